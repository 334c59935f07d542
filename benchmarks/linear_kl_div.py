"""Benchmark of ``linear_kl_div``: T² KL(teacher‖student) from hidden states and head weights, all four products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import Benchmark, Case
from fastkd.losses import linear_kl_div

FP32, BF16 = torch.float32, torch.bfloat16


def _case(device: str, shape: tuple[int, int, int], dtype: torch.dtype, reason: str) -> Case:
    return Case("linear_kl_div", shape, dtype, reason, device, options={"temperature": 2.0})


CASES = [
    *(_case("cpu", (512, 768, 30522), d, "BERT-base's masked-LM head") for d in (FP32, BF16)),
    *(_case("cpu", (256, 1024, 128256), d, "Llama 3's vocabulary on a small student") for d in (FP32, BF16)),
    *(_case("cuda", (n, 4096, 128256), BF16, "Llama 3 8B's head") for n in (1024, 8192)),
    _case("cuda", (8192, 768, 30522), BF16, "BERT-base's masked-LM head"),
]


def make_inputs(case: Case) -> dict[str, Tensor]:
    """Hidden states (N, H) and weights (V, H), of which logits spread over some tens of nats."""
    count, hidden, vocabulary = case.shape
    generator = torch.Generator(case.device).manual_seed(0)

    def normal(rows: int, scale: float) -> Tensor:
        x = torch.randn((rows, hidden), generator=generator, device=case.device)
        return x.mul_(scale).to(case.dtype)

    return {
        "student_hidden": normal(count, 1.0).requires_grad_(),
        "student_weight": normal(vocabulary, 3 * hidden**-0.5).requires_grad_(),
        "teacher_hidden": normal(count, 1.0),
        "teacher_weight": normal(vocabulary, 3 * hidden**-0.5),
    }


BENCHMARK = Benchmark("linear_kl_div", CASES, make_inputs)


@BENCHMARK.provider("compile", compiled=True)
@BENCHMARK.provider("eager")
def plain_torch(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, temperature: float
) -> Tensor:
    student = F.log_softmax(student_hidden @ student_weight.T / temperature, -1)
    teacher = F.log_softmax(teacher_hidden @ teacher_weight.T / temperature, -1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


@BENCHMARK.provider("fastkd")
def fused(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, temperature: float
) -> Tensor:
    return linear_kl_div(student_hidden, student_weight, teacher_hidden, teacher_weight, temperature=temperature)


@BENCHMARK.limit("products")
def four_products(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, **_: float
) -> Tensor:
    """The matrix products alone, each whole: both models' logits and the two gradients of the student."""
    logits = student_hidden @ student_weight.T
    torch.mm(teacher_hidden, teacher_weight.T)
    torch.mm(logits.T, student_hidden)
    return logits @ student_weight
