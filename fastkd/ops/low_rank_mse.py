"""``torch.ops.fastkd.low_rank_mse``: loss, gradients and projection of (N, d_in) rows, reduced as asked.

A scalar loss alone takes its gradients along in the forward pass. Where gradients still depend on what comes from
above, row by row (``reduction="none"``) or through the projection, they are made in the backward pass, by the same op.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import reference
from fastkd.ops import _extension
from fastkd.ops.kl_div import MEAN, NONE, SUM, denominator_of, divided, reduce

_extension.define(
    "low_rank_mse",
    "(Tensor x, Tensor down, Tensor up, Tensor target, Tensor? bias, Tensor? valid, Tensor? weights, "
    "Tensor? output, Tensor? grad_output, int reduction, Tensor? denominator, bool need_x, bool need_down, "
    "bool need_up, bool need_bias, bool need_output) -> (Tensor loss, Tensor grad_x, Tensor grad_down, "
    "Tensor grad_up, Tensor grad_bias, Tensor projection)",
)

Needs = tuple[bool, bool, bool, bool]
"""Whether x, down, up and bias want a gradient."""

NO_GRADIENTS: Needs = (False, False, False, False)


class Rows(NamedTuple):
    """What the rows are held against, and how their losses become one."""

    target: Tensor
    valid: Tensor | None
    weights: Tensor | None
    reduction: int
    denominator: Tensor | None


def low_rank_mse(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    valid: Tensor | None,
    weights: Tensor | None,
    reduction: int,
    normalizer: float | Tensor | None,
    need_output: bool,
) -> tuple[Tensor, Tensor]:
    """Checked arguments in, loss () or (N,) and projection (N, d_out) out; that is empty unless asked for."""
    denominator = denominator_of(x, valid, reduction, normalizer)
    if _extension.backend("low_rank_mse", x.device.type, x.dtype) == "reference":
        losses, projection = reference.low_rank_mse_rows(
            x, down, up, target, bias=bias, valid=valid, weights=weights, all_rows=need_output
        )
        return reduce(losses, reduction, denominator), projection
    rows = Rows(target, valid, None if weights is None else weights.float(), reduction, denominator)
    needs: Needs = (x.requires_grad, down.requires_grad, up.requires_grad, bias is not None and bias.requires_grad)
    if not torch.is_grad_enabled() or not any(needs):
        loss, *_, projection = _call(x, down, up, bias, rows, NO_GRADIENTS, need_output)
    elif need_output or reduction == NONE:
        loss, projection = _Deferred.apply(x, down, up, bias, rows, needs, need_output)  # type: ignore[no-untyped-call]
    else:
        loss = _InForward.apply(x, down, up, bias, rows, needs)  # type: ignore[no-untyped-call]
        projection = x.new_empty(0)
    return loss, projection


def _call(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    rows: Rows,
    needs: Needs,
    need_output: bool = False,
    output: Tensor | None = None,
    grad_output: Tensor | None = None,
) -> tuple[Tensor, ...]:
    results: tuple[Tensor, ...] = torch.ops.fastkd.low_rank_mse(
        x,
        down,
        up,
        rows.target,
        None if bias is None else bias.float(),
        rows.valid,
        rows.weights,
        output,
        grad_output,
        rows.reduction,
        rows.denominator,
        *needs,
        need_output,
    )
    return results


def _wanted(grads: tuple[Tensor, ...], needs: Needs) -> list[Tensor | None]:
    return [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "the fused low_rank_mse has no second derivative, which create_graph=True asks for: "
            "use float64 tensors or FASTKD_BACKEND=reference"
        )


class _InForward(torch.autograd.Function):
    """A scalar loss: all gradients come out of its own pass, scaled by one number in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, rows: Rows, needs: Needs) -> Tensor:
        loss, *grads, _ = _call(x, down, up, bias, rows, needs)
        ctx.save_for_backward(*grads, rows.denominator)
        ctx.needs, ctx.reduction, ctx.rows = needs, rows.reduction, x.shape[0]
        ctx.bias_dtype = torch.float32 if bias is None else bias.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        *grads, denominator = ctx.saved_tensors
        if ctx.reduction == MEAN and grads[0].dtype == torch.float16:
            # In half precision 1/N would flush most of the gradient to zero, so the kernels leave it out.
            grad_loss = divided(grad_loss, ctx.rows if denominator is None else denominator)
        elif grads[0].device.type == "cpu" and not torch.compiler.is_compiling() and grad_loss.item() == 1.0:
            return *_wanted((*grads[:3], grads[3].to(ctx.bias_dtype)), ctx.needs), None, None
        scaled = [(grad * grad_loss).to(grad.dtype) for grad in grads]
        return *_wanted((*scaled[:3], scaled[3].to(ctx.bias_dtype)), ctx.needs), None, None


