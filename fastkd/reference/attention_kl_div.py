"""KL of attention maps in plain torch: the definition every kernel is held to. It does make the maps."""

import torch
from torch import Tensor

from fastkd.reference.kl_div import NEG_INF, kl_div_rows


def attention_kl_div_rows(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    causal: bool = False,
    window: int = 0,
) -> Tensor:
    """KL(teacher‖student) of every query's attention (B, H, T_q), differentiable twice in the student.

    Queries are (B, H, T_q, d) and keys (B, H_k, T_k, d), H a multiple of H_k; d may differ between the models. A
    teacher with g times the student's heads is averaged: its heads h·g ... h·g + g − 1 make one map for head h.
    Biases broadcast to (B, H, T_q, T_k), masks are bool (B, T_q) and (B, T_k), a ``window`` of 0 is none. The result
    is float64 for float64 tensors, else float32.
    """
    batch, heads, queries, _ = student_query.shape
    visible = _visible(queries, student_key.shape[2], causal, window, student_query.device)
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    student = _scores(student_query, student_key, student_scale, student_bias, query_mask, key_mask, visible)
    teacher = _scores(teacher_query, teacher_key, teacher_scale, teacher_bias, query_mask, key_mask, visible)
    if teacher.shape[1] != heads:
        teacher = _average(teacher.unflatten(1, (heads, -1)))
    valid = None if query_mask is None else query_mask[:, None].expand(batch, heads, queries).reshape(-1)
    rows = kl_div_rows(student.flatten(0, 2), teacher.flatten(0, 2), valid=valid)
    return rows.reshape(batch, heads, queries)


def _visible(queries: int, keys: int, causal: bool, window: int, device: torch.device) -> Tensor:
    """(1, 1, T_q, T_k): what a query sees by its position; the last query stands at the last key."""
    ahead = torch.arange(keys, device=device) - (torch.arange(queries, device=device)[:, None] + keys - queries)
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if causal:
        seen = seen & (ahead <= 0)
    if window:
        seen = seen & (ahead.abs() < window)
    return seen[None, None]


def _scores(
    query: Tensor,
    key: Tensor,
    scale: float,
    bias: Tensor | None,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    visible: Tensor,
) -> Tensor:
    """(B, H, T_q, T_k), −inf where there is nothing to see; what is masked may hold NaN."""
    if query.dtype != torch.float64:
        query, key = query.float(), key.float()
    if query_mask is not None:
        query = query.masked_fill(~query_mask[:, None, :, None], 0.0)
    if key_mask is not None:
        key = key.masked_fill(~key_mask[:, None, :, None], 0.0)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = (query @ key.transpose(-1, -2)) * scale
    if bias is not None:
        scores = scores + bias
    return scores.masked_fill(~visible, NEG_INF)


def _average(scores: Tensor) -> Tensor:
    """Logarithm of the mean probability over dimension 2; a head that allows no key at all takes no part."""
    empty = (scores == NEG_INF).all(-1, keepdim=True)
    log_probs = scores.masked_fill(empty, 0.0).log_softmax(-1).masked_fill(empty, NEG_INF)
    return log_probs.logsumexp(2)
