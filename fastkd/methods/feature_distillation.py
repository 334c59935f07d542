"""Distillation by what student and teacher compute inside, on any objective."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from fastkd.methods.objective import Objective
from fastkd.students.layers import linear_maps, transformer_layers
from fastkd.students.low_rank import dense_weight
from fastkd.training.distillation import DistillationTrainer, agreement
from fastkd.training.taps import Features, Taps


class FeatureDistillationTrainer(DistillationTrainer):
    """Trains a sequence classifier with an objective on the features of student and teacher.

    The teacher answers at every step, since features are not stored.

    Args:
        model: the student; see ``DistillationTrainer``.
        args: ordinary training arguments, or a method's.
        objective: see :class:`fastkd.methods.objective.Objective`. One with a method ``at(progress)`` changes with
            the part of the training that is done.
        teacher: a model with a head per task, or a dict from task to model.
        **kwargs: of ``DistillationTrainer``.

    Raises:
        ValueError: as ``DistillationTrainer``, or a model that cannot be tapped (see ``Taps``).
    """

    def __init__(
        self, model: PreTrainedModel, args: TrainingArguments, *arguments: Any, objective: Objective, **kwargs: Any
    ) -> None:
        self.objective: Objective = objective
        super().__init__(model, args, *arguments, **kwargs)
        self._student_taps = self._tap(model)
        teachers = self.signal.teachers if self.signal else {}
        taps = {id(teacher): self._tap(teacher) for teacher in {id(t): t for t in teachers.values()}.values()}
        self._teacher_taps = {task: taps[id(teacher)] for task, teacher in teachers.items()}

    def _tap(self, model: nn.Module) -> Taps:
        needs = self.objective
        return Taps(model, attention=needs.needs_attention, hidden=needs.needs_hidden, maps=needs.needs_maps)

    def tasks_to_ask(self, datasets: Mapping[str, Any]) -> list[str]:
        return list(datasets) if self.objective.needs_teacher else []

    def _why_a_teacher(self, tasks: str) -> str:
        return f"but the loss compares its features on the rows of {tasks} with the student's"

    def distillation_loss(
        self, model: nn.Module, inputs: dict[str, Any], labels: Tensor, teacher_logits: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor], Any]:
        teacher = self._teacher_features(inputs)
        with self._student_taps.record() as student:
            outputs = self.student_outputs(model, inputs)
        student.logits = outputs.logits
        if self.objective.needs_weights:
            student.weights = map_weights(model)
        tokens = self._tokens_per_item * len(labels)
        loss, parts = self._objective_now()(student, teacher, labels, inputs.get("attention_mask"), tokens=tokens)
        agreed = {} if teacher.logits is None else agreement(outputs.logits, teacher.logits)
        return loss, parts | agreed, outputs

    def _teacher_features(self, inputs: Mapping[str, Any]) -> Features:
        """Of the task's teacher; empty for an objective that reads none."""
        if self.signal is None:
            return Features()
        task = inputs["task"]
        with self._teacher_taps[task].record() as teacher:
            teacher.logits = self.signal(inputs)
        if self.objective.needs_weights:
            teacher.weights = map_weights(self.signal.teachers[task])
        return teacher

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        tokens = sum(batch["attention_mask"].sum() for batch in batches)
        if self.args.average_tokens_across_devices:  # as the items are counted
            tokens = self.accelerator.gather(tokens.to(device)).sum()
        self._tokens_per_item = tokens / items
        return batches, items

    def _objective_now(self) -> Objective:
        at: Callable[[float], Objective] | None = getattr(self.objective, "at", None)
        return self.objective if at is None else at(self.state.global_step / max(1, self.state.max_steps))


def map_weights(model: nn.Module) -> dict[str, Tensor]:
    """The matrices (out, in) of the layers' linear maps, by name; of a factorised one the product of its factors."""
    _, layers = transformer_layers(model)
    return {name: dense_weight(module) for name, module in linear_maps(layers).items()}
