"""Mixup inside a model: hooks on its embedding tables mix examples while the model is called as always."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastkd.losses import mixup
from fastkd.mixup import Mix

STAGES = ("word", "sum", "post_ln")
MASKS = ("union", "first")
PADS = ("embed", "zero")

_NORMS = (nn.LayerNorm, nn.RMSNorm)


class EmbeddingMixer:
    """Mixes the examples of a batch where a model embeds them; outside the ``with`` block the model is as it was.

    The model is called with the examples' own token ids, so data-parallel wrappers, sharding and ``torch.compile`` see
    an ordinary call::

        mixer = EmbeddingMixer(model)
        with mixer(mix):
            mixed_logits = model(**mixer.inputs(batch, mix)).logits

    MixKD (arXiv 2011.00593) mixes embeddings; the rest is not known to us, so these are options:

    Args:
        model: unwrapped, with ``get_input_embeddings()``. The hooks stay on it, idle, until :meth:`close`; a later
            block puts them back.
        stage: ``"word"`` mixes the word embeddings alone; positions and token types are those of the example itself.
            ``"sum"`` mixes the token types' embeddings too, and those of positions that depend on where the pads are,
            as RoBERTa's do, so that the sum of word, type and position is exactly mixed before its normalisation.
            ``"post_ln"`` mixes what the module that holds the word embeddings gives, after its normalisation and
            dropout.
        mask: ``"union"``: a token of the mixture counts where it does in either example, and a model that numbers its
            tokens, as RoBERTa does, numbers these. ``"first"``: where it does in the example itself, so a longer
            partner is cut.
        pads: ``"embed"`` mixes a pad's embedding as any other; ``"zero"`` puts zeros in its place.

    Raises:
        ValueError: an unknown option, or a model that has no such point.
    """

    def __init__(self, model: nn.Module, *, stage: str = "word", mask: str = "union", pads: str = "embed") -> None:
        check_options(stage=stage, mask=mask, pads=pads)
        self.union = mask == "union"
        self.zero_pads = pads == "zero"
        words: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        types, positions = _named(model, "token_type_embeddings"), numbered_positions(model)
        self._mixed = {"word": [words], "sum": [words, *types, *positions]}.get(stage) or [_holder(model, words)]
        self._renumbered = positions if stage == "word" and self.union else []
        self.mixes_types = stage == "post_ln" or (stage == "sum" and bool(types))
        self._mix: Mix | None = None
        self._real: Tensor | None = None
        self._handles: list[RemovableHandle] = []
        self._attach()

    @contextmanager
    def __call__(self, mix: Mix, real: Tensor | None = None) -> Iterator[None]:
        """Mixes by ``mix`` in the block. ``real`` (B, L), 0 at the examples' pads, is needed to put zeros there."""
        if self.zero_pads and real is None:
            raise ValueError('real is None; pads="zero" needs to know where the pads are')
        if not self._handles:
            self._attach()
        self._mix, self._real = mix, real
        try:
            yield
        finally:
            self._mix = self._real = None

    def inputs(self, examples: Mapping[str, Any], mix: Mix) -> dict[str, Any]:
        """The examples' inputs with the ``attention_mask`` and ``token_type_ids`` (B, L) of their mixtures.

        Where only the partner has a token, the mixture has the partner's token type, unless types are mixed themselves.
        """
        inputs = dict(examples)
        if not self.union:
            return inputs
        mask, types = inputs["attention_mask"], inputs.get("token_type_ids")
        inputs["attention_mask"] = torch.maximum(mask, mask[mix.permutation])
        if types is not None and not self.mixes_types:
            inputs["token_type_ids"] = torch.where(mask.bool(), types, types[mix.permutation])
        return inputs

    def close(self) -> None:
        """Takes the hooks off the model until the next ``with`` block."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _attach(self) -> None:
        self._handles = [module.register_forward_hook(self._hook) for module in self._mixed]
        self._handles += [table.register_forward_pre_hook(self._renumber) for table in self._renumbered]

    def _hook(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if self._mix is None:
            return output
        if self.zero_pads and self._real is not None:
            output = output * self._real[..., None].to(output.dtype)
        return mixup(output, *self._mix)

    def _renumber(self, table: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        """The positions of the mixtures' tokens, from those of the examples', whose pads are at ``padding_idx``."""
        if self._mix is None:
            return None
        pad, (positions,) = cast(int, table.padding_idx), inputs
        real = positions != pad
        union = real | real[self._mix.permutation]
        return (pad + union.cumsum(1) * union,)


def check_options(**options: str) -> None:
    """Refuses an unknown ``stage``, ``mask`` or ``pads``."""
    for name, known in (("stage", STAGES), ("mask", MASKS), ("pads", PADS)):
        if options[name] not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {options[name]!r}")


def _named(model: nn.Module, last: str) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.split(".")[-1] == last]


def numbered_positions(model: nn.Module) -> list[nn.Embedding]:
    """The tables of positions that are token numbers, with one entry for all pads: those of RoBERTa and its kin."""
    tables = [table for table in _named(model, "position_embeddings") if isinstance(table, nn.Embedding)]
    return [table for table in tables if table.padding_idx is not None]


def _holder(model: nn.Module, words: nn.Module) -> nn.Module:
    """The module that embeds and normalises: the one that holds the word embeddings directly."""
    for module in model.modules():
        children = list(module.children())
        if any(child is words for child in children) and any(isinstance(child, _NORMS) for child in children):
            return module
    raise ValueError(f'stage is "post_ln", but {type(model).__name__} does not normalise its embeddings in one module')
