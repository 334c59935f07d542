"""Divergence of a language model from a teacher's most likely tokens, from hidden states and head weight."""

from torch import Tensor

from fastkd import ops
from fastkd.losses import _checks
from fastkd.losses._checks import REDUCTIONS, Reduction
from fastkd.losses.kl_div import DIVERGENCES, Divergence
from fastkd.losses.linear_kl_div import LinearLoss, check_head
from fastkd.losses.topk_kl_div import Tail, _check_options, teacher_of


def linear_topk_kl_div(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_ids: Tensor,
    teacher_values: Tensor,
    *,
    student_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    tail: Tail = "bucket",
    teacher_logsumexp: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor = 1.0,
    divergence: Divergence = "forward",
    beta: float = 0.5,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    scale_by_temperature: bool = True,
    memory_budget: int | None = None,
) -> Tensor:
    """:func:`fastkd.losses.topk_kl_div` of the logits ``hidden @ weight.T + bias``, which never all exist at once.

    Args:
        student_hidden: (..., H), float32, bfloat16, float16 or float64.
        student_weight: (V, H), as of ``nn.Linear``, in the dtype of the hidden states.
        teacher_ids, teacher_values: (..., k), as of :func:`fastkd.losses.topk_kl_div`, like all that is not named here.
        student_bias: (V,).
        student_logit_scale: factor of the logits, as of Cohere's models.
        student_softcap: cap c > 0 of c · tanh(logits / c), as of Gemma's.
        memory_budget: bytes that a chunk of logits may take, as of :func:`fastkd.losses.linear_kl_div`.

    Returns:
        The loss, float32 (float64 for float64 hidden states). Gradients flow to ``student_hidden``,
        ``student_weight`` and ``student_bias``; one that is frozen costs nothing.

    Rows that do not count take part in no product. Under autocast hidden states and weight are cast to its dtype
    first. With ``reduction="none"`` the backward pass computes the logits again.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it must be.
    """
    _checks.tensors(
        student_hidden=student_hidden, student_weight=student_weight, **_checks.given(student_bias=student_bias)
    )
    student_hidden, student_weight, student_bias = _checks.autocast(student_hidden, student_weight, student_bias)
    check_head("student", student_hidden, student_weight, student_bias, student_logit_scale, student_softcap)
    _check_options(tail, divergence, beta)
    _checks.reduction(reduction, normalizer)
    _checks.memory_budget(memory_budget)
    rows = student_hidden.shape[:-1]
    logits = student_hidden.detach()[..., :1].expand(*rows, len(student_weight))  # shape and device, not values
    valid = _checks.valid_rows("student_hidden", logits, labels, ignore_index, mask)
    scalar, per_row = _checks.temperature(temperature, "student_hidden", logits)
    teacher = teacher_of(logits, teacher_ids, teacher_values, tail, teacher_logsumexp, temperature, teacher_temperature)
    loss = ops.linear_topk_kl_div(
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        student_weight,
        student_bias,
        teacher,
        student_scale=float(student_logit_scale),
        student_softcap=student_softcap,
        temperature=scalar,
        row_temperature=per_row,
        divergence=DIVERGENCES.index(divergence),
        beta=beta,
        valid=valid,
        reduction=REDUCTIONS.index(reduction),
        normalizer=normalizer,
        scale_by_temperature=scale_by_temperature,
        memory_budget=memory_budget or 0,
    )
    return loss.reshape(rows) if reduction == "none" else loss


class LinearTopkKLDivLoss(LinearLoss):
    """:func:`linear_topk_kl_div` as a module: options at construction, by its keyword names; tensors at the call."""

    function = staticmethod(linear_topk_kl_div)
