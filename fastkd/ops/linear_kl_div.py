"""``torch.ops.fastkd.linear_kl_div``: divergence of two heads' logits, of which only a few rows exist at a time.

Four matrix products (the logits of both models, the gradients of the student's hidden states and weight), three where
the head is frozen, two without gradient: the gradient of a chunk of logits takes their place as soon as they are there.
"""

from operator import add
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import reference
from fastkd.ops import _extension
from fastkd.ops._heads import Gradients, Head, through_softcap
from fastkd.ops.kl_div import MEAN, NAMES, NONE, denominator_of, reduce

LEAST_BUDGET = 44 * 2**20

_extension.define(
    "linear_kl_div",
    "(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor teacher_hidden, "
    "Tensor teacher_weight, Tensor? teacher_bias, float student_scale, float teacher_scale, float? student_softcap, "
    "float? teacher_softcap, Tensor? row_temperature, float temperature, int divergence, float beta, Tensor? valid, "
    "Tensor? labels, float cross_entropy_weight, bool scale_by_temperature, int memory_budget, Tensor? row_weight, "
    "bool need_hidden, bool need_weight, bool need_bias) -> (Tensor rows, Tensor hidden, Tensor weight, Tensor bias)",
)


class Options(NamedTuple):
    """Arguments of the op from the teacher's hidden states to the memory budget, in the order of its schema."""

    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None
    student_scale: float
    teacher_scale: float
    student_softcap: float | None
    teacher_softcap: float | None
    row_temperature: Tensor | None
    temperature: float
    divergence: int
    beta: float
    valid: Tensor | None
    labels: Tensor | None
    cross_entropy_weight: float
    scale_by_temperature: bool
    memory_budget: int


def linear_kl_div(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    options: Options,
    reduction: int,
    normalizer: float | Tensor | None,
) -> Tensor:
    """Checked arguments in, loss () or (N,) out."""
    denominator = denominator_of(student_hidden, options.valid, reduction, normalizer)
    student = (student_hidden, student_weight, student_bias)
    if _extension.backend("linear_kl_div", student_hidden.device.type, student_hidden.dtype) == "reference":
        return reduce(_reference(student, options), reduction, denominator)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in student):
        return differentiable("linear_kl_div", student, options, reduction, denominator)
    rows = torch.ops.fastkd.linear_kl_div(*student, *options, None, False, False, False)[0]
    return reduce(rows, reduction, denominator)


def _reference(student: tuple[Tensor, Tensor, Tensor | None], options: Options) -> Tensor:
    temperature = options.temperature if options.row_temperature is None else options.row_temperature
    return reference.linear_kl_div_rows(
        *student,
        options.teacher_hidden,
        options.teacher_weight,
        options.teacher_bias,
        student_scale=options.student_scale,
        teacher_scale=options.teacher_scale,
        student_softcap=options.student_softcap,
        teacher_softcap=options.teacher_softcap,
        temperature=temperature,
        divergence=NAMES[options.divergence],
        beta=options.beta,
        valid=options.valid,
        labels=options.labels,
        cross_entropy_weight=options.cross_entropy_weight,
        scale_by_temperature=options.scale_by_temperature,
    )


def differentiable(
    op: str, student: tuple[Tensor, Tensor, Tensor | None], options: Any, reduction: int, denominator: Tensor | None
) -> Tensor:
    """Reduced loss of an ``op`` that takes hidden states, weight and bias, its options, row weights and what to make.

    Gradients in the forward pass; unreduced losses, whose weights are not known there, are computed once more.
    """
    loss: Tensor = _Linear.apply(*student, op, options, reduction, denominator)  # type: ignore[no-untyped-call]
    return loss


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        op: str,
        options: Any,
        reduction: int,
        denominator: Tensor | None,
    ) -> Tensor:
        ctx.op = op
        evaluate = getattr(torch.ops.fastkd, op)
        ctx.unreduced = reduction == NONE
        ctx.has_bias = bias is not None
        needed = ctx.needs_input_grad[:3]
        if ctx.unreduced:
            ctx.save_for_backward(hidden, weight, bias)
            ctx.options = options
            rows: Tensor = evaluate(hidden, weight, bias, *options, None, False, False, False)[0]
            return rows
        scale = hidden.new_full((), 1 / max(len(hidden), 1) if reduction == MEAN else 1.0, dtype=torch.float32)
        if denominator is not None:
            scale = torch.where(denominator == 0, 0.0, 1 / denominator)
        rows, *grads = evaluate(hidden, weight, bias, *options, scale, *needed)
        ctx.save_for_backward(*grads)
        return reduce(rows, reduction, denominator)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        compiling = torch.compiler.is_compiling()
        if torch.is_grad_enabled() and not compiling:
            raise RuntimeError(
                f"the fused {ctx.op} has no second derivative, which create_graph=True asks for: "
                "use float64 tensors or FASTKD_BACKEND=reference"
            )
        needed = ctx.needs_input_grad[:3]
        if ctx.unreduced:
            hidden, weight, bias = ctx.saved_tensors
            evaluate = getattr(torch.ops.fastkd, ctx.op)
            grads = evaluate(hidden, weight, bias, *ctx.options, grad_loss, *needed)[1:]
        else:
            grads = ctx.saved_tensors
            if compiling or grad_loss.device.type != "cpu" or grad_loss.item() != 1.0:
                grads = [(grad * grad_loss).to(grad.dtype) for grad in grads]
        return (*(grad if need else None for grad, need in zip(grads, needed, strict=True)), *(None,) * 4)


