"""Inputs of kl_div that every backend is checked with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import backends
import torch
from torch import Tensor

INF = float("inf")

DIVERGENCES = ("forward", "reverse", "jsd")

ROWS = 19
VOCABULARIES = (1, 2, 3, 15, 16, 17, 24, 25, 33, 64, 512, 513, 1000, 4099)
"""One column, below / at / above the vector widths, the last length of each kind of tile and the next, blocks."""


def rows(vocabulary: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ordinary, peaked, flat, near-tied, far-off and −inf-masked rows, (19, V), in storage wider than the rows."""
    generator = torch.Generator().manual_seed(seed)
    storage = torch.randn(2, ROWS, vocabulary + 5, generator=generator)
    student, teacher = storage[0, :, :vocabulary] * 3, storage[1, :, :vocabulary] * 3
    student[1, 0] += 30
    teacher[1, -1] += 30
    student[2], teacher[2] = 0.25, -1.5
    teacher[3] = student[3] + 0.05 * storage[1, 3, :vocabulary]
    student[4] += 500
    teacher[4] -= 500
    absent = torch.rand(vocabulary, generator=generator) < 0.4
    absent[: min(16, vocabulary - 1)] = True  # a whole first vector that does not exist
    absent[-1] = False
    student[5, absent] = teacher[5, absent] = -INF
    student[6, 0] = -INF
    teacher[7, -1] = -INF
    student[8] = -INF
    teacher[9] = -INF
    student[10] = teacher[10] = -INF
    student[11], teacher[11] = teacher[11] * 20, student[11] * 20
    storage[0, :, :vocabulary], storage[1, :, :vocabulary] = student, teacher
    storage = storage.to(dtype)
    return storage[0, :, :vocabulary], storage[1, :, :vocabulary]


@contextmanager
def answering(backend: str) -> Iterator[None]:
    """``backend`` answers kl_div; Triton with several tiles, and several rows to each, at a few dozen columns already.

    More the interpreter cannot afford.
    """
    with backends.answering("kl_div", backend):
        if backend != "triton":
            yield
            return
        from fastkd.kernels import kl_div as kernel

        tile = kernel._Tile(rows=8, columns=16, num_warps=4, maxnreg=None)
        with mock.patch.object(kernel, "_tile", return_value=tile):
            yield


FINITE = [0, 1, 2, 3, 4, 5, 12, 13, 14]
"""Rows whose loss is finite."""


def labels(vocabulary: int, seed: int = 0) -> Tensor:
    drawn = torch.randint(vocabulary, (ROWS,), generator=torch.Generator().manual_seed(seed))
    drawn[5] = vocabulary - 1  # which row 5 has
    drawn[0] = drawn[13] = -100
    return drawn


def temperatures(seed: int = 0) -> Tensor:
    return 0.5 + 3 * torch.rand(ROWS, generator=torch.Generator().manual_seed(seed))


def options(vocabulary: int) -> dict[str, dict[str, Any]]:
    """Keyword arguments by name; the last one takes every branch at once."""
    some = torch.arange(ROWS) % 3 != 1
    labelled = {"labels": labels(vocabulary), "cross_entropy_weight": 0.7}
    return {
        "plain": {},
        "tempered": {"temperature": 2.0},
        "unscaled": {"temperature": 0.7, "scale_by_temperature": False},
        "masked": {"mask": some},
        "nothing valid": {"mask": torch.zeros(ROWS)},
        "ragged": {"temperature": temperatures()},
        "skewed": {"beta": 0.1, "temperature": 1.5},
        "labelled": labelled | {"temperature": 2.0},
        "everything": labelled | {"temperature": temperatures(), "mask": some, "beta": 0.3},
    }
