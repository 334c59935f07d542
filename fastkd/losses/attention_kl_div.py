"""KL divergence of the attention maps of student and teacher, from their queries and keys."""

from functools import reduce
from typing import Literal

import torch
from torch import Tensor, nn

from fastkd import ops
from fastkd.losses import _checks
from fastkd.losses._checks import REDUCTIONS, Reduction
from fastkd.ops.attention_kl_div import Options

Layout = Literal["bhtd", "bthd"]

NAMES = ("student_query", "student_key", "teacher_query", "teacher_key")
FARTHEST = 2**30
"""No sequence is as long: a window of this size shows every key, and added to a position it does not overflow."""


def attention_kl_div(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    *,
    mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_lse: Tensor | None = None,
    teacher_lse: Tensor | None = None,
    relation_heads: int | None = None,
    average_teacher_heads: bool = False,
    layout: Layout = "bhtd",
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""KL(teacher ‖ student) of softmax(Q Kᵀ · scale + bias), with no T×T map in memory.

    The mean over batch, heads and valid queries is the attention loss of MiniLM (arXiv 2002.10957, eq. 2). With
    ``relation_heads`` and the same tensor as query and key it is the relation loss of MiniLMv2 (arXiv 2012.15828):
    Q–Q, K–K or V–V.

    Args:
        student_query: (B, H, T_q, d), or (B, T_q, H, d) with ``layout="bthd"``; float32, bfloat16, float16 or
            float64, any strides. A last dimension that is not dense is copied once.
        student_key: (B, H_k, T_k, d), H a multiple of H_k (grouped queries).
        teacher_query, teacher_key: likewise, of the same B, T_q and T_k; their d may differ. Must not require grad.
        mask: (B, T_k) bool, or numbers where 0 means that the key does not exist; or (B,) int64, the lengths of
            sequences padded at their end. Where T_q = T_k it says which queries are valid, too.
        query_mask: (B, T_q) bool or numbers, replaces ``mask`` for the queries.
        causal: a query sees no key behind its own position; the last query stands at the last key.
        window: a query sees keys less than so many positions away on either side.
        student_scale, teacher_scale: of Q Kᵀ, positive; 1/√d by default.
        student_bias, teacher_bias: added to the scaled scores, (B or 1, H or 1, T_q or 1, T_k), computed in float32;
            no gradient flows to them. −inf excludes a key.
        student_lse, teacher_lse: log Σ exp of the rows of scores, (B, H, T_q), over the keys that a query sees: what
            FlashAttention returns beside its output. They save the GPU kernels a pass; the CPU kernel takes its own.
            No gradient flows to them, and none is missing.
        relation_heads: join the heads of each token and split them anew into so many, the same for both models.
            Query and key must then have one width H·d. Tensors whose heads are not adjacent are copied.
        average_teacher_heads: a teacher with g times as many heads as the student is compared by the mean of the
            maps of each g consecutive heads. A choice of this project.
        layout: order of heads and tokens in all four tensors.
        reduction: ``"mean"`` divides the sum by H · (number of valid queries), ``"sum"`` does not divide, ``"none"``
            returns (B, H, T_q), 0 where a query is not valid.
        normalizer: a positive number or 0-d tensor that replaces H · (number of valid queries) in ``"mean"``.

    Returns:
        The loss, float32 (float64 for float64 tensors).

    Arithmetic is float32 inside. What is masked may hold NaN. A query whose keys the student's bias excludes where the
    teacher's allows them has loss +inf and gradient 0; a valid query that sees no key at all has loss 0 and counts.
    The fused backends raise on a second derivative; float64 takes the plain torch path, which has one.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it must be.
    """
    tensors = student_query, student_key, teacher_query, teacher_key
    biases = _checks.given(student_bias=student_bias, teacher_bias=teacher_bias)
    lses = _checks.given(student_lse=student_lse, teacher_lse=teacher_lse)
    _checks.tensors(**dict(zip(NAMES, tensors, strict=True)), **biases, **lses)
    _checks.reduction(reduction, normalizer)
    for name, tensor in (*zip(NAMES[2:], tensors[2:], strict=True), *biases.items()):
        _checks.frozen(name, tensor)
    if layout not in ("bhtd", "bthd"):
        raise ValueError(f"layout must be bhtd or bthd, got {layout!r}")
    q_s, k_s, q_t, k_t = (_heads(*named, layout, relation_heads) for named in zip(NAMES, tensors, strict=True))
    _check_shapes(q_s, k_s, q_t, k_t, average_teacher_heads)
    keys_exist, queries_valid = _masks(q_s, k_s, mask, query_mask)
    options = Options(
        _bias("student_bias", student_bias, q_s, k_s),
        _bias("teacher_bias", teacher_bias, q_t, k_t),
        _lse("student_lse", student_lse, q_s),
        _lse("teacher_lse", teacher_lse, q_t),
        queries_valid,
        keys_exist,
        _scale("student_scale", student_scale, q_s),
        _scale("teacher_scale", teacher_scale, q_t),
        causal,
        _window(window),
    )
    dtype = reduce(torch.promote_types, (x.dtype for x in tensors))
    q_s, k_s, q_t, k_t = (x.to(dtype) for x in (q_s, k_s, q_t, k_t))
    return ops.attention_kl_div(
        q_s, k_s, q_t, k_t, options, reduction=REDUCTIONS.index(reduction), normalizer=normalizer
    )


class AttentionKLDivLoss(nn.Module):
    """:func:`attention_kl_div` as a module: options at construction, tensors at the call."""

    def __init__(
        self,
        *,
        causal: bool = False,
        window: int | None = None,
        student_scale: float | None = None,
        teacher_scale: float | None = None,
        relation_heads: int | None = None,
        average_teacher_heads: bool = False,
        layout: Layout = "bhtd",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.causal = causal
        self.window = window
        self.student_scale = student_scale
        self.teacher_scale = teacher_scale
        self.relation_heads = relation_heads
        self.average_teacher_heads = average_teacher_heads
        self.layout: Layout = layout
        self.reduction = reduction

    def forward(
        self,
        student_query: Tensor,
        student_key: Tensor,
        teacher_query: Tensor,
        teacher_key: Tensor,
        *,
        mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        student_lse: Tensor | None = None,
        teacher_lse: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return attention_kl_div(
            student_query,
            student_key,
            teacher_query,
            teacher_key,
            mask=mask,
            query_mask=query_mask,
            causal=self.causal,
            window=self.window,
            student_scale=self.student_scale,
            teacher_scale=self.teacher_scale,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            student_lse=student_lse,
            teacher_lse=teacher_lse,
            relation_heads=self.relation_heads,
            average_teacher_heads=self.average_teacher_heads,
            layout=self.layout,
            reduction=self.reduction,
            normalizer=normalizer,
        )

    def extra_repr(self) -> str:
        return f"causal={self.causal}, window={self.window}, relation_heads={self.relation_heads}"


def _heads(name: str, x: Tensor, layout: str, relation_heads: int | None) -> Tensor:
    """(B, H, T, d) as a view where the strides allow it."""
    if x.dim() != 4 or x.shape[3] < 1:
        raise ValueError(f"{name} must be (B, H, T, d) with d >= 1, got shape {tuple(x.shape)}")
    if relation_heads is None:
        return x if layout == "bhtd" else x.transpose(1, 2)
    tokens = x if layout == "bthd" else x.transpose(1, 2)
    width = tokens.shape[2] * tokens.shape[3]
    if not (isinstance(relation_heads, int) and relation_heads >= 1) or width % relation_heads:
        raise ValueError(f"relation_heads is {relation_heads!r}, which does not divide the width {width} of {name}")
    split = tokens.reshape(*tokens.shape[:2], relation_heads, width // relation_heads)
    return split.transpose(1, 2)


def _check_shapes(
    student_query: Tensor, student_key: Tensor, teacher_query: Tensor, teacher_key: Tensor, average: bool
) -> None:
    for model, query, key in (("student", student_query, student_key), ("teacher", teacher_query, teacher_key)):
        shapes = f"{model}_query is (B, H, T, d) = {tuple(query.shape)} and {model}_key {tuple(key.shape)}"
        if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
            raise ValueError(f"{shapes}: B and d must be equal")
        if key.shape[1] < 1 or query.shape[1] % key.shape[1]:
            raise ValueError(f"{shapes}: the heads of the query must be a multiple of those of the key")
    for kind, student, teacher in (("query", student_query, teacher_query), ("key", student_key, teacher_key)):
        if (student.shape[0], student.shape[2]) != (teacher.shape[0], teacher.shape[2]):
            raise ValueError(
                f"teacher_{kind} is (B, H, T, d) = {tuple(teacher.shape)}, but student_{kind} is "
                f"{tuple(student.shape)}: B and T must be equal"
            )
    heads, of_teacher = student_query.shape[1], teacher_query.shape[1]
    if heads < 1 or of_teacher % heads or (of_teacher != heads and not average):
        raise ValueError(
            f"teacher_query has {of_teacher} heads, but student_query has {heads}: give relation_heads, or "
            "average_teacher_heads=True where the teacher's are a multiple of the student's"
        )


def _masks(
    query: Tensor, key: Tensor, mask: Tensor | None, query_mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Which keys exist (B, T_k) and which queries are valid (B, T_q), bool, None for all."""
    for name, value in _checks.given(mask=mask, query_mask=query_mask).items():
        _checks.tensor(name, value)
    if mask is not None and mask.dim() == 1:
        if mask.shape != key.shape[:1] or mask.is_floating_point() or mask.dtype == torch.bool:
            raise ValueError(f"mask of one dimension must be (B,) = ({key.shape[0]},) integer lengths, got {mask}")
        mask = torch.arange(key.shape[2], device=mask.device) < mask[:, None]
    if query_mask is None and query.shape[2] == key.shape[2]:
        query_mask = mask
    return _mask("mask", mask, key, "T_k"), _mask("query_mask", query_mask, query, "T_q")


def _mask(name: str, mask: Tensor | None, of: Tensor, tokens: str) -> Tensor | None:
    if mask is None:
        return None
    if mask.shape != (of.shape[0], of.shape[2]):
        raise ValueError(f"{name} has shape {tuple(mask.shape)}, but (B, {tokens}) is {(of.shape[0], of.shape[2])}")
    _checks.same_device(name, mask, "student_query", of)
    return mask if mask.dtype == torch.bool else mask != 0


def _bias(name: str, bias: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """float32, or float64 beside float64 tensors, broadcast to (B, H, T_q, T_k) by strides of 0."""
    if bias is None:
        return None
    whole = (*query.shape[:3], key.shape[2])
    fits = bias.dim() == 4 and bias.shape[3] == whole[3]
    if not fits or any(n not in (1, m) for n, m in zip(bias.shape, whole, strict=True)):
        raise ValueError(
            f"{name} has shape {tuple(bias.shape)}; it must be (B or 1, H or 1, T_q or 1, T_k) of {tuple(whole)}"
        )
    bias = bias.to(torch.float64 if query.dtype == torch.float64 else torch.float32)
    return (bias if bias.stride(3) == 1 else bias.contiguous()).expand(whole)


def _lse(name: str, lse: Tensor | None, query: Tensor) -> Tensor | None:
    if lse is None:
        return None
    if lse.shape != query.shape[:3]:
        raise ValueError(f"{name} has shape {tuple(lse.shape)}; it must be (B, H, T_q) = {tuple(query.shape[:3])}")
    return lse.detach().float()


def _scale(name: str, scale: float | None, query: Tensor) -> float:
    if scale is None:
        return float(query.shape[3] ** -0.5)
    _checks.positive(name, scale)
    return float(scale)


def _window(window: int | None) -> int:
    if window is None:
        return 0
    if not (isinstance(window, int) and window >= 1):
        raise ValueError(f"window must be an int of at least 1, the query's own position, got {window!r}")
    return min(window, FARTHEST)
