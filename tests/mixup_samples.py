"""Inputs of mixup and embedding_mixup that every backend is checked with."""

import torch
from torch import Tensor

SHAPES = ((1,), (7,), (6, 1), (5, 3), (4, 16), (7, 17), (3, 2, 33), (6, 4, 5, 7), (33, 500), (2, 131100))
"""Scalars, below / at / above the vector widths, several dimensions, rows longer than what a thread takes at a time."""

TABLES = ((5, 1), (9, 3), (40, 16), (11, 33), (300, 130), (50, 257))
"""Vocabulary and width: below / at / above the vector widths, and with a rest after the widest step."""

PAIRINGS = ("random", "identity", "one cycle", "swaps")


KINDS = 6
"""Kinds of examples, in turn: see ``examples``."""


def permutation(rows: int, pairing: str = "random", seed: int = 0) -> Tensor:
    in_order = torch.arange(rows)
    if pairing == "random":
        return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    if pairing == "one cycle":
        return in_order.roll(2) if rows % 2 else in_order.roll(1)
    if pairing == "swaps":
        return (in_order ^ 1).where((in_order ^ 1) < rows, in_order)
    return in_order


def lam(rows: int, seed: int = 0) -> Tensor:
    """Both ends, the middle, next to nothing, and the rest at random."""
    drawn = torch.rand(rows, generator=torch.Generator().manual_seed(seed))
    special = torch.tensor([0.3, 1.0, 0.0, 0.5, 1e-6, 1 - 1e-6])[:rows]
    drawn[: len(special)] = special
    return drawn


def pair(rows: int, pairing: str = "random") -> tuple[Tensor, Tensor]:
    return permutation(rows, pairing), lam(rows)


def examples(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Ordinary, far-off, tiny, huge, cancelling and zero examples in turn, in storage wider than the batch."""
    generator = torch.Generator().manual_seed(seed)
    storage = torch.randn(shape[0], *shape[1:-1], (shape[-1] if len(shape) > 1 else 1) + 3, generator=generator)
    x = storage[..., : shape[-1]] if len(shape) > 1 else storage[:, 0]
    for row, change in enumerate((1.0, 1.0, 1e-4, 1e4, -1.0, 0.0)):
        x[row::KINDS] *= change
    x[1::KINDS] += 500
    if len(x) > 4:
        x[4] = -x[0]
    storage = storage.to(dtype)
    return storage[..., : shape[-1]] if len(shape) > 1 else storage[:, 0]


def ids(shape: tuple[int, ...], vocabulary: int, seed: int = 0) -> Tensor:
    """Token ids of which most are rare, one in three is 0 and the last of the vocabulary occurs."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(vocabulary, shape, generator=generator)
    drawn[torch.rand(shape, generator=generator) < 1 / 3] = 0
    drawn.view(-1)[-1] = vocabulary - 1
    return drawn
