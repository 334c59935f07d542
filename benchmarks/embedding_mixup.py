"""Benchmark of ``embedding_mixup``: token embeddings looked up and mixed, and the dense gradient of their table.

A shape is examples × tokens × vocabulary × width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.limits import empty_on_huge_pages, huge_page_objection
from benchmarks.registry import FORWARD, FORWARD_BACKWARD, Benchmark, Case
from fastkd.losses import embedding_mixup

BOTH = (FORWARD, FORWARD_BACKWARD)
FP32, BF16 = torch.float32, torch.bfloat16


def _case(device: str, shape: tuple[int, ...], dtype: torch.dtype, reason: str, overhead: bool = False) -> Case:
    directions = BOTH if overhead else (FORWARD_BACKWARD,)
    return Case("embedding_mixup", shape, dtype, reason, device, directions, overhead=overhead)


CASES = [
    *(_case("cpu", (64, 128, 30522, 768), d, "a batch for BERT-base") for d in (FP32, BF16)),
    *(_case("cpu", (256, 128, 30522, 768), d, "a large batch for BERT-base") for d in (FP32, BF16)),
    _case("cpu", (8, 16, 1000, 32), FP32, "a toy: the cost of the call", overhead=True),
    *(_case("cuda", (256, 128, 30522, 768), d, "a large batch for BERT-base") for d in (BF16, FP32)),
    _case("cuda", (8, 16, 1000, 32), FP32, "a toy: the cost of the call", overhead=True),
]


def make_inputs(case: Case) -> dict[str, Tensor]:
    """Uniform ids: most rows of the table have no token or one, the hardest case for a cache."""
    examples, tokens, vocabulary, width = case.shape
    generator = torch.Generator(case.device).manual_seed(0)
    options = {"generator": generator, "device": case.device}
    return {
        "ids": torch.randint(vocabulary, (examples, tokens), **options),
        "table": torch.randn(vocabulary, width, **options).to(case.dtype).requires_grad_(),
        "permutation": torch.randperm(examples, **options),
        "lam": torch.rand(examples, **options),
        "upstream": torch.randn(examples, tokens, width, **options).to(case.dtype),
    }


BENCHMARK = Benchmark("embedding_mixup", CASES, make_inputs)


@BENCHMARK.provider("compile", compiled=True)
@BENCHMARK.provider("eager")
def plain_torch(ids: Tensor, table: Tensor, permutation: Tensor, lam: Tensor) -> Tensor:
    embeddings = F.embedding(ids, table)
    return torch.lerp(embeddings.index_select(0, permutation), embeddings, lam.to(table.dtype)[:, None, None])


@BENCHMARK.provider("fastkd")
def fused(ids: Tensor, table: Tensor, permutation: Tensor, lam: Tensor) -> Tensor:
    return embedding_mixup(ids, table, permutation, lam)


def _move(table: Tensor, upstream: Tensor, mixed: Tensor, gradient: Tensor) -> Tensor:
    """As many rows read and written as there are tokens; then as many read, and every row of the table written."""
    rows = upstream.flatten(0, 1)
    mixed.copy_(upstream)
    count = min(len(rows), len(table))
    gradient[:count] = rows[:count]
    gradient[count:] = 0
    return gradient


@BENCHMARK.limit("copy")
def copy_rows(table: Tensor, upstream: Tensor, **_: Tensor) -> Tensor:
    return _move(table, upstream, torch.empty_like(upstream), torch.empty_like(table))


@BENCHMARK.limit("copy-huge-pages", objection=huge_page_objection)
def copy_rows_to_huge_pages(table: Tensor, upstream: Tensor, **_: Tensor) -> Tensor:
    return _move(table, upstream, empty_on_huge_pages(upstream), empty_on_huge_pages(table))
