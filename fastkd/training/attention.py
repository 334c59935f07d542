"""The attention function of models in training: fast on a CPU, and open to ``Taps``."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from fastkd.cpu_target import VARIABLE
from fastkd.ops.attention import attention, has_kernel

TAPS = "_fastkd_taps"
"""Where the attention function finds, on the module that calls it, all ``Taps`` to hand its operands to."""
_PREFIX = "fastkd_"


def _has_tiles() -> bool:
    """Whether the kernels multiply tiles of bfloat16 on this CPU, and may."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16")) and os.environ.get(VARIABLE, "avx512") == "avx512"


_HAS_TILES = _has_tiles()


def use_own_attention(model: nn.Module) -> None:
    """Lets whatever in ``model`` calls its attention through transformers' ``sdpa`` call :func:`sdpa`."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    for part in parts:
        if part._can_set_attn_implementation() and part.config._attn_implementation == "sdpa":
            own_attention(part)


def own_attention(model: PreTrainedModel) -> None:
    """Sets the model's attention function to one that gives the same and can be tapped; an eager one becomes ``sdpa``.

    Raises:
        ValueError: the model does not call its attention through transformers' interface.
    """
    given = model.config._attn_implementation
    if given.startswith(_PREFIX):
        return
    delegate = "sdpa" if given == "eager" else given
    name = _PREFIX + delegate
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, _tapped(sdpa if delegate == "sdpa" else ALL_ATTENTION_FUNCTIONS[delegate]))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[delegate])
    kind = type(model).__name__
    try:
        model.set_attn_implementation(name)
    except ValueError as error:  # its advice is to load the model with what it may have been loaded with
        raise ValueError(f"{kind} has no attention but its own, eager one, so its queries cannot be had") from error
    if model.config._attn_implementation != name:
        raise ValueError(f"{kind} does not call its attention through transformers' AttentionInterface: no queries")


def sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """transformers' ``sdpa`` in half precision on a CPU, by the kernels or in float32 where that is faster.

    With tiles of bfloat16 (AMX) fastkd's own kernels are, and elsewhere float32 is where gradients are to be taken:
    torch's fused attention has no fast bfloat16 backward on a CPU, as ``benchmarks/training_attention.py`` shows. With
    dropout torch takes another path, which is left alone.
    """
    if query.device.type == "cpu" and query.dtype == torch.float32 and torch.is_autocast_enabled("cpu"):
        # Rotated queries and keys are float32; torch's own function casts them, too.
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.device.type != "cpu" or not half or kwargs.get("dropout"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    output = _by_kernel(module, query, key, value, attention_mask, **kwargs)
    if output is not None:
        return output, None
    if not query.requires_grad:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    with torch.autocast("cpu", enabled=False):
        output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **kwargs)
    return output.to(query.dtype), None


def _by_kernel(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> Tensor | None:
    """What fastkd's kernels give, where they are the faster ones and take all that is asked for."""
    asked = [name for name in ("position_bias", "cache", "softcap") if others.get(name) is not None]
    if not _HAS_TILES or query.dtype != torch.bfloat16 or asked:
        return None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = query.shape[2] > 1 and mask is None and causal
    if not has_kernel(query, key, value, mask, causal):
        return None
    return attention(query, key, value, mask, query.shape[-1] ** -0.5 if scaling is None else scaling, causal)


def _tapped(attention: Any) -> Any:
    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        for taps in getattr(module, TAPS, ()):
            taps.take_attention(module, query, key, value, **kwargs)
        return attention(module, query, key, value, attention_mask, **kwargs)

    return forward
