"""Benchmark of ``attention_kl_div``: KL(teacher‖student) of attention maps, from queries and keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import Benchmark, Case
from fastkd.losses import attention_kl_div

FP32, BF16 = torch.float32, torch.bfloat16


def _case(device: str, shape: tuple[int, int, int, int], dtype: torch.dtype, reason: str, causal: bool = False) -> Case:
    return Case("attention_kl_div", shape, dtype, reason, device, options={"causal": causal})


CASES = [
    *(_case("cpu", (8, 12, 128, 64), d, "a GLUE batch of BERT-base") for d in (FP32, BF16)),
    *(_case("cpu", (2, 12, 512, 64), d, "BERT-base at its full length") for d in (FP32, BF16)),
    *(_case("cpu", (1, 32, 1024, 128), d, "a decoder of 7B: masked tiles need no work", True) for d in (FP32, BF16)),
    *(_case("cuda", (1, 32, 4096, 128), d, "a decoder of 7B at 4096 tokens", True) for d in (BF16, FP32)),
    *(_case("cuda", (32, 12, 512, 64), d, "BERT-base at its full length") for d in (BF16, FP32)),
]


def make_inputs(case: Case) -> dict[str, Tensor]:
    """A student that roughly follows its teacher, whose scores spread over several nats."""
    generator = torch.Generator(case.device).manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(case.shape, generator=generator, device=case.device)

    teacher = [1.5 * draw() for _ in range(2)]
    student = [x + 0.5 * draw() for x in teacher]
    return {
        "student_query": student[0].to(case.dtype).requires_grad_(),
        "student_key": student[1].to(case.dtype).requires_grad_(),
        "teacher_query": teacher[0].to(case.dtype),
        "teacher_key": teacher[1].to(case.dtype),
    }


BENCHMARK = Benchmark("attention_kl_div", CASES, make_inputs)


def _log_map(query: Tensor, key: Tensor, causal: bool) -> Tensor:
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if causal:
        # The lowest number instead of −inf, as models do: F.kl_div makes NaN of two −inf.
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        scores = scores.masked_fill(future, torch.finfo(scores.dtype).min)
    return F.log_softmax(scores, -1, dtype=FP32 if scores.dtype == BF16 else None)


@BENCHMARK.provider("compile", compiled=True)
@BENCHMARK.provider("eager")
def plain_torch(
    student_query: Tensor, student_key: Tensor, teacher_query: Tensor, teacher_key: Tensor, causal: bool
) -> Tensor:
    """Scores by matmul, the divergence by ``F.kl_div``; in bfloat16 the softmax is taken in float32."""
    student, teacher = _log_map(student_query, student_key, causal), _log_map(teacher_query, teacher_key, causal)
    rows = F.kl_div(student, teacher, reduction="sum", log_target=True)
    return rows / student.shape[:-1].numel()


@BENCHMARK.provider("fastkd")
def fused(**arguments: Tensor) -> Tensor:
    loss = attention_kl_div(**arguments)  # type: ignore[arg-type]
    return loss


@BENCHMARK.limit("bmm")
def four_products(
    student_query: Tensor, student_key: Tensor, teacher_query: Tensor, teacher_key: Tensor, causal: bool
) -> Tensor:
    """Both scores and both gradients by the BLAS of torch, 8·T²·d FLOPs a head; with causal, half is enough."""
    q, k, teacher_q, teacher_k = (x.flatten(0, 1) for x in (student_query, student_key, teacher_query, teacher_key))
    if causal:
        half = q.shape[1] // 2  # all queries against half the keys: as many FLOPs as the triangle
        k, teacher_k = k[:, :half], teacher_k[:, :half]
    grad = q @ k.transpose(1, 2)
    scores = teacher_q @ teacher_k.transpose(1, 2)
    return (grad @ k).sum() + (grad.transpose(1, 2) @ q).sum() + scores[0, 0, 0]
