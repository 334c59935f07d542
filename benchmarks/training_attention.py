"""Benchmark of a MiniLM's attention in training on a CPU: bfloat16 without dropout, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.registry import STEP, Benchmark, Case
from fastkd.training.attention import sdpa

TEXTS = {16: "short sentences", 64: "pairs of sentences", 128: "paragraphs", 512: "whole windows of a text"}
CASES = [
    Case("training_attention", (32 if tokens <= 128 else 8, 12, tokens, 32), torch.bfloat16, reason, directions=(STEP,))
    for tokens, reason in TEXTS.items()
]


def make_inputs(case: Case) -> dict[str, Tensor]:
    pick = torch.Generator().manual_seed(0)
    names = ("query", "key", "value", "gradient")
    return {name: torch.randn(case.shape, generator=pick).to(case.dtype) for name in names}


BENCHMARK = Benchmark("training_attention", CASES, make_inputs)


def output_and_gradients(attention: Callable[..., Tensor], gradient: Tensor, *operands: Tensor) -> Tensor:
    """All that a step computes, (4, ...)."""
    leaves = [operand.detach().requires_grad_() for operand in operands]
    output = attention(*leaves)
    return torch.stack([output.detach(), *torch.autograd.grad(output, leaves, gradient)])


def called_by_a_model(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """One of transformers' attention functions, with the heads before the tokens again."""

    def attention(*operands: Tensor) -> Tensor:
        output: Tensor = function(nn.Module(), *operands, None, is_causal=False)[0]
        return output.transpose(1, 2)

    return attention


@BENCHMARK.provider("eager")
def transformers_own(query: Tensor, key: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    return output_and_gradients(called_by_a_model(sdpa_attention_forward), gradient, query, key, value)


@BENCHMARK.provider("maps")
def with_its_maps(query: Tensor, key: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """As transformers' ``eager`` attention computes it."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.mT * query.shape[-1] ** -0.5
        return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value

    return output_and_gradients(attention, gradient, query, key, value)


@BENCHMARK.provider("fastkd")
def own(query: Tensor, key: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    return output_and_gradients(called_by_a_model(sdpa), gradient, query, key, value)
