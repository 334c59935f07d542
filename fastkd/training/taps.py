"""What a model computes inside, recorded while it is called: hidden states, operands of attention, outputs of maps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastkd.students.layers import linear_maps, transformer_layers
from fastkd.training.attention import TAPS, own_attention


class Attention(NamedTuple):
    """What the attention maps of a layer are made of: softmax(``query`` · ``key``ᵀ · ``scale`` + ``bias``).

    ``query`` (B, H, T, d), after rotary embedding and the like; ``key`` and ``value`` (B, H_k, T, d). With ``causal`` a
    query sees no later key, with ``window`` none that many positions away. Pads are not known here.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    bias: Tensor | None
    causal: bool
    window: int | None


@dataclass
class Features:
    """One call's records.

    Args:
        hidden: the embeddings that the first layer takes, then what each layer gives, (B, T, h), before a last norm.
        attention: of each layer.
        outputs: of the linear maps of the layers, (B, T, out), by names as ``"3.attention.self.query"``.
        weights: of the same maps, (out, in); set by the caller.
        logits: of the model's answers, (..., classes); set by the caller.
    """

    hidden: list[Tensor] = field(default_factory=list)
    attention: list[Attention] = field(default_factory=list)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None


class Taps:
    """Records the features of a model's calls; outside :meth:`record` they are not kept.

    The attention maps themselves are never made: queries and keys are taken where the model hands them to its
    attention function, which stays what it was (an eager one becomes ``sdpa``). Hooks take the rest. A model may have
    several taps. Wrappers, sharding, ``torch.compile`` and non-reentrant checkpointing see an ordinary call::

        taps = Taps(model)
        with taps.record() as features:
            model(**batch)
        features.hidden[-1], features.attention[0].query

    Args:
        model: an encoder or a decoder of transformers, or a module around one; unwrapped.
        attention, hidden, maps: whether to record these; ``maps`` means the outputs of linear maps.

    Raises:
        ValueError: the model is an encoder and decoder in one, has no stack of layers, or does not call its attention
            through transformers' interface.
    """

    def __init__(self, model: nn.Module, *, attention: bool = True, hidden: bool = True, maps: bool = False) -> None:
        owner, self._layers = transformer_layers(model)
        self._attention, self._hidden, self._maps = attention, hidden, maps
        self._features: Features | None = None
        self._learns = False
        self._handles: list[RemovableHandle] = []
        self._tapped: list[nn.Module] = []
        if attention:
            own_attention(owner)
        self._attach()

    @contextmanager
    def record(self) -> Iterator[Features]:
        """The features of the one call in the block.

        Raises:
            ValueError: attention was to be recorded, and the call did not come to that of each layer once; or layers in
                training are called without gradient, as reentrant checkpointing does, and so have features without.
        """
        if not (self._handles or self._tapped):
            self._attach()
        self._features = features = Features()
        self._learns = torch.is_grad_enabled()
        try:
            yield features
        finally:
            self._features = None
        if self._attention and len(features.attention) != len(self._layers):
            calls = f"{len(features.attention)} attention calls in {len(self._layers)} layers"
            raise ValueError(f"the model cannot be tapped: {calls}, where there must be one in each")

    def close(self) -> None:
        """Takes the hooks off the model until the next :meth:`record`.

        Its attention function stays the equal one that can be tapped.
        """
        for handle in self._handles:
            handle.remove()
        for module in self._tapped:
            vars(module)[TAPS].remove(self)
        self._handles, self._tapped = [], []

    def _attach(self) -> None:
        layers = self._layers
        if self._attention:
            self._tapped = list(layers.modules())
        for module in self._tapped:
            vars(module).setdefault(TAPS, []).append(self)  # where the attention function finds it
        if self._hidden:
            self._handles.append(layers[0].register_forward_pre_hook(self._take_input, with_kwargs=True))
            self._handles += [layer.register_forward_hook(self._take_state) for layer in layers]
        if self._maps:
            found = linear_maps(layers)
            self._handles += [module.register_forward_hook(self._take_output(name)) for name, module in found.items()]

    def _of(self, module: nn.Module) -> Features | None:
        """Where to record what a module computes, if it is to be."""
        if self._features is not None and self._learns and module.training and not torch.is_grad_enabled():
            raise ValueError(
                f"{type(module).__name__} in training is called without gradient, as reentrant checkpointing does: its "
                "features would teach nothing. Set gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        return self._features

    def _take_input(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if features := self._of(layer):
            features.hidden.append(args[0] if args else kwargs["hidden_states"])

    def _take_state(self, layer: nn.Module, args: Any, output: Any) -> None:
        if features := self._of(layer):
            features.hidden.append(output[0] if isinstance(output, tuple) else output)

    def _take_output(self, name: str) -> Any:
        def take(module: nn.Module, args: Any, output: Tensor) -> None:
            if features := self._of(module):
                features.outputs[name] = output

        return take

    def take_attention(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> None:
        """Called by the attention function with what transformers hands it."""
        features = self._of(module)
        if features is None:
            return
        causal = kwargs.get("is_causal")
        features.attention.append(
            Attention(
                query,
                key,
                value,
                scale=kwargs.get("scaling") or query.shape[-1] ** -0.5,
                bias=kwargs.get("position_bias"),
                causal=getattr(module, "is_causal", False) if causal is None else causal,
                window=kwargs.get("sliding_window"),
            )
        )
