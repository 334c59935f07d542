"""Rows of an embedding table, mixed as they are looked up, and the gradient of the table without atomics.

Forward: two rows of the table in, one row out, for each token. Backward: the tokens are sorted by their row of the
table, and each row of the gradient is summed by one program, in the order of the batch: deterministic, each row
written once. A row that thousands of tokens share is one program's long loop: leave padding out by ``padding_idx``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.mixup import partners


@triton.jit(do_not_specialize=["n_rows", "n_tokens"])
def _lookup_kernel(
    ids_ptr,  # (N, T), dense
    table_ptr,  # (V, D)
    out_ptr,  # (N, T, D), dense
    partner_ptr,  # (N,)
    weight_ptr,  # (N,)
    partner_weight_ptr,  # (N,)
    table_stride,
    vocabulary,
    n_rows,
    n_tokens,
    n_cols,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(n_cols, BLOCK)
    at = program // blocks * TOKENS + tl.arange(0, TOKENS)
    columns = program % blocks * BLOCK + tl.arange(0, BLOCK)
    row, token = at // n_tokens, at % n_tokens
    inside = row < n_rows
    partner = tl.load(partner_ptr + row, mask=inside, other=0)
    paired = inside & (partner >= 0) & (partner < n_rows)
    weight = tl.load(weight_ptr + row, mask=inside, other=0.0)
    partner_weight = tl.load(partner_weight_ptr + row, mask=inside, other=0.0)
    own = tl.load(ids_ptr + at, mask=inside, other=-1)
    other = tl.load(ids_ptr + partner * n_tokens + token, mask=paired, other=-1)

    in_row = (columns < n_cols)[None, :]
    own_known = ((own >= 0) & (own < vocabulary))[:, None]
    other_known = ((other >= 0) & (other < vocabulary))[:, None]
    x = tl.load(table_ptr + (own * table_stride)[:, None] + columns[None, :], own_known & in_row, float("nan"))
    y = tl.load(table_ptr + (other * table_stride)[:, None] + columns[None, :], other_known & in_row, float("nan"))
    mixed = weight[:, None] * x.to(tl.float32) + partner_weight[:, None] * y.to(tl.float32)
    out = out_ptr + (at * n_cols)[:, None] + columns[None, :]
    tl.store(out, mixed.to(out_ptr.dtype.element_ty), mask=inside[:, None] & in_row)


@triton.jit(do_not_specialize=["n_tokens", "padding_idx"])
def _gather_kernel(
    grad_ptr,  # (N, T, D), dense
    out_ptr,  # (V, D), dense
    order_ptr,  # (N * T,): tokens by their row of the table
    first_ptr,  # (V + 1,): where the tokens of a row begin
    partner_ptr,  # (N,)
    weight_ptr,  # (N,)
    partner_weight_ptr,  # (N,)
    n_tokens,
    n_cols,
    padding_idx,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(n_cols, BLOCK)
    row = program // blocks
    columns = program % blocks * BLOCK + tl.arange(0, BLOCK)
    in_row = (columns < n_cols)[None, :]
    start = tl.load(first_ptr + row)
    stop = tl.where(row == padding_idx, start, tl.load(first_ptr + row + 1))
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(start, stop, TOKENS):
        source = k + tl.arange(0, TOKENS)
        present = source < stop
        at = tl.load(order_ptr + source, mask=present, other=0)
        batch_row, token = at // n_tokens, at % n_tokens
        partner = tl.load(partner_ptr + batch_row, mask=present, other=0)
        weight = tl.load(weight_ptr + batch_row, mask=present, other=0.0)
        partner_weight = tl.load(partner_weight_ptr + batch_row, mask=present, other=0.0)
        mask = present[:, None] & in_row
        x = tl.load(grad_ptr + (at * n_cols)[:, None] + columns[None, :], mask, 0.0).to(tl.float32)
        beside = (partner * n_tokens + token) * n_cols
        y = tl.load(grad_ptr + beside[:, None] + columns[None, :], mask, 0.0).to(tl.float32)
        total += tl.sum(weight[:, None] * x + partner_weight[:, None] * y, axis=0)
    tl.store(out_ptr + row * n_cols + columns, total.to(out_ptr.dtype.element_ty), mask=columns < n_cols)


def _lookup_tile(n_cols: int) -> tuple[int, int]:
    """Tokens and columns of a program of 128 threads: 1024 elements of each of the two rows."""
    columns = min(triton.next_power_of_2(n_cols), 1024)
    return 1024 // columns, columns


def _gather_tile(n_cols: int) -> tuple[int, int]:
    """Tokens in flight and columns of a program: most rows have few tokens, but a frequent one should not wait."""
    return 8, min(triton.next_power_of_2(n_cols), 256)


def launch_embedding_mixup(ids: Tensor, table: Tensor, permutation: Tensor, lam: Tensor) -> Tensor:
    """Mixed rows (N, T, D) of ``table`` (V, D), of any row stride, at ``ids`` (N, T) int64.

    ``permutation`` is (N,) int64, ``lam`` (N,) float32; values are not checked: an index out of range gives NaN.
    """
    (n_rows, n_tokens), (vocabulary, n_cols) = ids.shape, table.shape
    table = table if n_cols == 1 or table.stride(1) == 1 else table.contiguous()
    out = table.new_empty(n_rows, n_tokens, n_cols)
    if out.numel() == 0:
        return out
    partner, partner_weight = partners(permutation, lam, False)
    tokens, columns = _lookup_tile(n_cols)
    grid = (triton.cdiv(n_rows * n_tokens, tokens) * triton.cdiv(n_cols, columns),)
    with torch.cuda.device_of(table):
        _lookup_kernel[grid](
            ids.contiguous(),
            table,
            out,
            partner,
            lam.contiguous(),
            partner_weight,
            table.stride(0),
            vocabulary,
            n_rows,
            n_tokens,
            n_cols,
            TOKENS=tokens,
            BLOCK=columns,
            num_warps=4,
        )
    return out


def launch_embedding_mixup_backward(
    grad: Tensor, ids: Tensor, permutation: Tensor, lam: Tensor, vocabulary: int, padding_idx: int
) -> Tensor:
    """Gradient (V, D) of the table from that of the mixture, (N, T, D); none for row ``padding_idx`` (−1: no such).

    An id out of range adds nothing.
    """
    n_tokens, n_cols = grad.shape[1:]
    out = grad.new_empty(vocabulary, n_cols)
    if out.numel() == 0:
        return out
    ordered, order = ids.reshape(-1).sort(stable=True)
    first = torch.searchsorted(ordered, torch.arange(vocabulary + 1, device=ids.device))
    partner, partner_weight = partners(permutation, lam, True)
    tokens, columns = _gather_tile(n_cols)
    with torch.cuda.device_of(grad):
        _gather_kernel[(vocabulary * triton.cdiv(n_cols, columns),)](
            grad.contiguous(),
            out,
            order,
            first,
            partner,
            lam.contiguous(),
            partner_weight,
            n_tokens,
            n_cols,
            padding_idx,
            TOKENS=tokens,
            BLOCK=columns,
            num_warps=4,
        )
    return out
