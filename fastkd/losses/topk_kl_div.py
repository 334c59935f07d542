"""Divergence from a teacher of whom only the most likely tokens were kept."""

from typing import Literal

import torch
from torch import Tensor, nn

from fastkd import ops
from fastkd.losses import _checks
from fastkd.losses._checks import REDUCTIONS, Reduction
from fastkd.losses.kl_div import DIVERGENCES, Divergence, _check_divergence
from fastkd.ops.topk_kl_div import Teacher
from fastkd.reference.topk_kl_div import MOST_MASS

Tail = Literal["renormalize", "zero", "bucket"]

TAILS = ("renormalize", "zero", "bucket")


def topk_kl_div(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_values: Tensor,
    *,
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
) -> Tensor:
    r""":func:`fastkd.losses.kl_div` against a teacher of whom k columns of each row are known, in one fused pass.

    With S the listed columns, p = softmax(teacher / T) and q = softmax(student / T) over the whole vocabulary, the
    divergence of a row is that of two distributions over

    * ``"bucket"``: the columns of S and one outcome for all others, of mass 1 − Σ_S p and 1 − Σ_S q;
    * ``"renormalize"``: the columns of S, both models renormalised over them;
    * ``"zero"``: the whole vocabulary, where the teacher has nothing outside S: Σ_S p log(p / q). No divergence of
      distributions, since Σ_S p < 1: it can be negative, and only ``divergence="forward"`` has a meaning.

    Args:
        student_logits: (..., V), float32, bfloat16, float16 or float64. Rows may have any stride.
        teacher_ids: (..., k) int32 or int64, distinct in each row; −1 lists nothing, in rows of fewer ids.
        teacher_values: (..., k) log-probabilities or logits of these columns; must not require grad.
        tail: what stands for the columns that are not listed.
        teacher_logsumexp: (...) log Σ exp of the values over the whole vocabulary, which makes log-probabilities of
            logits; ``"zero"`` and ``"bucket"`` need it unless the values are log-probabilities. Must not require grad.
        temperature: T > 0, a number or one value per row (...).
        teacher_temperature: what the values were divided by already, before they were normalised. ``"renormalize"``
            takes them from there to T. ``"zero"`` and ``"bucket"`` cannot, since the mass outside S at another
            temperature is unknown: there it must equal ``temperature`` (as a tensor on a GPU: be the same tensor).
        divergence, beta, labels, ignore_index, mask, reduction, normalizer, scale_by_temperature: as of
            :func:`fastkd.losses.kl_div`. The labels tell valid rows and nothing else.

    Returns:
        The loss, float32 (float64 for float64 logits).

    The teacher's mass outside S is at least 2⁻²⁰, and where the student has no other column (all are listed, or −inf)
    there is no bucket in either model. One id renormalised is certain whatever the logits, hence refused. On a GPU ids
    are not looked at: one out of range makes its row NaN, one listed twice counts twice. Values whose probabilities sum
    to more than 1.05 are no log-probabilities: an error, on a GPU NaN. Everything else is as of ``kl_div``.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it must be.
    """
    _checks.tensors(student_logits=student_logits)
    _checks.columns("student_logits", student_logits, "V")
    _check_options(tail, divergence, beta)
    _checks.reduction(reduction, normalizer)
    vocabulary, rows = student_logits.shape[-1], student_logits.shape[:-1]
    valid = _checks.valid_rows("student_logits", student_logits, labels, ignore_index, mask)
    scalar, per_row = _checks.temperature(temperature, "student_logits", student_logits)
    teacher = teacher_of(
        student_logits, teacher_ids, teacher_values, tail, teacher_logsumexp, temperature, teacher_temperature
    )
    loss = ops.topk_kl_div(
        student_logits.reshape(-1, vocabulary),
        teacher,
        temperature=scalar,
        row_temperature=per_row,
        divergence=DIVERGENCES.index(divergence),
        beta=beta,
        valid=valid,
        reduction=REDUCTIONS.index(reduction),
        normalizer=normalizer,
        scale_by_temperature=scale_by_temperature,
    )
    return loss.reshape(rows) if reduction == "none" else loss


