"""Teachers: saving and loading, losses, padding, labels by name."""

import pytest
import torch
from families import FAMILIES, make
from tiny import bert_config, same_answers, save_encoder, tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    DistilBertConfig,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fastkd.data.glue import GLUE
from fastkd.training.pretrained import config_with_dropout, find_tokenizer, load_tokenizer
from fastkd.training.teacher import (
    MultiTaskEncoder,
    MultiTaskEncoderConfig,
    has_fast_bf16,
    load_teacher,
    task_loss,
)

IDS = torch.tensor([[2, 4, 10, 3, 14, 3], [2, 7, 3, 10, 3, 0]])
BATCH = {
    "input_ids": IDS,
    "attention_mask": (IDS != 0).long(),
    "token_type_ids": torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]]),
}


def multi_task(encoder=None, **options):
    torch.manual_seed(0)
    tasks = {"mnli": {"labels": GLUE["mnli"].label_names}, "stsb": {"labels": []}}
    return MultiTaskEncoder(MultiTaskEncoderConfig(encoder or bert_config(), tasks, **options)).eval()


def with_more_padding(batch):
    return {name: torch.nn.functional.pad(values, (0, 3)) for name, values in batch.items()}


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_save_and_load(tmp_path, pooling):
    model = multi_task(pooling=pooling)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).tasks == {
        "mnli": {"labels": ["entailment", "neutral", "contradiction"]},
        "stsb": {"labels": []},
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    for loaded in (AutoModelForSequenceClassification.from_pretrained(tmp_path), load_teacher(tmp_path)):
        assert not loaded.training
        for task in ("mnli", "stsb"):
            same_answers(loaded(**BATCH, task=task).logits, model(**BATCH, task=task).logits)


def test_loads_in_float32_whatever_was_saved(tmp_path):
    multi_task().bfloat16().save_pretrained(tmp_path)
    assert {p.dtype for p in load_teacher(tmp_path).parameters()} == {torch.float32}


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_padding_changes_nothing(pooling):
    model = multi_task(pooling=pooling)
    plain, padded = model(**BATCH, task="mnli").logits, model(**with_more_padding(BATCH), task="mnli").logits
    torch.testing.assert_close(plain, padded)


def test_head_reads_the_named_state():
    for pooling in ("cls", "mean"):
        model = multi_task(pooling=pooling)
        outputs = model.encoder(**BATCH)
        mean = torch.stack([outputs.last_hidden_state[0].mean(0), outputs.last_hidden_state[1, :5].mean(0)])
        state = outputs.pooler_output if pooling == "cls" else mean
        torch.testing.assert_close(model(**BATCH, task="stsb").logits, model.heads["stsb"](state))


@pytest.mark.parametrize("name", FAMILIES)
def test_one_dropout_for_all_of_a_model(name, tmp_path):
    make(name).save_pretrained(tmp_path)
    config = config_with_dropout(tmp_path, 0.25)
    rates = {part.p for part in AutoModel.from_config(config).modules() if isinstance(part, torch.nn.Dropout)}
    named = {value for key, value in vars(config).items() if "drop" in key and value is not None}
    assert rates | named <= {0.25, False}
    assert 0.25 in named
    assert config_with_dropout(tmp_path, None).to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()


def test_a_folder_without_a_tokenizer_is_not_given_one_of_special_tokens_alone(tmp_path):
    for name in ("bert", "gpt2"):
        make(name).save_pretrained(tmp_path / name)
        assert find_tokenizer(tmp_path / name) is None
        with pytest.raises(ValueError, match=f"{name} has no tokenizer beside the model; save"):
            load_tokenizer(tmp_path / name)
    tokenizer().save_pretrained(tmp_path / "bert")
    assert len(find_tokenizer(tmp_path / "bert")) == len(tokenizer())


def test_losses():
    model = multi_task()
    classes, scores = torch.tensor([2, 0]), torch.tensor([4.5, 1.0])
    log_probs = model(**BATCH, task="mnli").logits.log_softmax(-1)
    expected = -(log_probs[0, 2] + log_probs[1, 0]) / 2
    torch.testing.assert_close(model(**BATCH, task="mnli", labels=classes).loss, expected)
    predicted = model(**BATCH, task="stsb").logits[:, 0]
    torch.testing.assert_close(model(**BATCH, task="stsb", labels=scores).loss, ((predicted - scores) ** 2).mean())
    assert task_loss(torch.zeros(2, 1, dtype=torch.bfloat16), scores).dtype == torch.float32


def test_task_must_be_known():
    with pytest.raises(ValueError, match="task is None; this model has heads for mnli, stsb"):
        multi_task()(**BATCH)
    with pytest.raises(ValueError, match="task is 'rte'"):
        multi_task()(**BATCH, task="rte")
    with pytest.raises(ValueError, match="pooling is 'max'"):
        multi_task(pooling="max")


@pytest.mark.parametrize(
    "config",
    [
        RobertaConfig(
            vocab_size=16,
            type_vocab_size=1,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        ),
        DistilBertConfig(vocab_size=16, dim=16, n_layers=1, n_heads=2, hidden_dim=32),
    ],
)
def test_encoders_without_token_types(config, tmp_path):
    model = multi_task(config)
    model.save_pretrained(tmp_path)
    same_answers(load_teacher(tmp_path)(**BATCH, task="mnli").logits, model(**BATCH, task="mnli").logits)


def test_from_encoder_keeps_the_pretrained_weights(tmp_path):
    path = save_encoder(tmp_path)
    pretrained = AutoModel.from_pretrained(path).state_dict()
    for name, value in MultiTaskEncoder.from_encoder(path, ["sst2"]).encoder.state_dict().items():
        assert torch.equal(value, pretrained[name]), name


def classifier(folder, labels, cls=BertForSequenceClassification, config=bert_config):
    torch.manual_seed(0)
    options = {"num_labels": len(labels)}
    if labels[0] is not None:
        options = {
            "id2label": dict(enumerate(labels)),
            "label2id": {name: i for i, name in enumerate(labels)},
        }
    model = cls(config(**options)).eval()
    model.save_pretrained(folder)
    return model


def test_single_task_labels_are_matched_by_name(tmp_path):
    model = classifier(tmp_path, ["CONTRADICTION", "Entailment", "neutral"])
    teacher = load_teacher(tmp_path, task="mnli")
    assert teacher.config.tasks == {"mnli": {"labels": ["entailment", "neutral", "contradiction"]}}
    expected = model(**BATCH).logits[:, [1, 2, 0]]
    same_answers(teacher(**BATCH).logits, expected)
    same_answers(teacher(**BATCH, task="mnli").logits, expected)
    labels = torch.tensor([2, 0])
    torch.testing.assert_close(
        teacher(**BATCH, labels=labels).loss, torch.nn.functional.cross_entropy(expected, labels)
    )
    with pytest.raises(ValueError, match="task is 'rte'; this teacher knows mnli alone"):
        teacher(**BATCH, task="rte")


def test_unnamed_labels_need_their_order(tmp_path):
    model = classifier(tmp_path, [None, None])
    with pytest.raises(ValueError, match=r"does not name its labels \(LABEL_0, LABEL_1\).*not_entailment"):
        load_teacher(tmp_path, task="rte")
    teacher = load_teacher(tmp_path, task="rte", label_names=["not_entailment", "entailment"])
    same_answers(teacher(**BATCH).logits, model(**BATCH).logits[:, [1, 0]])
    with pytest.raises(ValueError, match="labelled yes, no; the labels of rte are"):
        load_teacher(tmp_path, task="rte", label_names=["yes", "no"])


def test_a_task_of_ones_own_takes_the_checkpoints_labels(tmp_path):
    model = classifier(tmp_path, ["Spam", "no spam"])
    teacher = load_teacher(tmp_path, task="mail")
    assert teacher.config.tasks == {"mail": {"labels": ["Spam", "no spam"]}}
    same_answers(teacher(**BATCH, task="mail").logits, model(**BATCH).logits)
    classifier(tmp_path, [None, None])
    with pytest.raises(ValueError, match=r"does not name its labels .*; state those of mail in the order"):
        load_teacher(tmp_path, task="mail")
    assert load_teacher(tmp_path, task="mail", label_names=["a", "b"]).config.tasks == {"mail": {"labels": ["a", "b"]}}
    with pytest.raises(ValueError, match="2 outputs of the teacher are labelled a, b, c"):
        load_teacher(tmp_path, task="mail", label_names=["a", "b", "c"])
    classifier(tmp_path, [None])
    assert load_teacher(tmp_path, task="mail").config.tasks == {"mail": {"labels": []}}


def test_foreign_labels_are_refused(tmp_path):
    classifier(tmp_path, ["toxic", "neutral", "other"])
    with pytest.raises(ValueError, match="labelled toxic, neutral, other; the labels of mnli are entailment"):
        load_teacher(tmp_path, task="mnli")
    with pytest.raises(ValueError, match=r"3 outputs of the teacher.*the labels of sst2 are negative, positive"):
        load_teacher(tmp_path, task="sst2")
    with pytest.raises(ValueError, match="stsb is a regression; a teacher of it has one output, not 3"):
        load_teacher(tmp_path, task="stsb")
    with pytest.raises(ValueError, match="say which task"):
        load_teacher(tmp_path)


def test_single_task_regression_and_roberta(tmp_path):
    def config(**options):
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        return RobertaConfig(vocab_size=16, type_vocab_size=1, **sizes, **options)

    model = classifier(tmp_path, [None], RobertaForSequenceClassification, config)
    teacher = load_teacher(tmp_path, task="stsb")
    expected = model(BATCH["input_ids"], BATCH["attention_mask"]).logits
    same_answers(teacher(**BATCH).logits, expected)


def test_a_multi_task_teacher_knows_its_tasks(tmp_path):
    multi_task().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="leave out task and label_names"):
        load_teacher(tmp_path, task="mnli")


@pytest.mark.parametrize(("named", "faster"), [(True, True), (True, False), (False, True)])
def test_trains_in_bfloat16_where_a_cpu_has_products_of_it_and_they_are_faster(monkeypatch, named, faster):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": named})
    monkeypatch.setattr("fastkd.training.teacher._bf16_products_are_faster", lambda: faster)
    assert has_fast_bf16() is (named and faster)
