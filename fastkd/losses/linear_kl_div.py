"""KL and Jensen–Shannon divergence of two language models, from hidden states and head weights."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastkd import ops
from fastkd.losses import _checks
from fastkd.losses._checks import REDUCTIONS, Reduction
from fastkd.losses.kl_div import DIVERGENCES, Divergence, _check_cross_entropy, _check_divergence
from fastkd.ops.linear_kl_div import Options


def linear_kl_div(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    common_vocab: int | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
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
    memory_budget: int | None = None,
) -> Tensor:
    """:func:`fastkd.losses.kl_div` of the logits ``hidden @ weight.T + bias``, which never all exist at once.

    The logits of a model are softcap · tanh(scale · (hidden weightᵀ + bias) / softcap), the tanh only where a softcap
    is given. Memory beyond inputs and gradients is that of a chunk of rows, whatever their number.

    Args:
        student_hidden: (..., H), float32, bfloat16, float16 or float64.
        student_weight: (V, H), as of ``nn.Linear``, in the dtype of the hidden states.
        teacher_hidden: (..., H_t), the leading dimensions of the student's; H_t may differ from H.
        teacher_weight: (V, H_t). Of another dtype than the student: the teacher's logits are rounded to the student's.
        student_bias, teacher_bias: (V,).
        common_vocab: compare the first so many columns of both heads; needed where their vocabularies differ, as by
            padding. The softmax is over these columns alone.
        student_logit_scale, teacher_logit_scale: factor of the logits, as of Cohere's models.
        student_softcap, teacher_softcap: cap c > 0 of c · tanh(logits / c), as of Gemma's.
        temperature, divergence, beta, labels, ignore_index, mask, reduction, normalizer, scale_by_temperature,
            cross_entropy_weight: as of :func:`fastkd.losses.kl_div`.
        memory_budget: bytes that chunks of logits may take; by default 44 MiB or, where that is more, 3/16 of the size
            of ``student_weight`` (in half precision three times it, what a sum over chunks would take). A smaller
            one is slower: the weight's gradient is read and written once per chunk.

    Returns:
        The loss, float32 (float64 for float64 hidden states). Gradients flow to ``student_hidden``,
        ``student_weight`` and ``student_bias``; one that is frozen costs nothing.

    Rows that do not count take part in no product. Under autocast everything is cast to its dtype first. With
    ``reduction="none"`` the backward pass computes the logits again. The edges are those of ``kl_div``; the fused
    backends raise on a second derivative. On a GPU a mask or labels make the host wait once, to learn their number.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it must be.
    """
    _checks.tensors(
        student_hidden=student_hidden,
        student_weight=student_weight,
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        **_checks.given(student_bias=student_bias, teacher_bias=teacher_bias),
    )
    student_hidden, student_weight, student_bias = _checks.autocast(student_hidden, student_weight, student_bias)
    teacher_hidden, teacher_weight, teacher_bias = _checks.autocast(teacher_hidden, teacher_weight, teacher_bias)
    check_head("student", student_hidden, student_weight, student_bias, student_logit_scale, student_softcap)
    check_head("teacher", teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap)
    _check_teacher(student_hidden, teacher_hidden, teacher_weight, teacher_bias)
    vocabulary = _common_vocabulary(student_weight, teacher_weight, common_vocab)
    _checks.reduction(reduction, normalizer)
    _check_divergence(divergence, beta)
    _check_cross_entropy(cross_entropy_weight, labels)
    _checks.memory_budget(memory_budget)
    rows = student_hidden.shape[:-1]
    logits = student_hidden.detach()[..., :1].expand(*rows, vocabulary)  # their shape and device, not their values
    valid = _checks.valid_rows("student_hidden", logits, labels, ignore_index, mask)
    scalar, per_row = _checks.temperature(temperature, "student_hidden", logits)
    options = Options(
        _checks.as_rows(teacher_hidden),
        _first(teacher_weight, vocabulary),
        _first(teacher_bias, vocabulary),
        float(student_logit_scale),
        float(teacher_logit_scale),
        student_softcap,
        teacher_softcap,
        None if per_row is None else per_row.float(),
        scalar,
        DIVERGENCES.index(divergence),
        beta,
        valid,
        None if labels is None else labels.reshape(-1),
        cross_entropy_weight,
        scale_by_temperature,
        memory_budget or 0,
    )
    loss = ops.linear_kl_div(
        _checks.as_rows(student_hidden),
        _first(student_weight, vocabulary),
        _first(student_bias, vocabulary),
        options,
        REDUCTIONS.index(reduction),
        normalizer,
    )
    return loss.reshape(rows) if reduction == "none" else loss


class LinearLoss(nn.Module):
    """A function of hidden states and weights as a module: options at construction, tensors at the call."""

    function: Callable[..., Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = self.function.__kwdefaults__ or {}
        if unknown := sorted(set(options) - set(known)):
            raise TypeError(f"{', '.join(unknown)}: no option of {self.function.__name__}; it has {', '.join(known)}")
        self.options = options

    def forward(self, *tensors: Tensor, **named: Any) -> Tensor:
        return self.function(*tensors, **self.options | named)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LinearKLDivLoss(LinearLoss):
    """:func:`linear_kl_div` as a module: options at construction, by its keyword names; tensors at the call."""

    function = staticmethod(linear_kl_div)


def check_head(
    model: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> None:
    if hidden.dim() < 1 or weight.dim() != 2 or weight.shape[0] < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{model}_hidden and {model}_weight must be (..., H) and (V, H), "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if weight.dtype != hidden.dtype:
        raise TypeError(
            f"{model}_weight is {weight.dtype}, but {model}_hidden is {hidden.dtype}: "
            "they must be equal outside autocast"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(
            f"{model}_bias must be ({weight.shape[0]},) of {weight.dtype}, got {tuple(bias.shape)} of {bias.dtype}"
        )
    _checks.number(f"{model}_logit_scale", scale)
    if softcap is not None:
        _checks.positive(f"{model}_softcap", softcap)


def _check_teacher(student: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if hidden.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"teacher_hidden has rows {tuple(hidden.shape[:-1])}, but student_hidden has {tuple(student.shape[:-1])}: "
            "they must be equal"
        )
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        _checks.frozen(f"teacher_{name}", tensor)


def _common_vocabulary(student: Tensor, teacher: Tensor, common: int | None) -> int:
    sizes = student.shape[0], teacher.shape[0]
    if common is None:
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"student_weight has {sizes[0]} rows and teacher_weight {sizes[1]}: where both vocabularies begin "
                f"alike, pass common_vocab, at most {min(sizes)}, for the columns to compare"
            )
        return sizes[0]
    if not (isinstance(common, int) and 1 <= common <= min(sizes)):
        raise ValueError(f"common_vocab must be an int from 1 to {min(sizes)}, the smaller vocabulary, got {common!r}")
    return common


def _first(x: Any, count: int) -> Any:
    """x[:count], but x itself where that is all: the gradient of a slice would be copied into one of the whole."""
    return x if x is None or len(x) == count else x[:count]
