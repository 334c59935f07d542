"""Divergence of a language-model head from a teacher's most likely tokens in plain torch, logits and all."""

from typing import Any

from torch import Tensor

from fastkd.reference.linear_kl_div import head_logits
from fastkd.reference.topk_kl_div import topk_kl_div_rows


def linear_topk_kl_div_rows(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    ids: Tensor,
    teacher: Tensor,
    *,
    student_scale: float = 1.0,
    student_softcap: float | None = None,
    **options: Any,
) -> Tensor:
    """Loss of every row, (N,): ``topk_kl_div_rows`` with its ``options`` on the logits of the head."""
    logits = head_logits(student_hidden, student_weight, student_bias, student_scale, student_softcap)
    return topk_kl_div_rows(logits, ids, teacher, **options)
