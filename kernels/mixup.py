"""Mixture of each row of a batch with another row: two rows in, one out, in one pass.

Programs that run at the same time hold the same columns of neighbouring rows, so that the row one of them reads as a
partner is in L2 for the one that reads it by itself: of b bytes an element, b read from memory and b written.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["n_rows"])
def _mixup_kernel(
    x_ptr,  # (N, C)
    out_ptr,  # (N, C), dense
    partner_ptr,  # (N,)
    weight_ptr,  # (N,)
    partner_weight_ptr,  # (N,)
    x_stride,
    n_rows,
    n_cols,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(n_rows, ROWS)
    row = program % tiles * ROWS + tl.arange(0, ROWS)
    columns = program // tiles * BLOCK + tl.arange(0, BLOCK)
    inside = row < n_rows
    partner = tl.load(partner_ptr + row, mask=inside, other=0)
    known = inside & (partner >= 0) & (partner < n_rows)
    weight = tl.load(weight_ptr + row, mask=inside, other=0.0)
    partner_weight = tl.load(partner_weight_ptr + row, mask=inside, other=0.0)

    in_row = (columns < n_cols)[None, :]
    x = tl.load(x_ptr + (row * x_stride)[:, None] + columns[None, :], mask=inside[:, None] & in_row, other=0.0)
    y = tl.load(
        x_ptr + (partner * x_stride)[:, None] + columns[None, :], mask=known[:, None] & in_row, other=float("nan")
    )
    mixed = weight[:, None] * x.to(tl.float32) + partner_weight[:, None] * y.to(tl.float32)
    out = out_ptr + (row * n_cols)[:, None] + columns[None, :]
    tl.store(out, mixed.to(out_ptr.dtype.element_ty), mask=inside[:, None] & in_row)


class _Tile(NamedTuple):
    rows: int
    columns: int


def _tile(n_cols: int) -> _Tile:
    """2048 elements to a program of 128 threads, 16 of each of the two rows to a thread; short rows share it."""
    columns = min(triton.next_power_of_2(n_cols), 2048)
    return _Tile(2048 // columns, columns)


def partners(permutation: Tensor, lam: Tensor, transpose: bool) -> tuple[Tensor, Tensor]:
    """Index and weight of each row's partner, (N,) both; the transpose of the map has them along the inverse."""
    if not transpose:
        return permutation.contiguous(), 1 - lam
    inverse = permutation.argsort()
    return inverse, (1 - lam)[inverse]


def launch_mixup(x: Tensor, permutation: Tensor, lam: Tensor, transpose: bool) -> Tensor:
    """``lam[i] x[i] + (1 - lam[i]) x[permutation[i]]`` for x (N, C) of any row stride, or its transpose, (N, C) dense.

    ``permutation`` is (N,) int64, ``lam`` (N,) float32; values are not checked: a partner out of range gives NaN.
    """
    n_rows, n_cols = x.shape
    x = x if n_cols == 1 or x.stride(1) == 1 else x.contiguous()
    out = x.new_empty(n_rows, n_cols)
    if out.numel() == 0:
        return out
    partner, partner_weight = partners(permutation, lam, transpose)
    tile = _tile(n_cols)
    grid = (triton.cdiv(n_rows, tile.rows) * triton.cdiv(n_cols, tile.columns),)
    with torch.cuda.device_of(x):
        _mixup_kernel[grid](
            x,
            out,
            partner,
            lam.contiguous(),
            partner_weight,
            x.stride(0),
            n_rows,
            n_cols,
            ROWS=tile.rows,
            BLOCK=tile.columns,
            num_warps=4,
        )
    return out
