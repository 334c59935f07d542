"""What every distillation by the Hugging Face Trainer shares: the frozen teacher, the parts of the loss, safe stops."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from fastkd.data.encode import MultiTaskDataset
from fastkd.training.adoption import accepted_inputs, adopt
from fastkd.training.attention import use_own_attention
from fastkd.training.classifiers import task_loss
from fastkd.training.loss_parts import Place
from fastkd.training.parts_trainer import PartsTrainer
from fastkd.training.signals import COLUMN, TeacherSignal
from fastkd.training.step_mean import StepMeanTrainer
from fastkd.training.trainer import MultiTaskTrainer


class DistillationTrainer(PartsTrainer, MultiTaskTrainer):
    """Trains a student with a loss that a method defines by overriding :meth:`distillation_loss`.

    The teacher is in evaluation mode and frozen, its matrix products in the dtype of ``args``' mixed precision. It
    stays out of the student's weights, optimizer, checkpoints and data-parallel wrapper; FSDP2 shards it too.

    What is logged of the loss, how a broken one ends the training, and resuming: see ``PartsTrainer``. ``agreement`` is
    the part of the rows on which student and teacher agree, ``eval_loss`` the hard-label loss.

    Args:
        model: the student: a model with ``config.tasks`` and a head for each, or, on one task, any sequence classifier
            of transformers, whose outputs are then given the task's label names.
        teacher: a model with a head per task, or a dict from task to model.
        **kwargs: of ``MultiTaskTrainer``.

    Raises:
        ValueError: a student without a head for a task of the training or evaluation rows, or with other labels or
            another order of them; no teacher where one is needed, or one without the student's tasks, label names or
            vocabulary.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        data_collator: Any = None,
        train_dataset: MultiTaskDataset | None = None,
        eval_dataset: Mapping[str, MultiTaskDataset] | None = None,
        *,
        teacher: nn.Module | Mapping[str, nn.Module] | None = None,
        **kwargs: Any,
    ) -> None:
        datasets = train_dataset.datasets if train_dataset else {}
        for rows in (train_dataset, *(eval_dataset or {}).values()):
            adopt(model, {name: task.label_names for name, task in (rows.tasks if rows else {}).items()})
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, **kwargs)
        self._accepted = accepted_inputs(model)
        self.signal: TeacherSignal | None = None
        asked = self.tasks_to_ask(datasets)
        if asked:
            if teacher is None:
                raise ValueError(f"teacher is None {self._why_a_teacher(', '.join(asked))}")
            labels = {task: model.config.tasks[task]["labels"] for task in asked}
            self.signal = TeacherSignal(teacher, labels, autocast=autocast_dtype(args))
            _check_vocabularies(model, self.signal)
            place_teachers(self, self.signal.teachers.values())

    def tasks_to_ask(self, datasets: Mapping[str, Any]) -> list[str]:
        """The tasks for which the loss needs the teacher itself: by default those whose rows do not hold its logits."""
        return [task for task, rows in datasets.items() if COLUMN not in rows.column_names]

    def distillation_loss(
        self, model: nn.Module, inputs: dict[str, Any], labels: Tensor, teacher_logits: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor], Any]:
        """A training batch's mean loss over its rows, its parts by name, and the student's output.

        ``teacher_logits``: the batch's column of them, if it has one.
        """
        raise NotImplementedError

    def batch_loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Any]:
        inputs = {name: value for name, value in batch.items() if name not in ("labels", COLUMN)}
        labels = batch["labels"]
        if not model.training:
            outputs = self.student_outputs(model, inputs)
            return task_loss(outputs.logits, labels), outputs
        loss, parts, outputs = self.distillation_loss(model, inputs, labels, batch.get(COLUMN))
        self.count(parts)
        return loss, outputs

    def student_outputs(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """The student called with those of the inputs that it takes."""
        return model(**{name: value for name, value in inputs.items() if name in self._accepted})

    def rows_of(self, place: Place) -> str:
        """The task and the rows, which the sampler gives again."""
        accumulation, processes = self.args.gradient_accumulation_steps, self.args.world_size
        per_epoch = -(-len(self.get_train_dataloader()) // accumulation)
        epoch, step = divmod(place.step, per_epoch)
        sampler, dataset = self._epoch_callback.sampler, self.train_dataset
        if sampler is None or not isinstance(dataset, MultiTaskDataset):
            return super().rows_of(place)
        sampler.set_epoch(epoch)
        number = (step * accumulation + place.micro_batch) * processes + self.args.process_index
        number %= len(sampler)  # Accelerate fills up an epoch's last round of processes with its first batches
        rows = [dataset[index] for index in next(islice(iter(sampler), number, None))]
        return f"task {rows[0]['task']}, rows {', '.join(str(row['row']) for row in rows)}"

    def _why_a_teacher(self, tasks: str) -> str:
        return (
            f"and the training rows of {tasks} have no column {COLUMN}: "
            "give a teacher, or add the column with add_teacher_logits"
        )


def place_teachers(trainer: StepMeanTrainer, teachers: Iterable[nn.Module]) -> None:
    """On the trainer's device, or sharded where its student is; on a CPU with the attention that students have."""
    teachers = list(teachers)
    if trainer.args.device.type == "cpu":
        for model in teachers:
            use_own_attention(model)
    if not trainer.is_fsdp_enabled:
        for model in teachers:
            model.to(trainer.args.device)
        return
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    if not trainer.accelerator.is_fsdp2:
        raise ValueError("FSDP version 1 is not supported; set fsdp_version to 2")
    for model in {id(model): model for model in teachers}.values():
        fsdp2_prepare_model(trainer.accelerator, model)


def agreement(student_logits: Tensor, teacher_logits: Tensor) -> dict[str, Tensor]:
    """``{"agreement": …}``: the part of the rows whose largest logit is the same; nothing for a regression."""
    if student_logits.shape[-1] == 1:
        return {}
    same = student_logits.detach().argmax(-1) == teacher_logits.argmax(-1)
    return {"agreement": same.float().mean()}


def autocast_dtype(args: TrainingArguments) -> torch.dtype | None:
    """Of the matrix products of a frozen model beside the one that is trained; None for float32."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def _check_vocabularies(student: PreTrainedModel, signal: TeacherSignal) -> None:
    own = student.get_input_embeddings().num_embeddings
    for task, teacher in signal.teachers.items():
        theirs = cast(PreTrainedModel, teacher).get_input_embeddings().num_embeddings
        if theirs != own:
            raise ValueError(
                f"the teacher of {task} has {theirs} word embeddings and the student {own}: both read the same token "
                "ids, so they must have one tokenizer; re-tokenise the texts for a student made for the teacher's"
            )
