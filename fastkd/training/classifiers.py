"""Sequence classifiers: a shared encoder with a head per task, and any single one called the same way."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from fastkd.data.glue import TASKS, get_task
from fastkd.data.task import UNLABELLED, Task

POOLINGS = ("cls", "mean", "cls_of_layers")


class MultiTaskEncoderConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Configuration of ``MultiTaskEncoder``.

    Args:
        encoder: configuration of the shared encoder, or its dict form with ``model_type``.
        tasks: for each task ``{"labels": [names]}``, in the order of the outputs; no names for a regression.
        pooling: ``"cls"`` takes the encoder's pooler output, or the first token's state where it has no
            pooler (the MT-DNN scheme); ``"mean"`` the mean state of the tokens; ``"cls_of_layers"`` the mean
            over all layers, without the word embeddings, of the first token's state.
        classifier_dropout: before every head, and before the output of a head with a hidden layer.
        head_size: units of a head's hidden layer, with ReLU; None makes the heads linear.
    """

    model_type = "fastkd-multitask-encoder"

    def __init__(
        self,
        encoder: PreTrainedConfig | dict[str, Any] | None = None,
        tasks: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
        pooling: str = "cls",
        classifier_dropout: float = 0.1,
        head_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        if pooling not in POOLINGS:
            raise ValueError(f"pooling is {pooling!r}; it must be one of {', '.join(POOLINGS)}")
        if head_size is not None and head_size < 1:
            raise ValueError(f"head_size is {head_size}; it must be at least 1, or None")
        if isinstance(encoder, dict):
            encoder = AutoConfig.for_model(**encoder)
        self.encoder = encoder
        self.tasks = {name: {"labels": list(task["labels"])} for name, task in (tasks or {}).items()}
        self.pooling = pooling
        self.classifier_dropout = classifier_dropout
        self.head_size = head_size
        super().__init__(**kwargs)


class MultiTaskEncoder(PreTrainedModel):  # type: ignore[no-untyped-call]
    """A shared encoder and, per task, dropout and a head on the pooled state (linear in the MT-DNN scheme)."""

    config_class = MultiTaskEncoderConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True

    def __init__(self, config: MultiTaskEncoderConfig) -> None:
        super().__init__(config)
        if config.encoder is None:
            raise ValueError("config.encoder is None; it must be the configuration of an encoder")
        self.encoder = _read_by(config.pooling, AutoModel.from_config(config.encoder))
        self.dropout = nn.Dropout(config.classifier_dropout)
        hidden_size = config.encoder.hidden_size
        self.heads = nn.ModuleDict(
            {name: _head(hidden_size, len(task["labels"]) or 1, config) for name, task in config.tasks.items()}
        )
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_encoder(
        cls, source: str | PreTrainedModel, tasks: Sequence[str | Task], **config: Any
    ) -> MultiTaskEncoder:
        """Fresh heads for ``tasks``, known ones by name, on an encoder: one to load in float32, or the model itself.

        Raises:
            ValueError: a quantised encoder; one of low-rank factors is welcome.
        """
        from fastkd.students.low_rank_loading import carry_ranks  # which imports this module

        encoder = AutoModel.from_pretrained(source, dtype=torch.float32) if isinstance(source, str) else source
        known = [task if isinstance(task, Task) else get_task(task) for task in tasks]
        labels = {task.name: {"labels": task.label_names} for task in known}
        model = cls(MultiTaskEncoderConfig(encoder.config, labels, **config))
        model.encoder = _read_by(model.config.pooling, encoder)
        carry_ranks(model)
        return model

    def keep_tasks(self, tasks: Sequence[str]) -> None:
        """Drops the heads of all other tasks."""
        missing = [task for task in tasks if task not in self.heads]
        if missing:
            raise ValueError(f"tasks has {', '.join(missing)}; this model has heads for {', '.join(self.heads)}")
        self.heads = nn.ModuleDict({task: self.heads[task] for task in tasks})
        self.config.tasks = {task: self.config.tasks[task] for task in tasks}

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        task: str | None = None,
    ) -> SequenceClassifierOutput:
        """Logits (rows, outputs of the task) and, with ``labels``, their mean loss over the rows.

        The loss is cross-entropy, or the squared error of a regression. ``task`` may be left out when the
        model has one.
        """
        task = self._resolve(task)
        inputs = _encoder_inputs(self.encoder.config, input_ids, attention_mask, token_type_ids)
        outputs = self.encoder(**inputs, output_hidden_states=self.config.pooling == "cls_of_layers")
        logits = self.heads[task](self.dropout(self._pool(outputs, attention_mask)))
        loss = None if labels is None else task_loss(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _resolve(self, task: str | None) -> str:
        if task is None and len(self.heads) == 1:
            return next(iter(self.heads))
        if task is None or task not in self.heads:
            raise ValueError(f"task is {task!r}; this model has heads for {', '.join(self.heads)}")
        return task

    def _pool(self, outputs: Any, attention_mask: torch.Tensor | None) -> torch.Tensor:
        states: torch.Tensor = outputs.last_hidden_state
        if self.config.pooling == "cls":
            pooled = getattr(outputs, "pooler_output", None)
            return states[:, 0] if pooled is None else pooled
        if self.config.pooling == "cls_of_layers":
            return torch.stack([layer[:, 0] for layer in outputs.hidden_states[1:]]).mean(dim=0)
        if attention_mask is None:
            return states.mean(dim=1)
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(dim=1) / weights.sum(dim=1)


def _read_by(pooling: str, encoder: Any) -> Any:
    """The encoder, without a pooler that would neither be read nor trained."""
    if pooling == "cls_of_layers" and getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    return encoder


def _head(width: int, outputs: int, config: MultiTaskEncoderConfig) -> nn.Module:
    if config.head_size is None:
        return nn.Linear(width, outputs)
    hidden, dropout = nn.Linear(width, config.head_size), nn.Dropout(config.classifier_dropout)
    return nn.Sequential(hidden, nn.ReLU(), dropout, nn.Linear(config.head_size, outputs))


def _encoder_inputs(
    config: PreTrainedConfig,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
) -> dict[str, torch.Tensor | None]:
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if getattr(config, "type_vocab_size", 0) > 1:  # RoBERTa has one type, DistilBERT and ModernBERT none
        inputs["token_type_ids"] = token_type_ids
    return inputs


def task_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over the rows of the cross-entropy, or of the squared error where ``logits`` is (rows, 1).

    A row without a label, −1, or NaN in a regression, adds 0 to the sum and counts as a row: so the losses of
    micro-batches still add up to that of the whole.

    Raises:
        ValueError: another number that is no class, on a CPU; elsewhere looking for one would wait for the device.
    """
    if logits.shape[-1] == 1:
        labelled = ~labels.isnan()
        scores = labels.float().where(labelled, 0)  # before the difference: a NaN in it would reach the gradient
        return ((at_least_float32(logits.squeeze(-1)) - scores).square() * labelled).mean()
    check_classes(labels, logits.shape[-1])
    total = nn.functional.cross_entropy(at_least_float32(logits), labels, ignore_index=UNLABELLED, reduction="sum")
    return total / len(labels)


def check_classes(labels: torch.Tensor, classes: int) -> None:
    """Refuses labels on a CPU that are neither classes nor ``UNLABELLED``."""
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = labels[(labels < UNLABELLED) | (labels >= classes)]
    if len(wrong):
        raise ValueError(
            f"labels has {wrong[0]}; they must be classes from 0 to {classes - 1}, or {UNLABELLED} where one is missing"
        )


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class SingleTaskTeacher(nn.Module):
    """A finished sequence classifier under the multi-task calling convention.

    Its logits come in the order of the task's labels, which are matched by name with the checkpoint's. The labels
    of a task of the user's own are the checkpoint's, or those stated as ``label_names``; one output is a regression.
    """

    def __init__(self, model: PreTrainedModel, task: str, label_names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        own = _own_labels(self.config, label_names)
        names = TASKS[task].label_names if task in TASKS else own if len(own) > 1 else ()
        self.order = _label_order(self.config, task, names, label_names)
        self.config.tasks = {task: {"labels": list(names)}}

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        task: str | None = None,
    ) -> SequenceClassifierOutput:
        """As ``MultiTaskEncoder.forward``."""
        only = next(iter(self.config.tasks))
        if task not in (None, only):
            raise ValueError(f"task is {task!r}; this teacher knows {only} alone")
        inputs = _encoder_inputs(self.config, input_ids, attention_mask, token_type_ids)
        logits = self.model(**inputs).logits[..., self.order]
        loss = None if labels is None else task_loss(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def _own_labels(config: PreTrainedConfig, stated: Sequence[str] | None) -> list[str]:
    return [str(name) for _, name in sorted((config.id2label or {}).items())] if stated is None else list(stated)


def _label_order(config: PreTrainedConfig, task: str, names: Sequence[str], stated: Sequence[str] | None) -> list[int]:
    """For each of the task's labels, the checkpoint's output that stands for it."""
    own = _own_labels(config, stated)
    if not names:
        if len(own) != 1:
            raise ValueError(f"{task} is a regression; a teacher of it has one output, not {len(own)}")
        return [0]
    if stated is None and all(name.upper() == f"LABEL_{i}" for i, name in enumerate(own)):
        raise ValueError(
            f"the checkpoint does not name its labels ({', '.join(own)}); state those of {task} in the order of its "
            f"outputs as label_names{', some order of ' + ', '.join(names) if task in TASKS else ''}"
        )
    spelled = [re.sub(r"[\s-]+", "_", name.strip().lower()) for name in own] if task in TASKS else own
    if len(own) != config.num_labels or sorted(spelled) != sorted(names):
        raise ValueError(
            f"{config.num_labels} outputs of the teacher are labelled {', '.join(own)}; "
            f"the labels of {task} are {', '.join(names)}"
        )
    return [spelled.index(name) for name in names]


AutoConfig.register(MultiTaskEncoderConfig.model_type, MultiTaskEncoderConfig)
AutoModelForSequenceClassification.register(MultiTaskEncoderConfig, MultiTaskEncoder)
