"""Distillation by what student and teacher compute inside, on any objective, for any kind of answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from fastkd.methods.objective import Objective
from fastkd.ops.kl_div import divided
from fastkd.students.layers import linear_maps, transformer_layers
from fastkd.students.low_rank import dense_weight
from fastkd.training.adoption import accepted_inputs
from fastkd.training.distillation import DistillationTrainer, agreement, autocast_dtype, place_teachers
from fastkd.training.language_model import LanguageModelTrainer
from fastkd.training.parts_trainer import PartsTrainer
from fastkd.training.spans import POSITIONS, SpanTrainer
from fastkd.training.taps import Features, Taps

Parts = dict[str, Tensor]


class FeatureDistillation(PartsTrainer):
    """What the trainers below have in common.

    The teacher answers at every step, since features are not stored. Means over tokens are over those of all
    micro-batches and processes of a step.

    Args:
        model: the student.
        args: ordinary training arguments, or a method's.
        objective: see :class:`fastkd.methods.objective.Objective`.
        teacher: documented by each.
        **kwargs: of the trainer without distillation.

    Raises:
        ValueError: a teacher is missing, a model cannot be tapped (see ``Taps``), or the objective has a module to be
            trained.
    """

    objective: Objective

    def tap(self, model: nn.Module) -> Taps:
        """For the features that the objective needs."""
        needs = self.objective
        if modules := needs.modules:
            raise ValueError(
                f"the objective has {modules[0]}, a module that a trainer does not train: give models of equal widths, "
                "or train both in a loop of your own (docs/baselines.md)"
            )
        return Taps(model, attention=needs.needs_attention, hidden=needs.needs_hidden, maps=needs.needs_maps)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        tokens = torch.as_tensor(sum(batch["attention_mask"].sum() for batch in batches), device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:  # as the items are counted
            tokens = self.accelerator.gather(tokens).sum()
        self._tokens_per_item = divided(tokens.float(), items)
        return batches, items

    def compare(
        self, student: Features, teacher: Features, labels: Tensor, batch: Mapping[str, Any]
    ) -> tuple[Tensor, Parts]:
        """The objective and its parts."""
        tokens = self._tokens_per_item * self.count_items(batch)
        progress = self.state.global_step / max(1, self.state.max_steps)
        objective = self.objective.at(progress)
        loss, parts = objective(student, teacher, labels, batch["attention_mask"], tokens=tokens)
        if not objective.needs_logits:  # data parallelism waits for a gradient of all that they come from, if one of 0
            loss = loss + 0.0 * cast(Tensor, student.logits).select(-1, 0).sum()
        return loss, parts


class FeatureDistillationTrainer(FeatureDistillation, DistillationTrainer):
    """Trains a sequence classifier with an objective on the features of student and teacher.

    ``teacher`` is a model with a head per task, or a dict from task to model: see ``DistillationTrainer``.
    """

    def __init__(
        self, model: PreTrainedModel, args: TrainingArguments, *rest: Any, objective: Objective, **kwargs: Any
    ) -> None:
        self.objective = objective
        super().__init__(model, args, *rest, **kwargs)
        self._student_taps = self.tap(model)
        teachers = self.signal.teachers if self.signal else {}
        taps = {id(teacher): self.tap(teacher) for teacher in {id(t): t for t in teachers.values()}.values()}
        self._teacher_taps = {task: taps[id(teacher)] for task, teacher in teachers.items()}

    def tasks_to_ask(self, datasets: Mapping[str, Any]) -> list[str]:
        return list(datasets) if self.objective.needs_teacher else []

    def release_models(self) -> None:
        for taps in (self._student_taps, *self._teacher_taps.values()):
            taps.close()

    def _why_a_teacher(self, tasks: str) -> str:
        return f"but the loss compares its features on the rows of {tasks} with the student's"

    def distillation_loss(
        self, model: nn.Module, inputs: dict[str, Any], labels: Tensor, teacher_logits: Tensor | None
    ) -> tuple[Tensor, Parts, Any]:
        teacher = self._teacher_features(inputs)
        with self._student_taps.record() as student:
            outputs = self.student_outputs(model, inputs)
        student.logits = outputs.logits
        if self.objective.needs_weights:
            student.weights = map_weights(model)
        loss, parts = self.compare(student, teacher, labels, inputs)
        agreed = {} if teacher.logits is None else agreement(outputs.logits, teacher.logits)
        return loss, parts | agreed, outputs

    def _teacher_features(self, inputs: Mapping[str, Any]) -> Features:
        """Of the task's teacher; empty for an objective that reads none."""
        if self.signal is None:
            return Features()
        task = inputs["task"]
        with torch.no_grad(), self._teacher_taps[task].record() as teacher:
            teacher.logits = self.signal(inputs)
        if self.objective.needs_weights:
            teacher.weights = map_weights(self.signal.teachers[task])
        return teacher


