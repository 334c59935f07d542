"""Transformer students: the embeddings and the first layers of a teacher or of a pretrained encoder.

The Transformer student of MKD (Liu et al., arXiv 1911.03588) and the students of MixKD (Liang et al., arXiv
2011.00593) are made so. docs/mkd.md tells what is known of them from what is a choice of this project.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from fastkd.data.task import Task
from fastkd.training.classifiers import MultiTaskEncoder, MultiTaskEncoderConfig

Model = TypeVar("Model", bound=PreTrainedModel)
HEAD_SIZE = 512  # of MKD's students, as recalled


def transformer_student(
    source: MultiTaskEncoder | PreTrainedModel | str | Path,
    layers: int,
    tasks: Sequence[str | Task],
    *,
    pooling: str = "cls_of_layers",
    head_size: int | None = HEAD_SIZE,
) -> MultiTaskEncoder:
    """A student of the first ``layers`` layers of ``source``, with a fresh head per task.

    Args:
        source: a teacher, whose rates of dropout it has, or an encoder; or the folder or Hub name of either.
        layers: 1 up to the number of layers of ``source``.
        tasks: known ones by name, see ``fastkd.data.glue.TASKS``.
        pooling, head_size: see ``MultiTaskEncoderConfig``. The defaults are MKD's as we recall them; the
            ordinary classifier, MixKD's, has ``pooling="cls", head_size=None``.

    Raises:
        ValueError: as :func:`first_layers`; or the source was itself made without a pooler, and ``pooling`` is
            another one.
    """
    model = source if isinstance(source, PreTrainedModel) else _load(source, reads_pooler=pooling == "cls")
    encoder = first_layers(model, layers)
    if pooling != "cls_of_layers" and getattr(encoder, "pooler", False) is None:
        raise ValueError(f'pooling is {pooling!r}; as the source has no pooler, it must be "cls_of_layers"')
    own = {"classifier_dropout": model.config.classifier_dropout} if isinstance(model, MultiTaskEncoder) else {}
    return MultiTaskEncoder.from_encoder(encoder, tasks, pooling=pooling, head_size=head_size, **own)


def first_layers(encoder: PreTrainedModel, count: int) -> PreTrainedModel:
    """A copy of an encoder, or of a ``MultiTaskEncoder``'s, that ends after its first ``count`` layers.

    What follows the layers (a pooler, a last norm) is the encoder's own.

    Raises:
        ValueError: ``count`` is not 1 up to the number of layers, the encoder is quantised or low-rank, or a weight of
            the shorter encoder is not among the weights of the longer one.
    """
    encoder = encoder.encoder if isinstance(encoder, MultiTaskEncoder) else encoder
    shorter: Any = AutoModel.from_config(_shorter(encoder, count))
    if getattr(encoder, "pooler", False) is None:
        shorter.pooler = None
    return cast(PreTrainedModel, _filled(shorter, encoder))


def shallow(model: Model, count: int) -> Model:
    """A copy of a model, its head included, that ends after its first ``count`` layers.

    Raises:
        ValueError: as :func:`first_layers`; or the model is a ``MultiTaskEncoder``.
    """
    if isinstance(model, MultiTaskEncoder):
        raise ValueError("model is a MultiTaskEncoder, which transformer_student shortens")
    shorter: Any = _filled(type(model)(_shorter(model, count)), model)
    if model.can_generate():
        shorter.generation_config = copy.deepcopy(model.generation_config)
    return cast(Model, shorter.to(model.dtype))


def _shorter(model: PreTrainedModel, count: int) -> PreTrainedConfig:
    depth = model.config.num_hidden_layers
    if not 1 <= count <= depth:
        raise ValueError(f"layers is {count}; it must be 1 to {depth}, the layers of the {model.config.model_type}")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("the source is low-rank or quantised; shorten what fastkd.students.merge makes of it")
    config = copy.deepcopy(model.config)
    for name in vars(config):
        if name.endswith("layer_types"):  # one entry per layer, as in ModernBERT
            setattr(config, name, getattr(config, name)[:count])
    config.num_hidden_layers = count
    return config


def _filled(shorter: Model, model: PreTrainedModel) -> Model:
    """With the weights of the longer model."""
    weights = model.state_dict()
    _refuse_missing([name for name in shorter.state_dict() if name not in weights], model.config.model_type)
    shorter.load_state_dict({name: weights[name] for name in shorter.state_dict()})
    return shorter


def _load(source: str | Path, reads_pooler: bool) -> PreTrainedModel:
    multi_task = isinstance(AutoConfig.from_pretrained(source), MultiTaskEncoderConfig)
    loader: Any = MultiTaskEncoder if multi_task else AutoModel
    model, info = loader.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    missing = [name for name in info["missing_keys"] if reads_pooler or not name.startswith("pooler.")]
    _refuse_missing(missing, source)
    return cast(PreTrainedModel, model)


def _refuse_missing(names: Sequence[str], source: str | Path) -> None:
    if names:
        raise ValueError(f"source {source} has no weights for {', '.join(sorted(names))} of the student")
