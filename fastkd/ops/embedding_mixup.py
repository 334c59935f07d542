"""``torch.ops.fastkd.embedding_mixup``: rows of a table looked up and mixed at once, and the gradient of the table."""

from typing import Any

import torch
from torch import Tensor

from fastkd import reference
from fastkd.ops import _extension

NO_PADDING = -1

_extension.define(
    "embedding_mixup", "(Tensor ids, Tensor table, Tensor permutation, Tensor lam, int padding_idx) -> Tensor"
)
_extension.define(
    "embedding_mixup_backward",
    "(Tensor grad, Tensor ids, Tensor permutation, Tensor lam, SymInt vocabulary, int padding_idx) -> Tensor",
)


def embedding_mixup(ids: Tensor, table: Tensor, permutation: Tensor, lam: Tensor, padding_idx: int | None) -> Tensor:
    """Checked arguments in: ids (B, ...), table (V, D), permutation (B,) int64, lam (B,), padding_idx in [0, V)."""
    if _extension.backend("embedding_mixup", table.device.type, table.dtype) == "reference":
        return reference.embedding_mixup(ids, table, permutation, lam, padding_idx)
    rows = ids.flatten(1) if ids.dim() > 1 else ids[:, None]
    padding = NO_PADDING if padding_idx is None else padding_idx
    mixed: Tensor = torch.ops.fastkd.embedding_mixup(rows, table, permutation, lam.float(), padding)
    return mixed.view(*ids.shape, table.shape[1])


def _fake(ids: Tensor, table: Tensor, permutation: Tensor, lam: Tensor, padding_idx: int) -> Tensor:
    return table.new_empty(*ids.shape, table.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, table, permutation, lam, ctx.padding_idx = inputs
    ctx.vocabulary = table.shape[0]
    ctx.save_for_backward(ids, permutation, lam)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ids, permutation, lam = ctx.saved_tensors
    table = torch.ops.fastkd.embedding_mixup_backward(grad, ids, permutation, lam, ctx.vocabulary, ctx.padding_idx)
    return None, table, None, None, None


def _fake_backward(
    grad: Tensor, ids: Tensor, permutation: Tensor, lam: Tensor, vocabulary: int, padding_idx: int
) -> Tensor:
    return grad.new_empty(vocabulary, grad.shape[-1])


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ids, permutation, lam, _, ctx.padding_idx = inputs
    ctx.save_for_backward(ids, permutation, lam)


def _backward_of_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The transpose of the table's gradient is the lookup again, of a table whose padding row is zero."""
    ids, permutation, lam = ctx.saved_tensors
    if ctx.padding_idx != NO_PADDING:
        rows = torch.arange(grad.shape[0], device=grad.device)[:, None]
        grad = grad.masked_fill(rows == ctx.padding_idx, 0.0)
    looked_up = torch.ops.fastkd.embedding_mixup(ids, grad, permutation, lam, ctx.padding_idx)
    return looked_up, None, None, None, None, None


def _triton(ids: Tensor, table: Tensor, permutation: Tensor, lam: Tensor, padding_idx: int) -> Tensor:
    from fastkd.kernels.embedding_mixup import launch_embedding_mixup

    mixed: Tensor = launch_embedding_mixup(ids, table, permutation, lam)
    return mixed


def _triton_backward(
    grad: Tensor, ids: Tensor, permutation: Tensor, lam: Tensor, vocabulary: int, padding_idx: int
) -> Tensor:
    from fastkd.kernels.embedding_mixup import launch_embedding_mixup_backward

    table: Tensor = launch_embedding_mixup_backward(grad, ids, permutation, lam, vocabulary, padding_idx)
    return table


torch.library.register_fake("fastkd::embedding_mixup", _fake)
torch.library.register_fake("fastkd::embedding_mixup_backward", _fake_backward)
torch.library.register_autograd("fastkd::embedding_mixup", _backward, setup_context=_save)
torch.library.register_autograd("fastkd::embedding_mixup_backward", _backward_of_backward, setup_context=_save_backward)
torch.library.register_kernel("fastkd::embedding_mixup", "cuda", _triton)
torch.library.register_kernel("fastkd::embedding_mixup_backward", "cuda", _triton_backward)