class TopkKLDivLoss(nn.Module):
    """:func:`topk_kl_div` as a module: options at construction, tensors at the call."""

    def __init__(
        self,
        *,
        tail: Tail = "bucket",
        temperature: float = 1.0,
        teacher_temperature: float = 1.0,
        divergence: Divergence = "forward",
        beta: float = 0.5,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        scale_by_temperature: bool = True,
    ) -> None:
        super().__init__()
        self.tail = tail
        self.temperature = temperature
        self.teacher_temperature = teacher_temperature
        self.divergence = divergence
        self.beta = beta
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.scale_by_temperature = scale_by_temperature

    def forward(
        self,
        student_logits: Tensor,
        teacher_ids: Tensor,
        teacher_values: Tensor,
        *,
        teacher_logsumexp: Tensor | None = None,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return topk_kl_div(
            student_logits,
            teacher_ids,
            teacher_values,
            tail=self.tail,
            teacher_logsumexp=teacher_logsumexp,
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
            divergence=self.divergence,
            beta=self.beta,
            labels=labels,
            ignore_index=self.ignore_index,
            mask=mask,
            reduction=self.reduction,
            normalizer=normalizer,
            scale_by_temperature=self.scale_by_temperature,
        )

    def extra_repr(self) -> str:
        return f"tail={self.tail!r}, divergence={self.divergence!r}, temperature={self.temperature}"


def teacher_of(
    student_logits: Tensor,
    ids: Tensor,
    values: Tensor,
    tail: Tail,
    logsumexp: Tensor | None,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor,
) -> Teacher:
    """The teacher's arguments, checked, with ids in ascending order and values at the loss's temperature."""
    _check_ids(student_logits, ids, values, tail)
    if values.dtype != torch.float64:
        values = values.float()
    if logsumexp is not None:
        _checks.tensors(student_logits=student_logits, teacher_logsumexp=logsumexp)
        _checks.row_values("teacher_logsumexp", logsumexp, "student_logits", student_logits)
        values = values - logsumexp[..., None]
    if not _same(temperature, teacher_temperature):
        if tail != "renormalize":
            raise ValueError(
                f"teacher_temperature must equal temperature for tail={tail!r}, got {teacher_temperature} and "
                f"{temperature}: the mass outside teacher_ids at another temperature is unknown. Take "
                'log-probabilities at the temperature of the loss, or tail="renormalize"'
            )
        _checks.temperature(teacher_temperature, "student_logits", student_logits, "teacher_temperature")
        values = values * _column(teacher_temperature) / _column(temperature)
    k = ids.shape[-1]
    ids, order = ids.reshape(-1, k).long().sort(-1)
    values = values.reshape(-1, k).gather(-1, order)
    if _checks.readable(ids):
        _check_values(student_logits.shape[-1], ids, values, tail)
    return Teacher(ids, values, tail)


def _same(temperature: float | Tensor, other: float | Tensor) -> bool:
    if isinstance(temperature, Tensor) and isinstance(other, Tensor):
        return temperature is other or (_checks.readable(temperature) and torch.equal(temperature, other))
    return not isinstance(temperature, Tensor) and not isinstance(other, Tensor) and temperature == other


def _column(temperature: float | Tensor) -> float | Tensor:
    return temperature[..., None] if isinstance(temperature, Tensor) else temperature


def _check_options(tail: str, divergence: Divergence, beta: float) -> None:
    if tail not in TAILS:
        raise ValueError(f"tail must be one of {', '.join(TAILS)}, got {tail!r}")
    _check_divergence(divergence, beta)
    if tail == "zero" and divergence != "forward":
        raise ValueError(
            f'divergence must be "forward" for tail="zero", got {divergence!r}: a teacher without mass outside its ids '
            'is no distribution; use tail="bucket" or "renormalize"'
        )


def _check_ids(student: Tensor, ids: Tensor, values: Tensor, tail: str) -> None:
    _checks.tensors(student_logits=student, teacher_values=values)
    _checks.frozen("teacher_values", values)
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        found = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"teacher_ids must be an int32 or int64 tensor, got {found}")
    _checks.same_device("teacher_ids", ids, "student_logits", student)
    rows = student.shape[:-1]
    if ids.dim() != student.dim() or ids.shape[:-1] != rows or ids.shape[-1] < 1:
        raise ValueError(
            f"teacher_ids has shape {tuple(ids.shape)}; it must be (..., k) with k >= 1 and the rows of "
            f"student_logits, {tuple(rows)}"
        )
    if values.shape != ids.shape:
        raise ValueError(
            f"teacher_values has shape {tuple(values.shape)}, but teacher_ids has {tuple(ids.shape)}: "
            "they must be equal"
        )
    if tail == "renormalize" and ids.shape[-1] == 1:
        raise ValueError(
            "teacher_ids has one id per row, whose probability renormalised is 1 for any logits: "
            'tail must be "bucket" or "zero", got "renormalize"'
        )


def _check_values(vocabulary: int, ids: Tensor, values: Tensor, tail: str) -> None:
    """What only a look at the numbers tells; ``ids`` (N, k) are in ascending order."""
    outside = (ids < -1) | (ids >= vocabulary)
    if bool(outside.any()):
        raise ValueError(f"teacher_ids holds {int(ids[outside][0])}, outside [0, {vocabulary}) and not -1")
    twice = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)
    if bool(twice.any()):
        raise ValueError(f"teacher_ids holds {int(ids[:, 1:][twice][0])} twice in one row: they must be distinct")
    if tail != "renormalize":
        mass = values.exp().masked_fill(ids < 0, 0.0).sum(-1)
        if bool((mass > MOST_MASS).any()):
            raise ValueError(
                f"teacher_values has probabilities that sum to {mass.max():.4g} in one row: for tail={tail!r} they "
                "must be log-probabilities over the whole vocabulary; pass teacher_logsumexp with logits, or "
                'tail="renormalize"'
            )
