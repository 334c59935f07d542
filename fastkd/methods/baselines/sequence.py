"""Distillation of decoders by other divergences of the next token's distribution than the forward one.

All take the tokens of a batch as they are, those of the data or of anyone's samples; nothing is sampled here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from fastkd.methods.logits import check_not_negative, check_share, check_temperature
from fastkd.methods.objective import Batch, Objective, Terms, answer, label_loss, logit_loss
from fastkd.training.taps import Features


@dataclass(frozen=True)
class ReverseKL(Objective):
    """total = (1 − ``alpha``) · label + ``alpha`` · reverse_kl, means over the tokens with a label.

    *reverse_kl* is T² · KL(student ‖ teacher), of all tokens of a text and not of sampled ones alone.

    Args:
        alpha: share of the distillation; the default is the share of distillation in MiniLLM's code.
        temperature: T.

    Raises:
        ValueError: ``alpha`` is not from 0 to 1, or ``temperature`` not positive.
    """

    alpha: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_share(alpha=self.alpha)
        check_temperature(self.temperature)

    def terms(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        distance = partial(logit_loss, temperature=self.temperature, divergence="reverse")
        return {
            "label": (1 - self.alpha, lambda: label_loss(answer(student), batch.labels)),
            "reverse_kl": (self.alpha, lambda: distance(student, teacher, batch.labels)),
        }


@dataclass(frozen=True)
class JSD(Objective):
    """Agarwal et al., "On-Policy Distillation of Language Models" (GKD, arXiv 2306.13649), on the batch's own tokens.

    total = (1 − ``alpha``) · label + ``alpha`` · jsd, means over the tokens with a label, with
    jsd = T² · (β · KL(teacher ‖ m) + (1−β) · KL(student ‖ m)) and m = β · teacher + (1−β) · student.

    Args:
        beta: inside (0, 1). TRL takes the bounds for forward and reverse KL, which are ``KD`` and ``ReverseKL`` here.
        alpha: share of the distillation; the default, as in TRL, leaves the labels out.
        temperature: T. TRL has no T², which at its temperature of 1 is the same.

    Raises:
        ValueError: ``beta`` is not inside (0, 1), ``alpha`` not from 0 to 1, or ``temperature`` not positive.
    """

    beta: float = 0.5
    alpha: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise ValueError(f"beta must be a number inside (0, 1), got {self.beta}")
        check_share(alpha=self.alpha)
        check_temperature(self.temperature)

    def terms(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        distance = partial(logit_loss, temperature=self.temperature, divergence="jsd", beta=self.beta)
        return {
            "label": (1 - self.alpha, lambda: label_loss(answer(student), batch.labels)),
            "jsd": (self.alpha, lambda: distance(student, teacher, batch.labels)),
        }


@dataclass(frozen=True)
class MiniLLM(Objective):
    """What MiniLLM (Gu et al., arXiv 2306.08543) adds to its policy gradient, on the batch's own tokens.

    total = single_step + ``lm_coef`` · ((1 − ``kd_ratio``) · label + ``kd_ratio`` · kd), means over the tokens with a
    label:

    * *single_step*: KL(student ‖ teacher) of each token's distribution, the part of the gradient of the sequences'
      KL(student ‖ teacher) that is exact without samples of what follows;
    * *label* and *kd*: the cross-entropy with the labels and KL(teacher ‖ student), the regulariser, which the released
      code takes on plain text and this project on the same tokens.

    The policy gradient on the student's own samples, which is what the method is named for, is not part of it.

    Args:
        lm_coef: weight of the regulariser, the released code's.
        kd_ratio: share of the distillation in it, the released scripts'.

    Raises:
        ValueError: ``lm_coef`` is negative, or ``kd_ratio`` not from 0 to 1.
    """

    lm_coef: float = 1.0
    kd_ratio: float = 0.5

    def __post_init__(self) -> None:
        check_not_negative(lm_coef=self.lm_coef)
        check_share(kd_ratio=self.kd_ratio)

    def terms(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        distance = partial(logit_loss, student, teacher, batch.labels, temperature=1.0)
        label, kd = self.lm_coef * (1 - self.kd_ratio), self.lm_coef * self.kd_ratio
        return {
            "single_step": (1.0, lambda: distance(divergence="reverse")),
            "label": (label, lambda: label_loss(answer(student), batch.labels)),
            "kd": (kd, distance),
        }
