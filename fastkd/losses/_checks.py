"""Checks that every loss shares: each names the argument, what it is and what it must be."""

from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from fastkd.ops._extension import FLOATS

Reduction = Literal["none", "mean", "sum"]

REDUCTIONS = ("none", "sum", "mean")


def tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def same_device(name: str, tensor: Tensor, of: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, but {of} is on {other.device}")


def frozen(name: str, tensor: Tensor | None) -> None:
    """No gradient flows to what a loss only measures against."""
    if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires grad, but no gradient flows to it: pass {name}.detach() or compute it under "
            "torch.no_grad()"
        )


def columns(name: str, tensor: Tensor, size: str) -> None:
    if tensor.dim() == 0 or tensor.shape[-1] < 1:
        raise ValueError(f"{name} must be (..., {size}) with {size} >= 1, got shape {tuple(tensor.shape)}")


def tensors(**named: Any) -> None:
    """Every argument a tensor of a supported floating dtype on the device of the first."""
    first = next(iter(named.items()))
    for name, value in named.items():
        tensor(name, value)
        floating(name, value)
        same_device(name, value, *first)


def given(**optional: Any) -> dict[str, Any]:
    """Those of the arguments that are not None."""
    return {name: value for name, value in optional.items() if value is not None}


def pair(student: Tensor, teacher: Tensor) -> None:
    """Logits of both models: tensors of one shape (..., V) on one device, the teacher without gradient."""
    tensors(student_logits=student, teacher_logits=teacher)
    if student.shape != teacher.shape:
        raise ValueError(
            f"teacher_logits has shape {tuple(teacher.shape)}, but student_logits has {tuple(student.shape)}: "
            "they must be equal"
        )
    columns("student_logits", student, "V")
    frozen("teacher_logits", teacher)


def number(name: str, value: object, kind: str = "a number") -> None:
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be {kind}, got {type(value).__name__}")


def positive(name: str, value: float, kind: str = "a number") -> None:
    number(name, value, kind)
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def memory_budget(budget: int | None) -> None:
    if budget is not None and not (isinstance(budget, int) and budget >= 1):
        raise ValueError(f"memory_budget must be a positive number of bytes, an int, got {budget!r}")


def reduction(reduction: str, normalizer: float | Tensor | None) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError(f'normalizer replaces the count in reduction="mean", got reduction={reduction!r}')
    if not isinstance(normalizer, Tensor):
        return positive("normalizer", normalizer, "a number or a 0-d tensor")
    if normalizer.dim() != 0:
        raise ValueError(f"normalizer must be a number or a 0-d tensor, got shape {tuple(normalizer.shape)}")
    frozen("normalizer", normalizer)
    if readable(normalizer) and not bool(normalizer >= 0):
        raise ValueError(f"normalizer must be positive, or 0 where nothing counts, got {normalizer.item()}")


def row_values(name: str, values: Tensor, of: str, rows_of: Tensor) -> Tensor:
    """``values``, one for each row of ``rows_of``, which is called ``of``, as (N,)."""
    rows = rows_of.shape[:-1]
    tensor(name, values)
    if values.shape != rows:
        raise ValueError(f"{name} has shape {tuple(values.shape)}; it holds one value per row of {of}, {tuple(rows)}")
    same_device(name, values, of, rows_of)
    frozen(name, values)
    return values.reshape(-1)


def row_mask(mask: Tensor | None, of: str, rows_of: Tensor) -> Tensor | None:
    """(N,) bool, true where ``mask`` lets a row count; None when there is none."""
    if mask is None:
        return None
    values = row_values("mask", mask, of, rows_of)
    return values if values.dtype == torch.bool else values != 0


def valid_rows(of: str, logits: Tensor, labels: Tensor | None, ignore_index: int, mask: Tensor | None) -> Tensor | None:
    """(N,) bool, true where a row counts; None when all do."""
    valid = row_mask(mask, of, logits)
    if labels is None:
        return valid
    ids = row_values("labels", labels, of, logits)
    if ids.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {ids.dtype}")
    number("ignore_index", ignore_index)
    labelled = ids != ignore_index
    if readable(ids):
        _label_range(ids, labelled, logits.shape[-1], ignore_index)
    return labelled if valid is None else labelled & valid


def temperature(
    temperature: float | Tensor, of: str, logits: Tensor, name: str = "temperature"
) -> tuple[float, Tensor | None]:
    """The temperature as a number, or 1.0 and one value per row (N,)."""
    if not isinstance(temperature, Tensor):
        positive(name, temperature, "a number or a tensor")
        return float(temperature), None
    values = row_values(name, temperature, of, logits)
    if readable(values) and not bool(((values > 0) & values.isfinite()).all()):
        raise ValueError(f"{name} must be positive and finite in every row, its least is {values.min()}")
    return 1.0, values


def autocast(*operands: Tensor | None) -> Any:
    """The operands as a linear layer would take them here."""
    device = next(x.device.type for x in operands if x is not None)
    if not torch.is_autocast_enabled(device):
        return operands
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in operands)


def as_rows(x: Tensor) -> Tensor:
    """(..., V) as (N, V), or ``x`` itself: a view is a node of the graph, which costs as much as a small kernel."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def readable(tensor: Tensor) -> bool:
    """Whether values can be looked at for free: not on a GPU, where it would wait for the device, nor in a graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _label_range(labels: Tensor, valid: Tensor, vocabulary: int, ignore_index: int) -> None:
    outside = valid & ((labels < 0) | (labels >= vocabulary))
    if bool(outside.any()):
        raise ValueError(
            f"labels holds {int(labels[outside][0])}, outside [0, {vocabulary}) and not ignore_index = {ignore_index}"
        )
