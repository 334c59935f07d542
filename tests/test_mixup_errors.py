"""Bad input of everything that mixes: a clear error that names the argument, what it is and what it must be."""

import pytest
import torch
from backends import fused

from fastkd.losses import embedding_mixup, mixup, mixup_cross_entropy
from fastkd.mixup import Mix, MixupSampler, mix_batch

X, PERMUTATION, LAM = torch.randn(4, 6), torch.tensor([2, 0, 1, 3]), torch.rand(4)
IDS, TABLE = torch.tensor([[0, 1], [2, 4], [4, 4], [3, 0]]), torch.randn(5, 3)
LABELS = torch.tensor([0, 5, 1, 2])
PAIR = {"permutation": PERMUTATION, "lam": LAM}

BAD_PAIRS = {
    "permutation must be a tensor, got list": {"permutation": [2, 0, 1, 3]},
    "permutation must be int64, got torch.int32": {"permutation": PERMUTATION.int()},
    r"permutation has shape \(3,\), the batch of .* needs \(4,\)": {"permutation": torch.arange(3)},
    "permutation is on meta, but .* is on cpu": {"permutation": PERMUTATION.to("meta")},
    r"every index in \[0, 4\) once, but 4 is outside or there twice": {"permutation": torch.tensor([1, 2, 4, 0])},
    r"every index in \[0, 4\) once, but -1 is outside or there twice": {"permutation": torch.tensor([1, 2, -1, 0])},
    r"every index in \[0, 4\) once, but 1 is outside or there twice": {"permutation": torch.tensor([1, 2, 1, 0])},
    "lam must be a number or a tensor, got str": {"lam": "a"},
    r"lam must lie in \[0, 1\], got 1.5": {"lam": 1.5},
    r"lam must lie in \[0, 1\], got nan": {"lam": float("nan")},
    "lam must be floating, got torch.int64": {"lam": torch.ones(4, dtype=torch.int64)},
    r"lam has shape \(4, 1\), the batch of .* needs a number, a 0-d tensor or \(4,\)": {"lam": LAM[:, None]},
    "lam is on meta, but .* is on cpu": {"lam": LAM.to("meta")},
    "lam requires grad, but no gradient flows to it: pass lam.detach": {"lam": LAM.clone().requires_grad_()},
    r"lam must lie in \[0, 1\], it spans -0.5 to 0.5": {"lam": torch.tensor([0.5, -0.5, 0.1, 0.2])},
    r"lam must lie in \[0, 1\], it spans nan to nan": {"lam": torch.tensor([0.5, float("nan"), 0.1, 0.2])},
}

BAD_CALLS = {
    "x must be a tensor, got list": (mixup, {"x": [1.0]}),
    r"x must be \(B, \.\.\.\), got a tensor of no dimension": (mixup, {"x": X[0, 0]}),
    "x must be float32, .* got torch.int64": (mixup, {"x": X.long()}),
    "ids must be int64, got torch.int32": (embedding_mixup, {"ids": IDS.int()}),
    r"ids must be \(B, \.\.\.\)": (embedding_mixup, {"ids": IDS[0, 0]}),
    r"ids must lie in \[0, 5\), they span 0 to 5": (embedding_mixup, {"ids": IDS + (IDS == 4)}),
    r"ids must lie in \[0, 5\), they span -1 to 3": (embedding_mixup, {"ids": IDS - 1}),
    "table must be a tensor, got Embedding: .* pass its weight": (embedding_mixup, {"table": torch.nn.Embedding(5, 3)}),
    "table must be float32, .* got torch.int64": (embedding_mixup, {"table": TABLE.long()}),
    r"table must be \(V, D\), got shape \(3,\)": (embedding_mixup, {"table": TABLE[0]}),
    "table is on meta, but ids is on cpu": (embedding_mixup, {"table": TABLE.to("meta")}),
    r"padding_idx must be an int in \[-5, 5\), got '0'": (embedding_mixup, {"padding_idx": "0"}),
    r"padding_idx must be an int in \[-5, 5\), got 5": (embedding_mixup, {"padding_idx": 5}),
    r"padding_idx must be an int in \[-5, 5\), got -6": (embedding_mixup, {"padding_idx": -6}),
    "labels is on meta, but logits is on cpu": (mixup_cross_entropy, {"labels": LABELS.to("meta")}),
    "labels must be a tensor, got list": (mixup_cross_entropy, {"labels": [0, 5, 1, 2]}),
    "labels must be int64, got torch.float32": (mixup_cross_entropy, {"labels": LABELS.float()}),
    r"labels has shape \(3,\); it holds one value per row of logits, \(4,\)": (
        mixup_cross_entropy,
        {"labels": LABELS[:3]},
    ),
    r"labels holds 6, outside \[0, 6\)": (mixup_cross_entropy, {"labels": LABELS + (LABELS == 5)}),
    "reduction must be one of none, sum, mean, got 'max'": (mixup_cross_entropy, {"reduction": "max"}),
}

