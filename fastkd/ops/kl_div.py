"""``torch.ops.fastkd.kl_div``: loss and gradient in one pass over (N, V) logits, reduced as asked."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import reference
from fastkd.ops import _extension

FORWARD, REVERSE, JSD = range(3)
NONE, SUM, MEAN = range(3)
NAMES = ("forward", "reverse", "jsd")

_OPTIONS = (
    "Tensor? row_temperature, float temperature, int divergence, float beta, Tensor? valid, Tensor? labels, "
    "float cross_entropy_weight, int reduction, Tensor? denominator, bool scale_by_temperature"
)
_extension.define(
    "kl_div",
    f"(Tensor student, Tensor teacher, {_OPTIONS}, bool need_grad, bool need_stats) "
    "-> (Tensor loss, Tensor grad, Tensor stats)",
)
_extension.define(
    "kl_div_",  # the gradient takes the place of the student's logits
    f"(Tensor(a!) student, Tensor teacher, {_OPTIONS}, bool need_stats) -> (Tensor loss, Tensor stats)",
)


class Options(NamedTuple):
    """Arguments of the op between the tensors and the two flags, in the order of its schema."""

    row_temperature: Tensor | None
    temperature: float
    divergence: int
    beta: float
    valid: Tensor | None
    labels: Tensor | None
    cross_entropy_weight: float
    reduction: int
    denominator: Tensor | None
    scale_by_temperature: bool


def kl_div(
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
    reduction: int,
    normalizer: float | Tensor | None,
    scale_by_temperature: bool,
    need_stats: bool,
) -> tuple[Tensor, Tensor]:
    """Checked arguments in, loss () or (N,) and stats (4, N) out; stats are empty unless asked for."""
    denominator = denominator_of(student, valid, reduction, normalizer)
    if _extension.backend("kl_div", student.device.type, student.dtype) == "reference":
        t = temperature if row_temperature is None else row_temperature
        rows = reference.kl_div_rows(
            student,
            teacher,
            temperature=t,
            divergence=NAMES[divergence],
            beta=beta,
            valid=valid,
            labels=labels,
            cross_entropy_weight=cross_entropy_weight,
            scale_by_temperature=scale_by_temperature,
        )
        stats = rows.new_empty(0)
        if need_stats:
            stats = reference.kl_div_stats(student, teacher, temperature=t, valid=valid, labels=labels)
        return reduce(rows, reduction, denominator), stats
    options = Options(
        None if row_temperature is None else row_temperature.float(),
        temperature,
        divergence,
        beta,
        valid,
        labels,
        cross_entropy_weight,
        reduction,
        denominator,
        scale_by_temperature,
    )
    if torch.is_grad_enabled() and student.requires_grad:
        loss, stats = _KLDiv.apply(student, teacher, options, need_stats)  # type: ignore[no-untyped-call]
    else:
        loss, _, stats = torch.ops.fastkd.kl_div(student, teacher, *options, False, need_stats)
    return loss, stats


def reduce(rows: Tensor, reduction: int, denominator: Tensor | None) -> Tensor:
    """Sum of the rows, divided for ``mean`` by the denominator, by default their number."""
    if reduction == NONE:
        return rows
    if reduction == SUM:
        return rows.sum()
    return divided(rows.sum(), rows.shape[0] if denominator is None else denominator)


def divided(total: Tensor, count: Tensor | int) -> Tensor:
    """``total / count``, 0 where that is 0, and so is the gradient: the NaN of 0 / 0 must not be multiplied into it."""
    if isinstance(count, Tensor):
        return torch.where(count == 0, 0.0, total) / torch.where(count == 0, 1.0, count)
    return total / max(count, 1)


def denominator_of(
    student: Tensor, valid: Tensor | None, reduction: int, normalizer: float | Tensor | None
) -> Tensor | None:
    if reduction != MEAN:
        return None
    if normalizer is not None:
        return torch.as_tensor(normalizer, dtype=torch.float32, device=student.device)
    return None if valid is None else valid.sum(dtype=torch.float32)


class _KLDiv(torch.autograd.Function):
    """Gradient in the forward pass. A plain Function: registered autograd costs more per call than a small kernel."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, options: Options, need_stats: bool
    ) -> tuple[Tensor, Tensor]:
        loss, grad, stats = torch.ops.fastkd.kl_div(student, teacher, *options, True, need_stats)
        ctx.mark_non_differentiable(stats)
        ctx.save_for_backward(grad, options.denominator)
        ctx.reduction = options.reduction
        return loss, stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad, denominator = ctx.saved_tensors
        return weighted("kl_div", grad, denominator, ctx.reduction, grad_loss), None, None, None


