"""Benchmark of a MiniLM's attention in training on a CPU: bfloat16 without dropout, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.registry import Benchmark, Case
from fastkd.training.attention import sdpa

TEXTS = {16: "short sentences", 64: "pairs of sentences", 128: "paragraphs", 512: "whole windows of a text"}
CASES = [
    Case("training_attention", (32 if tokens <= 128 else 8, 12, tokens, 32), torch.bfloat16, reason)
    for tokens, reason in TEXTS.items()
]


def make_inputs(case: Case) -> dict[str, Tensor]:
    pick = torch.Generator().manual_seed(0)
    return {name: torch.randn(case.shape, generator=pick).to(case.dtype) for name in ("query", "key", "value")}


BENCHMARK = Benchmark("training_attention", CASES, make_inputs)


@BENCHMARK.provider("eager")
def transformers_own(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    output: Tensor = sdpa_attention_forward(nn.Module(), query, key, value, None, is_causal=False)[0]
    return output


@BENCHMARK.provider("maps")
def with_its_maps(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As transformers' ``eager`` attention computes it."""
    maps = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1, dtype=torch.float32).to(query.dtype)
    return (maps @ value).transpose(1, 2)


@BENCHMARK.provider("fastkd")
def own(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    output: Tensor = sdpa(nn.Module(), query, key, value, None, is_causal=False)[0]
    return output