BAD_BATCHES = {
    "either embeddings or ids with table": {},
    "either embeddings or ids": {"embeddings": X, "ids": IDS, "table": TABLE},
    "ids were given, but not the table": {"ids": IDS},
    r"mask has shape \(3,\), but the batch has 4 examples": {"embeddings": X, "mask": torch.ones(3).bool()},
    "mask must be bool or integer, .* got torch.float32": {"embeddings": X, "mask": torch.ones(4)},
    r"labels has shape \(5,\), but the batch has 4 examples": {"embeddings": X, "labels": torch.zeros(5).long()},
    "labels must be int64, .* the scores of a regression belong into targets": {"embeddings": X, "labels": LAM},
    "targets must be a tensor, got list": {"embeddings": X, "targets": [1.0] * 4},
    "targets requires grad": {"embeddings": X, "targets": X.clone().requires_grad_()},
}

GOOD = {
    mixup: {"x": X} | PAIR,
    embedding_mixup: {"ids": IDS, "table": TABLE} | PAIR,
    mixup_cross_entropy: {"logits": X, "labels": LABELS} | PAIR,
}


@pytest.mark.parametrize("message", BAD_PAIRS)
@pytest.mark.parametrize("function", GOOD, ids=lambda f: f.__name__)
def test_a_bad_pairing_is_named(function, message):
    with pytest.raises((TypeError, ValueError), match=message):
        function(**GOOD[function] | BAD_PAIRS[message])


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_is_named(message):
    function, change = BAD_CALLS[message]
    with pytest.raises((TypeError, ValueError), match=message):
        function(**GOOD[function] | change)


@pytest.mark.parametrize("message", BAD_BATCHES)
def test_a_bad_batch_is_named(message):
    with pytest.raises((TypeError, ValueError), match=message):
        mix_batch(Mix(PERMUTATION, LAM), **BAD_BATCHES[message])


def test_bad_draws_are_named():
    for alpha in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="alpha must be positive and finite, got"):
            MixupSampler(alpha)
    with pytest.raises(TypeError, match="alpha must be a number, got str"):
        MixupSampler("0.4")
    with pytest.raises(ValueError, match="batch_size must not be negative, got -1"):
        MixupSampler()(-1)
    with pytest.raises(ValueError, match="cross_entropy needs labels"):
        mix_batch(Mix(PERMUTATION, LAM), X).cross_entropy(X)


@fused
def test_the_ops_themselves_guard_their_memory():
    ops, grad = torch.ops.fastkd, torch.randn(4, 2, 3)
    calls = {
        "permutation must hold every index of": lambda: ops.mixup(X, torch.full((4,), 9), LAM, False),
        "permutation must hold every index": lambda: ops.mixup(X, torch.tensor([0, 1, 1, 2]), LAM, False),
        "permutation must hold one int64": lambda: ops.mixup(X, PERMUTATION[:3], LAM, False),
        "lam must hold one float32": lambda: ops.mixup(X, PERMUTATION, LAM[:3], False),
        "x must be": lambda: ops.mixup(X[0], PERMUTATION, LAM, False),
        "takes float32, bfloat16 or float16": lambda: ops.mixup(X.double(), PERMUTATION, LAM, False),
        "ids holds 5": lambda: ops.embedding_mixup(IDS + 1, TABLE, PERMUTATION, LAM, -1),
        "ids holds 4": lambda: ops.embedding_mixup_backward(grad, IDS, PERMUTATION, LAM, 4, -1),
        "grad must be": lambda: ops.embedding_mixup_backward(grad[:, :1], IDS, PERMUTATION, LAM, 5, -1),
        "table must be": lambda: ops.embedding_mixup(IDS, TABLE[0], PERMUTATION, LAM, -1),
    }
    for message, call in calls.items():
        with pytest.raises(RuntimeError, match=message):
            call()
