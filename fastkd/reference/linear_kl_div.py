"""Divergence of two language-model heads in plain torch, logits and all: the definition of ``linear_kl_div``."""

from typing import Any

from torch import Tensor

from fastkd.reference.kl_div import kl_div_rows


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """softcap · tanh(scale · (hidden weightᵀ + bias) / softcap), (N, H) and (V, H) to (N, V), in their dtype."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * scale
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def linear_kl_div_rows(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    *,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    **options: Any,
) -> Tensor:
    """Loss of every row, (N,): ``kl_div_rows`` with its ``options`` on the logits of both heads."""
    student = head_logits(student_hidden, student_weight, student_bias, student_scale, student_softcap)
    teacher = head_logits(teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap)
    return kl_div_rows(student, teacher.to(student.dtype), **options)
