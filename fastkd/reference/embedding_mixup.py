"""Lookup and mixup of embeddings in plain torch: the definition every kernel is held to."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.reference.mixup import mixup


def embedding_mixup(
    ids: Tensor, table: Tensor, permutation: Tensor, lam: Tensor, padding_idx: int | None = None
) -> Tensor:
    """Mixed rows (B, ..., D) of ``table`` (V, D) at ``ids`` (B, ...), rounded once to the dtype of the table."""
    wide = table if table.dtype == torch.float64 else table.float()
    return mixup(F.embedding(ids, wide, padding_idx), permutation, lam).to(table.dtype)