class _Deferred(torch.autograd.Function):
    """Losses of rows, or a loss and the projection: the gradients of both come out of one pass in backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, rows: Rows, needs: Needs, need_output: bool
    ) -> tuple[Tensor, Tensor]:
        loss, *_, projection = _call(x, down, up, bias, rows, NO_GRADIENTS, need_output)
        saved = (x, down, up, bias, rows.target, rows.valid, rows.weights, rows.denominator)
        ctx.save_for_backward(*saved, projection if need_output else None)
        ctx.needs, ctx.reduction = needs, rows.reduction
        ctx.set_materialize_grads(False)
        if not need_output:
            ctx.mark_non_differentiable(projection)
        return loss, projection

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        x, down, up, bias, target, valid, weights, denominator, output = ctx.saved_tensors
        per_row = x.new_zeros(x.shape[0], dtype=torch.float32) if grad_loss is None else grad_loss
        if grad_loss is not None and ctx.reduction == MEAN:
            per_row = divided(grad_loss, x.shape[0] if denominator is None else denominator)
        per_row = per_row.expand(x.shape[0])
        rows = Rows(target, valid, per_row if weights is None else per_row * weights, SUM, None)
        if output is None:
            grad_output = None
        _, *grads, _ = _call(x, down, up, bias, rows, ctx.needs, False, output, grad_output)
        if bias is not None:
            grads[3] = grads[3].to(bias.dtype)
        return *_wanted(tuple(grads), ctx.needs), None, None, None


def _fake(x: Tensor, down: Tensor, up: Tensor, target: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    _, _, _, _, _, reduction, _, need_x, need_down, need_up, need_bias, need_output = arguments
    return (
        x.new_empty((x.shape[0],) if reduction == NONE else (), dtype=torch.float32),
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty(down.shape if need_down else (0,)),
        x.new_empty(up.shape if need_up else (0,)),
        x.new_empty((up.shape[0],) if need_bias else (0,), dtype=torch.float32),
        x.new_empty((x.shape[0], up.shape[0]) if need_output else (0,)),
    )


def _triton(x: Tensor, down: Tensor, up: Tensor, target: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    from fastkd.kernels.low_rank_mse import launch_low_rank_mse

    bias, valid, weights, output, grad_output, reduction, denominator, *needs, need_output = arguments
    scale = None if weights is None else weights.contiguous()
    if valid is not None:
        scale = valid.float() if scale is None else torch.where(valid, scale, 0.0)
    divisor = None
    if reduction == MEAN and x.dtype != torch.float16:
        divisor = (
            torch.full((), x.shape[0], dtype=torch.float32, device=x.device) if denominator is None else denominator
        )
    losses, *grads, projection = launch_low_rank_mse(
        x,
        down,
        up,
        target,
        bias=bias,
        scale=scale,
        divisor=divisor,
        output=output,
        grad_output=grad_output,
        needs=tuple(needs),
        need_output=need_output,
    )
    return reduce(losses, reduction, denominator), *grads, projection


torch.library.register_fake("fastkd::low_rank_mse", _fake)
torch.library.register_kernel("fastkd::low_rank_mse", "cuda", _triton)
