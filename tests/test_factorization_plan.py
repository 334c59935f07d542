"""Which matrices become two factors, and of which rank, within a budget of parameters."""

import copy

import pytest
import torch
from families import SIZES, make
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
)

from fastkd.students import factorize, plan_factorization
from fastkd.students.factorization import energies


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
    assert lines[-2].startswith(f"all parameters: {model.num_parameters():,} → {plan.after:,}")
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


def test_a_quantised_model_is_refused():
    model = factorize(make("bert"), plan_factorization(make("bert"), rank=4))
    with pytest.raises(ValueError, match="is quantised or low-rank already; factorise the model it was made of"):
        plan_factorization(model, rank=2)
