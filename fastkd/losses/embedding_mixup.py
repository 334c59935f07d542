"""Lookup of token embeddings and mixup of the examples in one gather."""

import torch
from torch import Tensor

from fastkd import ops
from fastkd.losses import _checks, _pairing
from fastkd.losses._checks import readable


def embedding_mixup(
    ids: Tensor, table: Tensor, permutation: Tensor, lam: float | Tensor, *, padding_idx: int | None = None
) -> Tensor:
    r"""λ_b · table[ids_b] + (1−λ_b) · table[ids_π(b)], token by token, without the looked-up copies.

    Equal to ``mixup(F.embedding(ids, table, padding_idx), permutation, lam)``, the mixture of MixKD (arXiv 2011.00593)
    at the level of word embeddings.

    Args:
        ids: (B, ...) int64 in [0, V); B is the batch that is mixed. On a GPU an id out of range gives NaN.
        table: (V, D), float32, bfloat16, float16 or float64, such as ``nn.Embedding.weight``.
        permutation, lam: as in :func:`fastkd.losses.mixup`.
        padding_idx: row of the table that gets no gradient, as in ``nn.Embedding``; negative counts from the end.
            Its values take part in the mixture like any others.

    Returns:
        (B, ..., D) in the dtype of the table.

    Arithmetic is float32 inside (float64 for float64), rounded once. Each row of the table's gradient is summed by one
    owner in the order of the batch: the same bits for any number of threads. Derivatives of any order exist.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it must be.
    """
    _pairing.batch("ids", ids)
    if ids.dtype != torch.int64:
        raise TypeError(f"ids must be int64, got {ids.dtype}")
    _check_table(table, ids)
    vocabulary = table.shape[0]
    if padding_idx is not None:
        if not (isinstance(padding_idx, int) and -vocabulary <= padding_idx < vocabulary):
            raise ValueError(f"padding_idx must be an int in [-{vocabulary}, {vocabulary}), got {padding_idx!r}")
        padding_idx %= vocabulary
    if readable(ids) and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ValueError(f"ids must lie in [0, {vocabulary}), they span {int(ids.min())} to {int(ids.max())}")
    return ops.embedding_mixup(ids, table, permutation, _pairing.pairing(permutation, lam, "ids", ids), padding_idx)


def _check_table(table: Tensor, ids: Tensor) -> None:
    if not isinstance(table, Tensor):
        raise TypeError(f"table must be a tensor, got {type(table).__name__}: for an nn.Embedding pass its weight")
    _checks.floating("table", table)
    if table.dim() != 2:
        raise ValueError(f"table must be (V, D), got shape {tuple(table.shape)}")
    _checks.same_device("table", table, "ids", ids)
