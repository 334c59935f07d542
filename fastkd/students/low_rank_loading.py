"""Saving and loading low-rank students: transformers' hook for changed modules puts the factors in before the weights.

The hook is that of quantised models (``HfQuantizer``), the only one that every ``from_pretrained`` calls between making
a model and reading its weights. Nothing here is quantised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fastkd.students.low_rank import LowRankEmbedding, LowRankLinear, factor_class

METHOD = "fastkd-low-rank"


@register_quantization_config(METHOD)
class LowRankConfig(QuantizationConfigMixin):
    """The part ``quantization_config`` of a low-rank student's configuration.

    Args:
        ranks: of each factorised module, by name.
    """

    def __init__(self, ranks: Mapping[str, int], quant_method: str = METHOD) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]  # an enumeration of those known to transformers
        self.ranks = dict(ranks)


@register_quantizer(METHOD)
class LowRankLoader(HfQuantizer):
    """Puts factors of the configured ranks in the place of dense modules."""

    quantization_config: LowRankConfig

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self.quantization_config.ranks = _ranks_in(model, self.quantization_config.ranks)
        for name, rank in self.quantization_config.ranks.items():
            dense = model.get_submodule(name)
            exchange(model, name, factor_class(dense).like(dense, rank))
        remember_ranks(model, self.quantization_config.ranks)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model.is_quantized = False  # it can be cast, trained and compiled as any other
        return model


def _ranks_in(model: PreTrainedModel, ranks: Mapping[str, int]) -> dict[str, int]:
    """The ranks by the model's own names, which another class with the same base gives another prefix.

    Parts that the class does not have, such as the pooler in a model for masked tokens, are left out, as
    ``from_pretrained`` leaves out their weights.

    Raises:
        ValueError: a rank is of a module that the model should have, and has not.
    """
    base, modules = f"{model.base_model_prefix}.", dict(model.named_modules())
    found = {}
    for name, rank in ranks.items():
        names = (name, base + name, name.removeprefix(base))
        own = next((own for own in names if own in modules), None)
        if own is not None:
            found[own] = rank
        elif any(other.rpartition(".")[0] in modules for other in names):
            raise ValueError(f"the configuration has a rank of {name}, which {type(model).__name__} does not have")
    if not found:
        raise ValueError(f"the configuration has no rank of a matrix that {type(model).__name__} has")
    return found


def exchange(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module into the place of the one of that name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def remember_ranks(model: Any, ranks: Mapping[str, int]) -> None:
    """Makes ``save_pretrained`` store the ranks: the model's own, and that of an encoder in it."""
    for prefix, part in _configured(model):
        own = {name.removeprefix(prefix): rank for name, rank in ranks.items() if name.startswith(prefix)}
        if own:
            part.config.quantization_config = LowRankConfig(own)
            part.hf_quantizer = LowRankLoader(part.config.quantization_config)
    _tie(model)


def carry_ranks(model: PreTrainedModel) -> None:
    """Makes ``save_pretrained`` of a model that was made around a low-rank base store the base's ranks.

    Raises:
        ValueError: the base is quantised in another way.
    """
    known = getattr(model.base_model.config, "quantization_config", None)
    if known is None:
        return
    if not isinstance(known, LowRankConfig):
        raise ValueError(f"{type(model.base_model).__name__} is quantised; give one that is not")
    remember_ranks(model, {f"{model.base_model_prefix}.{name}": rank for name, rank in known.ranks.items()})


def _configured(model: Any) -> list[tuple[str, Any]]:
    """The model and those of its parts that have a configuration of their own, each with the prefix of its modules."""
    parts = [(f"{name}.", part) for name, part in model.named_children() if isinstance(part, PreTrainedModel)]
    return [("", model), *((prefix, part) for prefix, part in parts if part.config is not model.config)]


def forget_ranks(model: Any) -> None:
    """Makes a model without factors an ordinary one."""
    for _, part in _configured(model):
        if getattr(part, "hf_quantizer", None) is not None:
            part.hf_quantizer.remove_quantization_config(part)
    vars(model).pop("_tied_weights_keys", None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.tie_weights()


def _tie(model: Any) -> None:
    """A head that shares the word embedding shares its factors."""
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    tied = head is not None and f"{names[head]}.weight" in model.all_tied_weights_keys
    if not (tied and isinstance(words, LowRankEmbedding)):
        return
    shared = LowRankLinear.like(head, words.rank)
    shared.up, shared.down, shared.bias = words.up, words.down, head.bias
    exchange(model, names[head], shared)
    ties = {name: of for name, of in model.all_tied_weights_keys.items() if name != f"{names[head]}.weight"}
    ties |= {f"{names[head]}.{factor}": f"{names[words]}.{factor}" for factor in ("up", "down")}
    model._tied_weights_keys = ties
    model.all_tied_weights_keys = dict(ties)
