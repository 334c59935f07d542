"""Distillation of the first token's states in the middle layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fastkd.losses import mse
from fastkd.methods.baselines.layers import Layers, check_layers, layer_pairs, state_pairs
from fastkd.methods.logits import check_not_negative, check_share, check_temperature
from fastkd.methods.objective import Batch, Objective, Terms, answer, class_count, hidden_states, label_loss, logit_loss
from fastkd.training.taps import Features


@dataclass(frozen=True)
class PKD(Objective):
    """Sun et al., "Patient Knowledge Distillation for BERT Model Compression" (arXiv 1908.09355).

    total = (1 − ``alpha``) · label + ``alpha`` · kd + ``beta`` · patience, reduced as the released code does:

    * *kd*: T² · KL(teacher ‖ student), a mean over rows *and classes*, so that of C classes it is 1/C of ``KD``'s; of
      tokens and spans over rows, a choice of this project;
    * *patience*: squared error of the first token's states, each divided by its Euclidean norm, a mean over rows, pairs
      of layers and the h features, so 1/h of a squared distance.

    Args:
        alpha, temperature, beta: the defaults are those of the released code's example.
        layers: see ``layer_pairs``.

    Raises:
        ValueError: a bad weight, temperature or map; when called: models that the map does not fit, or hidden states of
            different widths.
    """

    alpha: float = 0.7
    temperature: float = 10.0
    beta: float = 500.0
    layers: Layers = "skip"

    @property
    def needs_hidden(self) -> bool:
        return self.beta > 0

    def __post_init__(self) -> None:
        check_share(alpha=self.alpha)
        check_temperature(self.temperature)
        check_not_negative(beta=self.beta)
        check_layers(self.layers)

    def terms(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        return {
            "label": (1 - self.alpha, lambda: label_loss(answer(student), batch.labels)),
            "kd": (self.alpha, lambda: self._divergence(student, teacher, batch.labels)),
            "patience": (self.beta, lambda: self._patience(hidden_states(student), hidden_states(teacher))),
        }

    def _divergence(self, student: Features, teacher: Features, labels: Tensor) -> Tensor:
        divergence = logit_loss(student, teacher, labels, temperature=self.temperature)
        return divergence / class_count(answer(student), labels)

    def _patience(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        pairs = layer_pairs(self.layers, len(student) - 1, len(teacher) - 1)
        sides = state_pairs(student, teacher, pairs)
        mine, theirs = ([nn.functional.normalize(x[:, 0].float(), dim=-1) for x in side] for side in sides)
        return mse(mine, theirs)[0] / len(pairs)
