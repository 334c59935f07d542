"""Checks that every loss shares: each names the argument, what it is and what it must be."""

from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["none", "mean", "sum"]

REDUCTIONS = ("none", "sum", "mean")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def pair(student: Tensor, teacher: Tensor) -> None:
    """Logits of both models: tensors of one shape (..., V) on one device, the teacher without gradient."""
    if not isinstance(student, Tensor) or not isinstance(teacher, Tensor):
        kinds = f"{type(student).__name__} and {type(teacher).__name__}"
        raise TypeError(f"student_logits and teacher_logits must be tensors, got {kinds}")
    if student.shape != teacher.shape:
        raise ValueError(
            f"teacher_logits has shape {tuple(teacher.shape)}, but student_logits has {tuple(student.shape)}: "
            "they must be equal"
        )
    if student.dim() == 0 or student.shape[-1] < 1:
        raise ValueError(f"student_logits must be (..., V) with V >= 1, got shape {tuple(student.shape)}")
    if student.dtype not in FLOATS or teacher.dtype not in FLOATS:
        raise TypeError(
            "student_logits and teacher_logits must be float32, bfloat16, float16 or float64, "
            f"got {student.dtype} and {teacher.dtype}"
        )
    _same_device("teacher_logits", teacher, student)
    if teacher.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "teacher_logits requires grad, but no gradient flows to the teacher: compute it under torch.no_grad() "
            "or pass teacher_logits.detach()"
        )


def reduction(reduction: str, normalizer: float | Tensor | None) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError(f'normalizer replaces the count in reduction="mean", got reduction={reduction!r}')
    if isinstance(normalizer, Tensor):
        if normalizer.dim() != 0:
            raise ValueError(f"normalizer must be a number or a 0-d tensor, got shape {tuple(normalizer.shape)}")
        if normalizer.requires_grad:
            raise ValueError("normalizer requires grad, but no gradient flows to it: pass normalizer.detach()")
    elif not normalizer > 0:
        raise ValueError(f"normalizer must be positive, got {normalizer}")


def valid_rows(logits: Tensor, labels: Tensor | None, ignore_index: int, mask: Tensor | None) -> Tensor | None:
    """(N,) bool, true where a row counts; None when all do."""
    rows, valid = logits.shape[:-1], None
    if labels is not None:
        if labels.dtype != torch.int64:
            raise TypeError(f"labels must be int64, got {labels.dtype}")
        if labels.shape != rows:
            raise ValueError(f"labels has shape {tuple(labels.shape)}, the rows of the logits are {tuple(rows)}")
        _same_device("labels", labels, logits)
        valid = labels != ignore_index
        if readable(labels):
            _label_range(labels, valid, logits.shape[-1], ignore_index)
    if mask is not None:
        if mask.shape != rows:
            raise ValueError(f"mask has shape {tuple(mask.shape)}, the rows of the logits are {tuple(rows)}")
        _same_device("mask", mask, logits)
        mask = mask if mask.dtype == torch.bool else mask != 0
        valid = mask if valid is None else valid & mask
    return None if valid is None else valid.reshape(-1)


def temperature(temperature: float | Tensor, logits: Tensor) -> tuple[float, Tensor | None]:
    """The temperature as a number, or 1.0 and one value per row (N,)."""
    if not isinstance(temperature, Tensor):
        if not 0.0 < temperature < float("inf"):
            raise ValueError(f"temperature must be positive and finite, got {temperature}")
        return float(temperature), None
    if temperature.requires_grad:
        raise ValueError("temperature requires grad, but no gradient flows to it: pass temperature.detach()")
    rows = logits.shape[:-1]
    if temperature.shape != rows:
        raise ValueError(
            f"temperature has shape {tuple(temperature.shape)}; as a tensor it holds one value per row, {tuple(rows)}"
        )
    _same_device("temperature", temperature, logits)
    if readable(temperature) and not bool(((temperature > 0) & temperature.isfinite()).all()):
        raise ValueError(f"temperature must be positive and finite in every row, its least is {temperature.min()}")
    return 1.0, temperature.reshape(-1)


def as_rows(x: Tensor) -> Tensor:
    """(..., V) as (N, V), or ``x`` itself: a view is a node of the graph, which costs as much as a small kernel."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def readable(tensor: Tensor) -> bool:
    """Whether values can be looked at for free: not on a GPU, where it would wait for the device, nor in a graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _same_device(name: str, tensor: Tensor, logits: Tensor) -> None:
    if tensor.device != logits.device:
        raise ValueError(f"{name} is on {tensor.device}, but student_logits is on {logits.device}")


def _label_range(labels: Tensor, valid: Tensor, vocabulary: int, ignore_index: int) -> None:
    outside = valid & ((labels < 0) | (labels >= vocabulary))
    if bool(outside.any()):
        raise ValueError(
            f"labels holds {int(labels[outside][0])}, outside [0, {vocabulary}) and not ignore_index = {ignore_index}"
        )


def tensors(**named: object) -> None:
    """Every argument a tensor of a supported floating dtype on the device of the first; None is passed over."""
    first = ""
    device = None
    for name, value in named.items():
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.dtype not in FLOATS:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
        if device is None:
            first, device = name, value.device
        elif value.device != device:
            raise ValueError(f"{name} is on {value.device}, but {first} is on {device}")


def frozen(name: str, tensor: Tensor | None) -> None:
    """No gradient flows to what a loss only measures against."""
    if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, but no gradient flows to it: pass {name}.detach()")


def row_values(name: str, values: Tensor | None, of: str, tensor: Tensor) -> Tensor | None:
    """``values``, one for each row of ``tensor``, which is called ``of``, as (N,)."""
    if values is None:
        return None
    rows = tensor.shape[:-1]
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(values).__name__}")
    if values.shape != rows:
        raise ValueError(f"{name} has shape {tuple(values.shape)}; it holds one value per row of {of}, {tuple(rows)}")
    if values.device != tensor.device:
        raise ValueError(f"{name} is on {values.device}, but {of} is on {tensor.device}")
    frozen(name, values)
    return values.reshape(-1)
