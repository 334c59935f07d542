"""Inputs of topk_kl_div that every backend is checked with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import backends
import kl_div_samples
import torch
from torch import Tensor

from fastkd.losses import topk_kl_div

INF = float("inf")
TAILS = ("renormalize", "zero", "bucket")
PAIRS = [(tail, divergence) for tail in TAILS for divergence in ("forward", "reverse", "jsd")]
PAIRS.remove(("zero", "reverse"))
PAIRS.remove(("zero", "jsd"))

ROWS = kl_div_samples.ROWS
SIZES = ((2, 2), (3, 2), (16, 3), (17, 17), (33, 5), (513, 20), (1000, 64), (4099, 520))
"""(V, k): all columns listed, below / at / above the vector widths and the blocks, few and many outcomes."""


def rows(vocabulary: int, k: int, dtype: torch.dtype = torch.float32, temperature: Any = 1.0) -> tuple[Tensor, ...]:
    """Student logits (19, V) of ``kl_div_samples``, and of its teacher k ids and their log-probabilities.

    The ids are the most likely ones in some rows and any in others, in no order, here and there −1 for nothing.
    """
    generator = torch.Generator().manual_seed(vocabulary)
    student, teacher = kl_div_samples.rows(vocabulary, dtype)
    t = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    log_probs = (teacher.double() / t).log_softmax(-1).nan_to_num(nan=-INF)
    ids = log_probs.topk(k).indices
    for row in range(1, ROWS, 3):
        ids[row] = torch.randperm(vocabulary, generator=generator)[:k]
    values = log_probs.gather(-1, ids)
    nothing = torch.rand(ROWS, k, generator=generator) < 0.2
    nothing[::2] = False
    nothing[15] = True
    values[nothing] = 7.0  # what stands there is not looked at
    return student, ids.masked_fill(nothing, -1), values.to(dtype)


@contextmanager
def answering(backend: str) -> Iterator[None]:
    """``backend`` answers topk_kl_div; Triton with several tiles to a row of a few dozen columns already."""
    with backends.answering("topk_kl_div", backend):
        if backend != "triton":
            yield
            return
        from fastkd.kernels import topk_kl_div as kernel

        with mock.patch.object(kernel, "_sizes", return_value={"BLOCK": 16, "BLOCK_K": 4}):
            yield


def options() -> dict[str, dict[str, Any]]:
    """Keyword arguments by name; the last one takes every branch at once."""
    some = torch.arange(ROWS) % 3 != 1
    ragged = {"temperature": kl_div_samples.temperatures()}
    return {
        "plain": {},
        "tempered": {"temperature": 2.0},
        "unscaled": {"temperature": 0.7, "scale_by_temperature": False},
        "masked": {"mask": some},
        "nothing valid": {"mask": torch.zeros(ROWS)},
        "ragged": ragged,
        "everything": ragged | {"mask": some, "beta": 0.3, "labels": kl_div_samples.labels(2)},
    }


def at_loss_temperature(student: Tensor, ids: Tensor, values: Tensor, **options: Any) -> Tensor:
    """The loss from values that hold its temperature already."""
    temperature = options.get("temperature", 1.0)
    return topk_kl_div(student, ids, values, teacher_temperature=temperature, **options)
