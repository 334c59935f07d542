"""Distillation of logits and of the direction of the last hidden states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastkd.methods.baselines.layers import same_width
from fastkd.methods.logits import check_temperature, check_weights
from fastkd.methods.objective import Batch, Objective, Terms, answer, hidden_states, label_loss, logit_loss
from fastkd.ops.kl_div import divided
from fastkd.training.taps import Features


@dataclass(frozen=True)
class DistilBERT(Objective):
    """Sanh et al., "DistilBERT, a distilled version of BERT" (arXiv 1910.01108), with a task's labels.

    total = ``alpha_ce`` · kd + ``alpha_task`` · label + ``alpha_cos`` · cosine, reduced as the released code does:

    * *kd*: T² · KL(teacher ‖ student), a mean over rows;
    * *label*: the loss of the labels in place of masked language modelling, a choice of this project;
    * *cosine*: 1 − cosine of the last layer's states, a mean over the tokens that are no pads.

    Args:
        alpha_ce, alpha_task, alpha_cos, temperature: the defaults are those of the released command, whose weight of
            masked language modelling ``alpha_task`` takes.

    Raises:
        ValueError: a bad weight or temperature; when called: hidden states of different widths.
    """

    alpha_ce: float = 5.0
    alpha_task: float = 2.0
    alpha_cos: float = 1.0
    temperature: float = 2.0

    @property
    def needs_hidden(self) -> bool:
        return self.alpha_cos > 0

    def __post_init__(self) -> None:
        check_weights(alpha_ce=self.alpha_ce, alpha_task=self.alpha_task, alpha_cos=self.alpha_cos)
        check_temperature(self.temperature)

    def terms(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        return {
            "kd": (self.alpha_ce, lambda: logit_loss(student, teacher, batch.labels, temperature=self.temperature)),
            "label": (self.alpha_task, lambda: label_loss(answer(student), batch.labels)),
            "cosine": (self.alpha_cos, lambda: cosine_loss(student, teacher, batch.mask, batch.tokens)),
        }


def cosine_loss(
    student: Features, teacher: Features, mask: Tensor | None = None, tokens: float | Tensor | None = None
) -> Tensor:
    """1 − cosine of the last states, a mean over the tokens that ``mask`` (B, T) keeps, or their sum over ``tokens``.

    0 where it keeps none.
    """
    mine, theirs = hidden_states(student)[-1].float(), hidden_states(teacher)[-1].detach().float()
    same_width(mine, theirs)
    exists = torch.ones(mine.shape[:2], dtype=torch.bool, device=mine.device) if mask is None else mask != 0
    pads = ~exists.unsqueeze(-1)  # filled before the cosine: a NaN in a pad would reach the gradient
    cosine = nn.functional.cosine_similarity(mine.masked_fill(pads, 1.0), theirs.masked_fill(pads, 1.0), dim=-1)
    count = exists.sum() if tokens is None else torch.as_tensor(tokens)
    return divided(((1 - cosine) * exists).sum(), count)
