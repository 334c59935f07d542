"""The distance between a student's and a teacher's logits, as every method here takes it."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Literal, cast

from torch import Tensor, nn

from fastkd.losses import kl_div

KINDS = ("mse", "kl")


@dataclass(frozen=True)
class LogitDistance:
    """d(teacher, student) of logits (B, classes), or (B, 1) of a regression, a mean over rows.

    Args:
        kind: ``"mse"``, the squared error, a mean over classes too; or ``"kl"``, T² · KL(teacher ‖ student). A
            regression always takes ``"mse"``.
        temperature: T of ``"kl"``.
        sum_over_classes: of ``"mse"``: sum over classes in place of the mean.

    Raises:
        ValueError: an unknown ``kind``, a temperature that is not positive; when called: no teacher logits, or
            another shape than the student's.
    """

    kind: Literal["mse", "kl"] = "mse"
    temperature: float = 1.0
    sum_over_classes: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f'loss must be "mse" or "kl", got {self.kind!r}')
        check_temperature(self.temperature)

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor | None) -> Tensor:
        if teacher_logits is None or teacher_logits.shape != student_logits.shape:
            found = None if teacher_logits is None else tuple(teacher_logits.shape)
            raise ValueError(f"teacher_logits must have the student's shape {tuple(student_logits.shape)}, got {found}")
        if self.kind == "kl" and student_logits.shape[-1] > 1:
            return cast(Tensor, kl_div(student_logits, teacher_logits, temperature=self.temperature))
        error = nn.functional.mse_loss(student_logits.float(), teacher_logits.float())
        return error * student_logits.shape[-1] if self.sum_over_classes else error


def is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_temperature(temperature: float) -> None:
    """Refuses a temperature that is not a positive finite number."""
    if not (is_number(temperature) and 0 < temperature < float("inf")):
        raise ValueError(f"temperature must be a positive number, got {temperature!r}")


def check_share(**shares: float) -> None:
    """Refuses a share that is not from 0 to 1."""
    for name, share in shares.items():
        if not (is_number(share) and 0 <= share <= 1):
            raise ValueError(f"{name} must be a number from 0 to 1, got {share!r}")


def check_not_negative(**weights: float) -> None:
    """Refuses a weight that is negative or not finite."""
    for name, weight in weights.items():
        if not (is_number(weight) and 0 <= weight < float("inf")):
            raise ValueError(f"{name} must be a number of at least 0, got {weight!r}")


def check_weights(**weights: float) -> None:
    """Refuses a weight that is negative or not finite, and weights that are all 0."""
    check_not_negative(**weights)
    if not any(weights.values()):
        raise ValueError(
            f"{' and '.join(weights)} are {'both' if len(weights) == 2 else 'all'} 0: nothing would be learned"
        )
