"""Benchmark of ``mixup``: each example of a batch mixed with its partner, one λ per example."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.limits import empty_on_huge_pages, huge_page_objection
from benchmarks.registry import FORWARD, FORWARD_BACKWARD, Benchmark, Case
from fastkd.losses import mixup

BOTH = (FORWARD, FORWARD_BACKWARD)
FP32, BF16 = torch.float32, torch.bfloat16


def _case(device: str, shape: tuple[int, ...], dtype: torch.dtype, reason: str, overhead: bool = False) -> Case:
    return Case("mixup", shape, dtype, reason, device, BOTH if overhead else (FORWARD_BACKWARD,), overhead=overhead)


CASES = [
    *(_case("cpu", (256, 128, 768), d, "a large batch of BERT-base embeddings") for d in (FP32, BF16)),
    *(_case("cpu", (32, 128, 768), d, "a usual batch of BERT-base embeddings") for d in (FP32, BF16)),
    _case("cpu", (32, 3), FP32, "teacher's logits of one MNLI batch: the cost of the call", overhead=True),
    *(_case("cuda", (256, 512, 1024), d, "a large batch of BERT-large embeddings") for d in (BF16, FP32)),
    *(_case("cuda", (256, 128, 768), d, "a large batch of BERT-base embeddings") for d in (BF16, FP32)),
    _case("cuda", (32, 3), FP32, "teacher's logits of one MNLI batch: the cost of the call", overhead=True),
]


def make_inputs(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator(case.device).manual_seed(0)
    x, upstream = (torch.randn(case.shape, generator=generator, device=case.device).to(case.dtype) for _ in range(2))
    return {
        "x": x.requires_grad_(),
        "permutation": torch.randperm(case.shape[0], generator=generator, device=case.device),
        "lam": torch.rand(case.shape[0], generator=generator, device=case.device),
        "upstream": upstream,
    }


BENCHMARK = Benchmark("mixup", CASES, make_inputs)


@BENCHMARK.provider("compile", compiled=True)
@BENCHMARK.provider("eager")
def plain_torch(x: Tensor, permutation: Tensor, lam: Tensor) -> Tensor:
    """The fastest spelling: half the time of ``weight * x + (1 - weight) * x[permutation]``."""
    weight = lam.to(x.dtype).view(-1, *(1,) * (x.dim() - 1))
    return torch.lerp(x.index_select(0, permutation), x, weight)


@BENCHMARK.provider("fastkd")
def fused(x: Tensor, permutation: Tensor, lam: Tensor) -> Tensor:
    return mixup(x, permutation, lam)


@BENCHMARK.limit("copy")
def copy_both(x: Tensor, upstream: Tensor, **_: Tensor) -> Tensor:
    """Each example read once and written once, and so each gradient."""
    mixed = x.clone()  # alive with the gradient, as the mixture is
    return torch.stack((mixed.view(-1)[0], upstream.clone().view(-1)[0]))


@BENCHMARK.limit("copy-huge-pages", objection=huge_page_objection)
def copy_both_to_huge_pages(x: Tensor, upstream: Tensor, **_: Tensor) -> Tensor:
    mixed = empty_on_huge_pages(x).copy_(x)
    return torch.stack((mixed.view(-1)[0], empty_on_huge_pages(upstream).copy_(upstream).view(-1)[0]))
