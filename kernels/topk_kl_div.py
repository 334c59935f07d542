"""Divergence from a teacher of whom some columns are known, as ``kl_div`` over a row's outcomes.

A first sweep over the row makes the student's outcomes: the logits of the listed columns and, as one more, T log Σ
exp(z/T) over the rest of the vocabulary. The sum leaves the listed columns out from the start: what remains of a
difference of sums would be rounding where the listed columns have nearly all the mass. The ids ascend, so each tile
meets only those that lie in it. ``kl_div``'s kernel compares the outcomes, which are few. A second sweep writes the
gradient: one number times the exponentials of the rest, and over it the listed columns' own.

Bytes per logit of b bytes: 2b read and b written, b read for the loss alone; "renormalize", which has no rest, reads
the listed columns alone. Rows that are not valid are not read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels._math import advance, exp, load_tile, origin
from fastkd.kernels.kl_div import launch_kl_div

MAX_REGISTERS = 128
"""Of a thread that makes outcomes: ptxas, left to itself, allows half of that and spills a few."""


@triton.jit
def _unlisted(x, columns, ids, position, next_id, end, k):
    """A tile with −inf in the listed columns before ``end``, and which id comes next."""
    while next_id < end:
        x = tl.where(columns[None, :] == next_id, float("-inf"), x)
        position += 1
        next_id = tl.load(ids + position, mask=position < k, other=2147483647)
    return x, position, next_id


@triton.jit
def _outcomes_kernel(
    student_ptr,  # (N, V)
    ids_ptr,  # (N, k), ascending
    outcomes_ptr,  # (N, k) or, with the rest, (N, k + 1): written
    rest_ptr,  # (2, N) maximum and sum of the rest: written, or None: there is no rest
    row_temperature_ptr,  # (N,) or None
    valid_ptr,  # (N,) or None
    student_stride,
    n_cols,
    n_rows,
    k,
    temperature,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    valid = row < n_rows
    if valid_ptr is not None:
        valid = tl.load(valid_ptr + row) != 0
    if row_temperature_ptr is not None:
        temperature = tl.load(row_temperature_ptr + row)
    student = student_ptr + row * student_stride
    ids = ids_ptr + row * k
    outcomes = outcomes_ptr + row * k
    top = 0.0
    if rest_ptr is not None:
        outcomes += row
        inv_t = tl.full((1,), 1.0, tl.float32) / temperature
        maximum, total = tl.full((1,), float("-inf"), tl.float32), tl.zeros((1,), tl.float32)
        pointer = student + tl.zeros((1,), tl.int64)
        exists = tl.zeros((1,), tl.int32) == 0
        position = 0
        next_id = tl.load(ids)
        stop = n_cols * valid.to(tl.int32)
        for first in range(0, stop, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            x = load_tile(pointer, exists, columns, n_cols)
            x, position, next_id = _unlisted(x, columns, ids, position, next_id, first + BLOCK, k)
            maximum, x, e, decay, _ = advance(x, maximum, inv_t)
            total = total * decay + tl.sum(e, axis=1)
        top = tl.sum(origin(maximum), axis=0)
        total = tl.sum(total, axis=0)
        tl.store(rest_ptr + row, top)
        tl.store(rest_ptr + n_rows + row, total)
        tl.store(outcomes + k, tl.where(total == 0, float("-inf"), temperature * tl.log(total)))
    for first in range(0, k, BLOCK_K):
        index = first + tl.arange(0, BLOCK_K)
        inside = index < k * valid.to(tl.int32)
        column = tl.load(ids + index, mask=inside, other=-1)
        logit = tl.load(student + column, mask=inside & (column >= 0) & (column < n_cols), other=float("-inf"))
        logit = tl.where((column < -1) | (column >= n_cols), float("nan"), logit.to(tl.float32) - top)
        tl.store(outcomes + index, logit, mask=index < k)


@triton.jit
def _gradient_kernel(
    student_ptr,  # (N, V)
    ids_ptr,  # (N, k)
    slopes_ptr,  # (N, k) or, with the rest, (N, k + 1): gradient in the outcomes
    rest_ptr,  # (2, N) or None
    grad_ptr,  # (N, V), dense; may be the student's logits
    row_temperature_ptr,  # (N,) or None
    student_stride,
    n_cols,
    n_rows,
    k,
    temperature,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student = student_ptr + row * student_stride
    grad = grad_ptr + row * n_cols
    slopes = slopes_ptr + row * k
    inv_t = 0.0
    top = 0.0
    slope = 0.0
    if rest_ptr is not None:
        slopes += row
        if row_temperature_ptr is not None:
            temperature = tl.load(row_temperature_ptr + row)
        inv_t = 1.0 / temperature
        top = tl.load(rest_ptr + row)
        total = tl.load(rest_ptr + n_rows + row)
        slope = tl.load(slopes + k)
        slope = tl.where(total == 0, 0.0, slope / total)
    for first in range(0, n_cols, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        value = tl.zeros((BLOCK,), tl.float32)
        if rest_ptr is not None:  # noqa: SIM102 (one is known at compile time, the other is not)
            if slope != 0:
                x = tl.load(student + columns, mask=columns < n_cols, other=float("-inf")).to(tl.float32)
                value = slope * exp(tl.minimum(x - top, 0.0), inv_t)
        tl.store(grad + columns, value.to(grad_ptr.dtype.element_ty), mask=columns < n_cols)
    tl.debug_barrier()  # another thread wrote what stands where a listed column's gradient goes
    for first in range(0, k, BLOCK_K):
        index = first + tl.arange(0, BLOCK_K)
        column = tl.load(ids_ptr + row * k + index, mask=index < k, other=-1)
        value = tl.load(slopes + index, mask=index < k, other=0.0)
        tl.store(grad + column, value.to(grad_ptr.dtype.element_ty), mask=(column >= 0) & (column < n_cols))


def _sizes(n_cols: int, k: int) -> dict[str, int]:
    """Columns and ids of a row that its program takes at a time: 16 columns to a thread, as ``kl_div`` does."""
    return {"BLOCK": min(triton.next_power_of_2(n_cols), 4096), "BLOCK_K": min(triton.next_power_of_2(k), 1024)}


def launch_topk_kl_div(
    student: Tensor,
    ids: Tensor,
    teacher: Tensor,
    *,
    temperature: float,
    row_temperature: Tensor | None,
    divergence: int,
    beta: float,
    valid: Tensor | None,
    row_weight: Tensor | None,
    scale_by_temperature: bool,
    grad_scale: Tensor | None,
    need_grad: bool,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """Weighted losses (N,) and ``grad_scale`` · their gradient (N, V), empty unless needed.

    ``student`` is (N, V), rows at any stride, ``ids`` (N, k) ascending with −1 for nothing, ``teacher`` (N, k) float32
    with −inf where nothing is listed, or (N, k + 1) where the rest of the vocabulary is an outcome. ``in_place`` puts
    the gradient where the student's logits, contiguous, were. Values are not checked. Deterministic: a row belongs to
    one program.
    """
    n_rows, n_cols = student.shape
    k, has_rest = ids.shape[1], teacher.shape[1] > ids.shape[1]
    student = student if student.stride(1) == 1 else student.contiguous()
    ids, row_temperature, valid = (x if x is None else x.contiguous() for x in (ids, row_temperature, valid))
    outcomes = torch.empty_like(teacher, memory_format=torch.contiguous_format)
    rest = outcomes.new_empty(2, n_rows) if has_rest else None
    sizes = _sizes(n_cols, k)
    with torch.cuda.device_of(student):
        _outcomes_kernel[(n_rows,)](
            student, ids, outcomes, rest, row_temperature, valid,
            student.stride(0), n_cols, n_rows, k, temperature, **sizes, num_warps=8, maxnreg=MAX_REGISTERS,
        )  # fmt: skip
    if rest is not None:
        teacher = torch.cat((teacher[:, :k], teacher[:, k:].masked_fill(rest[1, :, None] == 0, float("-inf"))), 1)
    rows, slopes, _ = launch_kl_div(
        outcomes,
        teacher,
        temperature=temperature,
        row_temperature=row_temperature,
        divergence=divergence,
        beta=beta,
        valid=valid,
        labels=None,
        cross_entropy_weight=0.0,
        scale_by_temperature=scale_by_temperature,
        grad_scale=grad_scale,
        need_grad=need_grad,
        need_stats=False,
    )
    if row_weight is not None:
        rows, slopes = rows * row_weight, slopes * row_weight[:, None] if need_grad else slopes
    grad = student if in_place else student.new_empty((n_rows, n_cols) if need_grad else 0)
    if need_grad:
        with torch.cuda.device_of(student):
            _gradient_kernel[(n_rows,)](
                student, ids, slopes, rest, grad, row_temperature,
                student.stride(0), n_cols, n_rows, k, temperature, **sizes, num_warps=8,
            )  # fmt: skip
    return rows, grad
