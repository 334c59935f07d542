"""Divergence of two rows of logits, its gradient and its statistics, with no row of probabilities in memory.

With x = logit − row maximum, Z = Σ exp(x/T), and the log-ratio r = log p_t − log p_s = (x_t − x_s)/T + log(Z_s/Z_t):

    forward    Σ p_t·r                                        gradient  (p_s − p_t) / T
    reverse   −Σ p_s·r                                        gradient  p_s·(Σ p_s·r − r) / T
    jsd        β Σ p_t·log(p_t/m) + (1−β) Σ p_s·log(p_s/m)    gradient  (1−β)·p_s·(a − Σ p_s·a) / T,  a = log(p_s/m)

times T² if asked, plus weight · CE(student at T = 1, label). x_t − x_s is taken inside the sums, before anything large
has cancelled. The reverse divergence takes x_t from the teacher's logit at the student's top instead of from the
teacher's own: the columns that weigh most then have the smallest x_t − x_s.

A first sweep over the row keeps running maxima and sums, moved along whenever a maximum rises: loss and statistics in
one read. The gradient needs the final sums, hence a second sweep, backwards, so that it meets first the tiles still
in L2. The JSD needs them already for its loss and sweeps once more.

Bytes per logit of b bytes, loss and gradient together: 2b read and b written, plus the share of another 2b (JSD: 4b)
that L2 has lost by the next sweep. Rows that are not valid are not read.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels._math import (
    advance,
    at_max,
    below,
    beside,
    decay,
    exp,
    first_at_max,
    lacks_any,
    load_tile,
    origin,
    shifted,
    tile_columns,
)

FORWARD = tl.constexpr(0)
REVERSE = tl.constexpr(1)
JSD = tl.constexpr(2)


@triton.jit
def _sums(
    student, teacher, valid, n_cols, inv_t,
    DIVERGENCE: tl.constexpr, LABELS: tl.constexpr, STATS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """First sweep. ``hard`` is the student's Z at T = 1, ``cross`` Σ exp(x/T)·(x_t − x_s), x of the weighting model.

    ``from_t`` is what x_t is counted from and ``gap`` is log(Z_s/Z_t), both Z from the same references as the x.
    """
    zeros = tl.zeros_like(inv_t)
    sum_s, sum_t, cross, hard, depth_s, depth_t = zeros, zeros, zeros, zeros, zeros, zeros
    max_s, max_t, from_t = zeros + float("-inf"), zeros + float("-inf"), zeros
    index_s, index_t = zeros.to(tl.int32), zeros.to(tl.int32)
    infinite = zeros > 0
    stop = n_cols * tl.max(valid.to(tl.int32), axis=0)
    for step in range(0, stop, BLOCK):
        columns = tile_columns(step, n_cols, BLOCK, False)
        s = load_tile(student, valid, columns, n_cols)
        t = load_tile(teacher, valid, columns, n_cols)
        if DIVERGENCE == FORWARD:
            infinite |= lacks_any(s, t)
        if DIVERGENCE == REVERSE:
            infinite |= lacks_any(t, s)
        new_s, x_s, e_s, decay_s, rise_s = advance(s, max_s, inv_t)
        new_t, x_t, e_t, decay_t, rise_t = advance(t, max_t, inv_t)
        if DIVERGENCE == FORWARD:
            cross = shifted(cross, sum_t, rise_t - rise_s, decay_t) + tl.sum(e_t * (x_t - x_s), axis=1)
        if DIVERGENCE == REVERSE:
            new_from = tl.where(new_s > max_s, at_max(x_s, t), from_t)
            y_t = beside(t, new_from)
            cross = shifted(cross, sum_s, new_from - from_t - rise_s, decay_s) + tl.sum(e_s * (y_t - x_s), axis=1)
            from_t = new_from
        if LABELS:
            hard = hard * decay(max_s, new_s, 1.0) + tl.sum(exp(x_s, 1.0), axis=1)
        if STATS:
            depth_s = shifted(depth_s, sum_s, rise_s, decay_s) + tl.sum(e_s * x_s, axis=1)
            depth_t = shifted(depth_t, sum_t, rise_t, decay_t) + tl.sum(e_t * x_t, axis=1)
            index_s = tl.where(new_s > max_s, first_at_max(x_s, columns), index_s)
            index_t = tl.where(new_t > max_t, first_at_max(x_t, columns), index_t)
        sum_s = sum_s * decay_s + tl.sum(e_s, axis=1)
        sum_t = sum_t * decay_t + tl.sum(e_t, axis=1)
        max_s, max_t = new_s, new_t
    entropy_s = tl.log(sum_s) - depth_s / sum_s * inv_t
    entropy_t = tl.log(sum_t) - depth_t / sum_t * inv_t
    gap = tl.log(sum_s / sum_t)
    if DIVERGENCE == REVERSE:
        gap -= (origin(max_t) - from_t) * inv_t
    else:
        from_t = max_t
    return max_s, from_t, sum_s, sum_t, gap, cross, infinite, hard, entropy_s, entropy_t, index_s == index_t


@triton.jit
def _mixture(x_s, x_t, inv_t, sum_s, sum_t, beta):
    """p_s, p_t, log(p_s/m), log(p_t/m), from the larger probability down: the smaller one may vanish."""
    ratio = (x_t - x_s) * inv_t + tl.log(sum_s / sum_t)
    teacher_leads = ratio >= 0
    quotient = exp(-tl.abs(ratio), 1.0)
    larger = exp(tl.where(teacher_leads, x_t, x_s), inv_t) * tl.where(teacher_leads, 1 / sum_t, 1 / sum_s)
    smaller = larger * quotient
    log_larger = -tl.log(tl.where(teacher_leads, beta + (1 - beta) * quotient, 1 - beta + beta * quotient))
    p_s = tl.where(teacher_leads, smaller, larger)
    p_t = tl.where(teacher_leads, larger, smaller)
    return p_s, p_t, log_larger - tl.maximum(ratio, 0.0), log_larger + tl.minimum(ratio, 0.0)


@triton.jit
def _jsd(student, teacher, live, n_cols, inv_t, max_s, max_t, sum_s, sum_t, beta, BLOCK: tl.constexpr):
    """Second sweep of the JSD: the divergence, and KL(p_s ‖ m) for its gradient."""
    loss = tl.zeros_like(inv_t)
    mean = loss
    stop = n_cols * tl.max(live.to(tl.int32), axis=0)
    for step in range(0, stop, BLOCK):
        columns = tile_columns(step, n_cols, BLOCK, True)
        x_s = below(load_tile(student, live, columns, n_cols), max_s)
        x_t = below(load_tile(teacher, live, columns, n_cols), max_t)
        p_s, p_t, to_s, to_t = _mixture(x_s, x_t, inv_t[:, None], sum_s[:, None], sum_t[:, None], beta)
        loss += tl.sum(beta * p_t * to_t + (1 - beta) * p_s * to_s, axis=1)
        mean += tl.sum(p_s * to_s, axis=1)
    return loss, mean


@triton.jit
def _slope(x_s, x_t, inv_t, sum_s, sum_t, mean, beta, DIVERGENCE: tl.constexpr):
    """T · gradient of the divergence in one tile; ``mean`` is the sum over the row in its formula."""
    if DIVERGENCE == FORWARD:
        return exp(x_s, inv_t) * (1 / sum_s) - exp(x_t, inv_t) * (1 / sum_t)
    elif DIVERGENCE == REVERSE:
        return exp(x_s, inv_t) * (1 / sum_s) * (mean - (x_t - x_s) * inv_t)
    else:
        p_s, _, to_s, _ = _mixture(x_s, x_t, inv_t, sum_s, sum_t, beta)
        return (1 - beta) * p_s * (to_s - mean)


@triton.jit(do_not_specialize=["n_rows"])
def _kl_div_kernel(
    student_ptr,  # (N, V)
    teacher_ptr,  # (N, V)
    rows_ptr,  # (N,)
    grad_ptr,  # (N, V), dense, or None
    stats_ptr,  # (4, N) or None
    row_temperature_ptr,  # (N,) or None
    valid_ptr,  # (N,) or None
    labels_ptr,  # (N,) or None
    grad_scale_ptr,  # () or None
    student_stride,
    teacher_stride,
    n_rows,
    n_cols,
    temperature,
    beta,
    cross_entropy_weight,
    DIVERGENCE: tl.constexpr,
    SCALE_BY_TEMPERATURE: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < n_rows
    valid = inside
    if valid_ptr is not None:
        valid = inside & (tl.load(valid_ptr + row, mask=inside, other=0) != 0)
    temperature = temperature + tl.zeros((ROWS,), tl.float32)
    if row_temperature_ptr is not None:
        temperature = tl.load(row_temperature_ptr + row, mask=inside, other=1.0)
    inv_t = 1.0 / temperature
    student = student_ptr + row * student_stride
    teacher = teacher_ptr + row * teacher_stride

    max_s, from_t, sum_s, sum_t, gap, cross, infinite, hard, entropy_s, entropy_t, agree = _sums(
        student, teacher, valid, n_cols, inv_t, DIVERGENCE, labels_ptr is not None, stats_ptr is not None, BLOCK
    )
    empty_s, empty_t = sum_s == 0, sum_t == 0
    infinite |= empty_s != empty_t
    cross_entropy = tl.zeros_like(inv_t)
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row, mask=valid, other=0)
        known = valid & (label >= 0) & (label < n_cols)
        logit = tl.load(student + label, mask=known, other=float("nan")).to(tl.float32)
        cross_entropy = tl.log(hard) - (logit - origin(max_s))
    if CROSS_ENTROPY:
        infinite |= (logit == float("-inf")) & ~empty_s
    live = valid & ~(infinite | empty_s)

    if DIVERGENCE == JSD:
        loss, mean = _jsd(student, teacher, live, n_cols, inv_t, max_s, from_t, sum_s, sum_t, beta, BLOCK)
    else:
        mean = cross / (sum_t if DIVERGENCE == FORWARD else sum_s) * inv_t
        loss = mean + gap
        if DIVERGENCE == REVERSE:
            loss = -loss
    if SCALE_BY_TEMPERATURE:
        loss *= temperature * temperature
    if CROSS_ENTROPY:
        loss += cross_entropy_weight * cross_entropy
    loss = tl.where(live, loss, tl.where(valid & infinite, float("inf"), 0.0))
    tl.store(rows_ptr + row, loss, mask=inside)
    if stats_ptr is not None:
        counted = valid & ~(empty_s | empty_t)
        stats = stats_ptr + row
        tl.store(stats, tl.where(counted, cross_entropy, 0.0), mask=inside)
        tl.store(stats + n_rows, tl.where(counted, entropy_s, 0.0), mask=inside)
        tl.store(stats + n_rows + n_rows, tl.where(counted, entropy_t, 0.0), mask=inside)
        tl.store(stats + n_rows + n_rows + n_rows, tl.where(counted & agree, 1.0, 0.0), mask=inside)

    if grad_ptr is not None:
        grad = grad_ptr + row * n_cols
        scale = temperature if SCALE_BY_TEMPERATURE else inv_t
        hard_scale = cross_entropy_weight
        if CROSS_ENTROPY:
            hard_scale = tl.where(known, cross_entropy_weight, float("nan"))
        if grad_scale_ptr is not None:
            scale *= tl.load(grad_scale_ptr)
            hard_scale *= tl.load(grad_scale_ptr)
        inv_t, sum_s, sum_t, mean = inv_t[:, None], sum_s[:, None], sum_t[:, None], mean[:, None]
        for step in range(0, n_cols, BLOCK):
            columns = tile_columns(step, n_cols, BLOCK, DIVERGENCE != JSD)
            x_s = below(load_tile(student, live, columns, n_cols), max_s)
            t = load_tile(teacher, live, columns, n_cols)
            x_t = beside(t, from_t) if DIVERGENCE == REVERSE else below(t, from_t)
            value = scale[:, None] * _slope(x_s, x_t, inv_t, sum_s, sum_t, mean, beta, DIVERGENCE)
            if CROSS_ENTROPY:
                one_hot = (columns[None, :] == label[:, None]).to(tl.float32)
                value += hard_scale[:, None] * (exp(x_s, 1.0) * (1 / hard[:, None]) - one_hot)
            value = tl.where(live[:, None], value, 0.0).to(grad_ptr.dtype.element_ty)
            tl.store(grad[:, None] + columns[None, :], value, mask=inside[:, None] & (columns < n_cols)[None, :])


class _Tile(NamedTuple):
    rows: int
    columns: int
    num_warps: int
    maxnreg: int | None


def _tile(n_cols: int, divergence: int) -> _Tile:
    """What one program takes at a time.

    Long rows stream through tiles of 16 logits of each model to a thread, which leaves registers for several programs
    on a multiprocessor where a tile as wide as a vocabulary would spill. The JSD holds more of each column at once:
    half of that. The bound on registers is for the JSD and the reverse divergence: ptxas, left to itself, sets one low
    enough to spill a few. Short rows share a program, 8 logits of each model to a thread, but no more than a row to a
    thread: the state of a row takes more registers than a few columns do.
    """
    widest = 2048 if divergence == JSD.value else 4096
    maxnreg = None if divergence == FORWARD.value else 128
    columns = min(triton.next_power_of_2(n_cols), widest)
    return _Tile(min(128, max(1, 1024 // columns)), columns, 8 if columns == widest else 4, maxnreg)


def launch_kl_div(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float,
    row_temperature: Tensor | None,
    divergence: int,
    beta: float,
    valid: Tensor | None,
    labels: Tensor | None,
    cross_entropy_weight: float,
    scale_by_temperature: bool,
    grad_scale: Tensor | None,
    need_grad: bool,
    need_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (N,), ``grad_scale`` · their gradient (N, V) and statistics (4, N); the last two empty unless needed.

    ``student`` and ``teacher`` are (N, V) of one dtype, rows at any stride; columns that are not dense are copied
    first. Values are not checked.
    The statistics are those of ``fastkd.reference.kl_div_stats``. Deterministic: a row belongs to one program.
    """
    n_rows, n_cols = student.shape
    student, teacher = (x if x.stride(1) == 1 else x.contiguous() for x in (student, teacher))
    rows = student.new_empty(n_rows, dtype=torch.float32)
    grad = student.new_empty((n_rows, n_cols) if need_grad else 0)
    stats = student.new_empty((4, n_rows) if need_stats else 0, dtype=torch.float32)
    weighted = cross_entropy_weight != 0
    row_temperature, valid, labels = (
        None if vector is None else vector.contiguous() for vector in (row_temperature, valid, labels)
    )
    tile = _tile(n_cols, divergence)
    with torch.cuda.device_of(student):
        _kl_div_kernel[(triton.cdiv(n_rows, tile.rows),)](
            student, teacher, rows, grad if need_grad else None, stats if need_stats else None,
            row_temperature, valid, labels if weighted or need_stats else None, grad_scale,
            student.stride(0), teacher.stride(0), n_rows, n_cols, temperature, beta, cross_entropy_weight,
            DIVERGENCE=divergence, SCALE_BY_TEMPERATURE=scale_by_temperature, CROSS_ENTROPY=weighted,
            ROWS=tile.rows, BLOCK=tile.columns, num_warps=tile.num_warps, maxnreg=tile.maxnreg,
        )  # fmt: skip
    return rows, grad, stats
