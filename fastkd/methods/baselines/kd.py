"""Distillation of the logits at a temperature."""

from __future__ import annotations

from dataclasses import dataclass

from fastkd.methods.logits import check_share, check_temperature
from fastkd.methods.objective import Batch, Objective, Terms, answer, label_loss, logit_loss
from fastkd.training.taps import Features


@dataclass(frozen=True)
class KD(Objective):
    """Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531).

    total = (1 − ``alpha``) · label + ``alpha`` · kd, with kd = T² · KL(teacher ‖ student), both means over rows, of
    which a decoder's are the tokens with a label. With ``temperature=1`` that is the word-level distillation of
    MiniLLM's code but for the entropy of the teacher, a constant, which its cross-entropy of soft labels has on top.

    Args:
        alpha: share of the distillation.
        temperature: T. No code was released with the paper; both defaults are those of DistilBERT's script for SQuAD.

    Raises:
        ValueError: ``alpha`` is not from 0 to 1, or ``temperature`` not positive.
    """

    alpha: float = 0.5
    temperature: float = 2.0

    @property
    def needs_teacher(self) -> bool:
        return self.alpha > 0

    def __post_init__(self) -> None:
        check_share(alpha=self.alpha)
        check_temperature(self.temperature)

    def terms(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        return {
            "label": (1 - self.alpha, lambda: label_loss(answer(student), batch.labels)),
            "kd": (self.alpha, lambda: logit_loss(student, teacher, batch.labels, temperature=self.temperature)),
        }
