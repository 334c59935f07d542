"""Distillation of attention scores and hidden states in one stage, of logits in another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from fastkd.losses import kl_div, mse
from fastkd.losses.kl_div import KLDivStats
from fastkd.methods.baselines.layers import Layers, check_layers, layer_pairs, state_pairs
from fastkd.methods.logits import check_temperature
from fastkd.methods.objective import (
    Batch,
    Objective,
    Terms,
    answer,
    answers,
    attentions,
    class_count,
    counted,
    hidden_states,
    label_loss,
)
from fastkd.training.taps import Attention, Features

STAGES = ("intermediate", "prediction")


@dataclass(frozen=True)
class TinyBERT(Objective):
    """Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding" (arXiv 1909.10351), one stage of two.

    Reduced as the released code does. The stage *intermediate* has total = attention + hidden:

    * *attention*: over the pairs of layers, the sum of the mean squared errors of the scores Q Kᵀ · scale + bias,
      before the softmax, with 0 in both models where the key is a pad or out of sight; queries that are pads count;
    * *hidden*: the same of the embeddings and of the states of the pairs of layers, pads included, the student's
      through ``projection``.

    The stage *prediction* has total = kd, the cross-entropy of the logits with the teacher's at a temperature, a mean
    over rows *and classes* and without T², of tokens and spans over rows; of a regression total = label, the squared
    error to the scores.

    The released code finds what is out of sight by a score of at most −100, so it also takes a true score of that size
    for 0; here only masks decide, a choice of this project.

    Args:
        stage: ``"intermediate"`` or ``"prediction"``.
        layers: see ``layer_pairs``.
        projection: from the student's width to the teacher's, one for all layers, such as ``nn.Linear``, to be trained
            with the student and then left behind. The released code has it where the widths are equal, too.
        temperature: of the stage *prediction*.

    Raises:
        ValueError: an unknown stage, a bad map or temperature; when called: models that the map does not fit,
            different numbers of heads, or of widths without a projection.
    """

    stage: Literal["intermediate", "prediction"] = "intermediate"
    layers: Layers = "uniform"
    projection: nn.Module | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {self.stage!r}")
        check_layers(self.layers)
        if not isinstance(self.projection, nn.Module | None):
            raise ValueError(f"projection must be a module, or None for models of one width, got {self.projection!r}")
        check_temperature(self.temperature)

    @property
    def needs_logits(self) -> bool:
        return self.stage == "prediction"

    @property
    def needs_attention(self) -> bool:
        return self.stage == "intermediate"

    @property
    def needs_hidden(self) -> bool:
        return self.stage == "intermediate"

    def terms(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        if self.stage == "intermediate":
            return {
                "attention": (1.0, lambda: self._attention(attentions(student), attentions(teacher), batch.mask)),
                "hidden": (1.0, lambda: self._hidden(hidden_states(student), hidden_states(teacher))),
            }
        if answer(student).shape[-1] == 1:
            return {"label": (1.0, lambda: label_loss(answer(student), batch.labels))}
        return {"kd": (1.0, lambda: self._soft_cross_entropy(student, teacher, batch.labels))}

    def _attention(self, student: list[Attention], teacher: list[Attention], mask: Tensor | None) -> Tensor:
        pairs = layer_pairs(self.layers, len(student), len(teacher))
        mine = [attention_scores(student[layer - 1], mask) for layer, _ in pairs]
        theirs = [attention_scores(teacher[layer - 1], mask) for _, layer in pairs]
        heads, wanted = mine[0].shape[1], theirs[0].shape[1]
        if heads != wanted:
            raise ValueError(f"the student has {heads} attention heads and the teacher {wanted}: they must be equal")
        return mse(mine, theirs)[0]

    def _hidden(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        pairs = layer_pairs(self.layers, len(student) - 1, len(teacher) - 1)
        project = self.projection or nn.Identity()
        states = state_pairs([project(state) for state in student], teacher, [(0, 0), *pairs])
        return mse(*states)[0]

    def _soft_cross_entropy(self, student: Features, teacher: Features, labels: Tensor) -> Tensor:
        logits, mask = answers(student, teacher), counted(labels)
        answered = kl_div(
            *logits, temperature=self.temperature, mask=mask, scale_by_temperature=False, return_stats=True
        )
        divergence, stats = cast(tuple[Tensor, KLDivStats], answered)
        return (divergence + stats.teacher_entropy) / class_count(logits[0], labels)


def attention_scores(attention: Attention, mask: Tensor | None) -> Tensor:
    """Q Kᵀ · scale + bias, (B, H, T, T), and 0 where the key is a pad by ``mask`` (B, T) or out of sight."""
    query, key = attention.query, attention.key
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(-1, -2) * attention.scale
    if attention.bias is not None:
        scores = scores + attention.bias
    tokens = torch.arange(query.shape[2], device=query.device)
    ahead = tokens - tokens[:, None]
    hidden = ahead > 0 if attention.causal else torch.zeros_like(ahead, dtype=torch.bool)
    if attention.window is not None:
        hidden = hidden | (ahead.abs() >= attention.window)
    if mask is not None:
        hidden = hidden | (mask == 0)[:, None, None, :]
    return scores.masked_fill(hidden, 0.0)
