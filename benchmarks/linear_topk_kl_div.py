"""Benchmark of ``linear_topk_kl_div``: T² KL against 64 kept columns of the teacher, from hidden states and a head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import Benchmark, Case
from benchmarks.topk_kl_div import K, plain_torch
from fastkd.losses import linear_topk_kl_div

FP32, BF16 = torch.float32, torch.bfloat16


def _case(device: str, shape: tuple[int, int, int], dtype: torch.dtype, reason: str) -> Case:
    return Case("linear_topk_kl_div", shape, dtype, reason, device, options={"temperature": 2.0})


CASES = [
    *(_case("cpu", (512, 768, 30522), d, "BERT's vocabulary on its base size") for d in (FP32, BF16)),
    *(_case("cpu", (256, 1024, 128256), d, "Llama 3's vocabulary on a small student") for d in (FP32, BF16)),
    _case("cuda", (8192, 4096, 128256), BF16, "Llama 3 8B's head"),
]


def make_inputs(case: Case) -> dict[str, Tensor]:
    """Hidden states (N, H), a weight (V, H), and a teacher whose logits spread over some tens of nats."""
    count, hidden, vocabulary = case.shape
    generator = torch.Generator(case.device).manual_seed(0)

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(shape, generator=generator, device=case.device).mul_(scale)

    values, ids = F.log_softmax(normal(count, vocabulary, scale=2.0), -1).topk(K)
    return {
        "student_hidden": normal(count, hidden, scale=1.0).to(case.dtype).requires_grad_(),
        "student_weight": normal(vocabulary, hidden, scale=3 * hidden**-0.5).to(case.dtype).requires_grad_(),
        "teacher_ids": ids,
        "teacher_values": values,
    }


BENCHMARK = Benchmark("linear_topk_kl_div", CASES, make_inputs)


@BENCHMARK.provider("compile", compiled=True)
@BENCHMARK.provider("eager")
def plain(
    student_hidden: Tensor, student_weight: Tensor, teacher_ids: Tensor, teacher_values: Tensor, temperature: float
) -> Tensor:
    return plain_torch(student_hidden @ student_weight.T, teacher_ids, teacher_values, temperature, "bucket")


@BENCHMARK.provider("fastkd")
def fused(
    student_hidden: Tensor, student_weight: Tensor, teacher_ids: Tensor, teacher_values: Tensor, temperature: float
) -> Tensor:
    options = {"temperature": temperature, "teacher_temperature": temperature}
    return linear_topk_kl_div(student_hidden, student_weight, teacher_ids, teacher_values, **options)


@BENCHMARK.limit("products")
def three_products(student_hidden: Tensor, student_weight: Tensor, **_: object) -> Tensor:
    """The matrix products alone, each whole: the student's logits and the two gradients."""
    logits = student_hidden @ student_weight.T
    torch.mm(logits.T, student_hidden)
    return logits @ student_weight