def _default_budget(weight: Tensor) -> int:
    """Bytes for logits, from what it costs to sum the weight's gradient over chunks.

    In float32 the sum is read and written once per chunk: 3/16 of its size keeps that below a tenth of the time. In
    half precision many chunks need a float32 sum and a product beside it, three times the weight: few chunks of that
    size are faster and no larger.
    """
    return max(LEAST_BUDGET, weight.nbytes * 3 // 16 if weight.dtype == torch.float32 else 3 * weight.nbytes)


def rows_within(budget: int, weight: Tensor) -> int:
    """How many rows of logits take ``budget`` bytes (0: the default), at least two."""
    return max((budget or _default_budget(weight)) // (len(weight) * weight.element_size()), 2)


def evenly(start: int, stop: int, most: int) -> list[slice]:
    """From ``start`` to ``stop`` in as few parts of at most ``most`` as there can be, of nearly one size."""
    count = -(-(stop - start) // most)
    size = -(-(stop - start) // max(count, 1))
    return [slice(first, min(first + size, stop)) for first in range(start, stop, max(size, 1))]


def plan(rows: int, most: int, lent: int) -> list[tuple[slice, int]]:
    """Chunks of the student's rows, and how many of the teacher's rows have logits beside theirs, ``most`` together.

    For ``lent`` rows the teacher has other memory, during the first chunk alone. Each chunk reads the weights anew for
    every product, so few large chunks are fast; the teacher, who has one product of four, is given three eighths.
    """
    first = min(rows, lent, most)
    rest = evenly(first, rows, max(5 * most // 8, 1))
    beside = most - (rest[0].stop - rest[0].start) if rest else 0
    return [(slice(0, first), first)] * bool(first) + [(part, min(part.stop - part.start, beside)) for part in rest]


def _fused(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *values, row_weight, need_hidden, need_weight, need_bias = arguments
    options = Options(*values)
    index = None if options.valid is None else options.valid.nonzero().squeeze(1)

    def counted(x: Tensor | None) -> Any:
        """The rows that count: the others take no part in any product."""
        return x if x is None or x.dim() == 0 or index is None else x[index]

    options = options._replace(
        valid=None, row_temperature=counted(options.row_temperature), labels=counted(options.labels)
    )
    student = Head(counted(hidden), weight, bias, options.student_scale, options.student_softcap)
    teacher = Head(
        counted(options.teacher_hidden),
        options.teacher_weight,
        options.teacher_bias,
        options.teacher_scale,
        options.teacher_softcap,
    )
    count, vocabulary = len(student.hidden), len(weight)
    gradients = Gradients(student, counted(row_weight), need_hidden, need_weight, need_bias)
    alike = teacher.hidden.dtype == hidden.dtype
    lent = gradients.memory if alike else None
    chunks = plan(count, rows_within(options.memory_budget, weight), 0 if lent is None else weight.shape[1])
    beside = [theirs if alike and (lent is None or rows.start > 0) else 0 for rows, theirs in chunks]
    sizes = [rows.stop - rows.start for rows, _ in chunks]
    buffer = hidden.new_empty(max(map(add, sizes, beside), default=0), vocabulary)
    losses = hidden.new_empty(count, dtype=torch.float32)
    for (rows, theirs), size in zip(chunks, sizes, strict=True):
        logits, memory = student.logits(rows, buffer[:size]), buffer[size:]
        if lent is not None and rows.start == 0:
            memory = lent.view(-1, vocabulary)
        elif not alike:
            memory = teacher.hidden.new_empty(theirs, vocabulary)
        for start in range(rows.start, rows.stop, theirs):
            part = slice(start, min(start + theirs, rows.stop))
            ours = logits[start - rows.start : part.stop - rows.start]
            taught = teacher.logits(part, memory[: part.stop - start])
            losses[part] = _divergence(ours, taught, part, options, gradients.needed)
        gradients.add(rows, logits, len(chunks))
    return gradients.results(losses, index, hidden.shape[0])


def _divergence(student: Tensor, teacher: Tensor, rows: slice, options: Options, need_grad: bool) -> Tensor:
    """Losses of some rows; leaves the gradient in place of the student's logits when it is needed."""
    arguments = (
        student,
        teacher.to(student.dtype),
        None if options.row_temperature is None else options.row_temperature[rows],
        options.temperature,
        options.divergence,
        options.beta,
        None,
        None if options.labels is None else options.labels[rows],
        options.cross_entropy_weight,
        NONE,
        None,
        options.scale_by_temperature,
    )
    if not need_grad:
        loss: Tensor = torch.ops.fastkd.kl_div(*arguments, False, False)[0]
        return loss
    return through_softcap(student, options.student_softcap, lambda: torch.ops.fastkd.kl_div_(*arguments, False)[0])


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    *_, need_hidden, need_weight, need_bias = arguments
    needs = ((hidden, need_hidden), (weight, need_weight), (bias, need_bias))
    grads = (hidden.new_empty(x.shape if need and x is not None else (0,)) for x, need in needs)
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32), *grads


torch.library.register_fake("fastkd::linear_kl_div", _fake)
torch.library.register_kernel("fastkd::linear_kl_div", ("cpu", "cuda"), _fused)
