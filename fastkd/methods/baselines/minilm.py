"""Distillation of how tokens attend to one another, in one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastkd.losses import attention_kl_div
from fastkd.methods.logits import check_not_negative
from fastkd.methods.objective import Batch, Objective, Terms, answer, attentions, label_loss
from fastkd.training.taps import Attention, Features


@dataclass(frozen=True)
class MiniLM(Objective):
    """Wang et al., "MiniLM: Deep Self-Attention Distillation" (arXiv 2002.10957), of the last layers.

    total = attention + value + ``label_weight`` · label, the first two KL(teacher ‖ student) over the keys, means over
    heads and the queries that are no pads:

    * *attention*: of the attention maps;
    * *value*: of the value relations softmax(V Vᵀ / √d), which see as far as the attention does.

    No code was released; this is the paper's formula as others have it. Its mean over the tokens of a text is here one
    over the tokens of the batch, as in GLMKD, a choice of this project.

    Args:
        label_weight: of the labels' loss. The paper has none, so with 0 the student's head learns nothing here and
            is to be fine-tuned.

    Raises:
        ValueError: a negative weight; when called: different numbers of heads, or attention that sees differently far.
    """

    label_weight: float = 0.0

    @property
    def needs_logits(self) -> bool:
        return self.label_weight > 0

    @property
    def needs_attention(self) -> bool:
        return True

    def __post_init__(self) -> None:
        check_not_negative(label_weight=self.label_weight)

    def terms(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        mine, theirs = attentions(student)[-1], attentions(teacher)[-1]
        _check_heads(mine, theirs)
        of_maps, of_values = (
            _options(mine, theirs, batch.mask, batch.tokens, heads=heads.shape[1]) for heads in (mine.query, mine.value)
        )
        return {
            "attention": (1.0, lambda: _maps(mine, theirs, of_maps)),
            "value": (1.0, lambda: _relations(mine.value, theirs.value, of_values)),
            "label": (self.label_weight, lambda: label_loss(answer(student), batch.labels)),
        }


@dataclass(frozen=True)
class MiniLMv2(Objective):
    """Wang et al., "MiniLMv2: Multi-Head Self-Attention Relation Distillation" (arXiv 2012.15828).

    total = query + key + value + ``label_weight`` · label. Each of the first three is KL(teacher ‖ student) of the
    relations softmax(X Xᵀ / √d) of X = Q, K or V, whose heads are joined and split anew into ``relation_heads``, so
    that models of any width and number of heads can be compared. It is a mean over relation heads and the queries that
    are no pads, as in ``MiniLM``.

    No code was released. Queries and keys are taken after rotary embedding, where a model has it.

    Args:
        relation_heads: must divide the widths of both models; 48 is the paper's for teachers of base size as we
            recall it.
        teacher_layer: counted from 1; None is the last. The student's is always its last.
        label_weight: as in ``MiniLM``.

    Raises:
        ValueError: a bad option; when called: ``relation_heads`` does not divide a width, the teacher has no such
            layer, or attention that sees differently far.
    """

    relation_heads: int = 48
    teacher_layer: int | None = None
    label_weight: float = 0.0

    @property
    def needs_logits(self) -> bool:
        return self.label_weight > 0

    @property
    def needs_attention(self) -> bool:
        return True

    def __post_init__(self) -> None:
        check_not_negative(label_weight=self.label_weight)
        for name in ("relation_heads", "teacher_layer"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")

    def terms(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        depth = len(attentions(teacher))
        layer = self.teacher_layer or depth
        if layer > depth:
            raise ValueError(f"teacher_layer is {layer}; it must be 1 to {depth}, the layers of the teacher")
        mine, theirs = attentions(student)[-1], attentions(teacher)[layer - 1]
        options = _options(mine, theirs, batch.mask, batch.tokens, heads=self.relation_heads)
        options["relation_heads"] = self.relation_heads
        return {
            "query": (1.0, lambda: _relations(mine.query, theirs.query, options)),
            "key": (1.0, lambda: _relations(mine.key, theirs.key, options)),
            "value": (1.0, lambda: _relations(mine.value, theirs.value, options)),
            "label": (self.label_weight, lambda: label_loss(answer(student), batch.labels)),
        }


def _maps(student: Attention, teacher: Attention, options: dict[str, Any]) -> Tensor:
    return attention_kl_div(
        student.query,
        student.key,
        teacher.query,
        teacher.key,
        student_scale=student.scale,
        teacher_scale=teacher.scale,
        student_bias=None if student.bias is None else student.bias.detach(),
        teacher_bias=teacher.bias,
        **options,
    )


def _relations(student: Tensor, teacher: Tensor, options: dict[str, Any]) -> Tensor:
    return attention_kl_div(student, student, teacher, teacher, **options)


def _options(
    student: Attention, teacher: Attention, mask: Tensor | None, tokens: float | Tensor | None, heads: int
) -> dict[str, Any]:
    """How far both models see, which must be equally far, and what a mean over so many heads divides by."""
    mine, theirs = ({"causal": x.causal, "window": x.window} for x in (student, teacher))
    if mine != theirs:
        raise ValueError(f"the teacher's attention has {theirs}, but the student's {mine}: they must be equal")
    return {**mine, "mask": mask, "normalizer": None if tokens is None else heads * tokens}


def _check_heads(student: Attention, teacher: Attention) -> None:
    mine, theirs = ((x.query.shape[1], x.value.shape[1]) for x in (student, teacher))
    if mine != theirs:
        heads = f"the student's last layer has {mine} query and value heads and the teacher's {theirs}"
        raise ValueError(f"{heads}: MiniLM takes equally many, MiniLMv2 any")
