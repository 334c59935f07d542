"""Benchmark of ``topk_kl_div``: T² KL(teacher‖student) against 64 kept columns of the teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.limits import empty_on_huge_pages, huge_page_objection
from benchmarks.registry import FORWARD, FORWARD_BACKWARD, Benchmark, Case
from fastkd.losses import topk_kl_div

FP32, BF16 = torch.float32, torch.bfloat16
K = 64


def _case(device: str, shape: tuple[int, int], dtype: torch.dtype, tail: str, reason: str) -> Case:
    directions = (FORWARD, FORWARD_BACKWARD) if tail == "renormalize" else (FORWARD_BACKWARD,)
    return Case("topk_kl_div", shape, dtype, reason, device, directions, {"temperature": 2.0, "tail": tail})


CASES = [
    *(_case("cpu", (512, 128256), d, "bucket", "Llama 3's vocabulary") for d in (FP32, BF16)),
    *(_case("cpu", (1024, 30522), d, "bucket", "BERT's vocabulary: masked-LM logits") for d in (FP32, BF16)),
    _case("cpu", (511, 128256), FP32, "renormalize", "Llama 3's vocabulary, of which 64 columns are read"),
    *(_case("cuda", (8192, 128256), d, "bucket", "Llama 3's vocabulary") for d in (BF16, FP32)),
    _case("cuda", (8191, 128256), BF16, "renormalize", "Llama 3's vocabulary, of which 64 columns are read"),
]


def make_inputs(case: Case) -> dict[str, Tensor]:
    """Logits that spread over tens of nats, and a student that roughly follows its teacher."""
    generator = torch.Generator(case.device).manual_seed(0)
    teacher = torch.randn(case.shape, generator=generator, device=case.device).mul_(4)
    student = torch.randn(case.shape, generator=generator, device=case.device).add_(teacher)
    values, ids = (teacher / 2.0).log_softmax(-1).topk(K)
    return {"student_logits": student.to(case.dtype).requires_grad_(), "teacher_ids": ids, "teacher_values": values}


BENCHMARK = Benchmark("topk_kl_div", CASES, make_inputs)


@BENCHMARK.provider("compile", compiled=True)
@BENCHMARK.provider("eager")
def plain_torch(
    student_logits: Tensor, teacher_ids: Tensor, teacher_values: Tensor, temperature: float, tail: str
) -> Tensor:
    """As users write it: log-softmax of the whole row and a gather, the bucket by log1p(−exp) of the listed mass."""
    student = student_logits / temperature
    if tail == "renormalize":
        log_q = student.gather(-1, teacher_ids).log_softmax(-1)
        log_p = teacher_values.log_softmax(-1)
    else:
        log_q = _with_rest(student.log_softmax(-1).gather(-1, teacher_ids))
        log_p = _with_rest(teacher_values)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean() * temperature**2


def _with_rest(log_probs: Tensor) -> Tensor:
    rest = torch.log1p(-log_probs.float().exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))
    return torch.cat((log_probs, rest.to(log_probs.dtype)), -1)


@BENCHMARK.provider("fastkd")
def fused(student_logits: Tensor, teacher_ids: Tensor, teacher_values: Tensor, temperature: float, tail: str) -> Tensor:
    options = {"temperature": temperature, "teacher_temperature": temperature, "tail": tail}
    return topk_kl_div(student_logits, teacher_ids, teacher_values, **options)


def _as_words(logits: Tensor) -> Tensor:
    """The same bytes as 32-bit numbers: converting bf16 is no part of the limit."""
    return logits if logits.dtype == FP32 else logits.view(torch.int32)


@BENCHMARK.limit("neg")
def read_one_write_one(student_logits: Tensor, tail: str, **_: object) -> Tensor:
    if tail == "renormalize":
        return torch.zeros_like(student_logits)
    return torch.neg(_as_words(student_logits))


@BENCHMARK.limit("neg-huge-pages", objection=huge_page_objection)
def read_one_write_huge_pages(student_logits: Tensor, tail: str, **_: object) -> Tensor:
    words = _as_words(student_logits)
    out = empty_on_huge_pages(words)
    return out.zero_() if tail == "renormalize" else torch.neg(words, out=out)