def weighted(op: str, grad: Tensor, denominator: Tensor | None, reduction: int, grad_loss: Tensor) -> Tensor:
    """The logits' gradient that ``op`` made in its forward pass, times the loss's."""
    compiling = torch.compiler.is_compiling()
    if torch.is_grad_enabled() and not compiling:
        raise RuntimeError(
            f"the fused {op} has no second derivative, which create_graph=True asks for: "
            "use float64 logits or FASTKD_BACKEND=reference"
        )
    if reduction == NONE:
        grad_loss = grad_loss[:, None]
    elif reduction == MEAN and grad.dtype == torch.float16:
        # In half precision 1/N would flush most of the gradient to zero, so the kernels leave it out.
        grad_loss = divided(grad_loss, grad.shape[0] if denominator is None else denominator)
    elif grad.device.type == "cpu" and not compiling and grad_loss.item() == 1.0:
        return grad
    return (grad * grad_loss).to(grad.dtype)


def _fake(student: Tensor, teacher: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *options, need_grad, need_stats = arguments
    rows = student.shape[0]
    loss = student.new_empty((rows,) if Options(*options).reduction == NONE else (), dtype=torch.float32)
    grad = student.new_empty(student.shape if need_grad else (0,))
    stats = student.new_empty((4, rows) if need_stats else (0,), dtype=torch.float32)
    return loss, grad, stats


def _triton(student: Tensor, teacher: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *options, need_grad, need_stats = arguments
    return _launch(student, teacher, Options(*options), need_grad=need_grad, need_stats=need_stats, in_place=False)


def _triton_(student: Tensor, teacher: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *options, need_stats = arguments
    loss, _, stats = _launch(student, teacher, Options(*options), need_grad=True, need_stats=need_stats, in_place=True)
    return loss, stats


def _launch(student: Tensor, teacher: Tensor, options: Options, **wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
    from fastkd.kernels.kl_div import launch_kl_div

    rows, grad, stats = launch_kl_div(
        student,
        teacher,
        temperature=options.temperature,
        row_temperature=options.row_temperature,
        divergence=options.divergence,
        beta=options.beta,
        valid=options.valid,
        labels=options.labels,
        cross_entropy_weight=options.cross_entropy_weight,
        scale_by_temperature=options.scale_by_temperature,
        grad_scale=grad_scale_of(student, options.reduction, options.denominator),
        **wanted,
    )
    return reduce(rows, options.reduction, options.denominator), grad, stats


def grad_scale_of(student: Tensor, reduction: int, denominator: Tensor | None) -> Tensor | None:
    """What a Triton kernel multiplies the gradient of its rows by; None for 1."""
    if reduction != MEAN or student.dtype == torch.float16:
        return None
    if denominator is None:
        denominator = torch.full((), student.shape[0], dtype=torch.float32, device=student.device)
    return torch.where(denominator == 0, 0.0, 1.0 / denominator)


def _fake_(student: Tensor, teacher: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *options, need_stats = arguments
    loss, _, stats = _fake(student, teacher, *options, False, need_stats)
    return loss, stats


torch.library.register_fake("fastkd::kl_div_", _fake_)
torch.library.register_kernel("fastkd::kl_div_", "cuda", _triton_)
torch.library.register_fake("fastkd::kl_div", _fake)
torch.library.register_kernel("fastkd::kl_div", "cuda", _triton)
