"""Temperature-scaled KL and Jensen–Shannon divergence between student and teacher logits."""

from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastkd import ops
from fastkd.losses import _checks
from fastkd.losses._checks import REDUCTIONS, Reduction

Divergence = Literal["forward", "reverse", "jsd"]

DIVERGENCES = ("forward", "reverse", "jsd")


class KLDivStats(NamedTuple):
    """What the same read of the logits tells besides the loss; no gradient flows through it.

    Each is a mean over the valid rows, or one value per row with ``reduction="none"``.
    """

    cross_entropy: Tensor
    """Hard-label cross-entropy of the student at T = 1 (0 without ``labels``), in nats."""
    student_entropy: Tensor
    """Entropy of the student's distribution at the given temperature, in nats."""
    teacher_entropy: Tensor
    """Entropy of the teacher's distribution at the given temperature, in nats."""
    agreement: Tensor
    """Share of rows where student and teacher have the same most likely column."""


def kl_div(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    divergence: Divergence = "forward",
    beta: float = 0.5,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    scale_by_temperature: bool = True,
    cross_entropy_weight: float = 0.0,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, KLDivStats]:
    r"""Divergence of two softmax distributions over the last dimension, from raw logits, in one fused pass.

    With p_t = softmax(teacher / T) and p_s = softmax(student / T), the loss of a row is

    * ``"forward"``: T² · KL(p_t ‖ p_s), the loss of Hinton et al. (arXiv 1503.02531),
    * ``"reverse"``: T² · KL(p_s ‖ p_t),
    * ``"jsd"``: T² · (β · KL(p_t ‖ m) + (1−β) · KL(p_s ‖ m)) with m = β p_t + (1−β) p_s, the generalised
      Jensen–Shannon divergence of GKD (arXiv 2306.13649),

    plus ``cross_entropy_weight`` · CE(softmax(student), label) at T = 1.

    Args:
        student_logits: (..., V), float32, bfloat16, float16 or float64. Rows may have any stride.
        teacher_logits: the same shape; must not require grad. Of another dtype: both are promoted, which copies.
        temperature: T > 0, a number or one value per row (...).
        divergence: ``"forward"``, ``"reverse"`` or ``"jsd"``.
        beta: weight of the teacher in the mixture, inside (0, 1); read by ``"jsd"`` alone.
        labels: (...) int64 class ids; a row whose label is ``ignore_index`` is not valid.
        mask: (...) bool, or numbers where 0 means: not valid. Combined with ``labels`` by *and*.
        reduction: ``"mean"`` divides the sum of the valid rows by their number, ``"sum"`` does not divide,
            ``"none"`` returns the loss of every row (...), 0 where not valid.
        normalizer: a positive number or 0-d tensor that replaces the number of valid rows in ``"mean"``: the global
            count under gradient accumulation or data parallelism. A tensor may hold 0, where nothing counts.
        scale_by_temperature: multiply the divergence by T², which keeps its gradient's size independent of T.
        cross_entropy_weight: weight of the hard-label term; needs ``labels``.
        return_stats: also return :class:`KLDivStats`.

    Returns:
        The loss, float32 (float64 for float64 logits), or (loss, stats).

    Arithmetic is float32 inside. Finite logits give finite losses and gradients; a NaN stays in its row. A column
    that is −inf in both models does not exist. A row in which the divergence is infinite (the student excludes by
    −inf what the teacher allows, or the other way round for ``"reverse"``) has loss +inf and gradient 0. Nothing
    valid, or no rows at all: loss 0, with zero gradients attached. The fused backends raise on a second derivative;
    float64 logits take the plain torch path, which has one.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it must be.
    """
    _checks.pair(student_logits, teacher_logits)
    _checks.reduction(reduction, normalizer)
    _check_divergence(divergence, beta)
    _check_cross_entropy(cross_entropy_weight, labels)
    rows = student_logits.shape[:-1]
    valid = _checks.valid_rows("student_logits", student_logits, labels, ignore_index, mask)
    scalar, per_row = _checks.temperature(temperature, "student_logits", student_logits)
    dtype = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
    loss, stats = ops.kl_div(
        _checks.as_rows(student_logits.to(dtype)),
        _checks.as_rows(teacher_logits.to(dtype)),
        temperature=scalar,
        row_temperature=per_row,
        divergence=DIVERGENCES.index(divergence),
        beta=beta,
        valid=valid,
        labels=None if labels is None else labels.reshape(-1),
        cross_entropy_weight=cross_entropy_weight,
        reduction=REDUCTIONS.index(reduction),
        normalizer=normalizer,
        scale_by_temperature=scale_by_temperature,
        need_stats=return_stats,
    )
    if reduction == "none":
        loss = loss.reshape(rows)
    if not return_stats:
        return loss
    return loss, _stats(stats, valid, rows if reduction == "none" else None)


class KLDivLoss(nn.Module):
    """:func:`kl_div` as a module: options at construction, tensors at the call."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        divergence: Divergence = "forward",
        beta: float = 0.5,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        scale_by_temperature: bool = True,
        cross_entropy_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.divergence = divergence
        self.beta = beta
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.scale_by_temperature = scale_by_temperature
        self.cross_entropy_weight = cross_entropy_weight

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        loss = kl_div(
            student_logits,
            teacher_logits,
            temperature=self.temperature,
            divergence=self.divergence,
            beta=self.beta,
            labels=labels,
            ignore_index=self.ignore_index,
            mask=mask,
            reduction=self.reduction,
            normalizer=normalizer,
            scale_by_temperature=self.scale_by_temperature,
            cross_entropy_weight=self.cross_entropy_weight,
        )
        return cast(Tensor, loss)

    def extra_repr(self) -> str:
        beta = f", beta={self.beta}" if self.divergence == "jsd" else ""
        return f"divergence={self.divergence!r}, temperature={self.temperature}{beta}, reduction={self.reduction!r}"


def _check_divergence(divergence: str, beta: float) -> None:
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    if divergence != "jsd":
        return
    _checks.number("beta", beta)
    if not 0.0 < beta < 1.0:
        raise ValueError(
            f'beta must be inside (0, 1) for divergence="jsd", got {beta}: use divergence="forward" or "reverse" '
            "for the one-sided divergences"
        )


def _check_cross_entropy(weight: float, labels: Tensor | None) -> None:
    _checks.number("cross_entropy_weight", weight)
    if weight and labels is None:
        raise ValueError(f"cross_entropy_weight is {weight}, but labels were not given")


def _stats(stats: Tensor, valid: Tensor | None, rows: torch.Size | None) -> KLDivStats:
    if rows is not None:
        return KLDivStats(*(row.reshape(rows) for row in stats))
    count = stats.shape[1] if valid is None else valid.sum()
    return KLDivStats(*(stats.sum(1) / torch.as_tensor(count, device=stats.device).clamp(min=1)))
