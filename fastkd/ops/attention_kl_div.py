"""``torch.ops.fastkd.attention_kl_div``: KL of attention maps by query, and the gradients of their weighted sum."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import reference
from fastkd.ops import _extension
from fastkd.ops.kl_div import MEAN, NONE, divided

_extension.define(
    "attention_kl_div",
    "(Tensor student_query, Tensor student_key, Tensor teacher_query, Tensor teacher_key, Tensor? student_bias, "
    "Tensor? teacher_bias, Tensor? student_lse, Tensor? teacher_lse, Tensor? query_mask, Tensor? key_mask, "
    "float student_scale, float teacher_scale, bool causal, int window, Tensor? row_weight) -> "
    "(Tensor loss, Tensor grad_query, Tensor grad_key)",
)


class Options(NamedTuple):
    """Arguments of the op between queries and keys and the weights of the rows, in the order of its schema."""

    student_bias: Tensor | None
    teacher_bias: Tensor | None
    student_lse: Tensor | None
    teacher_lse: Tensor | None
    query_mask: Tensor | None
    key_mask: Tensor | None
    student_scale: float
    teacher_scale: float
    causal: bool
    window: int


def attention_kl_div(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    options: Options,
    *,
    reduction: int,
    normalizer: float | Tensor | None,
) -> Tensor:
    """Checked arguments in, loss () or (B, H, T_q) out."""
    tensors = student_query, student_key, teacher_query, teacher_key
    count = _count(student_query, options.query_mask, normalizer) if reduction == MEAN else None
    device, dtype = student_query.device.type, student_query.dtype
    if _extension.backend("attention_kl_div", device, dtype) == "reference":
        defining = {name: value for name, value in options._asdict().items() if not name.endswith("_lse")}
        return _reduce(reference.attention_kl_div_rows(*tensors, **defining), reduction, count)
    dense = [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
    if torch.is_grad_enabled() and (student_query.requires_grad or student_key.requires_grad):
        return _AttentionKLDiv.apply(*dense, options, reduction, count)  # type: ignore[no-untyped-call, no-any-return]
    return _reduce(torch.ops.fastkd.attention_kl_div(*dense, *options, None)[0], reduction, count)


def _count(query: Tensor, query_mask: Tensor | None, normalizer: float | Tensor | None) -> Tensor:
    if normalizer is not None:
        return torch.as_tensor(normalizer, dtype=torch.float32, device=query.device)
    batch, heads, queries, _ = query.shape
    if query_mask is None:
        return torch.full((), batch * heads * queries, dtype=torch.float32, device=query.device)
    return heads * query_mask.sum(dtype=torch.float32)


def _reduce(rows: Tensor, reduction: int, count: Tensor | None) -> Tensor:
    """Summed in two steps, the first of which never splits a row: so the sum does not depend on the threads."""
    if reduction == NONE:
        return rows
    total = rows.sum(-1).sum()
    return total if count is None else divided(total, count)


class _AttentionKLDiv(torch.autograd.Function):
    """Gradients in the forward pass, where one weight serves all rows; else in the backward pass, with theirs."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, options, reduction, count = arguments
        query = tensors[0]
        weight = None
        if reduction != NONE:
            # In half precision 1/N would flush most of the gradient to zero, so there the division comes last.
            one = torch.ones((), device=query.device)
            early = count is not None and query.dtype != torch.float16
            weight = (torch.where(count == 0, 0.0, 1.0 / count) if early else one).expand(query.shape[:-1])
        rows, *grads = torch.ops.fastkd.attention_kl_div(*tensors, *options, weight)
        ctx.save_for_backward(*(tensors if reduction == NONE else (*grads, count)))
        ctx.options, ctx.reduction = options if reduction == NONE else (), reduction  # else it would keep biases alive
        return _reduce(rows, reduction, count)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "the fused attention_kl_div has no second derivative, which create_graph=True asks for: "
                "use float64 tensors or FASTKD_BACKEND=reference"
            )
        if ctx.reduction == NONE:
            tensors = ctx.saved_tensors
            _, *grads = torch.ops.fastkd.attention_kl_div(*tensors, *ctx.options, grad_loss.float())
        else:
            *grads, count = ctx.saved_tensors
            if grads[0].dtype == torch.float16 and count is not None:
                grad_loss = divided(grad_loss, count)
            unchanged = grads[0].device.type == "cpu" and not torch.compiler.is_compiling() and grad_loss.item() == 1.0
            if not unchanged:
                grads = [(grad * grad_loss).to(grad.dtype) for grad in grads]
        return (*grads, None, None, None, None, None)


def _fake(student_query: Tensor, student_key: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    needed = arguments[-1] is not None
    grad_query, grad_key = (torch.empty_like(x) if needed else x.new_empty(0) for x in (student_query, student_key))
    return student_query.new_empty(student_query.shape[:-1], dtype=torch.float32), grad_query, grad_key


torch.library.register_fake("fastkd::attention_kl_div", _fake)


def _triton(
    student_query: Tensor, student_key: Tensor, teacher_query: Tensor, teacher_key: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    from fastkd.kernels.attention_kl_div import launch_attention_kl_div

    *values, row_weight = arguments
    options = Options(*values)
    loss, grad_query, grad_key = launch_attention_kl_div(
        (student_query, student_key, options.student_bias, options.student_lse),
        (teacher_query, teacher_key, options.teacher_bias, options.teacher_lse),
        query_mask=options.query_mask,
        key_mask=options.key_mask,
        scales=(options.student_scale, options.teacher_scale),
        causal=options.causal,
        window=options.window,
        row_weight=row_weight,
    )
    return loss, grad_query, grad_key


torch.library.register_kernel("fastkd::attention_kl_div", "cuda", _triton)
