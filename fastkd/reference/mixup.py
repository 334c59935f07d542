"""Mixup in plain torch: the definition every kernel is held to."""

import torch
from torch import Tensor


def mixup(x: Tensor, permutation: Tensor, lam: Tensor) -> Tensor:
    """``lam[i] * x[i] + (1 - lam[i]) * x[permutation[i]]``, rounded once to the dtype of ``x`` (B, ...).

    ``permutation`` is (B,) int64, ``lam`` (B,) floating. Arithmetic is float64 for float64 ``x``, else float32.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    weight = lam.to(wide.dtype).reshape(-1, *(1,) * (x.dim() - 1))
    return (weight * wide + (1 - weight) * wide[permutation]).to(x.dtype)
