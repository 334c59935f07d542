"""Inputs of low_rank_mse that every backend is checked with."""

from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from backends import HAS_GPU
from backends import answering as answering_op
from torch import Tensor

SHAPES = {
    "one of each": (1, 1, 1, 1),
    "odd": (7, 5, 3, 17),
    "vectors": (64, 32, 16, 48),
    "several slices": (300, 33, 5, 40),
    "rank above d_in": (150, 6, 20, 9),
}
"""(N, d_in, r, d_out); slices are 128 rows at least."""

LARGE, LARGE_BFLOAT16 = (1300, 24, 12, 70), (16500, 6, 3, 10)
"""Several chunks in a slice, on the CPU."""


def rows(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    """x, down, up, bias and target, in storage wider than the rows: ordinary, large, zero and nearly met rows."""
    n, d_in, rank, d_out = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    down, up, bias = draw(rank, d_in) / d_in**0.5, draw(d_out, rank) / rank**0.5, draw(d_out)
    x = draw(n, d_in + 3)[:, :d_in]
    target = draw(n, d_out + 5)[:, :d_out]
    if n > 5:
        x[1] *= 30
        x[2] = target[2] = 0.0
        target[3] = (x[3] @ down.T) @ up.T + bias + 0.01 * target[3]
        target[4] += 100
    return tuple(t.to(dtype) for t in (x, down, up, bias, target))


def options(n: int, seed: int = 0) -> dict[str, dict]:
    """Keyword arguments by name."""
    generator = torch.Generator().manual_seed(seed)
    mask, weights = torch.arange(n) % 3 != 1, torch.rand(n, generator=generator)
    if n > 6:
        weights[6] = 0.0
    return {
        "plain": {},
        "masked": {"mask": mask},
        "weighted": {"weights": weights},
        "normalized": {"mask": mask, "weights": weights, "normalizer": 7.5},
        "summed": {"mask": mask, "reduction": "sum"},
        "rows": {"mask": mask, "weights": weights, "reduction": "none"},
    }


@contextmanager
def answering(op: str, backend: str):
    """As in ``backends``; Triton's interpreter multiplies bfloat16 as integers, so here its operands are widened."""
    if backend != "triton" or HAS_GPU:
        with answering_op(op, backend):
            yield
        return
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot

    def widened(self, a, b, *rest):
        handles = [
            interpreter.TensorHandle((h.data.astype(np.uint32) << 16).view(np.float32), interpreter.tl.float32)
            if h.dtype.scalar == interpreter.tl.bfloat16
            else h
            for h in (a, b)
        ]
        return create_dot(self, *handles, *rest)

    with answering_op(op, backend), mock.patch.object(interpreter.InterpreterBuilder, "create_dot", widened):
        yield
