"""MKD: one multi-task student learns the logits of a multi-task teacher, by the squared error.

Liu et al., "MKD: a Multi-Task Knowledge Distillation Approach for Pretrained Language Models" (arXiv
1911.03588). docs/mkd.md tells what is known of the paper's recipe from what is a choice of this project.
"""

from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor
from torch.nn import functional as F

from fastkd.losses import kl_div


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
            rows.
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
            parts["hard_label"] = _hard_label(student_logits, labels)
        weights = {"distillation": self.distillation_weight, "hard_label": self.hard_label_weight}
        total = sum(weights[name] * part for name, part in parts.items())
        return cast(Tensor, total), parts

    def _distillation(self, student_logits: Tensor, teacher_logits: Tensor | None) -> Tensor:
        if teacher_logits is None or teacher_logits.shape != student_logits.shape:
            found = None if teacher_logits is None else tuple(teacher_logits.shape)
            raise ValueError(f"teacher_logits must have the student's shape {tuple(student_logits.shape)}, got {found}")
        if self.loss == "kl" and student_logits.shape[-1] > 1:
            return cast(Tensor, kl_div(student_logits, teacher_logits, temperature=self.temperature))
        error = F.mse_loss(student_logits.float(), teacher_logits.float())
        return error * student_logits.shape[-1] if self.sum_over_classes else error


def _hard_label(student_logits: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None:
        raise ValueError("labels must be given when hard_label_weight is above 0")
    if student_logits.shape[-1] == 1:
        return F.mse_loss(student_logits.squeeze(-1).float(), labels.float())
    return F.cross_entropy(student_logits.float(), labels)
