"""What every distillation by the Hugging Face Trainer shares: the frozen teacher, the parts of the loss, safe stops."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from fastkd.data.encode import MultiTaskDataset
from fastkd.training.adoption import accepted_inputs, adopt
from fastkd.training.checkpoints import last_checkpoint
from fastkd.training.classifiers import task_loss
from fastkd.training.loss_parts import LossParts, Place, means
from fastkd.training.signals import COLUMN, TeacherSignal
from fastkd.training.trainer import MultiTaskTrainer


class DistillationTrainer(MultiTaskTrainer):
    """Trains a student with a loss that a method defines by overriding :meth:`distillation_loss`.

    The teacher is in evaluation mode and frozen, its matrix products in the dtype of ``args``' mixed precision. It
    stays out of the student's weights, optimizer, checkpoints and data-parallel wrapper; FSDP2 shards it too.

    The unweighted parts of the loss are logged as ``loss_<part>`` and the rows on which student and teacher agree as
    ``agreement``: means over the micro-batches of all processes since the last log, summed on the device. A part that
    is NaN or infinite ends the training with ``FloatingPointError`` at the next log, save or end, before anything
    is saved. ``eval_loss`` is the hard-label loss.

    ``train(resume_from_checkpoint=True)`` goes on from the last checkpoint that is whole, or starts anew without one.

    Args:
        model: the student: a model with ``config.tasks`` and a head for each, or, on one task, any sequence classifier
            of transformers, whose outputs are then given the task's label names.
        teacher: a model with a head per task, or a dict from task to model.
        **kwargs: of ``MultiTaskTrainer``.

    Raises:
        ValueError: no teacher where one is needed, or a teacher without the student's tasks, label names or vocabulary.
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
        tasks = train_dataset.tasks if train_dataset else {}
        adopt(model, {name: task.label_names for name, task in tasks.items()})
        args.logging_nan_inf_filter = False  # it would read the loss at every step, and hide what is to be found
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, **kwargs)
        self._accepted = accepted_inputs(model)
        self._parts = LossParts()
        self._micro_batch = 0
        self.signal: TeacherSignal | None = None
        asked = self.tasks_to_ask(datasets)
        if asked:
            if teacher is None:
                raise ValueError(f"teacher is None {self._why_a_teacher(', '.join(asked))}")
            labels = {task: model.config.tasks[task]["labels"] for task in asked}
            self.signal = TeacherSignal(teacher, labels, autocast=_autocast(args))
            _check_vocabularies(model, self.signal)
            self._place_teacher(self.signal)

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
        self._parts.add(parts, Place(self.state.global_step, self._micro_batch))
        self._micro_batch += 1
        return loss, outputs

    def student_outputs(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """The student called with those of the inputs that it takes."""
        return model(**{name: value for name, value in inputs.items() if name in self._accepted})

    @property
    def place(self) -> Place:
        """The micro-batch that is being trained on."""
        return Place(self.state.global_step, self._micro_batch)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        self._micro_batch = 0
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(cast(str, self.args.output_dir), self.args.world_size)
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        self._stop_if_broken()
        return result

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            self._stop_if_broken()
            of_all = means(gather_object([self._parts.totals()]))
            logs |= {name if name == "agreement" else f"loss_{name}": round(mean, 4) for name, mean in of_all.items()}
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._stop_if_broken()
        super()._save_checkpoint(*args, **kwargs)

    def _stop_if_broken(self) -> None:
        """In all processes together: what one has seen is in every one's weights after the step."""
        found = self._parts.broken()
        here = None
        if found is not None:
            place, parts = found
            where = f"step {place.step + 1} ({self._rows_of(place)})"
            here = f"{' and '.join(parts)} of the loss is NaN or infinite in {where}"
        broken = [message for message in gather_object([here]) if message]
        if broken:
            kept = last_checkpoint(cast(str, self.args.output_dir), self.args.world_size)
            raise FloatingPointError(f"{broken[0]}; the last good checkpoint is {kept or 'none'}")

    def _rows_of(self, place: Place) -> str:
        """Which rows a micro-batch of this process held: the sampler gives them again."""
        accumulation, processes = self.args.gradient_accumulation_steps, self.args.world_size
        per_epoch = -(-len(self.get_train_dataloader()) // accumulation)
        epoch, step = divmod(place.step, per_epoch)
        sampler = self._epoch_callback.sampler
        dataset = self.train_dataset
        if sampler is None or not isinstance(dataset, MultiTaskDataset):
            return "rows unknown"
        sampler.set_epoch(epoch)
        number = (step * accumulation + place.micro_batch) * processes + self.args.process_index
        rows = [dataset[index] for index in next(islice(iter(sampler), number, None))]
        return f"task {rows[0]['task']}, rows {', '.join(str(row['row']) for row in rows)}"

    def _why_a_teacher(self, tasks: str) -> str:
        return (
            f"and the training rows of {tasks} have no column {COLUMN}: "
            "give a teacher, or add the column with add_teacher_logits"
        )

    def _place_teacher(self, signal: TeacherSignal) -> None:
        if not self.is_fsdp_enabled:
            signal.to(self.args.device)
            return
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        if not self.accelerator.is_fsdp2:
            raise ValueError("FSDP version 1 is not supported; set fsdp_version to 2")
        for model in {id(model): model for model in signal.teachers.values()}.values():
            fsdp2_prepare_model(self.accelerator, model)


def agreement(student_logits: Tensor, teacher_logits: Tensor) -> dict[str, Tensor]:
    """``{"agreement": …}``: the part of the rows whose largest logit is the same; nothing for a regression."""
    if student_logits.shape[-1] == 1:
        return {}
    same = student_logits.detach().argmax(-1) == teacher_logits.argmax(-1)
    return {"agreement": same.float().mean()}


def _autocast(args: TrainingArguments) -> torch.dtype | None:
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
