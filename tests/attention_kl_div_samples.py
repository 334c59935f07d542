"""Inputs of attention_kl_div that every backend is checked with."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import backends
import numpy as np
import torch
from torch import Tensor

INF = float("inf")
Tensors = tuple[Tensor, Tensor, Tensor, Tensor]


def tensors(
    batch: int = 2,
    heads: int = 2,
    queries: int = 37,
    keys: int | None = None,
    dim: int = 8,
    *,
    teacher_dim: int | None = None,
    key_heads: int | None = None,
    teacher_heads: int | None = None,
    teacher_key_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Tensors:
    """Queries and keys in storage wider than the heads; flat, peaked and nearly agreeing maps among them."""
    generator = torch.Generator().manual_seed(seed)
    keys = keys or queries

    def draw(heads: int, tokens: int, dim: int) -> Tensor:
        return torch.randn(batch, tokens, heads, dim + 3, generator=generator)[..., :dim].transpose(1, 2)

    student_query = draw(heads, queries, dim)
    student_key = draw(key_heads or heads, keys, dim)
    teacher_heads, teacher_dim = teacher_heads or heads, teacher_dim or dim
    teacher_query = draw(teacher_heads, queries, teacher_dim)
    teacher_key = draw(teacher_key_heads or teacher_heads, keys, teacher_dim)
    if queries > 3:
        student_query[:, :, 1] = 0.0
        teacher_query[:, :, 2] *= 12
        student_query[:, :, 3] *= 12
    if teacher_query.shape == student_query.shape and teacher_key.shape == student_key.shape and batch > 1:
        teacher_query[1] = student_query[1] + 0.02 * teacher_query[1]
        teacher_key[1] = student_key[1]
    return tuple(x.to(dtype) for x in (student_query, student_key, teacher_query, teacher_key))  # type: ignore[return-value]


def bias(queries: int, keys: int, heads: int = 2, seed: int = 1) -> Tensor:
    """As T5's: (1, H, T_q, T_k)."""
    return torch.randn(1, heads, queries, keys, generator=torch.Generator().manual_seed(seed))


def _excluding() -> dict[str, Tensor]:
    """−inf in both models, in the student's alone (a loss of +inf), in the teacher's alone, and of whole rows."""
    student, teacher = bias(37, 37).clone(), bias(37, 37, seed=2).clone()
    student[:, 0, :, 5:9] = teacher[:, 0, :, 5:9] = -INF
    student[:, 1, 4, 31] = teacher[:, 1, 6, 11] = -INF
    student[:, 0, 10] = teacher[:, 0, 11] = -INF
    student[:, 1, 12] = teacher[:, 1, 12] = -INF
    return {"student_bias": student, "teacher_bias": teacher}


PADDING = torch.arange(37) < torch.tensor([[30], [37]])
HOLES = (torch.arange(37) * 7) % 5 != torch.tensor([[0], [3]])

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "one token": ({"queries": 1, "dim": 1}, {}),
    "long": ({"batch": 1, "queries": 300, "dim": 40}, {}),
    "unequal sizes": ({"dim": 5, "teacher_dim": 33}, {"student_scale": 0.7, "teacher_scale": 0.2}),
    "cross": ({"queries": 21, "keys": 50}, {"mask": torch.tensor([50, 7])}),
    "cross with valid queries": ({"queries": 5, "keys": 20}, {"query_mask": torch.arange(10).view(2, 5) % 3 != 0}),
    "causal": ({"queries": 150}, {"causal": True}),
    "causal, more keys": ({"queries": 20, "keys": 70}, {"causal": True}),
    "causal, more queries": ({"queries": 70, "keys": 20}, {"causal": True}),
    "window": ({"queries": 150}, {"window": 9}),
    "causal window": ({"queries": 150}, {"window": 40, "causal": True}),
    "window of any size": ({}, {"window": sys.maxsize}),
    "padding": ({}, {"mask": PADDING}),
    "lengths": ({}, {"mask": torch.tensor([30, 0])}),
    "holes": ({}, {"mask": HOLES, "causal": True}),
    "grouped": (
        {"heads": 4, "key_heads": 2, "teacher_heads": 4, "teacher_key_heads": 1},
        {"causal": True, "mask": PADDING},
    ),
    "averaged": (
        {"heads": 2, "teacher_heads": 6, "teacher_key_heads": 3},
        {"average_teacher_heads": True, "mask": HOLES},
    ),
    "relations": ({"heads": 2, "dim": 18, "teacher_heads": 3, "teacher_dim": 8}, {"relation_heads": 4, "causal": True}),
    "biased": ({}, {"student_bias": bias(37, 37), "teacher_bias": bias(1, 37, 1).expand(2, 1, 1, 37)}),
    "excluding": ({}, _excluding() | {"mask": HOLES}),
    "averaged, excluding": (
        {"teacher_heads": 4},
        {"average_teacher_heads": True} | {"teacher_bias": _excluding()["teacher_bias"].repeat(1, 2, 1, 1)},
    ),
}
"""Shapes and options by name."""


@contextmanager
def answering(backend: str) -> Iterator[None]:
    """``backend`` answers attention_kl_div; Triton in tiles so small that a few dozen tokens make several."""
    with backends.answering("attention_kl_div", backend):
        if backend != "triton":
            yield
            return
        from fastkd.kernels import attention_kl_div as kernel

        sizes = {"ROWS": 32, "KEYS": 32, "num_warps": 4}
        with mock.patch.object(kernel, "tile", return_value=sizes), _bfloat16_products():
            yield


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    """Triton's interpreter keeps bfloat16 as its bits, which its matrix product takes for integers."""
    if backends.HAS_GPU:
        yield
        return
    from triton import language as tl
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        bits = interpreter._convert_float(x.data, tl.bfloat16, tl.float32, None)
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, widened(a), widened(b), *rest)

    with mock.patch.object(interpreter.InterpreterBuilder, "create_dot", create_dot):
        yield
