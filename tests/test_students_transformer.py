"""Transformer students: the very layers of their source, the pooling and heads of MKD, saving and loading."""

import pytest
import torch
from tiny import same_answers
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    GPT2LMHeadModel,
    ModernBertConfig,
    RobertaConfig,
)

from fastkd.methods.students import TransformerStudent
from fastkd.students import factorize, first_layers, merge, plan_factorization, shallow, transformer_student
from fastkd.training.teacher import MultiTaskEncoder, load_teacher

IDS = torch.tensor([[2, 4, 10, 3, 14, 3], [2, 7, 3, 10, 3, 0]])
INPUTS = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}
SIZES = {
    "vocab_size": 16,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}
CONFIGS = {
    "bert": BertConfig(**SIZES),
    "roberta": RobertaConfig(**SIZES, type_vocab_size=1),
    "distilbert": DistilBertConfig(vocab_size=16, dim=16, n_layers=4, n_heads=2, hidden_dim=32, initializer_range=0.5),
    "electra": ElectraConfig(**SIZES, embedding_size=8),
    "modernbert": ModernBertConfig(**SIZES, initializer_cutoff_factor=1.0),
}


def make(config):
    torch.manual_seed(0)
    return AutoModel.from_config(config).eval()


@pytest.fixture
def bert():
    return make(CONFIGS["bert"])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_student_is_its_sources_first_layers(name):
    encoder = make(CONFIGS[name])
    states = encoder(**INPUTS, output_hidden_states=True).hidden_states
    for count in (1, 3):
        shorter = first_layers(encoder, count).eval()
        expected = encoder.final_norm(states[count]) if name == "modernbert" else states[count]
        torch.testing.assert_close(shorter(**INPUTS).last_hidden_state, expected)
        assert shorter.config.num_hidden_layers == count
    assert encoder.config.num_hidden_layers == 4


@pytest.mark.parametrize("name", CONFIGS)
def test_a_student_of_any_encoder_is_saved_and_loaded(name, tmp_path):
    student = transformer_student(make(CONFIGS[name]), 3, ["mnli", "stsb"], head_size=8).eval()
    student.save_pretrained(tmp_path)
    for loaded in (AutoModelForSequenceClassification.from_pretrained(tmp_path), load_teacher(tmp_path)):
        for task, outputs in (("mnli", 3), ("stsb", 1)):
            logits = student(**INPUTS, task=task).logits
            assert logits.shape == (2, outputs)
            same_answers(loaded(**INPUTS, task=task).logits, logits)


def test_a_shallow_model_has_the_head_dtype_and_options_of_its_source():
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 16}
    source = GPT2LMHeadModel(GPT2Config(**sizes)).to(torch.bfloat16).eval()
    source.generation_config.max_new_tokens = 7
    shorter = shallow(source, 2).eval()
    assert (shorter.dtype, shorter.generation_config.max_new_tokens) == (torch.bfloat16, 7)
    assert shorter.generation_config is not source.generation_config
    source.transformer.h = source.transformer.h[:2]
    assert torch.equal(shorter(IDS).logits, source(IDS).logits)


def test_a_model_with_heads_of_tasks_is_shortened_by_another_function(bert):
    with pytest.raises(ValueError, match="MultiTaskEncoder, which transformer_student shortens"):
        shallow(transformer_student(bert, 2, ["rte"]), 1)


def test_a_low_rank_source_is_refused_until_it_is_merged(bert):
    low_rank = factorize(bert, plan_factorization(bert, rank=3))
    with pytest.raises(ValueError, match=r"the source is low-rank or quantised; shorten what fastkd.students.merge"):
        transformer_student(low_rank, 2, ["rte"])
    assert transformer_student(merge(low_rank), 2, ["rte"])(**INPUTS).logits.shape == (2, 2)


def test_the_pooling_is_the_mean_of_the_layers_first_states(bert):
    student = transformer_student(bert, 3, ["stsb"], head_size=8).eval()
    states = bert(**INPUTS, output_hidden_states=True).hidden_states
    pooled = (states[1][:, 0] + states[2][:, 0] + states[3][:, 0]) / 3
    hidden, _, _, output = student.heads["stsb"]
    torch.testing.assert_close(student(**INPUTS).logits, output(hidden(pooled).relu()))
    assert not any(name.startswith("encoder.pooler") for name in student.state_dict())


