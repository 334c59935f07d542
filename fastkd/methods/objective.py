"""What the losses of distillation by features have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, cast

from torch import Tensor, nn

from fastkd.losses import kl_div
from fastkd.training.classifiers import task_loss
from fastkd.training.taps import Features

IGNORED = -100
"""The label of a token, or the position of a span, that does not count."""


class Objective(Protocol):
    """The loss of a method, usable in any training loop.

    ``needs_…`` tell whether it reads the teacher at all, and which features beside the logits: see ``Features``.
    """

    @property
    def needs_teacher(self) -> bool: ...

    @property
    def needs_attention(self) -> bool: ...

    @property
    def needs_hidden(self) -> bool: ...

    @property
    def needs_maps(self) -> bool: ...

    @property
    def needs_weights(self) -> bool: ...

    def __call__(
        self,
        student: Features,
        teacher: Features,
        labels: Tensor,
        mask: Tensor | None = None,
        *,
        tokens: float | Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted total and its unweighted parts by name.

        Args:
            student, teacher: features of one call each on the same tokens.
            labels: as many as the logits have rows: (B,) classes or scores of a regression, (B, 2) first and last
                token of a span, or (B, T) next tokens; ``IGNORED`` in the last two does not count.
            mask: (B, T), 0 at pads; None where there are none.
            tokens: what a mean over valid tokens divides by, in place of their number here: their number in all
                micro-batches and processes, for gradients that do not depend on the division into these.
        """


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with the labels, a mean over those that count; of one label per row as ``task_loss``."""
    if labels.dim() == 1:
        return task_loss(logits, labels)
    flat, wanted = logits.flatten(0, -2), labels.flatten()
    total = nn.functional.cross_entropy(flat.float(), wanted, ignore_index=IGNORED, reduction="sum")
    return total / (wanted != IGNORED).sum().clamp(min=1)


def logit_loss(student: Features, teacher: Features, labels: Tensor, *, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student) of the logits, a mean over the rows that count; squared error of a regression."""
    mine, theirs = answers(student, teacher)
    if mine.shape[-1] == 1:
        return nn.functional.mse_loss(mine.float(), theirs.float())
    counts = labels != IGNORED if labels.dim() > 1 else None
    return cast(Tensor, kl_div(mine, theirs, temperature=temperature, mask=counts))


def answers(student: Features, teacher: Features) -> tuple[Tensor, Tensor]:
    """The logits of both, once it is clear that they can be compared."""
    if student.logits is None or teacher.logits is None:
        raise ValueError("features have no logits; set them from the models' outputs")
    if student.logits.shape != teacher.logits.shape:
        shapes = f"{tuple(teacher.logits.shape)}, but the student's {tuple(student.logits.shape)}"
        raise ValueError(f"the teacher's logits have shape {shapes}")
    return student.logits, teacher.logits


def weighted(parts: Mapping[str, Tensor], weights: Mapping[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the parts, and the parts."""
    return cast(Tensor, sum(weights[name] * part for name, part in parts.items())), dict(parts)
