"""Temperature-scaled divergence between two rows of logits in plain torch: the definition every kernel is held to."""

import torch
from torch import Tensor

NEG_INF = float("-inf")


def kl_div_rows(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    divergence: str = "forward",
    beta: float = 0.5,
    valid: Tensor | None = None,
    labels: Tensor | None = None,
    cross_entropy_weight: float = 0.0,
    scale_by_temperature: bool = True,
) -> Tensor:
    """Loss of every row, differentiable twice in ``student``.

    ``student`` and ``teacher`` are (N, V); ``temperature`` is a number or (N,); ``valid`` (N,) bool and ``labels``
    (N,) int64 are optional. Returns (N,) in float64 for float64 logits, else float32. The meaning of every argument
    and of −inf, NaN and masked rows is that of :func:`fastkd.losses.kl_div`.
    """
    student, teacher = _accumulation(student), _accumulation(teacher)
    temperature = _column(temperature, student)
    infinite, dead = _classify(student, teacher, divergence, valid, labels, cross_entropy_weight)
    student = student.masked_fill(dead[:, None], 0.0)
    teacher = teacher.masked_fill(dead[:, None], 0.0)

    rows = _divergence(student / temperature, teacher / temperature, divergence, beta)
    if scale_by_temperature:
        rows = rows * temperature.squeeze(-1).square()
    if labels is not None and cross_entropy_weight:
        rows = rows + cross_entropy_weight * _cross_entropy(student, labels)
    return rows.masked_fill(dead, 0.0).masked_fill(infinite, float("inf"))


@torch.no_grad()
def kl_div_stats(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    valid: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """(4, N): cross-entropy at T = 1, entropies of student and teacher at T, in nats, and agreement of the argmax."""
    student, teacher = _accumulation(student), _accumulation(teacher)
    temperature = _column(temperature, student)
    empty = (student == NEG_INF).all(-1) | (teacher == NEG_INF).all(-1)
    dead = empty if valid is None else empty | ~valid
    student = student.masked_fill(dead[:, None], 0.0)
    teacher = teacher.masked_fill(dead[:, None], 0.0)
    cross_entropy = _cross_entropy(student, labels) if labels is not None else student.new_zeros(len(student))
    agreement = (student.argmax(-1) == teacher.argmax(-1)).to(student.dtype)
    entropies = _entropy(student / temperature), _entropy(teacher / temperature)
    return torch.stack((cross_entropy, *entropies, agreement)).masked_fill(dead, 0.0)


def _accumulation(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _column(temperature: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(temperature, Tensor):
        return temperature.to(like.dtype)[:, None]
    return torch.full((1, 1), temperature, dtype=like.dtype, device=like.device)


def _classify(
    student: Tensor,
    teacher: Tensor,
    divergence: str,
    valid: Tensor | None,
    labels: Tensor | None,
    cross_entropy_weight: float,
) -> tuple[Tensor, Tensor]:
    """Rows whose loss is +inf, and rows that take no part in the arithmetic (those, the empty and the masked)."""
    no_student, no_teacher = student == NEG_INF, teacher == NEG_INF
    empty_student, empty_teacher = no_student.all(-1), no_teacher.all(-1)
    infinite = empty_student ^ empty_teacher
    if divergence == "forward":
        infinite = infinite | (no_student & (teacher > NEG_INF)).any(-1)
    elif divergence == "reverse":
        infinite = infinite | (no_teacher & (student > NEG_INF)).any(-1)
    if labels is not None and cross_entropy_weight:
        label_missing = no_student.gather(-1, _safe(labels, student)[:, None]).squeeze(-1)
        infinite = infinite | (label_missing & ~empty_student)
    if valid is not None:
        infinite = infinite & valid
    dead = infinite | (empty_student & empty_teacher)
    return infinite, dead if valid is None else dead | ~valid


def _safe(labels: Tensor, logits: Tensor) -> Tensor:
    return labels.clamp(0, logits.shape[-1] - 1)


def _finite(log_probs: Tensor) -> Tensor:
    """Log-probabilities with 0 where a column has no mass: those are only ever multiplied by a probability of 0."""
    return log_probs.masked_fill(log_probs == NEG_INF, 0.0)


def _divergence(student: Tensor, teacher: Tensor, divergence: str, beta: float) -> Tensor:
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    finite_s, finite_t = _finite(log_s), _finite(log_t)
    if divergence == "forward":
        return (log_t.exp() * (finite_t - finite_s)).sum(-1)
    if divergence == "reverse":
        return (log_s.exp() * (finite_s - finite_t)).sum(-1)
    gone = (log_s == NEG_INF) & (log_t == NEG_INF)
    weight = torch.tensor([beta, 1 - beta], dtype=student.dtype, device=student.device).log()
    log_m = torch.logaddexp(log_t.masked_fill(gone, 0.0) + weight[0], log_s.masked_fill(gone, 0.0) + weight[1])
    to_teacher = (log_t.exp() * (finite_t - log_m)).sum(-1)
    to_student = (log_s.exp() * (finite_s - log_m)).sum(-1)
    return beta * to_teacher + (1 - beta) * to_student


def _cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    return -student.log_softmax(-1).gather(-1, _safe(labels, student)[:, None]).squeeze(-1)


def _entropy(logits: Tensor) -> Tensor:
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * _finite(log_probs)).sum(-1)
