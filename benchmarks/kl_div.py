"""Benchmark of ``kl_div``: temperature-scaled KL(teacher‖student) over the last dimension, times T²."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.limits import empty_on_huge_pages, huge_page_objection
from benchmarks.peers import liger_objection
from benchmarks.registry import FORWARD, FORWARD_BACKWARD, Benchmark, Case
from fastkd.losses import kl_div

BOTH = (FORWARD, FORWARD_BACKWARD)
FP32, BF16 = torch.float32, torch.bfloat16


def _case(device: str, shape: tuple[int, int], dtype: torch.dtype, reason: str, overhead: bool = False) -> Case:
    directions = BOTH if overhead else (FORWARD_BACKWARD,)
    return Case("kl_div", shape, dtype, reason, device, directions, {"temperature": 2.0}, overhead)


CASES = [
    *(_case("cpu", (1024, 30522), d, "BERT's vocabulary: masked-LM logits") for d in (FP32, BF16)),
    *(_case("cpu", (512, 128256), d, "Llama 3's vocabulary") for d in (FP32, BF16)),
    _case("cpu", (8192, 128), FP32, "rows that fit the L1 cache, as attention maps of 128 tokens do"),
    _case("cpu", (32768, 3), FP32, "rows far below a vector's width: many MNLI sentence pairs"),
    _case("cpu", (32, 2), FP32, "one SST-2 batch: the cost of the call", overhead=True),
    *(_case("cuda", (8192, 128256), d, "Llama 3's vocabulary") for d in (BF16, FP32)),
    *(_case("cuda", (8192, 32000), d, "Llama 2's vocabulary: a row fits one SM") for d in (BF16, FP32)),
    *(_case("cuda", (1024, 30522), d, "BERT's vocabulary: masked-LM logits") for d in (BF16, FP32)),
    *(_case("cuda", (65536, 3), d, "rows far below a warp's width") for d in (BF16, FP32)),
    _case("cuda", (32, 2), FP32, "one SST-2 batch: the cost of the call", overhead=True),
]


def make_inputs(case: Case) -> dict[str, Tensor]:
    """Logits that spread over tens of nats, and a student that roughly follows its teacher."""
    generator = torch.Generator(case.device).manual_seed(0)
    teacher = torch.randn(case.shape, generator=generator, device=case.device).mul_(4)
    student = torch.randn(case.shape, generator=generator, device=case.device).add_(teacher)
    return {
        "student_logits": student.to(case.dtype).requires_grad_(),
        "teacher_logits": teacher.to(case.dtype),
    }


BENCHMARK = Benchmark("kl_div", CASES, make_inputs)


@BENCHMARK.provider("compile", compiled=True)
@BENCHMARK.provider("eager")
def plain_torch(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """The faster of the usual spellings: ``log_target=True``, and no upcast of half-precision logits."""
    student = F.log_softmax(student_logits / temperature, -1)
    teacher = F.log_softmax(teacher_logits / temperature, -1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


@BENCHMARK.provider("liger", objection=liger_objection)
def liger(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    from liger_kernel.transformers import LigerKLDIVLoss

    student = F.log_softmax(student_logits / temperature, -1)
    teacher = F.log_softmax(teacher_logits / temperature, -1)
    return LigerKLDIVLoss(reduction="batchmean", log_target=True)(student, teacher) * temperature**2


@BENCHMARK.provider("liger JSD", objection=liger_objection)
def liger_jsd(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Its JSD kernel at beta = 0, where it is the forward divergence."""
    from liger_kernel.transformers import LigerJSD

    student = F.log_softmax(student_logits / temperature, -1)
    teacher = F.log_softmax(teacher_logits / temperature, -1)
    return LigerJSD(beta=0.0)(student, teacher) * temperature**2


@BENCHMARK.provider("fastkd")
def fused(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    return kl_div(student_logits, teacher_logits, temperature=temperature)


def _as_words(logits: Tensor) -> Tensor:
    """The same bytes as 32-bit numbers: converting bf16 is no part of the limit."""
    return logits if logits.dtype == FP32 else logits.view(torch.int32)


@BENCHMARK.limit("add")
def read_both_write_one(student_logits: Tensor, teacher_logits: Tensor, **_: float) -> Tensor:
    return torch.add(_as_words(student_logits), _as_words(teacher_logits))


@BENCHMARK.limit("add-huge-pages", objection=huge_page_objection)
def read_both_write_huge_pages(student_logits: Tensor, teacher_logits: Tensor, **_: float) -> Tensor:
    student, teacher = _as_words(student_logits), _as_words(teacher_logits)
    return torch.add(student, teacher, out=empty_on_huge_pages(student))
