"""``torch.ops.fastkd.linear_topk_kl_div``: a head's logits, a few rows at a time, against a teacher's top k.

Three matrix products (the student's logits, the gradients of its hidden states and weight), two where the head is
frozen, one without gradient.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import reference
from fastkd.ops import _extension
from fastkd.ops._heads import Gradients, Head, through_softcap
from fastkd.ops.kl_div import NAMES, NONE, denominator_of, reduce
from fastkd.ops.linear_kl_div import differentiable, evenly, rows_within
from fastkd.ops.topk_kl_div import Teacher, prepare
from fastkd.reference.topk_kl_div import unnormalized

_extension.define(
    "linear_topk_kl_div",
    "(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor ids, Tensor teacher, "
    "float student_scale, float? student_softcap, Tensor? row_temperature, float temperature, int divergence, "
    "float beta, Tensor? valid, Tensor? mass, bool scale_by_temperature, int memory_budget, Tensor? row_weight, "
    "bool need_hidden, bool need_weight, bool need_bias) -> (Tensor rows, Tensor hidden, Tensor weight, Tensor bias)",
)


class Options(NamedTuple):
    """Arguments of the op from the teacher's ids to the memory budget, in the order of its schema."""

    ids: Tensor
    outcomes: Tensor
    student_scale: float
    student_softcap: float | None
    row_temperature: Tensor | None
    temperature: float
    divergence: int
    beta: float
    valid: Tensor | None
    mass: Tensor | None
    scale_by_temperature: bool
    memory_budget: int


def linear_topk_kl_div(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher: Teacher,
    *,
    student_scale: float,
    student_softcap: float | None,
    temperature: float,
    row_temperature: Tensor | None,
    divergence: int,
    beta: float,
    valid: Tensor | None,
    reduction: int,
    normalizer: float | Tensor | None,
    scale_by_temperature: bool,
    memory_budget: int,
) -> Tensor:
    """Checked arguments in, loss () or (N,) out."""
    denominator = denominator_of(student_hidden, valid, reduction, normalizer)
    student = (student_hidden, student_weight, student_bias)
    row_temperature = None if row_temperature is None else row_temperature.float()
    t = temperature if row_temperature is None else row_temperature
    if _extension.backend("linear_topk_kl_div", student_hidden.device.type, student_hidden.dtype) == "reference":
        rows = reference.linear_topk_kl_div_rows(
            *student,
            teacher.ids,
            teacher.log_probs,
            student_scale=student_scale,
            student_softcap=student_softcap,
            tail=teacher.tail,
            temperature=t,
            divergence=NAMES[divergence],
            beta=beta,
            valid=valid,
            scale_by_temperature=scale_by_temperature,
        )
        return reduce(rows, reduction, denominator)
    outcomes, mass, valid = prepare(teacher, t, valid)
    options = Options(
        teacher.ids,
        outcomes,
        student_scale,
        student_softcap,
        row_temperature,
        temperature,
        divergence,
        beta,
        valid,
        mass,
        scale_by_temperature,
        memory_budget,
    )
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in student):
        loss = differentiable("linear_topk_kl_div", student, options, reduction, denominator)
    else:
        rows = torch.ops.fastkd.linear_topk_kl_div(*student, *options, None, False, False, False)[0]
        loss = reduce(rows, reduction, denominator)
    if mass is None:
        return loss
    assert valid is not None
    return loss + reduce(
        unnormalized(torch.zeros_like(mass), mass, valid, t, scale_by_temperature), reduction, denominator
    )


def _fused(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *values, row_weight, need_hidden, need_weight, need_bias = arguments
    options = Options(*values)
    index = None if options.valid is None else options.valid.nonzero().squeeze(1)

    def counted(x: Tensor | None) -> Any:
        """The rows that count: the others take no part in any product."""
        return x if x is None or x.dim() == 0 or index is None else x[index]

    student = Head(counted(hidden), weight, bias, options.student_scale, options.student_softcap)
    count = len(student.hidden)
    chunks = evenly(0, count, rows_within(options.memory_budget, weight))
    gradients = Gradients(student, counted(row_weight), need_hidden, need_weight, need_bias)
    buffer = hidden.new_empty(max((rows.stop - rows.start for rows in chunks), default=0), len(weight))
    per_row: list[Any] = [counted(x) for x in (options.ids, options.outcomes, options.row_temperature, options.mass)]
    losses = hidden.new_empty(count, dtype=torch.float32)
    for rows in chunks:
        logits = student.logits(rows, buffer[: rows.stop - rows.start])
        ids, outcomes, temperature, mass = (x if x is None else x[rows] for x in per_row)
        losses[rows] = _divergence(logits, ids, outcomes, temperature, mass, options, gradients.needed)
        gradients.add(rows, logits, len(chunks))
    return gradients.results(losses, index, hidden.shape[0])


def _divergence(
    student: Tensor,
    ids: Any,
    outcomes: Any,
    row_temperature: Tensor | None,
    mass: Tensor | None,
    options: Options,
    need_grad: bool,
) -> Tensor:
    """Losses of some rows; leaves the gradient in place of the student's logits when it is needed."""
    arguments = (
        student,
        ids,
        outcomes,
        row_temperature,
        options.temperature,
        options.divergence,
        options.beta,
        None,
        mass,
        NONE,
        None,
        options.scale_by_temperature,
    )
    if not need_grad:
        loss: Tensor = torch.ops.fastkd.topk_kl_div(*arguments, False)[0]
        return loss
    return through_softcap(student, options.student_softcap, lambda: torch.ops.fastkd.topk_kl_div_(*arguments))


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    *_, need_hidden, need_weight, need_bias = arguments
    needs = ((hidden, need_hidden), (weight, need_weight), (bias, need_bias))
    grads = (hidden.new_empty(x.shape if need and x is not None else (0,)) for x, need in needs)
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32), *grads


torch.library.register_fake("fastkd::linear_topk_kl_div", _fake)
torch.library.register_kernel("fastkd::linear_topk_kl_div", ("cpu", "cuda"), _fused)
