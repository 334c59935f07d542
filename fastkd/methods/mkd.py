"""MKD: one multi-task student learns the logits of a multi-task teacher, by the squared error.

Liu et al., "MKD: a Multi-Task Knowledge Distillation Approach for Pretrained Language Models" (arXiv
1911.03588). docs/mkd.md tells what is known of the paper's recipe from what is a choice of this project.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from fastkd.methods.logits import LogitDistance, check_weights
from fastkd.training.classifiers import task_loss
from fastkd.training.distillation import DistillationTrainer, agreement


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
            all rows, to which one without a label adds 0.
        distillation_weight: 0 with ``hard_label_weight=1`` trains without a teacher.
    """

    loss: Literal["mse", "kl"] = "mse"
    temperature: float = 1.0
    sum_over_classes: bool = False
    hard_label_weight: float = 0.0
    distillation_weight: float = 1.0

    def __post_init__(self) -> None:
        self.distance()
        check_weights(hard_label_weight=self.hard_label_weight, distillation_weight=self.distillation_weight)

    def distance(self) -> LogitDistance:
        return LogitDistance(self.loss, self.temperature, self.sum_over_classes)

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None = None, labels: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted total and its unweighted parts ``distillation`` and ``hard_label``, those with a weight.

        Args:
            student_logits, teacher_logits: (B, classes), or (B, 1) for a regression; columns in the same order.
            labels: (B,) class numbers, −1 where one is missing; or scores of a regression, NaN where one is.

        Raises:
            ValueError: an argument that a term with a weight needs is missing, the logits' shapes differ, or a label
                on a CPU is no class.
        """
        parts = {}
        if self.distillation_weight:
            parts["distillation"] = self.distance()(student_logits, teacher_logits)
        if self.hard_label_weight:
            if labels is None:
                raise ValueError("labels must be given when hard_label_weight is above 0")
            parts["hard_label"] = task_loss(student_logits, labels)
        weights = {"distillation": self.distillation_weight, "hard_label": self.hard_label_weight}
        total = sum(weights[name] * part for name, part in parts.items())
        return cast(Tensor, total), parts


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


class MKDTrainer(DistillationTrainer):
    """Distils a multi-task teacher, or one teacher per task, into one multi-task student.

    Args:
        model: the student; see ``DistillationTrainer``.
        args: an :class:`MKDConfig`.
        teacher: a model with a head per task, or a dict from task to model; not needed when the training rows
            have a column ``teacher_logits`` (see ``add_teacher_logits``), nor with ``distillation_weight=0``.
        **kwargs: of ``DistillationTrainer``, which tells what is logged and what becomes of the teacher.

    The parts of the loss are ``distillation`` and ``hard_label``.

    Raises:
        ValueError: as ``DistillationTrainer``.
    """

    args: MKDConfig

    def __init__(self, model: PreTrainedModel, args: MKDConfig, *arguments: Any, **kwargs: Any) -> None:
        self.objective: MKDObjective = args.objective()
        super().__init__(model, args, *arguments, **kwargs)

    def tasks_to_ask(self, datasets: Mapping[str, Any]) -> list[str]:
        return super().tasks_to_ask(datasets) if self.objective.distillation_weight else []

    def distillation_loss(
        self, model: nn.Module, inputs: dict[str, Any], labels: Tensor, teacher_logits: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor], Any]:
        outputs = self.student_outputs(model, inputs)
        if teacher_logits is None and self.signal is not None:
            teacher_logits = self.signal(inputs)
        loss, parts = self.objective(outputs.logits, teacher_logits, labels)
        if teacher_logits is not None:
            parts |= agreement(outputs.logits, teacher_logits)
        return loss, parts, outputs
