"""Low-rank students: the best factors, ranks within the budget, saving and loading, and back to dense."""

import copy
import json

import pytest
import torch
from families import BATCH, DECODERS, FAMILIES, SIZES, make
from subprocesses import python
from torch import nn
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
from fastkd.students.factorization import energies
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


def test_an_embedding_that_does_more_than_look_up_stays_whole():
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return 2 * super().forward(ids)

    model = make("gpt2")
    model.transformer.wte = Scaled(*model.transformer.wte.weight.shape)
    assert "transformer.wte" in plan_factorization(model, rank=3).others
    with pytest.raises(ValueError, match=r"embedding is True, but the word embedding is a Scaled"):
        plan_factorization(model, rank=3, embedding=True)


def test_what_is_left_alone_is_listed():
    model = make("bert")
    model.experts = nn.Parameter(torch.zeros(2, 3, 4))
    model.convolution = nn.Conv1d(3, 4, 2)
    others = plan_factorization(model, rank=3).others
    tables = [f"bert.embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")]
    assert sorted(others) == sorted([*tables, "classifier", "convolution", "experts"])


def test_the_least_budget_that_an_error_names_can_be_met():
    model = make("bert")
    with pytest.raises(ValueError, match="rank 1 everywhere leaves") as error:
        plan_factorization(model, parameters=100)
    least = int(str(error.value).rpartition(" ")[2].replace(",", ""))
    assert plan_factorization(model, parameters=least).after == least
    with pytest.raises(ValueError, match="cannot be met"):
        plan_factorization(model, parameters=least - 1)


@pytest.mark.parametrize("allocation", ["uniform", "spectrum"])
def test_the_ranks_fill_the_budget(allocation):
    model = make("bert")
    for budget in (20_000, 25_000, 28_000):
        plan = plan_factorization(model, parameters=budget, allocation=allocation, embedding=False)
        next_rank = max(sum(matrix.shape) for matrix in plan.matrices) * (
            len(plan.matrices) if allocation == "uniform" else 1
        )
        assert budget - next_rank < plan.after <= budget


def test_the_spectrum_keeps_more_than_equal_ranks():
    model = make("bert")
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if name.endswith("dense.weight") and index % 2:  # matrices of low and of full rank
            parameter.data = torch.randn(parameter.shape[0], 2) @ torch.randn(2, parameter.shape[1])
    kept = {}
    for allocation in ("uniform", "spectrum"):
        plan = plan_factorization(model, ratio=0.7, allocation=allocation, embedding=False)
        student = factorize(model, plan)
        parts = []
        for matrix in plan.matrices:
            want, got = (m.get_submodule(matrix.name).weight for m in (model, student))
            part = 1 - ((got - want).norm() / want.norm()).square().item()
            assert matrix.energy == pytest.approx(part, abs=1e-4)
            parts.append(matrix.energy)
        kept[allocation] = sum(parts)
    assert kept["spectrum"] > kept["uniform"] + 0.5


def test_weights_move_ranks():
    plan = plan_factorization(make("bert"), ratio=0.7, embedding=False, weights={"*.attention.*": 0.5})
    ranks = {"attention" in matrix.name: matrix.rank for matrix in plan.matrices if "pooler" not in matrix.name}
    assert ranks[True] == ranks[False] // 2


def test_the_embedding_is_factorised_where_the_budget_needs_it():
    model = BertForSequenceClassification(BertConfig(**{**SIZES, "vocab_size": 500}))
    words = "bert.embeddings.word_embeddings"
    assert words not in plan_factorization(model, ratio=0.8).ranks
    plan = plan_factorization(model, ratio=0.5)
    assert words in plan.ranks
    lines = str(plan).splitlines()
    assert lines[1].split()[:2] == [words, "500"]
    assert lines[-2].startswith(f"all parameters: {count(model):,} → {plan.after:,}")
    assert lines[-1].endswith("classifier")


def test_the_spectrum_counts_a_matrix_by_its_size():
    model = BertForSequenceClassification(BertConfig(**{**SIZES, "vocab_size": 5000}))
    words = "bert.embeddings.word_embeddings"
    uniform, spectrum = (plan_factorization(model, ratio=0.2, allocation=name) for name in ("uniform", "spectrum"))
    assert spectrum.ranks[words] >= uniform.ranks[words] / 2  # a rank of a large matrix costs much and keeps much


def test_a_plan_changes_nothing():
    model = make("bert")
    before = copy.deepcopy(model.state_dict())
    plan_factorization(model, ratio=0.5)
    factorize(model, plan_factorization(model, ratio=0.5))
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_energies_are_parts_of_the_squared_norm():
    weight = torch.diag(torch.tensor([3.0, 1.0, 2.0]))
    torch.testing.assert_close(energies(weight), torch.tensor([9.0, 4.0, 1.0]).double() / 14)
    assert energies(torch.zeros(3, 2)).tolist() == [1.0, 0.0]


def test_a_plan_of_another_model_is_refused():
    plan = plan_factorization(make("bert"), rank=3)
    with pytest.raises(ValueError, match=r"plan has bert\.encoder\.\S+, \(32, 32\), which this GPT2LMHeadModel"):
        factorize(make("gpt2"), plan)
    wider = BertForSequenceClassification(BertConfig(**SIZES | {"hidden_size": 36}))
    with pytest.raises(ValueError, match="which this BertForSequenceClassification does not have"):
        factorize(wider, plan)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of parameters, ratio and rank"),
        ({"ratio": 0.5, "rank": 3}, "exactly one of parameters, ratio and rank"),
        ({"ratio": 1.5}, "ratio must be above 0 and below 1, got 1.5"),
        ({"rank": 0}, "rank is 0; it must be a whole number from 1 to 21"),
        ({"rank": 500}, "rank is 500; it must be a whole number from 1 to 21, above which no matrix becomes"),
        ({"rank": 2.5}, "rank is 2.5; it must be a whole number from 1 to 21"),
        ({"rank": True}, "rank is True; it must be a whole number"),
        ({"parameters": 10**9}, "parameters is 1,000,000,000; it must be less than the model's"),
        ({"parameters": 100}, "a budget of 100 parameters cannot be met: rank 1 everywhere leaves"),
        ({"ratio": 0.5, "allocation": "best"}, "allocation must be one of uniform, spectrum, got 'best'"),
        ({"rank": 3, "allocation": "spectrum"}, "allocation and weights need a budget, parameters or ratio"),
        ({"rank": 3, "weights": {"*": 2.0}}, "allocation and weights need a budget, parameters or ratio"),
        ({"ratio": 0.5, "weights": {"*.nothing": 1.0}}, r"weights has '\*.nothing', which fits no matrix"),
        ({"ratio": 0.5, "weights": {"*": -1.0}}, r"weights\['\*'\] must be positive and finite, got -1.0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan_factorization(make("bert"), **options)


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


def test_a_quantised_model_is_refused():
    model = factorize(make("bert"), plan_factorization(make("bert"), rank=4))
    with pytest.raises(ValueError, match="is quantised or low-rank already; factorise the model it was made of"):
        plan_factorization(model, rank=2)
