"""Divergence from a teacher of whom only some columns are known, in plain torch: the definition of ``topk_kl_div``."""

from typing import Any

import torch
from torch import Tensor

from fastkd.reference.kl_div import NEG_INF, _accumulation, _column, kl_div_rows

LEAST_REST = 2.0**-20
"""Teacher's mass outside its ids, at least: float32 log-probabilities do not tell less from none."""

MOST_MASS = 1.05
"""Sum of a teacher's probabilities beyond which they are none; 1 but for the rounding of half precision."""


def topk_kl_div_rows(
    student: Tensor,
    ids: Tensor,
    teacher: Tensor,
    *,
    tail: str = "bucket",
    temperature: float | Tensor = 1.0,
    divergence: str = "forward",
    beta: float = 0.5,
    valid: Tensor | None = None,
    scale_by_temperature: bool = True,
) -> Tensor:
    """Loss of every row, differentiable twice in ``student``.

    ``student`` is (N, V) logits, ``ids`` (N, k) int64 with −1 for nothing, ``teacher`` (N, k) the log-probabilities of
    the teacher at the loss's temperature, for ``"renormalize"`` up to a constant per row. The loss is ``kl_div_rows``
    over k outcomes, or over k + 1 where the last is what lies outside the ids. Returns (N,) in float64 for float64
    logits, else float32. The meaning of everything else is that of :func:`fastkd.losses.topk_kl_div`.
    """
    student, teacher = _accumulation(student), _accumulation(teacher)
    if valid is not None:
        student = student.masked_fill(~valid[:, None], 0.0)
    unlisted = ids < 0
    teacher = teacher.masked_fill(unlisted, NEG_INF)
    outcomes = student.gather(-1, ids.clamp(min=0)).masked_fill(unlisted, NEG_INF)
    t = _column(temperature, student)
    options: dict[str, Any] = {"divergence": divergence, "beta": beta, "scale_by_temperature": scale_by_temperature}
    if tail == "renormalize":
        return kl_div_rows(outcomes, teacher * t, temperature=temperature, valid=valid, **options)

    mass = probability_mass(teacher).to(student.dtype)
    rest = _rest(student, ids, t)
    some = torch.ones_like(mass, dtype=torch.bool) if valid is None else valid
    if tail == "bucket":
        teacher_rest = rest_of(mass).masked_fill(rest == NEG_INF, NEG_INF)
    else:
        teacher_rest = torch.full_like(mass, NEG_INF)
        some = some & (mass != 0)
    pair = torch.cat((outcomes, rest[:, None]), -1), torch.cat((teacher, teacher_rest[:, None]), -1) * t
    rows = kl_div_rows(*pair, temperature=temperature, valid=some, **options)
    return rows if tail == "bucket" else unnormalized(rows, mass, some, temperature, scale_by_temperature)


def probability_mass(log_probs: Tensor) -> Tensor:
    """Sum of each row's probabilities, float64: what it lacks of 1 is a difference. NaN if they are none."""
    mass = log_probs.double().exp().sum(-1)
    return mass.where(mass <= MOST_MASS, torch.nan)


def rest_of(mass: Tensor) -> Tensor:
    """Logarithm of the teacher's mass outside its ids."""
    return (1 - mass).clamp(min=LEAST_REST).log()


def unnormalized(
    rows: Tensor, mass: Tensor, valid: Tensor, temperature: float | Tensor, scale_by_temperature: bool
) -> Tensor:
    """Σ p log(p / q) of probabilities p that sum to ``mass``, from the same of p / mass."""
    surprise = torch.xlogy(mass, mass)
    if scale_by_temperature:
        surprise = surprise * temperature**2
    return mass.where(valid, 0.0) * rows + surprise.where(valid, 0.0)


def _rest(student: Tensor, ids: Tensor, temperature: Tensor) -> Tensor:
    """T · log Σ exp(z / T) over the columns that are not listed; −inf where there is none."""
    count, columns = student.shape
    listed = torch.zeros(count, columns + 1, dtype=torch.bool, device=student.device)
    listed.scatter_(1, ids.where(ids >= 0, columns), True)
    others = student.masked_fill(listed[:, :columns], NEG_INF)
    empty = (others == NEG_INF).all(-1)
    rest = (others.masked_fill(empty[:, None], 0.0) / temperature).logsumexp(-1) * temperature.squeeze(-1)
    return rest.masked_fill(empty, NEG_INF)