def test_every_weight_is_trained(bert):
    student = transformer_student(bert, 2, ["sst2"])
    student(**INPUTS, labels=torch.tensor([0, 1])).loss.backward()
    assert [name for name, parameter in student.named_parameters() if parameter.grad is None] == []


def test_an_ordinary_classifier_takes_over_the_pooler(bert):
    student = transformer_student(bert, 2, ["stsb"], pooling="cls", head_size=None).eval()
    states = bert(**INPUTS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(student(**INPUTS).logits, student.heads["stsb"](bert.pooler(states[2])))


def test_the_student_owns_its_weights(bert):
    student = transformer_student(bert, 2, ["sst2"])
    table = bert.get_input_embeddings().weight.clone()
    with torch.no_grad():
        student.get_input_embeddings().weight.zero_()
    assert torch.equal(bert.get_input_embeddings().weight, table)


def test_a_teacher_and_a_folder_are_sources_too(bert, tmp_path):
    teacher = MultiTaskEncoder.from_encoder(bert, ["rte"])
    teacher.save_pretrained(tmp_path / "teacher")
    bert.save_pretrained(tmp_path / "encoder")
    expected = first_layers(bert, 2).state_dict()
    for source in (teacher, tmp_path / "teacher", str(tmp_path / "encoder")):
        encoder = transformer_student(source, 2, ["sst2"], pooling="cls").encoder
        assert encoder.state_dict().keys() == expected.keys()
        assert all(torch.equal(weight, expected[name]) for name, weight in encoder.state_dict().items())


@pytest.mark.parametrize("layers", [0, 5, -1])
def test_the_number_of_layers_must_be_the_sources(bert, layers):
    with pytest.raises(ValueError, match=f"layers is {layers}; it must be 1 to 4, the layers of the bert"):
        transformer_student(bert, layers, ["sst2"])


def test_weights_the_source_lacks_are_refused(bert, tmp_path):
    BertForMaskedLM(CONFIGS["bert"]).save_pretrained(tmp_path)  # has no pooler
    with pytest.raises(ValueError, match=r"has no weights for pooler\.dense\.bias, pooler\.dense\.weight of the st"):
        transformer_student(tmp_path, 2, ["sst2"], pooling="cls")
    transformer_student(tmp_path, 2, ["sst2"])
    bert.encoder.layer[1].output = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"has no weights for encoder\.layer\.1\.output"):
        first_layers(bert, 2)


def test_a_student_of_a_student(bert, tmp_path):
    """What is saved must load whole, and a pooler that was left out cannot come back."""
    student = transformer_student(bert, 3, ["sst2"])
    with pytest.raises(ValueError, match="pooling is 'cls'; as the source has no pooler"):
        transformer_student(student, 2, ["sst2"], pooling="cls")
    smaller = transformer_student(student, 2, ["sst2"]).eval()
    smaller.save_pretrained(tmp_path)
    same_answers(load_teacher(tmp_path)(**INPUTS).logits, smaller(**INPUTS).logits)


def test_a_head_has_at_least_one_unit(bert):
    with pytest.raises(ValueError, match="head_size is 0; it must be at least 1, or None"):
        transformer_student(bert, 2, ["sst2"], head_size=0)


def test_the_caller_seeds_the_heads(bert):
    def head(seed):
        torch.manual_seed(seed)
        return transformer_student(bert, 2, ["sst2"]).heads["sst2"][0].weight

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))


@pytest.mark.parametrize("keeps_heads", [False, True])
def test_a_student_has_its_teachers_dropout_and_on_request_its_heads(bert, keeps_heads):
    options = {"pooling": "mean", "classifier_dropout": 0.3}
    teacher = MultiTaskEncoder.from_encoder(bert, ["sst2", "mrpc", "stsb"], **options)
    student = TransformerStudent(2, pooling=None, head_size=None, keeps_heads=keeps_heads).make(
        teacher, {"mrpc": ("no", "yes"), "stsb": ()}
    )
    assert (student.dropout.p, student.config.pooling) == (0.3, "mean")
    assert list(student.heads) == ["mrpc", "stsb"]
    for task, head in student.heads.items():
        assert torch.equal(head.weight, teacher.heads[task].weight) is keeps_heads
