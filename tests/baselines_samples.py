"""Features of a student and a teacher, as taps would have recorded them, for the tests of the baselines."""

import torch

from fastkd.methods.objective import IGNORED
from fastkd.training.taps import Attention, Features

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
SMALL = {"minilmv2": {"relation_heads": 4}}  # options without which a baseline does not fit these models
LABELS = torch.tensor([0, 2, 1])
NEXT_TOKENS = torch.tensor([[IGNORED, 3, 0, 5, 1], [IGNORED, 2, 4, IGNORED, IGNORED], [6, 1, *[IGNORED] * 3]])


def features(seed, *, layers=2, width=8, heads=2, logits=(3, 3), grad=False, causal=False):
    draw = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(*shape, generator=draw).requires_grad_(grad)  # noqa: E731
    parts = lambda: (new(3, heads, 5, width // heads) for _ in range(3))  # noqa: E731
    scale = (width // heads) ** -0.5
    attention = [Attention(*parts(), scale=scale, bias=None, causal=causal, window=None) for _ in range(layers)]
    return Features([new(3, 5, width) for _ in range(layers + 1)], attention, logits=new(*logits))


def tensors(given):
    return [*given.hidden, *(x for layer in given.attention for x in layer[:3]), given.logits]


def pair(**options):
    """A student of 2 layers and a teacher of 4."""
    return features(0, grad=True, **options), features(1, layers=4, **options)


def close(got, want):
    torch.testing.assert_close(got.double(), torch.as_tensor(want).double(), rtol=2e-5, atol=1e-6)
