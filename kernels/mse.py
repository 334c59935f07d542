"""Squared error of rows and its gradient: every element is read once, and written once where it has a gradient.

Bytes per element of b bytes: 2b read and b written. Rows that do not count are read by nobody.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 1024
"""Elements of a tile: 8 of each operand to a thread. Twice that spills on sm_100."""


@triton.jit
def load_scale(scale_ptr, rows, n_rows):
    """Weights of rows, 1 without a table and 0 beyond the last row."""
    inside = rows < n_rows
    scale = inside.to(tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + rows, mask=inside, other=0.0)
    return scale


@triton.jit
def _squared_error_kernel(
    prediction_ptr,  # (N, d)
    bias_ptr,  # (d,) float32 or None
    target_ptr,  # (N, d)
    scale_ptr,  # (N,) float32 or None
    factor_ptr,  # () float32 or None
    addend_ptr,  # (N, d), dense, or None
    grad_ptr,  # (N, d), dense, or None; may be the prediction
    output_ptr,  # (N, d), dense, or None
    loss_ptr,  # (N,)
    prediction_stride,
    target_stride,
    n_rows,
    n_cols,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    scale = load_scale(scale_ptr, rows, n_rows)
    counts = scale != 0.0
    slope = 2.0 * scale / n_cols
    if factor_ptr is not None:
        slope *= tl.load(factor_ptr)
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, n_cols, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = (rows < n_rows)[:, None] & (columns < n_cols)[None, :]
        wanted = inside & counts[:, None]
        dense = rows[:, None] * n_cols + columns[None, :]
        readable = wanted if output_ptr is None else inside
        value = tl.load(prediction_ptr + rows[:, None] * prediction_stride + columns[None, :], mask=readable, other=0.0)
        value = value.to(tl.float32)
        if bias_ptr is not None:
            value += tl.load(bias_ptr + columns, mask=columns < n_cols, other=0.0)[None, :]
        if output_ptr is not None:
            tl.store(output_ptr + dense, value.to(output_ptr.dtype.element_ty), mask=inside)
        target = tl.load(target_ptr + rows[:, None] * target_stride + columns[None, :], mask=wanted, other=0.0)
        error = tl.where(wanted, value - target.to(tl.float32), 0.0)
        squares += error * error
        if grad_ptr is not None:
            grad = slope[:, None] * error
            if addend_ptr is not None:
                grad += tl.load(addend_ptr + dense, mask=inside, other=0.0).to(tl.float32)
            tl.store(grad_ptr + dense, grad.to(grad_ptr.dtype.element_ty), mask=inside)
    tl.store(loss_ptr + rows, tl.sum(squares, axis=1) * scale / n_cols, mask=rows < n_rows)


def launch_squared_error(
    prediction: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    factor: Tensor | None = None,
    addend: Tensor | None = None,
    grad: Tensor | None = None,
    output: Tensor | None = None,
) -> Tensor:
    """Losses (N,): ``scale`` · mean square of ``prediction + bias − target``, rows (N, d) at any stride.

    Writes ``factor · scale · 2/d · error + addend`` into ``grad`` and ``prediction + bias`` into ``output`` where they
    are given. ``scale`` (N,), ``bias`` (d,) and ``factor`` () are float32. Values are not checked. Deterministic.
    """
    n_rows, n_cols = prediction.shape
    prediction, target = (t if t.stride(1) == 1 else t.contiguous() for t in (prediction, target))
    losses = prediction.new_empty(n_rows, dtype=torch.float32)
    if n_rows == 0:
        return losses
    block = min(MAX_BLOCK, triton.next_power_of_2(n_cols))
    rows = MAX_BLOCK // block
    with torch.cuda.device_of(prediction):
        _squared_error_kernel[(triton.cdiv(n_rows, rows),)](
            prediction, bias, target, scale, factor, addend, grad, output, losses,
            prediction.stride(0), target.stride(0), n_rows, n_cols, ROWS=rows, BLOCK=block,
        )  # fmt: skip
    return losses
