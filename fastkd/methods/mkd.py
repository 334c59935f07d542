"""MKD: one multi-task student learns the logits of a multi-task teacher, by the squared error.

Liu et al., "MKD: a Multi-Task Knowledge Distillation Approach for Pretrained Language Models" (arXiv
1911.03588). docs/mkd.md tells what is known of the paper's recipe from what is a choice of this project.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from fastkd.data.encode import MultiTaskDataset
from fastkd.losses import kl_div
from fastkd.training.signals import COLUMN, TeacherSignal
from fastkd.training.teacher import task_loss
from fastkd.training.trainer import MultiTaskTrainer


@dataclass(frozen=True)
class MKDObjective:
    """The loss of MKD for one single-task batch: distillation, and hard labels where asked for.

    total = ``distillation_weight`` · distillation + ``hard_label_weight`` · hard_label. The published loss is
    believed to be the first term alone, so the second has weight 0 by default.

    Args:
        loss: ``"mse"``, the squared error of the logits, or ``"kl"``, T² · KL(teacher ‖ student) at
            ``temperature``, a mean over rows. A regression (one output) always takes ``"mse"``.
        temperature: of ``"kl"``.
        sum_over_classes: of ``"mse"``: sum over classes, mean over rows, in place of the mean over all elements
            (the paper does not say which).
        hard_label_weight: of the cross-entropy with the labels, or the squared error of a regression; mean over
            the rows that have a label.
        distillation_weight: 0 with ``hard_label_weight=1`` trains without a teacher.
    """

    loss: Literal["mse", "kl"] = "mse"
    temperature: float = 1.0
    sum_over_classes: bool = False
    hard_label_weight: float = 0.0
    distillation_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.loss not in ("mse", "kl"):
            raise ValueError(f'loss must be "mse" or "kl", got {self.loss!r}')
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be a positive number, got {self.temperature}")
        for name in ("hard_label_weight", "distillation_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a number of at least 0, got {getattr(self, name)}")
        if self.hard_label_weight == self.distillation_weight == 0:
            raise ValueError("hard_label_weight and distillation_weight are both 0: nothing would be learned")

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None = None, labels: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted total and its unweighted parts ``distillation`` and ``hard_label``, those with a weight.

        Args:
            student_logits, teacher_logits: (B, classes), or (B, 1) for a regression; columns in the same order.
            labels: (B,) class numbers, or scores of a regression.

        Raises:
            ValueError: an argument that a term with a weight needs is missing, or the logits' shapes differ.
        """
        parts = {}
        if self.distillation_weight:
            parts["distillation"] = self._distillation(student_logits, teacher_logits)
        if self.hard_label_weight:
            if labels is None:
                raise ValueError("labels must be given when hard_label_weight is above 0")
            parts["hard_label"] = task_loss(student_logits, labels)
        weights = {"distillation": self.distillation_weight, "hard_label": self.hard_label_weight}
        total = sum(weights[name] * part for name, part in parts.items())
        return cast(Tensor, total), parts

    def _distillation(self, student_logits: Tensor, teacher_logits: Tensor | None) -> Tensor:
        if teacher_logits is None or teacher_logits.shape != student_logits.shape:
            found = None if teacher_logits is None else tuple(teacher_logits.shape)
            raise ValueError(f"teacher_logits must have the student's shape {tuple(student_logits.shape)}, got {found}")
        if self.loss == "kl" and student_logits.shape[-1] > 1:
            return cast(Tensor, kl_div(student_logits, teacher_logits, temperature=self.temperature))
        error = nn.functional.mse_loss(student_logits.float(), teacher_logits.float())
        return error * student_logits.shape[-1] if self.sum_over_classes else error


@dataclass
class MKDConfig(TrainingArguments):
    """``TrainingArguments`` and the options of :class:`MKDObjective`, which documents them.

    Defaults that differ from ``TrainingArguments``: learning rate 5e-4, 128 rows per batch and 16 epochs, the
    paper's as we recall them, and batches of rows of similar length, a choice of this project.
    """

    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Rows per device and step."})
    num_train_epochs: float = field(default=16.0, metadata={"help": "Times every row is seen."})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "group_by_length puts rows of similar length together."}
    )
    loss: str = field(default="mse", metadata={"help": "mse of the logits, or kl at a temperature."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of kl."})
    sum_over_classes: bool = field(default=False, metadata={"help": "Sum mse over classes, not mean."})
    hard_label_weight: float = field(default=0.0, metadata={"help": "Weight of the hard-label loss."})
    distillation_weight: float = field(default=1.0, metadata={"help": "Weight of the distillation loss."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.objective()  # refuses bad options before any work

    def objective(self) -> MKDObjective:
        return MKDObjective(
            loss=cast(Literal["mse", "kl"], self.loss),
            temperature=self.temperature,
            sum_over_classes=self.sum_over_classes,
            hard_label_weight=self.hard_label_weight,
            distillation_weight=self.distillation_weight,
        )


class MKDTrainer(MultiTaskTrainer):
    """Distils a multi-task teacher, or one teacher per task, into one multi-task student.

    Args:
        model: the student, with ``config.tasks``.
        args: an :class:`MKDConfig`.
        teacher: a model with a head per task, or a dict from task to model; not needed when the training rows
            have a column ``teacher_logits`` (see ``add_teacher_logits``), nor with ``distillation_weight=0``.
            It is frozen, and stays out of the student's weights, optimizer and checkpoints.
        **kwargs: of ``MultiTaskTrainer``.

    ``eval_loss`` is the hard-label loss. The unweighted parts of the training loss are logged as
    ``loss_distillation`` and ``loss_hard_label``, means over the micro-batches since the last log.

    Raises:
        ValueError: no teacher where one is needed, or a teacher without the student's tasks and label names.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: MKDConfig,
        data_collator: Any = None,
        train_dataset: MultiTaskDataset | None = None,
        eval_dataset: Mapping[str, MultiTaskDataset] | None = None,
        *,
        teacher: nn.Module | Mapping[str, nn.Module] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, **kwargs)
        self.objective: MKDObjective = args.objective()
        self.signal = None
        datasets = train_dataset.datasets if train_dataset else {}
        without = [task for task, rows in datasets.items() if COLUMN not in rows.column_names]
        if self.objective.distillation_weight and without:
            if teacher is None:
                raise ValueError(
                    f"teacher is None and the training rows of {', '.join(without)} have no column {COLUMN}: "
                    "give a teacher, or add the column with add_teacher_logits"
                )
            labels = {task: model.config.tasks[task]["labels"] for task in without}
            self.signal = TeacherSignal(teacher, labels).to(args.device)
        self._sums: dict[str, Tensor] = {}
        self._micro_batches = 0

    def batch_loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Any]:
        inputs = {name: value for name, value in batch.items() if name not in ("labels", COLUMN)}
        labels, teacher_logits = batch.get("labels"), batch.get(COLUMN)
        outputs = model(**inputs)
        if not model.training:
            return task_loss(outputs.logits, cast(Tensor, labels)), outputs
        if teacher_logits is None and self.signal is not None:
            teacher_logits = self.signal(inputs)
        loss, parts = self.objective(outputs.logits, teacher_logits, labels)
        for name, part in parts.items():  # kept on the device: reading them each step would wait for it
            self._sums[name] = self._sums.get(name, torch.zeros_like(part)) + part.detach()
        self._micro_batches += 1
        return loss, outputs

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._micro_batches:
            logs |= {f"loss_{name}": round(s.item() / self._micro_batches, 4) for name, s in self._sums.items()}
            self._sums, self._micro_batches = {}, 0
        super().log(logs, *args, **kwargs)
