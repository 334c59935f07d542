"""Mixup of a whole batch: who is mixed with whom and by how much, and everything the batch holds mixed alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastkd.losses import _checks, embedding_mixup, mixup, mixup_cross_entropy
from fastkd.losses._checks import Reduction


class Mix(NamedTuple):
    """One draw, shared by everything that is mixed alike: the inputs of teacher and student, labels, masks."""

    permutation: Tensor
    """(B,) int64: the partner of each example."""
    lam: Tensor
    """(B,) float32: the weight of the example itself; its partner has 1 − lam."""


class MixupSampler:
    """Draws λ ~ Beta(α, α) and a uniform permutation for each batch, from a generator of its own.

    Args:
        alpha: α > 0. MixKD (arXiv 2011.00593) does not give its value in the material this project had; 0.4 is a
            choice of this project.
        per_example: one λ per example, else one for the whole batch. Mixup's authors (arXiv 1710.09412) draw one per
            batch in their code; the default is a choice of this project.
        seed: of the generator, numbers of at least 0. Give each data-parallel rank its own, such as ``(seed, rank)``.

    ``state_dict()`` is plain numbers and strings; a sampler that has loaded it draws on as if never interrupted.
    """

    def __init__(self, alpha: float = 0.4, *, per_example: bool = True, seed: int | Sequence[int] = 0) -> None:
        _checks.positive("alpha", alpha)
        self.alpha = alpha
        self.per_example = per_example
        self._generator = np.random.Generator(np.random.PCG64(seed))

    def __call__(self, batch_size: int, device: torch.device | str | None = None) -> Mix:
        """Draw for a batch; the draw does not depend on the device it is then moved to."""
        if batch_size < 0:
            raise ValueError(f"batch_size must not be negative, got {batch_size}")
        permutation = self._generator.permutation(batch_size)
        lam = self._generator.beta(self.alpha, self.alpha, size=batch_size if self.per_example else 1)
        return Mix(
            torch.from_numpy(permutation).to(device, torch.int64),
            torch.from_numpy(lam).to(device, torch.float32).expand(batch_size),
        )

    def state_dict(self) -> dict[str, Any]:
        return dict(self._generator.bit_generator.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.bit_generator.state = state


@dataclass(frozen=True)
class MixedBatch:
    """What :func:`mix_batch` returns; a field is None where its argument was."""

    mix: Mix
    embeddings: Tensor
    mask: Tensor | None
    labels: Tensor | None
    targets: Tensor | None

    def cross_entropy(self, logits: Tensor, *, ignore_index: int = -100, reduction: Reduction = "mean") -> Tensor:
        """Cross-entropy of the mixture's logits against the labels of both its examples."""
        if self.labels is None:
            raise ValueError("cross_entropy needs labels, but mix_batch was given none")
        return mixup_cross_entropy(logits, self.labels, *self.mix, ignore_index=ignore_index, reduction=reduction)


def mix_batch(
    mix: Mix,
    embeddings: Tensor | None = None,
    *,
    ids: Tensor | None = None,
    table: Tensor | None = None,
    padding_idx: int | None = None,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    targets: Tensor | None = None,
) -> MixedBatch:
    """Mix everything that a batch holds by one draw.

    Args:
        mix: who is mixed with whom and by how much.
        embeddings: (B, ...) floating, mixed by :func:`fastkd.losses.mixup`; or instead of them
        ids, table, padding_idx: token ids (B, ...) and the table (V, D) they are looked up in, in one pass with the
            mixing, by :func:`fastkd.losses.embedding_mixup`.
        mask: (B, ...) bool or integer, nonzero where a token counts. A token of the mixture counts where it does in
            either example (the larger number where they are integers): a choice of this project, MixKD is silent.
        labels: (B, ...) int64 class ids, for :meth:`MixedBatch.cross_entropy`.
        targets: (B, ...) floating, mixed as the embeddings are: probabilities or logits of a teacher, or the scores of
            a regression; must not require grad.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it must be.
    """
    if (embeddings is None) == (ids is None):
        raise ValueError("mix_batch takes either embeddings or ids with table")
    if embeddings is not None:
        mixed = mixup(embeddings, *mix)
    elif table is None:
        raise ValueError("ids were given, but not the table to look them up in")
    else:
        assert ids is not None
        mixed = embedding_mixup(ids, table, *mix, padding_idx=padding_idx)
    for name, tensor in _checks.given(mask=mask, labels=labels, targets=targets).items():
        _checks.tensor(name, tensor)
        if tensor.dim() == 0 or len(tensor) != len(mixed):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but the batch has {len(mixed)} examples")
    if labels is not None and labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}: the scores of a regression belong into targets")
    _checks.frozen("targets", targets)
    return MixedBatch(
        mix,
        mixed,
        None if mask is None else _union(mask, mix.permutation),
        labels,
        None if targets is None else mixup(targets, *mix),
    )


def _union(mask: Tensor, permutation: Tensor) -> Tensor:
    if mask.is_floating_point():
        raise TypeError(f"mask must be bool or integer, nonzero where a token counts, got {mask.dtype}")
    return torch.maximum(mask, mask[permutation])
