"""``torch.ops.fastkd.mse``: squared errors of many pairs of (N, d), their gradients and weighted total in one call."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import reference
from fastkd.ops import _extension
from fastkd.ops.kl_div import MEAN, divided, reduce

_extension.define(
    "mse",
    "(Tensor[] students, Tensor[] teachers, Tensor? valid, Tensor weights, Tensor denominators, "
    "bool[] need_grad) -> (Tensor total, Tensor parts, Tensor[] grads)",
)


def mse(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    *,
    valid: Tensor | None,
    weights: Tensor,
    reduction: int,
    normalizer: float | Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Checked pairs of (N, d) in, weighted total () and one value per pair (P,) out; only the total has a gradient."""
    first = students[0]
    denominators = _denominators(students, valid, reduction, normalizer)
    dtypes = {student.dtype for student in students}
    backends = {_extension.backend("mse", first.device.type, dtype) for dtype in dtypes}
    if "reference" in backends:
        parts = torch.stack(
            [
                reduce(reference.mse_rows(student, teacher, valid=valid), MEAN, count)
                for student, teacher, count in zip(students, teachers, denominators.unbind(), strict=True)
            ]
        )
        return (weights.to(parts.dtype) * parts).sum(), parts.detach()
    if torch.is_grad_enabled() and any(student.requires_grad for student in students):
        shared = (tuple(teachers), valid, weights, denominators)
        total, parts = _MSE.apply(shared, *students)  # type: ignore[no-untyped-call]
    else:
        nothing = [False] * len(students)
        total, parts, _ = torch.ops.fastkd.mse(students, teachers, valid, weights, denominators, nothing)
    return total, parts


def _denominators(
    students: Sequence[Tensor], valid: Tensor | None, reduction: int, normalizer: float | Tensor | None
) -> Tensor:
    device = students[0].device
    if reduction != MEAN:
        return torch.ones(len(students), device=device)
    if normalizer is not None:
        return torch.as_tensor(normalizer, dtype=torch.float32, device=device).expand(len(students)).contiguous()
    if valid is not None:
        return valid.sum(dtype=torch.float32).expand(len(students)).contiguous()
    return torch.tensor([float(student.shape[0]) for student in students], device=device)


class _MSE(torch.autograd.Function):
    """Gradients in the forward pass, each multiplied by one number in backward."""

    @staticmethod
    def forward(ctx: Any, shared: tuple[Any, ...], *students: Tensor) -> tuple[Tensor, Tensor]:
        teachers, valid, weights, denominators = shared
        needs = [student.requires_grad for student in students]
        total, parts, grads = torch.ops.fastkd.mse(students, teachers, valid, weights, denominators, needs)
        ctx.mark_non_differentiable(parts)
        ctx.save_for_backward(weights, denominators, *grads)
        ctx.needs = needs
        return total, parts

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        compiling = torch.compiler.is_compiling()
        if torch.is_grad_enabled() and not compiling:
            raise RuntimeError(
                "the fused mse has no second derivative, which create_graph=True asks for: "
                "use float64 tensors or FASTKD_BACKEND=reference"
            )
        weights, denominators, *grads = ctx.saved_tensors
        unscaled = grad_total.device.type == "cpu" and not compiling and grad_total.item() == 1.0
        shares = divided(weights, denominators) * grad_total

        def scaled(grad: Tensor, share: Tensor) -> Tensor:
            if grad.dtype == torch.float16:  # the kernels leave the share out, which would flush most of it to zero
                return (grad * share).to(grad.dtype)
            return grad if unscaled else (grad * grad_total).to(grad.dtype)

        pairs = zip(grads, shares.unbind(), ctx.needs, strict=True)
        return None, *(scaled(grad, share) if needed else None for grad, share, needed in pairs)


def _fake(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    valid: Tensor | None,
    weights: Tensor,
    denominators: Tensor,
    need_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    parts = weights.new_empty(len(students))
    grads = [s.new_empty(s.shape if needed else (0,)) for s, needed in zip(students, need_grad, strict=True)]
    return weights.new_empty(()), parts, grads


def _triton(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    valid: Tensor | None,
    weights: Tensor,
    denominators: Tensor,
    need_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    from fastkd.kernels.mse import launch_squared_error

    inverse = torch.where(denominators == 0, 0.0, 1.0 / denominators)
    scale = None if valid is None else valid.float()
    sums, grads = [], []
    for student, teacher, share, needed in zip(
        students, teachers, (weights * inverse).unbind(), need_grad, strict=True
    ):
        grad = student.new_empty(student.shape if needed else (0,))
        factor = None if student.dtype == torch.float16 else share
        losses = launch_squared_error(student, teacher, scale=scale, factor=factor, grad=grad if needed else None)
        sums.append(losses.sum())
        grads.append(grad)
    parts = torch.stack(sums) * inverse
    return (weights * parts).sum(), parts, grads


torch.library.register_fake("fastkd::mse", _fake)
torch.library.register_kernel("fastkd::mse", "cuda", _triton)
