"""Checks of a permutation and its λ, shared by everything that mixes a batch."""

import torch
from torch import Tensor

from fastkd.losses import _checks
from fastkd.losses._checks import readable


def pairing(permutation: Tensor, lam: float | Tensor, name: str, mixed: Tensor) -> Tensor:
    """λ as one float32 (float64 where it is) per example of the tensor called ``name``, everything checked."""
    rows = mixed.shape[0]
    _checks.tensor("permutation", permutation)
    if permutation.dtype != torch.int64:
        raise TypeError(f"permutation must be int64, got {permutation.dtype}")
    if permutation.shape != (rows,):
        raise ValueError(f"permutation has shape {tuple(permutation.shape)}, the batch of {name} needs ({rows},)")
    _checks.same_device("permutation", permutation, name, mixed)
    if readable(permutation):
        _is_permutation(permutation)
    if not isinstance(lam, Tensor):
        _checks.number("lam", lam, "a number or a tensor")
        if not 0.0 <= lam <= 1.0:
            raise ValueError(f"lam must lie in [0, 1], got {lam}")
        return torch.full((rows,), lam, dtype=torch.float64, device=mixed.device)
    _check_lam(lam, rows, name, mixed)
    lam = lam if lam.dtype == torch.float64 else lam.float()
    return lam if lam.dim() == 1 else lam.expand(rows)


def batch(name: str, tensor: Tensor) -> None:
    _checks.tensor(name, tensor)
    if tensor.dim() == 0:
        raise ValueError(f"{name} must be (B, ...), got a tensor of no dimension")


def _check_lam(lam: Tensor, rows: int, name: str, mixed: Tensor) -> None:
    if not lam.is_floating_point():
        raise TypeError(f"lam must be floating, got {lam.dtype}")
    if lam.shape not in ((), (rows,)):
        raise ValueError(
            f"lam has shape {tuple(lam.shape)}, the batch of {name} needs a number, a 0-d tensor or ({rows},)"
        )
    _checks.same_device("lam", lam, name, mixed)
    _checks.frozen("lam", lam)
    if readable(lam) and lam.numel():
        low, high = (bound.item() for bound in lam.aminmax())
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"lam must lie in [0, 1], it spans {low:.4g} to {high:.4g}")


def _is_permutation(permutation: Tensor) -> None:
    rows = range(len(permutation))
    in_order = sorted(permutation.tolist())
    if in_order != list(rows):
        wrong = next(index for index, row in zip(in_order, rows, strict=True) if index != row)
        raise ValueError(
            f"permutation must hold every index in [0, {len(rows)}) once, but {wrong} is outside or there twice"
        )
