"""``torch.ops.fastkd.attention_forward`` and its gradient: the attention of models in training on a CPU."""

from typing import Any

import torch
from torch import Tensor

from fastkd.ops import _extension

_extension.define(
    "attention_forward",
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, bool causal) -> (Tensor output, Tensor lse)",
)
_extension.define(
    "attention_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, bool causal, Tensor lse) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
)


def has_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> bool:
    """Whether :func:`attention` takes these: on a CPU, of one dtype and width, any mask a bool one."""
    return (
        query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype
        and query.dim() == 4
        and query.shape[0] == key.shape[0]
        and key.shape == value.shape
        and query.shape[-1] == key.shape[-1]
        and key.shape[2] > 0
        and query.shape[1] % key.shape[1] == 0
        and not (causal and query.shape[2] != key.shape[2])
        and (mask is None or mask.dtype == torch.bool)
        and _extension.backend("attention", "cpu", query.dtype) == "cpu"
    )


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` with tokens before heads in its result.

    Args:
        query: (B, H, T_q, d), for which :func:`has_kernel` is true.
        key, value: (B, a divisor of H, T_k, d).
        mask: bool, broadcast to (B, H, T_q, T_k); true for a key that a query sees. A query that sees none gives zeros.
        scale: of the scores.
        causal: query i sees keys 0 to i.

    Returns:
        (B, T_q, H, d).

    Raises:
        RuntimeError: a second derivative is asked for.
    """
    if mask is not None:
        mask = mask.expand(*query.shape[:3], key.shape[2])
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    output: Tensor = torch.ops.fastkd.attention_forward(query, key, value, mask, scale, causal)[0]
    return output


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])  # kept for the gradient of the output
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, of_lse: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "the fused attention has no second derivative, which create_graph=True asks for: "
            "use float64 tensors or FASTKD_BACKEND=reference"
        )
    if grad is None:
        return (None,) * 6
    *tensors, lse = ctx.saved_tensors
    grads = torch.ops.fastkd.attention_backward(grad, *tensors, ctx.scale, ctx.causal, lse)
    return (*grads, None, None, None)


def _fake_forward(query: Tensor, key: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    batch, heads, queries, dim = query.shape
    return query.new_empty(batch, queries, heads, dim), query.new_empty(batch, heads, queries, dtype=torch.float32)


def _fake_backward(grad: Tensor, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in tensors[:3])
    return query, key, value


torch.library.register_fake("fastkd::attention_forward", _fake_forward)
torch.library.register_fake("fastkd::attention_backward", _fake_backward)
torch.library.register_autograd("fastkd::attention_forward", _backward, setup_context=_save)
