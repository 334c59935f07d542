"""Benchmark of ``linear_kl_div``: T² KL(teacher‖student) from hidden states and head weights, all four products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import liger_missing, liger_objection
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


AUTO_CHUNKER = {"auto_chunker.enable": True, "auto_chunker.amplify_ratio_threshold": 0}
"""At its own threshold it leaves out heads with fewer rows than eight times their width, which are all but one here."""


@BENCHMARK.provider("auto-chunker", compiled=True, inductor=AUTO_CHUNKER)
@BENCHMARK.provider("compile", compiled=True)
@BENCHMARK.provider("eager")
def plain_torch(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, temperature: float
) -> Tensor:
    student = F.log_softmax(student_hidden @ student_weight.T / temperature, -1)
    teacher = F.log_softmax(teacher_hidden @ teacher_weight.T / temperature, -1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


@BENCHMARK.provider("linear_cross_entropy")
def linear_cross_entropy(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, temperature: float
) -> Tensor:
    """Torch's own, less the entropy of the teacher's probabilities; for such targets torch 2.13 has no chunks."""
    log_probs = F.log_softmax(teacher_hidden @ teacher_weight.T / temperature, -1)
    probs = log_probs.exp()
    negative_entropy = (probs * log_probs).sum() / len(probs)
    cross_entropy = F.linear_cross_entropy(student_hidden / temperature, student_weight, probs)
    return (cross_entropy + negative_entropy) * temperature**2


@BENCHMARK.provider("liger JSD", objection=liger_objection)
def liger_jsd(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, temperature: float
) -> Tensor:
    """Its fused linear JSD at beta = 0, where it is the forward divergence."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.0, temperature=temperature)
    return loss(student_hidden, student_weight, teacher_hidden, teacher_weight, None) * temperature**2


@BENCHMARK.provider("liger chunked JSD", objection=liger_missing)
def liger_chunked_jsd(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, temperature: float
) -> Tensor:
    """Its chunks of plain torch, compiled, at beta = 0 and without the hard loss."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, temperature=temperature)
    no_labels = student_hidden.new_zeros(len(student_hidden), dtype=torch.int64)
    return loss(student_hidden, student_weight, teacher_hidden, teacher_weight, no_labels) * temperature**2


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
