"""Benchmark of ``mse``: the squared errors of the hidden states of all layers, padding masked."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.registry import Benchmark, Case
from fastkd.losses import mse

FP32, BF16 = torch.float32, torch.bfloat16
LENGTH = 128
"""Tokens to a sequence; lengths are uniform between half of it and all, so that a quarter of the rows is padding."""


def _case(device: str, shape: tuple[int, int, int], dtype: torch.dtype, reason: str) -> Case:
    return Case("mse", shape, dtype, reason, device)


CASES = [
    *(_case("cpu", (13, 2048, 768), d, "BERT-base: embeddings and 12 layers of 16 sequences") for d in (FP32, BF16)),
    *(_case("cuda", (33, 8192, 4096), d, "a 7B model: embeddings and 32 layers") for d in (BF16, FP32)),
]


def make_inputs(case: Case) -> dict[str, Tensor]:
    """One tensor for the layers of each model, and a student that roughly follows its teacher."""
    generator = torch.Generator(case.device).manual_seed(0)
    teacher = torch.randn(case.shape, generator=generator, device=case.device)
    student = torch.randn(case.shape, generator=generator, device=case.device).add_(teacher)
    lengths = torch.randint(
        LENGTH // 2, LENGTH + 1, (case.shape[1] // LENGTH,), generator=generator, device=case.device
    )
    mask = torch.arange(LENGTH, device=case.device) < lengths[:, None]
    layers = {f"student{k}": layer.to(case.dtype).requires_grad_() for k, layer in enumerate(student.unbind())}
    return {**layers, "teacher": teacher.to(case.dtype), "mask": mask.reshape(-1)}


BENCHMARK = Benchmark("mse", CASES, make_inputs)


@BENCHMARK.provider("compile", compiled=True)
@BENCHMARK.provider("eager")
def plain_torch(teacher: Tensor, mask: Tensor, **students: Tensor) -> Tensor:
    """A loop over the layers, as distillation code has it, its sums in float32."""
    total = torch.zeros((), device=mask.device)
    for student, layer in zip(students.values(), teacher.unbind(), strict=True):
        wide = torch.promote_types(student.dtype, FP32)
        rows = (student.to(wide) - layer.to(wide)).square().mean(-1)
        total = total + (rows * mask).sum() / mask.sum()
    return total


@BENCHMARK.provider("fastkd")
def fused(teacher: Tensor, mask: Tensor, **students: Tensor) -> Tensor:
    return mse(list(students.values()), list(teacher.unbind()), mask=mask)[0]


@BENCHMARK.limit("subtract")
def read_both_write_one(teacher: Tensor, mask: Tensor, **students: Tensor) -> Tensor:
    """Reads what counts, writes every gradient."""
    rows = int(mask.sum())
    for student, layer in zip(students.values(), teacher.unbind(), strict=True):
        grad = torch.empty_like(student)
        torch.sub(student[:rows], layer[:rows], out=grad[:rows])
        grad[rows:].zero_()
    return grad
