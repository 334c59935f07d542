"""The attention function of training: the same function as transformers', by another path in half precision."""

import copy

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fastkd.training.attention import sdpa, train_by_own_attention
from tests.tiny import bert, bilstm


def operands(dtype):
    torch.manual_seed(0)
    return [torch.randn(2, 4, 9, 8).to(dtype).requires_grad_() for _ in range(3)]


def mask(kind):
    seen = torch.rand(2, 1, 9, 9) > 0.3
    seen[..., 0] = True
    return {"none": None, "bool": seen, "float": torch.where(seen, 0.0, -torch.inf)}[kind]


def result(attention, dtype, kind, **options):
    tensors = operands(dtype)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float64):
        output, _ = attention(torch.nn.Module(), *tensors, mask(kind), is_causal=False, **options)
    return output, torch.autograd.grad(output.float().square().sum(), tensors)


@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_half_precision_is_as_close_as_transformers_own(kind):
    (output, gradients), (theirs, their_gradients) = (
        result(attention, torch.bfloat16, kind, scaling=0.3) for attention in (sdpa, sdpa_attention_forward)
    )
    exact, exact_gradients = result(sdpa_attention_forward, torch.float64, kind, scaling=0.3)
    assert output.dtype == torch.bfloat16
    for mine, other, want in zip((output, *gradients), (theirs, *their_gradients), (exact, *exact_gradients)):
        error, allowed = ((x.double() - want).norm() for x in (mine, other))
        assert error <= 1.2 * allowed + 1e-6


def test_dropout_takes_torchs_own_path():
    mine, theirs = (result(attention, torch.bfloat16, "bool", dropout=0.5) for attention in (sdpa, sdpa_attention_forward))
    for a, b in zip((mine[0], *mine[1]), (theirs[0], *theirs[1])):
        assert torch.equal(a, b)
