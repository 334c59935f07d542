"""Squared error of ``(x · downᵀ) · upᵀ + bias`` against a target, its gradients and, on request, the projection.

With z = x·downᵀ, e = z·upᵀ + bias − target and g = slope·e, the gradients are dz = g·up, dx = dz·down, d(up) = gᵀ·z and
d(down) = dzᵀ·x. Only e is as wide as the target, so only the side where it would appear is fused:

* ``_rows_kernel``: one program takes a tile of rows and sweeps d_out: loss and dz. e lives in registers.
* ``_factor_kernel``: one program takes a tile of columns and a split of the rows: e again, and gᵀ·z in registers; the
  same kernel with x in the place of e gives xᵀ·dz. Splits are summed in order, without atomics: the same bits again.

z and dx are plain products of tall, thin matrices, which cuBLAS does at the speed of memory. Bytes per element of width
b, loss and all gradients: x and the target 2b each, dx b, so 10 in bfloat16 where d_in = d_out; 7 products of 2·N·r·d.

Ranks above ``MAX_RANK`` (whose tiles would spill), float32 (whose products belong to cuBLAS and its TF32 settings) and
calls that hand back the projection take blocks of rows: cuBLAS for the products, the kernel of ``mse`` for the error.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.mse import launch_squared_error, load_scale

MAX_RANK = 128
ROWS_PER_SPLIT = 2048
BLOCK_ELEMENTS = 2**23
"""Error elements in flight where rows go in blocks: 16 MiB in bfloat16, enough rows to fill a GPU."""


@triton.jit
def _error(z, up, bias_ptr, target_ptr, target_stride, rows, columns, counts, n_cols):
    """z·upᵀ + bias − target of one tile, 0 where a row does not count."""
    inside = counts[:, None] & (columns < n_cols)[None, :]
    target = tl.load(target_ptr + rows[:, None] * target_stride + columns[None, :], mask=inside, other=0.0)
    value = tl.dot(z, tl.trans(up)) - target.to(tl.float32)
    if bias_ptr is not None:
        value += tl.load(bias_ptr + columns, mask=columns < n_cols, other=0.0)[None, :]
    return tl.where(inside, value, 0.0)


@triton.jit
def _load_factor(factor_ptr, rows, kept, rank, RANK: tl.constexpr):
    """A tile (rows, RANK) of a matrix of width ``rank``, 0 outside and where not ``kept``."""
    ranks = tl.arange(0, RANK)
    mask = kept[:, None] & (ranks < rank)[None, :]
    return tl.load(factor_ptr + rows[:, None].to(tl.int64) * rank + ranks[None, :], mask=mask, other=0.0)


@triton.jit
def _rows_kernel(
    z_ptr,  # (N, r), dense
    up_ptr,  # (d_out, r), dense
    bias_ptr,  # (d_out,) float32 or None
    target_ptr,  # (N, d_out)
    scale_ptr,  # (N,) float32 or None
    factor_ptr,  # () float32 or None
    loss_ptr,  # (N,)
    dz_ptr,  # (N, r), dense, or None
    target_stride,
    n_rows,
    n_cols,
    rank,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    scale = load_scale(scale_ptr, rows, n_rows)
    counts = scale != 0.0
    slope = 2.0 * scale / n_cols
    if factor_ptr is not None:
        slope *= tl.load(factor_ptr)
    z = _load_factor(z_ptr, rows, counts, rank, RANK)
    loss = tl.zeros((ROWS,), tl.float32)
    dz = tl.zeros((ROWS, RANK), tl.float32)
    for first in range(0, n_cols, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        up = _load_factor(up_ptr, columns, columns < n_cols, rank, RANK)
        error = _error(z, up, bias_ptr, target_ptr, target_stride, rows, columns, counts, n_cols)
        loss += tl.sum(error * error, axis=1)
        if dz_ptr is not None:
            dz += tl.dot((error * slope[:, None]).to(up.dtype), up)
    tl.store(loss_ptr + rows, loss * scale / n_cols, mask=rows < n_rows)
    if dz_ptr is not None:
        ranks = tl.arange(0, RANK)
        mask = (rows < n_rows)[:, None] & (ranks < rank)[None, :]
        tl.store(dz_ptr + rows[:, None] * rank + ranks[None, :], dz.to(dz_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _factor_kernel(
    z_ptr,  # (N, r), dense
    up_ptr,  # (columns, r), dense; None: take the wide matrix itself
    bias_ptr,  # (columns,) float32 or None
    wide_ptr,  # (N, columns): the target, or x
    scale_ptr,  # (N,) float32 or None
    factor_ptr,  # () float32 or None
    sums_ptr,  # (splits, columns, r)
    bias_sums_ptr,  # (splits, columns) or None
    wide_stride,
    n_rows,
    n_cols,
    rank,
    rows_per_split,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    split = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    factor = 1.0
    if factor_ptr is not None:
        factor = tl.load(factor_ptr)
    if up_ptr is not None:
        up = _load_factor(up_ptr, columns, columns < n_cols, rank, RANK)
    sums = tl.zeros((COLUMNS, RANK), tl.float32)
    bias_sums = tl.zeros((COLUMNS,), tl.float32)
    for step in range(0, rows_per_split, ROWS):
        rows = split * rows_per_split + step + tl.arange(0, ROWS)
        scale = load_scale(scale_ptr, rows, n_rows)
        counts = scale != 0.0
        z = _load_factor(z_ptr, rows, counts, rank, RANK)
        if up_ptr is not None:
            error = _error(z, up, bias_ptr, wide_ptr, wide_stride, rows, columns, counts, n_cols)
            error *= (2.0 * factor * scale / n_cols)[:, None]
            bias_sums += tl.sum(error, axis=0)
            wide = error.to(z.dtype)
        else:
            inside = counts[:, None] & (columns < n_cols)[None, :]
            wide = tl.load(wide_ptr + rows[:, None] * wide_stride + columns[None, :], mask=inside, other=0.0)
        sums += tl.dot(tl.trans(wide), z)
    ranks = tl.arange(0, RANK)
    mask = (columns < n_cols)[:, None] & (ranks < rank)[None, :]
    row = split * n_cols + columns
    tl.store(sums_ptr + row[:, None] * rank + ranks[None, :], sums, mask=mask)
    if bias_sums_ptr is not None:
        tl.store(bias_sums_ptr + row, bias_sums, mask=columns < n_cols)


def _factor_sums(
    z: Tensor,
    wide: Tensor,
    up: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    factor: Tensor | None = None,
    need_bias: bool = False,
) -> tuple[Tensor, Tensor]:
    """gᵀ·z (columns, r) and the sums of g over the rows (columns,), or wideᵀ·z without ``up``; float32."""
    (n_rows, n_cols), rank = wide.shape, z.shape[1]
    splits = triton.cdiv(n_rows, ROWS_PER_SPLIT)
    sums = z.new_empty((splits, n_cols, rank), dtype=torch.float32)
    bias_sums = z.new_empty((splits, n_cols), dtype=torch.float32) if need_bias else None
    tile = _tile(rank, n_cols, wide.stride(0))
    _factor_kernel[(triton.cdiv(n_cols, tile["COLUMNS"]), splits)](
        z, up, bias, wide, scale, factor, sums, bias_sums, wide.stride(0), n_rows, n_cols, rank, ROWS_PER_SPLIT, **tile
    )
    return sums.sum(0), bias_sums.sum(0) if need_bias else z.new_empty(0, dtype=torch.float32)


def _tile(rank: int, *widths: int) -> dict[str, int]:
    """Tiles whose two accumulators, (rows, columns) and (rows or columns, rank), stay in registers.

    Widths that are no multiples of 16 are read element by element, whose addresses need the registers of more threads.
    """
    num_warps = 4 if all(width % 16 == 0 for width in (rank, *widths)) else 8
    return {"RANK": max(16, triton.next_power_of_2(rank)), "ROWS": 64, "COLUMNS": 64, "num_warps": num_warps}


def _fused(x, down, up, target, bias, scale, factor, needs):
    """Loss of every row and the gradients, with neither projection nor error in memory."""
    need_x, need_down, need_up, need_bias = needs
    n_rows, rank = x.shape[0], down.shape[0]
    z = torch.mm(x, down.t())
    losses = x.new_empty(n_rows, dtype=torch.float32)
    dz = torch.empty_like(z) if need_x or need_down else None
    tile = _tile(rank, up.shape[0], target.stride(0))
    _rows_kernel[(triton.cdiv(n_rows, tile["ROWS"]),)](
        z, up, bias, target, scale, factor, losses, dz, target.stride(0), n_rows, up.shape[0], rank, **tile
    )
    grad_x, grad_down, grad_up = (x.new_empty(0) for _ in range(3))
    grad_bias = losses.new_empty(0)
    if need_x:
        grad_x = torch.mm(dz, down)
    if need_down:
        grad_down = _factor_sums(dz, x, scale=scale)[0].t().to(down.dtype).contiguous()
    if need_up or need_bias:
        sums, grad_bias = _factor_sums(z, target, up, bias, scale, factor, need_bias)
        grad_up = sums.to(up.dtype) if need_up else grad_up
    return losses, grad_x, grad_down, grad_up, grad_bias


def _blocks(x, down, up, target, bias, scale, factor, given_output, grad_output, needs, projection):
    """The same by blocks of rows: products by cuBLAS, one block of the error in memory at a time."""
    need_x, need_down, need_up, need_bias = needs
    n_rows, d_out = target.shape
    losses = x.new_empty(n_rows, dtype=torch.float32)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0)
    sums = [
        torch.zeros(factor_.shape, dtype=torch.float32, device=x.device) if needed else x.new_empty(0)
        for factor_, needed in ((down, need_down), (up, need_up))
    ]
    grad_bias = x.new_zeros(d_out if need_bias else 0, dtype=torch.float32)
    block_rows = max(256, BLOCK_ELEMENTS // d_out)
    for first in range(0, n_rows, block_rows):
        block = slice(first, first + block_rows)

        def part(values, block=block):
            return None if values is None else values[block]

        x_block, scale_block, addend = x[block], part(scale), part(grad_output)
        if scale is not None and projection is None and addend is None:
            x_block = x_block.masked_fill(scale_block[:, None] == 0, 0.0)
        z = torch.mm(x_block, down.t())
        error = torch.mm(z, up.t()) if given_output is None else given_output[block]
        grad = None
        if any(needs):
            grad = error if given_output is None else torch.empty_like(error)
        losses[block] = launch_squared_error(
            error, target[block], bias=bias if given_output is None else None, scale=scale_block, factor=factor,
            addend=addend, grad=grad, output=part(projection),
        )  # fmt: skip
        if grad is None:
            continue
        if need_up:
            sums[1] += torch.mm(grad.t(), z)
        if need_bias:
            grad_bias += grad.sum(0, dtype=torch.float32)
        if need_x or need_down:
            dz = torch.mm(grad, up)
            if need_x:
                torch.mm(dz, down, out=grad_x[block])
            if need_down:
                sums[0] += torch.mm(dz.t(), x_block)
    return losses, grad_x, sums[0].to(down.dtype), sums[1].to(up.dtype), grad_bias


def launch_low_rank_mse(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    scale: Tensor | None,
    divisor: Tensor | None,
    output: Tensor | None,
    grad_output: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
    need_output: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses (N,), gradients of x, down, up and bias, and the projection (N, d_out); empty where not needed.

    ``scale`` (N,) weighs the rows, 0 leaves one out; ``divisor`` () divides the gradients; ``output`` is the projection
    of an earlier call, ``grad_output`` the gradient that arrives there. Values are not checked. Deterministic.
    """
    down, up = down.contiguous(), up.contiguous()
    x, target = (t if t.stride(1) == 1 else t.contiguous() for t in (x, target))
    grad_output = None if grad_output is None else grad_output.contiguous()
    factor = None if divisor is None else torch.where(divisor == 0, 0.0, 1.0 / divisor)
    projection = target.new_empty(target.shape) if need_output else None
    fused = x.dtype != torch.float32 and down.shape[0] <= MAX_RANK and not need_output
    if fused and output is None and grad_output is None and x.shape[0] > 0:
        with torch.cuda.device_of(x):
            results = _fused(x, down, up, target, bias, scale, factor, needs)
    else:
        results = _blocks(x, down, up, target, bias, scale, factor, output, grad_output, needs, projection)
    return *results, x.new_empty(0) if projection is None else projection
