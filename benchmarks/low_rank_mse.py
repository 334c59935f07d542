"""Benchmark of ``low_rank_mse``: mean squared error of ``(x · downᵀ) · upᵀ`` against a target, padding masked."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import FORWARD_BACKWARD, Benchmark, Case
from fastkd.losses import low_rank_mse

FP32, BF16 = torch.float32, torch.bfloat16
LENGTH = 128
"""Tokens to a sequence; lengths are uniform between half of it and all, so that a quarter of the rows is padding."""


def _case(device: str, shape: tuple[int, int, int, int], dtype: torch.dtype, reason: str, masked: bool = True) -> Case:
    return Case("low_rank_mse", shape, dtype, reason, device, (FORWARD_BACKWARD,), {"masked": masked})


CASES = [
    *(_case("cpu", (4096, 768, 64, 768), d, "BERT-base attention output at rank 64") for d in (FP32, BF16)),
    *(_case("cpu", (4096, 768, 128, 3072), d, "BERT-base intermediate layer at rank 128") for d in (FP32, BF16)),
    *(_case("cpu", (4096, 768, 64, 768), d, "the same without padding", masked=False) for d in (FP32, BF16)),
    *(_case("cpu", (4096, 768, 128, 3072), d, "the same without padding", masked=False) for d in (FP32, BF16)),
    *(_case("cuda", (16384, 4096, 64, 4096), d, "a 7B model's attention output at rank 64") for d in (BF16, FP32)),
    _case("cuda", (16384, 4096, 256, 4096), BF16, "a rank whose tiles do not fit the registers"),
]


def make_inputs(case: Case) -> dict[str, Tensor]:
    """Hidden states of order 1, factors as a linear layer begins, and a target the projection half explains."""
    n, d_in, rank, d_out = case.shape
    generator = torch.Generator(case.device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=case.device)

    x, down, up = draw(n, d_in), draw(rank, d_in) / d_in**0.5, draw(d_out, rank) / rank**0.5
    target = (x @ down.T) @ up.T + draw(n, d_out)
    operands = {name: t.to(case.dtype).requires_grad_() for name, t in (("x", x), ("down", down), ("up", up))}
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (n // LENGTH,), generator=generator, device=case.device)
    mask = torch.arange(LENGTH, device=case.device) < lengths[:, None]
    if not case.options["masked"]:
        mask.fill_(True)
    return {**operands, "target": target.to(case.dtype), "mask": mask.reshape(-1)}


BENCHMARK = Benchmark("low_rank_mse", CASES, make_inputs)


@BENCHMARK.provider("compile", compiled=True)
@BENCHMARK.provider("eager")
def plain_torch(x: Tensor, down: Tensor, up: Tensor, target: Tensor, mask: Tensor, masked: bool) -> Tensor:
    """Two linear layers and a masked mean of squares, its sums in float32 as autocast would have them."""
    projection = F.linear(F.linear(x, down), up)
    wide = torch.promote_types(x.dtype, FP32)
    rows = (projection.to(wide) - target.to(wide)).square().mean(-1)
    return (rows * mask).sum() / mask.sum() if masked else rows.mean()


@BENCHMARK.provider("fastkd")
def fused(x: Tensor, down: Tensor, up: Tensor, target: Tensor, mask: Tensor, masked: bool) -> Tensor:
    return low_rank_mse(x, down, up, target, mask=mask if masked else None)


@cache
def _buffer(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Where the products write: touching fresh pages is no part of the limit."""
    return torch.empty(shape, dtype=dtype, device=device)


@BENCHMARK.limit("products")
def bare_products(x: Tensor, down: Tensor, up: Tensor, target: Tensor, mask: Tensor, masked: bool) -> Tensor:
    """The six matrix products over the rows that count, gathered beforehand."""
    rows = int(mask.sum())
    x, target = x[:rows], target[:rows]
    z = x @ down.t()
    torch.mm(z, up.t(), out=_buffer(target.shape, target.dtype, target.device))
    dz = target @ up  # in the place of the error, which is of its size
    torch.mm(target.t(), z)
    torch.mm(dz.t(), x)
    return torch.mm(dz, down, out=_buffer(x.shape, x.dtype, x.device))
