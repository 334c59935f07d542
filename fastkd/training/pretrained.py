"""Loading a model as the class that it was saved from, or with a dropout of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
import transformers
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastkd.students.low_rank_loading import METHOD
from fastkd.training.classifiers import MultiTaskEncoder, MultiTaskEncoderConfig


def load_model(path: str | Path) -> PreTrainedModel:
    """The model of a folder or of a name on the Hub, float32, in evaluation mode, with whatever head it has.

    Raises:
        ValueError: it is low-rank or quantised.
        OSError: there is no such model.
    """
    config = AutoConfig.from_pretrained(path)
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if method is not None:
        kind = "low-rank" if method == METHOD else f"quantised ({method})"
        raise ValueError(f"{path} is {kind} already; name the model that it was made of")
    architecture = next(iter(config.architectures or ()), "")
    known = getattr(transformers, architecture, AutoModel)
    loader = MultiTaskEncoder if isinstance(config, MultiTaskEncoderConfig) else known
    model: PreTrainedModel = loader.from_pretrained(path, dtype=torch.float32)
    model.train(False)
    return model


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model.

    Raises:
        ValueError, OSError: there is none; transformers itself then makes one of special tokens alone for some models.
    """
    tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(path))
    if {*tokenizer.get_vocab()} <= {*tokenizer.all_special_tokens, "▁"}:
        raise ValueError(f"{path} has no tokenizer beside the model; save the model's tokenizer to it, too")
    return tokenizer


def find_tokenizer(path: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model, if there is one."""
    try:
        return load_tokenizer(path)
    except (OSError, ValueError):
        return None


def check_encoder(name: str | Path, config: PreTrainedConfig) -> None:
    """Raises ``ValueError`` for a model that teachers are not made of, as a teacher or student of this project."""
    if type(config) not in MODEL_MAPPING:
        raise ValueError(f"{name} is a {config.model_type}; a teacher is made of an encoder that transformers knows")


def config_with_dropout(path: str | Path, rate: float | None) -> PreTrainedConfig:
    """The configuration of a pretrained model with one rate for all that it drops; None leaves it as it is.

    Raises:
        ValueError: the rate is below 0, or is 1 or above.
    """
    config: PreTrainedConfig = AutoConfig.from_pretrained(path)
    if rate is None:
        return config
    if not 0 <= rate < 1:
        raise ValueError(f"dropout is {rate}; it must be at least 0 and below 1")
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float | int) and not isinstance(value, bool):
            setattr(config, name, rate)
    return config
