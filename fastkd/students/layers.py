"""Where a Transformer keeps its layers, and the linear maps in them."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastkd.students.low_rank import LowRankLinear

LINEAR = (nn.Linear, Conv1D, LowRankLinear)


def transformer_layers(model: nn.Module) -> tuple[PreTrainedModel, nn.ModuleList]:
    """The innermost model of transformers that holds the stack of layers, and the stack.

    Raises:
        ValueError: there is none, or an encoder's and a decoder's.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder and a decoder in one, which is not supported")
    found = None
    for owner in model.modules():
        if isinstance(owner, PreTrainedModel):
            depth = getattr(owner.config, "num_hidden_layers", None)
            stacks = [m for m in owner.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
            found = (owner, stacks[0]) if stacks else found
    if found is None:
        raise ValueError(f"{type(model).__name__} has no stack of config.num_hidden_layers layers")
    return found


def linear_maps(layers: nn.ModuleList) -> dict[str, nn.Module]:
    """The linear maps of the layers, factorised or not, by their names among the layers."""
    return {name: module for name, module in layers.named_modules() if isinstance(module, LINEAR)}
