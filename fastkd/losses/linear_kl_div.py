"""KL and Jensen–Shannon divergence of two language models, from hidden states and head weights."""

from typing import Any

import torch
from torch import Tensor, nn

from fastkd import ops
from fastkd.losses import _checks
from fastkd.losses._checks import REDUCTIONS, Reduction
from fastkd.losses.kl_div import DIVERGENCES, Divergence, _check_divergence
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
    tensors = (student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias)
    student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias = _autocast(*tensors)
    _check_head("student", student_hidden, student_weight, student_bias, student_softcap)
    _check_head("teacher", teacher_hidden, teacher_weight, teacher_bias, teacher_softcap)
    _check_teacher(student_hidden, teacher_hidden, teacher_weight, teacher_bias)
    vocabulary = _common_vocabulary(student_weight, teacher_weight, common_vocab)
    _checks.reduction(reduction, normalizer)
    _check_divergence(divergence, beta)
    if cross_entropy_weight and labels is None:
        raise ValueError(f"cross_entropy_weight is {cross_entropy_weight}, but labels were not given")
    if memory_budget is not None and memory_budget < 1:
        raise ValueError(f"memory_budget must be a positive number of bytes, got {memory_budget}")
    rows = student_hidden.shape[:-1]
    logits = student_hidden.detach()[..., :1].expand(*rows, vocabulary)  # their shape and device, not their values
    valid = _checks.valid_rows(logits, labels, ignore_index, mask)
    scalar, per_row = _checks.temperature(temperature, logits)
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


class LinearKLDivLoss(nn.Module):
    """:func:`linear_kl_div` as a module: options at construction, by its keyword names; tensors at the call."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = linear_kl_div.__kwdefaults__ or {}
        if unknown := sorted(set(options) - set(known)):
            raise TypeError(f"{', '.join(unknown)}: no option of linear_kl_div; it has {', '.join(known)}")
        self.options = options

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        **tensors: Any,
    ) -> Tensor:
        options = self.options | tensors
        return linear_kl_div(student_hidden, student_weight, teacher_hidden, teacher_weight, **options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _autocast(*tensors: Tensor | None) -> Any:
    device = next(x.device.type for x in tensors if x is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _check_head(model: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> None:
    if hidden.dim() < 1 or weight.dim() != 2 or weight.shape[0] < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{model}_hidden and {model}_weight must be (..., H) and (V, H), "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if hidden.dtype not in _checks.FLOATS or weight.dtype != hidden.dtype:
        raise TypeError(
            f"{model}_hidden and {model}_weight must share one of float32, bfloat16, float16 and float64, "
            f"got {hidden.dtype} and {weight.dtype}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(
            f"{model}_bias must be ({weight.shape[0]},) of {weight.dtype}, got {tuple(bias.shape)} of {bias.dtype}"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{model}_softcap must be positive, got {softcap}")
    for name, tensor in ((f"{model}_weight", weight), (f"{model}_bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, but {model}_hidden is on {hidden.device}")


def _check_teacher(student: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if hidden.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"teacher_hidden has rows {tuple(hidden.shape[:-1])}, but student_hidden has {tuple(student.shape[:-1])}: "
            "they must be equal"
        )
    if hidden.device != student.device:
        raise ValueError(f"teacher_hidden is on {hidden.device}, but student_hidden is on {student.device}")
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"teacher_{name} requires grad, but no gradient flows to the teacher: compute it under "
                f"torch.no_grad() or pass teacher_{name}.detach()"
            )


def _common_vocabulary(student: Tensor, teacher: Tensor, common: int | None) -> int:
    sizes = student.shape[0], teacher.shape[0]
    if common is None:
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"student_weight has {sizes[0]} rows and teacher_weight {sizes[1]}: where both vocabularies begin "
                f"alike, pass common_vocab, at most {min(sizes)}, for the columns to compare"
            )
        return sizes[0]
    if not 1 <= common <= min(sizes):
        raise ValueError(f"common_vocab must be from 1 to {min(sizes)}, the smaller vocabulary, got {common}")
    return common


def _first(x: Any, count: int) -> Any:
    """x[:count], but x itself where that is all: the gradient of a slice would be copied into one of the whole."""
    return x if x is None or len(x) == count else x[:count]
