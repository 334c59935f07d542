"""Low-rank students: the best factors, saving and loading, and back to dense."""

import copy
import json

import pytest
import torch
from families import BATCH, DECODERS, FAMILIES, SIZES, make
from subprocesses import python
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BitsAndBytesConfig,
)
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import validate_quantization_for_training

from fastkd.students import LowRankEmbedding, LowRankLinear, factorize, merge, plan_factorization
from fastkd.students.low_rank import truncated_svd
from fastkd.training.classifiers import MultiTaskEncoder


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_factors_are_the_best_of_their_rank():
    weight = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(weight.double())
    for rank in (1, 5, 12):
        up, down = truncated_svd(weight, rank)
        error = (up.double() @ down.double() - weight.double()).norm()
        torch.testing.assert_close(error, singular[rank:].norm(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(up.T @ up, down @ down.T, rtol=1e-4, atol=1e-4)  # Σ is split equally
    up, down = truncated_svd(weight.double(), 12)
    torch.testing.assert_close(up @ down, weight.double(), rtol=1e-12, atol=1e-12)
    for rank in (0, 13):
        with pytest.raises(ValueError, match=f"rank is {rank}; it must be 1 to 12"):
            truncated_svd(weight, rank)


@pytest.mark.parametrize("dense", [torch.nn.Linear(6, 10), torch.nn.Linear(10, 6, bias=False), Conv1D(10, 6)])
def test_a_map_of_full_rank_is_the_dense_one(dense):
    torch.manual_seed(0)
    if dense.bias is not None:
        torch.nn.init.normal_(dense.bias)
    factored = LowRankLinear.from_dense(dense, 6)
    x = torch.randn(3, 4, factored.in_features)
    torch.testing.assert_close(factored(x), dense(x), rtol=1e-4, atol=1e-5)
    merged = factored.merged()
    assert type(merged) is type(dense)
    torch.testing.assert_close(merged(x), dense(x), rtol=1e-4, atol=1e-5)


def test_a_table_of_full_rank_is_the_dense_one():
    table = torch.nn.Embedding(9, 4, padding_idx=2)
    ids = torch.tensor([[0, 2, 8]])
    factored = LowRankEmbedding.from_dense(table, 4)
    torch.testing.assert_close(factored(ids), table(ids), rtol=1e-4, atol=1e-5)
    factored(ids).sum().backward()
    assert factored.up.grad[[0, 8]].any(1).all()
    assert not factored.up.grad[2].any()  # a pad is not learned
    merged = factored.merged()
    assert merged.padding_idx == 2
    torch.testing.assert_close(merged(ids), table(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "allocation"), [*((name, "uniform") for name in FAMILIES), ("bert", "spectrum"), ("gpt2", "spectrum")]
)
def test_a_student_keeps_its_answers_when_saved_loaded_and_merged(name, allocation, tmp_path):
    model = make(name)
    plan = plan_factorization(model, ratio=0.6, allocation=allocation, embedding=True)
    student = factorize(model, plan)
    assert count(student) == plan.after <= 0.6 * plan.before
    assert count(model) == plan.before
    answers = student(**BATCH).logits
    assert not torch.equal(answers, model(**BATCH).logits)

    student.save_pretrained(tmp_path / "student")
    auto = AutoModelForCausalLM if name in DECODERS else AutoModelForSequenceClassification
    for loader in (type(model), auto):
        loaded = loader.from_pretrained(tmp_path / "student")
        assert count(loaded) == plan.after
        assert torch.equal(loaded.eval()(**BATCH).logits, answers)
    validate_quantization_for_training(loaded)
    loaded(**BATCH).logits.sum().backward()
    assert all(parameter.grad is not None for name, parameter in loaded.named_parameters() if ".down" in name)
    assert copy.deepcopy(loaded).half().float().dtype == torch.float32

    dense = merge(loaded)
    assert count(dense) == plan.before
    torch.testing.assert_close(dense(**BATCH).logits, answers, rtol=1e-4, atol=1e-4)
    dense.save_pretrained(tmp_path / "dense")
    again = type(model).from_pretrained(tmp_path / "dense")
    assert "quantization_config" not in again.config.to_dict()
    torch.testing.assert_close(again.eval()(**BATCH).logits, answers, rtol=1e-4, atol=1e-4)


def test_a_tied_head_shares_the_words_factors(tmp_path):
    student = factorize(make("gpt2"), plan_factorization(make("gpt2"), rank=8, embedding=True))
    student.save_pretrained(tmp_path)
    for model in (student, type(student).from_pretrained(tmp_path)):
        assert model.lm_head.up is model.transformer.wte.up
        assert model.lm_head.down is model.transformer.wte.down
    hidden = student.transformer(**BATCH).last_hidden_state
    torch.testing.assert_close(student(**BATCH).logits, hidden @ student.transformer.wte.weight.T, rtol=1e-4, atol=1e-4)


def test_a_tied_head_keeps_its_bias(tmp_path):
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**SIZES)).eval()
    with torch.no_grad():
        words = model.get_input_embeddings().weight
        words.copy_(torch.randn(len(words), 3) @ torch.randn(3, words.shape[1]))
        model.cls.predictions.bias.normal_()
    factorize(model, plan_factorization(model, rank=3, maps=False, embedding=True)).save_pretrained(tmp_path)
    student = BertForMaskedLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(student(**BATCH).logits, model(**BATCH).logits, rtol=1e-4, atol=1e-4)
    assert student.cls.predictions.decoder.bias is student.cls.predictions.bias


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            '"bert.pooler.dense"',
            '"bert.pooler.other"',
            "rank of bert.pooler.other, which BertFor",
        ),
        ('"bert.', '"other.', "no rank of a matrix that BertForSequenceClassification has"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path, old, new, message):
    model = make("bert")
    factorize(model, plan_factorization(model, rank=4)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        BertForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(("name", "auto"), [("bert", AutoModelForMaskedLM), ("gpt2", AutoModelForCausalLM)])
def test_other_classes_of_the_same_base_load_a_student(name, auto, tmp_path):
    """A body without a head, a head of another kind, and a student of these again."""
    with_head = make(name)
    body = with_head.base_model
    plan = plan_factorization(body, rank=3, embedding=True)
    student = factorize(body, plan)
    hidden = student(**BATCH).last_hidden_state
    student.save_pretrained(tmp_path / "body")
    model = auto.from_pretrained(tmp_path / "body")  # its head shares the factors of the words
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (head.up, head.down) == (words.up, words.down)
    model.save_pretrained(tmp_path / "head")
    for folder in ("body", "head"):
        again = AutoModel.from_pretrained(tmp_path / folder).eval()
        torch.testing.assert_close(again(**BATCH).last_hidden_state, hidden)
    factorize(with_head, plan_factorization(with_head, rank=3, embedding=True)).save_pretrained(tmp_path / "classes")
    again = AutoModel.from_pretrained(tmp_path / "classes").eval()
    torch.testing.assert_close(again(**BATCH).last_hidden_state, hidden)


def test_heads_of_tasks_on_a_low_rank_encoder_and_the_encoder_of_a_student(tmp_path):
    body = make("bert").base_model
    low_rank = factorize(body, plan_factorization(body, rank=3, embedding=True))
    model = MultiTaskEncoder.from_encoder(low_rank, ["rte"]).eval()
    whole = MultiTaskEncoder.from_encoder(copy.deepcopy(body), ["rte"])
    student = factorize(whole, plan_factorization(whole, rank=3, embedding=True)).eval()
    for number, some in enumerate((model, student)):
        logits, states = some(**BATCH).logits, some.encoder(**BATCH).last_hidden_state
        for turn in range(2):  # a loaded one is saved again
            some.save_pretrained(tmp_path / f"{number}-{turn}")
            some.encoder.save_pretrained(tmp_path / f"{number}-{turn}-encoder")
            some = AutoModelForSequenceClassification.from_pretrained(tmp_path / f"{number}-{turn}").eval()
            encoder = AutoModel.from_pretrained(tmp_path / f"{number}-{turn}-encoder").eval()
            assert torch.equal(some(**BATCH).logits, logits)
            assert torch.equal(encoder(**BATCH).last_hidden_state, states)
        merge(some).save_pretrained(tmp_path / f"{number}-merged")
        assert "quantization" not in (tmp_path / f"{number}-merged" / "config.json").read_text()
    body.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ValueError, match="BertModel is quantised; give one that is not"):
        MultiTaskEncoder.from_encoder(body, ["rte"])


def test_a_student_loads_in_a_process_of_its_own(tmp_path):
    student = factorize(make("bert"), plan_factorization(make("bert"), ratio=0.6))
    student.save_pretrained(tmp_path / "whole")
    student.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    script = """
import sys, torch, fastkd.students
from families import BATCH
from transformers import AutoModelForSequenceClassification
models = [AutoModelForSequenceClassification.from_pretrained(folder).eval() for folder in sys.argv[1:]]
print([model(**BATCH).logits.tolist() for model in models])
"""
    whole, shards = json.loads(python("-c", script, str(tmp_path / "whole"), str(tmp_path / "shards")).splitlines()[-1])
    assert whole == shards
    torch.testing.assert_close(torch.tensor(whole), student(**BATCH).logits, rtol=1e-5, atol=1e-6)
