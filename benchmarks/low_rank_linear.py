"""Benchmark of a low-rank linear map at half the weights of the dense one that it stands for, forward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import FORWARD, Benchmark, Case

MAPS = {
    (384, 384): "attention of a MiniLM",
    (384, 1536): "its feed-forward part",
    (768, 768): "attention of a BERT-base",
}
ROWS = {1: "one token", 24: "a short text", 128: "a long text", 4096: "32 texts of 128 tokens"}


def half(into: int, out: int) -> int:
    """The rank at which two factors have half the weights."""
    return into * out // (2 * (into + out))


CASES = [
    Case("low_rank_linear", (rows, into, half(into, out), out), torch.float32, reason, "cpu", (FORWARD,), {}, rows == 1)
    for (into, out), what in MAPS.items()
    for rows, reason in ((rows, f"{what}, {tokens}") for rows, tokens in ROWS.items())
]


def make_inputs(case: Case) -> dict[str, Tensor]:
    """Factors of −1, 0 and 1, whose product is exact, so that both maps are the same."""
    rows, into, rank, out = case.shape
    pick = torch.Generator().manual_seed(0)
    down, up = (torch.randint(-1, 2, size, generator=pick).to(case.dtype) for size in ((rank, into), (out, rank)))
    x = torch.randn(rows, into, generator=pick).to(case.dtype)
    return {
        "x": x,
        "down": down,
        "up": up,
        "weight": up @ down,
        "bias": torch.randn(out, generator=pick).to(case.dtype),
    }


BENCHMARK = Benchmark("low_rank_linear", CASES, make_inputs)


@BENCHMARK.provider("eager")
def dense(x: Tensor, down: Tensor, up: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


@BENCHMARK.provider("fastkd")
def factorised(x: Tensor, down: Tensor, up: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As ``LowRankLinear`` does."""
    return F.linear(F.linear(x, down), up, bias)


@BENCHMARK.limit("half-products", direction=FORWARD)
def half_the_dense_product(x: Tensor, down: Tensor, up: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The dense map of half the outputs: as many multiplications as the two factors have."""
    return F.linear(x, weight[: len(weight) // 2], bias[: len(bias) // 2])
