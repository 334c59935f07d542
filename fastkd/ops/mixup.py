"""``torch.ops.fastkd.mixup``: a batch mixed along a permutation, or the transpose of that map."""

from typing import Any

import torch
from torch import Tensor

from fastkd import reference
from fastkd.ops import _extension

_extension.define("mixup", "(Tensor x, Tensor permutation, Tensor lam, bool transpose) -> Tensor")


def mixup(x: Tensor, permutation: Tensor, lam: Tensor) -> Tensor:
    """Checked arguments in: x (B, ...), permutation (B,) int64, lam (B,) floating."""
    if _extension.backend("mixup", x.device.type, x.dtype) == "reference":
        return reference.mixup(x, permutation, lam)
    rows = x.flatten(1) if x.dim() > 1 else x[:, None]
    mixed: Tensor = torch.ops.fastkd.mixup(rows, permutation, lam.float(), False)
    return mixed if rows is x else mixed.view(x.shape)


def _fake(x: Tensor, permutation: Tensor, lam: Tensor, transpose: bool) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, permutation, lam, ctx.transpose = inputs
    ctx.save_for_backward(permutation, lam)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The op is linear and its transpose is the same op along the inverse permutation: no scatter, any derivative."""
    return torch.ops.fastkd.mixup(grad, *ctx.saved_tensors, not ctx.transpose), None, None, None


def _triton(x: Tensor, permutation: Tensor, lam: Tensor, transpose: bool) -> Tensor:
    from fastkd.kernels.mixup import launch_mixup

    mixed: Tensor = launch_mixup(x, permutation, lam, transpose)
    return mixed


torch.library.register_fake("fastkd::mixup", _fake)
torch.library.register_autograd("fastkd::mixup", _backward, setup_context=_save)
torch.library.register_kernel("fastkd::mixup", "cuda", _triton)
