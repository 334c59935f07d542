"""Mean squared errors of many (student, teacher) pairs in one call."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fastkd import ops
from fastkd.losses import _checks
from fastkd.losses._checks import REDUCTIONS


def mse(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    weights: Sequence[float] | Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Mean squared error of every pair, and their weighted total: hidden states or matrices of all layers at once.

    With rows of d features, the value of a pair is the mean over its rows of 1/d · Σⱼ (studentᵢⱼ − teacherᵢⱼ)²; without
    a mask that is ``torch.nn.functional.mse_loss``. The total is Σ weight · value.

    Args:
        students: P tensors (..., d), float32, bfloat16, float16 or float64, of any shapes. Rows may have any stride.
        teachers: P tensors of the same shapes; must not require grad. Of another dtype: both are promoted.
        mask: (...) bool, or numbers where 0 means: the row does not count. Shared by all pairs, all of which must then
            have these rows; pairs that do not, such as weight matrices, go into a call of their own.
        weights: P numbers, or (P,); 1 by default.
        reduction: ``"mean"`` divides the sum over the valid rows by their number, ``"sum"`` does not.
        normalizer: a positive number or 0-d tensor that replaces the number of rows in ``"mean"``: the global count
            under gradient accumulation or data parallelism.

    Returns:
        (total, values): the total () with a gradient, and the unweighted value of every pair (P,), detached. float32
        (float64 if any student is float64).

    Each student's gradient is written in the pass that reads it. Arithmetic is float32 inside. A NaN in a masked row
    goes nowhere. Nothing valid, or no rows at all: 0, with zero gradients attached. The fused backends raise on a
    second derivative; float64 takes the plain torch path, which has one.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it must be.
    """
    _check_pairs(students, teachers, mask)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be mean or sum, got {reduction!r}")
    _checks.reduction(reduction, normalizer)
    first = students[0]
    return ops.mse(
        *_as_rows(students, teachers),
        valid=_checks.row_mask(mask, "every student", first),
        weights=_weights(weights, len(students), first),
        reduction=REDUCTIONS.index(reduction),
        normalizer=normalizer,
    )


def _check_pairs(students: Sequence[Tensor], teachers: Sequence[Tensor], mask: Tensor | None) -> None:
    for name, given in (("students", students), ("teachers", teachers)):
        if isinstance(given, Tensor) or not isinstance(given, Sequence):
            raise TypeError(f"{name} must be a list or tuple of tensors, got {type(given).__name__}")
    if len(students) != len(teachers) or not students:
        raise ValueError(
            f"students holds {len(students)} tensors and teachers {len(teachers)}: equally many, at least 1"
        )
    for k, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        mine, its = f"students[{k}]", f"teachers[{k}]"
        _checks.tensors(**{"students[0]": students[0], mine: student, its: teacher})
        if student.shape != teacher.shape:
            raise ValueError(f"{its} has shape {tuple(teacher.shape)}, but {mine} has {tuple(student.shape)}")
        _checks.columns(mine, student, "d")
        if mask is not None and student.shape[:-1] != students[0].shape[:-1]:
            raise ValueError(
                f"{mine} has rows {tuple(student.shape[:-1])}, but students[0] has {tuple(students[0].shape[:-1])}: "
                "with a mask all pairs must have the same rows; call mse without it for those that do not"
            )
        _checks.frozen(its, teacher)


def _as_rows(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    dtypes = [torch.promote_types(s.dtype, t.dtype) for s, t in zip(students, teachers, strict=True)]
    if torch.float64 in dtypes:
        dtypes = [torch.float64] * len(dtypes)
    rows = [[_checks.as_rows(x.to(d)) for x, d in zip(side, dtypes, strict=True)] for side in (students, teachers)]
    return rows[0], rows[1]


def _weights(weights: Sequence[float] | Tensor | None, pairs: int, like: Tensor) -> Tensor:
    if weights is None:
        return torch.ones(pairs, device=like.device)
    if isinstance(weights, Tensor):
        _checks.frozen("weights", weights)
    try:
        values = torch.as_tensor(weights, dtype=torch.float32, device=like.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"weights must be one number per pair, or a tensor of them, got {weights!r}") from error
    if values.shape != (pairs,):
        raise ValueError(f"weights has shape {tuple(values.shape)}; it holds one number per pair, {(pairs,)}")
    return values