class ModelDistillation(FeatureDistillation):
    """For a single teacher that is called as the student is."""

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *rest: Any,
        objective: Objective,
        teacher: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        self.objective = objective
        super().__init__(model, args, *rest, **kwargs)
        self._student_taps, self._teacher_taps = self.tap(model), None
        self.teacher = teacher if objective.needs_teacher else None
        if objective.needs_teacher:
            if teacher is None:
                raise ValueError("teacher is None, but the loss compares the student with it")
            _check_vocabulary(model, teacher)
            place_teachers(self, [teacher.eval().requires_grad_(False)])
            self._teacher_taps = self.tap(teacher)

    def release_models(self) -> None:
        for taps in (self._student_taps, self._teacher_taps):
            if taps is not None:
                taps.close()

    def answers(self, outputs: Any, batch: Mapping[str, Any]) -> Tensor:
        """The logits (..., classes) that the labels are of."""
        raise NotImplementedError

    def labels(self, batch: Mapping[str, Any]) -> Tensor:
        """As many as the answers have rows; see :class:`fastkd.methods.objective.Objective`."""
        raise NotImplementedError

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What the student is called with."""
        raise NotImplementedError

    def teacher_inputs(self, batch: Mapping[str, Any], teacher: PreTrainedModel) -> dict[str, Any]:
        """What the teacher is called with."""
        return self.inputs(batch)

    def batch_loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Any]:
        if not model.training:
            return super().batch_loss(model, batch)
        teacher = self._teacher_features(batch)
        with self._student_taps.record() as student:
            outputs = model(**self.inputs(batch))
        student.logits = self.answers(outputs, batch)
        if self.objective.needs_weights:
            student.weights = map_weights(model)
        loss, parts = self.compare(student, teacher, self.labels(batch), batch)
        self.count(parts)
        return loss, outputs

    @torch.no_grad()
    def _teacher_features(self, batch: Mapping[str, Any]) -> Features:
        if self.teacher is None or self._teacher_taps is None:
            return Features()
        dtype, device = autocast_dtype(self.args), batch["input_ids"].device.type
        with self._teacher_taps.record() as teacher, torch.autocast(device, dtype) if dtype else nullcontext():
            outputs = self.teacher(**self.teacher_inputs(batch, self.teacher))
        teacher.logits = self.answers(outputs, batch)
        if self.objective.needs_weights:
            teacher.weights = map_weights(self.teacher)
        return teacher


class SpanDistillationTrainer(ModelDistillation, SpanTrainer):
    """Trains any ``AutoModelForQuestionAnswering`` with an objective; ``teacher`` is another one of its vocabulary.

    A window has two answers, the first and the last token, among its tokens without the pads.
    """

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in batch.items() if name in self._accepted}

    def teacher_inputs(self, batch: Mapping[str, Any], teacher: PreTrainedModel) -> dict[str, Any]:
        names = accepted_inputs(teacher) - {*POSITIONS}  # token types, too, where the student has none
        return {name: value for name, value in batch.items() if name in names}

    def answers(self, outputs: Any, batch: Mapping[str, Any]) -> Tensor:
        logits = torch.stack([outputs.start_logits, outputs.end_logits], dim=1)
        return logits.float().masked_fill(batch["attention_mask"][:, None] == 0, -torch.inf)

    def labels(self, batch: Mapping[str, Any]) -> Tensor:
        return torch.stack([batch[name] for name in POSITIONS], dim=1)


class LanguageModelDistillationTrainer(ModelDistillation, LanguageModelTrainer):
    """Trains any ``AutoModelForCausalLM`` with an objective; ``teacher`` is another one of its vocabulary.

    Answers are the next tokens of the responses; states and attention are compared on all tokens but pads.
    """

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {name: batch[name] for name in ("input_ids", "attention_mask")} | {"use_cache": False}

    def answers(self, outputs: Any, batch: Mapping[str, Any]) -> Tensor:
        return cast(Tensor, outputs.logits)[:, :-1]

    def labels(self, batch: Mapping[str, Any]) -> Tensor:
        return cast(Tensor, batch["labels"])[:, 1:]


def map_weights(model: nn.Module) -> dict[str, Tensor]:
    """The matrices (out, in) of the layers' linear maps, by name; of a factorised one the product of its factors.

    Those of a sharded model are gathered.
    """
    _, layers = transformer_layers(model)
    return {name: dense_weight(module) for name, module in linear_maps(layers).items()}


def _check_vocabulary(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    own, theirs = (model.get_input_embeddings().num_embeddings for model in (student, teacher))
    if own != theirs:
        raise ValueError(
            f"the teacher has {theirs} word embeddings and the student {own}: both read the same token ids, so they "
            "must have one tokenizer"
        )
