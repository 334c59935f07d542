"""Benchmark of the student's BiLSTM layer in training on a CPU: ragged sequences, forward and backward."""

from __future__ import annotations

from functools import cache
from itertools import product
from unittest import mock

import torch
from torch import Tensor

from benchmarks.registry import STEP, Benchmark, Case
from fastkd.students import bilstm
from fastkd.students.bilstm import BiLSTM

SEQUENCES, TOKENS = 32, 32
SIZES = {(256, 128): "small: the encoder", (768, 128): "small: an integrator", (1536, 256): "mkd: an integrator"}
CASES = [
    Case("training_bilstm", (SEQUENCES, TOKENS, *sizes), dtype, reason, directions=(STEP,))
    for dtype, (sizes, reason) in product((torch.bfloat16, torch.float32), SIZES.items())
]


@cache
def layer_of(inputs: int, hidden: int, dtype: torch.dtype) -> BiLSTM:
    torch.manual_seed(0)
    return BiLSTM(inputs, hidden).to(dtype)


def make_inputs(case: Case) -> dict[str, Tensor]:
    rows, tokens, inputs, hidden = case.shape
    pick = torch.Generator().manual_seed(0)
    lengths = torch.randint(tokens // 2, tokens + 1, (rows,), generator=pick)
    lengths[0] = tokens
    sizes = {"x": inputs, "gradient": 2 * hidden}
    drawn = {name: torch.randn(rows, tokens, size, generator=pick).to(case.dtype) for name, size in sizes.items()}
    return {**drawn, "lengths": lengths}


BENCHMARK = Benchmark("training_bilstm", CASES, make_inputs)


def output_and_gradients(x: Tensor, lengths: Tensor, gradient: Tensor) -> Tensor:
    """All that a step computes, in one row; inputs in half precision stand for a training under autocast."""
    layer = layer_of(x.shape[-1], gradient.shape[-1] // 2, torch.promote_types(x.dtype, torch.float32))
    leaf = x.detach().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        output = layer(leaf, lengths)
    found = torch.autograd.grad(output, [leaf, *layer.parameters()], gradient.to(output.dtype))
    return torch.cat([part.detach().flatten().float() for part in (output, *found)])


@BENCHMARK.provider("eager")
def by_torch(x: Tensor, lengths: Tensor, gradient: Tensor) -> Tensor:
    """Two of oneDNN's fused layers over padded sequences, the second of which are reversed."""
    with mock.patch.object(bilstm, "trains_by_kernel", return_value=False):
        return output_and_gradients(x, lengths, gradient)


@BENCHMARK.provider("fastkd")
def own(x: Tensor, lengths: Tensor, gradient: Tensor) -> Tensor:
    return output_and_gradients(x, lengths, gradient)
