"""``torch.ops.fastkd.topk_kl_div``: loss and gradient of (N, V) logits against a teacher of k columns per row.

It is ``kl_div`` over a row's outcomes: the listed columns and, where the teacher has one value more than ids, the rest
of the vocabulary as one outcome. What a tail means is settled here, once for all backends.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import reference
from fastkd.ops import _extension
from fastkd.ops.kl_div import NAMES, NONE, denominator_of, grad_scale_of, reduce, weighted
from fastkd.reference.topk_kl_div import probability_mass, rest_of, unnormalized

_OPTIONS = (
    "Tensor ids, Tensor teacher, Tensor? row_temperature, float temperature, int divergence, float beta, "
    "Tensor? valid, Tensor? row_weight, int reduction, Tensor? denominator, bool scale_by_temperature"
)
_extension.define("topk_kl_div", f"(Tensor student, {_OPTIONS}, bool need_grad) -> (Tensor loss, Tensor grad)")
_extension.define(
    "topk_kl_div_",  # the gradient takes the place of the student's logits
    f"(Tensor(a!) student, {_OPTIONS}) -> Tensor",
)


class Teacher(NamedTuple):
    """What is known of each row's teacher."""

    ids: Tensor
    """(N, k) int64, ascending, distinct but for the −1 that list nothing."""
    log_probs: Tensor
    """(N, k) at the loss's temperature; up to a constant per row where the tail is ``"renormalize"``."""
    tail: str


class Options(NamedTuple):
    """Arguments of the op between the student's logits and the flag, in the order of its schema."""

    ids: Tensor
    outcomes: Tensor
    """(N, k or k + 1) logits of the teacher, float32; the last of k + 1 is that of the rest."""
    row_temperature: Tensor | None
    temperature: float
    divergence: int
    beta: float
    valid: Tensor | None
    row_weight: Tensor | None
    reduction: int
    denominator: Tensor | None
    scale_by_temperature: bool


def topk_kl_div(
    student: Tensor,
    teacher: Teacher,
    *,
    temperature: float,
    row_temperature: Tensor | None,
    divergence: int,
    beta: float,
    valid: Tensor | None,
    reduction: int,
    normalizer: float | Tensor | None,
    scale_by_temperature: bool,
) -> Tensor:
    """Checked arguments in, loss () or (N,) out."""
    denominator = denominator_of(student, valid, reduction, normalizer)
    t = temperature if row_temperature is None else row_temperature.float()
    if _extension.backend("topk_kl_div", student.device.type, student.dtype) == "reference":
        rows = reference.topk_kl_div_rows(
            student,
            teacher.ids,
            teacher.log_probs,
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
        None if row_temperature is None else row_temperature.float(),
        temperature,
        divergence,
        beta,
        valid,
        mass,
        reduction,
        denominator,
        scale_by_temperature,
    )
    if torch.is_grad_enabled() and student.requires_grad:
        loss: Tensor = _TopkKLDiv.apply(student, options)  # type: ignore[no-untyped-call]
    else:
        loss, _ = torch.ops.fastkd.topk_kl_div(student, *options, False)
    if mass is None:
        return loss
    assert valid is not None
    surprise = unnormalized(torch.zeros_like(mass), mass, valid, t, scale_by_temperature)
    return loss + reduce(surprise, reduction, denominator)


def prepare(
    teacher: Teacher, temperature: float | Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The teacher's outcomes, for ``"zero"`` each row's mass, and which rows take part."""
    log_probs = teacher.log_probs.float().masked_fill(teacher.ids < 0, float("-inf"))
    mass = None
    if teacher.tail != "renormalize":
        total = probability_mass(log_probs)
        rest = rest_of(total).float()
        if teacher.tail == "zero":
            mass, rest = total.float(), torch.full_like(rest, float("-inf"))
            valid = mass != 0 if valid is None else valid & (mass != 0)
            mass = mass.where(valid, 0.0)  # a NaN of a row that does not count must not be multiplied into it
        log_probs = torch.cat((log_probs, rest[:, None]), -1)
    scale = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    return log_probs * scale, mass, valid


class _TopkKLDiv(torch.autograd.Function):
    """Gradient in the forward pass, as of ``kl_div``."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, options: Options) -> Tensor:
        loss, grad = torch.ops.fastkd.topk_kl_div(student, *options, True)
        ctx.save_for_backward(grad, options.denominator)
        ctx.reduction = options.reduction
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad, denominator = ctx.saved_tensors
        return weighted("topk_kl_div", grad, denominator, ctx.reduction, grad_loss), None


def _fake(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *options, need_grad = arguments
    loss = student.new_empty((student.shape[0],) if Options(*options).reduction == NONE else (), dtype=torch.float32)
    return loss, student.new_empty(student.shape if need_grad else (0,))


def _fake_(student: Tensor, *options: Any) -> Tensor:
    return _fake(student, *options, False)[0]


def _triton(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *options, need_grad = arguments
    return _launch(student, Options(*options), need_grad=need_grad, in_place=False)


def _triton_(student: Tensor, *options: Any) -> Tensor:
    return _launch(student, Options(*options), need_grad=True, in_place=True)[0]


def _launch(student: Tensor, options: Options, **wanted: bool) -> tuple[Tensor, Tensor]:
    from fastkd.kernels.topk_kl_div import launch_topk_kl_div

    rows, grad = launch_topk_kl_div(
        student,
        options.ids,
        options.outcomes,
        temperature=options.temperature,
        row_temperature=options.row_temperature,
        divergence=options.divergence,
        beta=options.beta,
        valid=options.valid,
        row_weight=options.row_weight,
        scale_by_temperature=options.scale_by_temperature,
        grad_scale=grad_scale_of(student, options.reduction, options.denominator),
        **wanted,
    )
    return reduce(rows, options.reduction, options.denominator), grad


torch.library.register_fake("fastkd::topk_kl_div_", _fake_)
torch.library.register_kernel("fastkd::topk_kl_div_", "cuda", _triton_)
torch.library.register_fake("fastkd::topk_kl_div", _fake)
torch.library.register_kernel("fastkd::topk_kl_div", "cuda", _triton)
