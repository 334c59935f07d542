"""A tiny student and, for each op, a loss of it: what training loops put under the machinery of torch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.losses import (
    attention_kl_div,
    embedding_mixup,
    kl_div,
    linear_kl_div,
    linear_topk_kl_div,
    low_rank_mse,
    mixup,
    mse,
    topk_kl_div,
)

WIDTH = 16
HEADS = 2


class Batch(NamedTuple):
    """B examples of T tokens, of which ``mask`` says how many there are."""

    x: Tensor
    ids: Tensor
    teacher: Tensor
    mask: Tensor
    lam: Tensor

    def part(self, rows: slice) -> "Batch":
        return Batch(*(tensor[rows] for tensor in self))


def batch(count: int, tokens: int = 5, device: str = "cpu") -> Batch:
    generator = torch.Generator().manual_seed(count)
    x, teacher = torch.randn(2, count, tokens, WIDTH, generator=generator)
    ids = torch.randint(WIDTH, (count, tokens), generator=generator)
    lengths = torch.randint(1, tokens + 1, (count, 1), generator=generator)
    mask = torch.arange(tokens) < lengths
    return Batch(*(t.to(device) for t in (x, ids, teacher, mask, torch.rand(count, generator=generator))))


class Student(nn.Module):
    """A layer and one more weight, to which every loss has gradients."""

    def __init__(self, name: str, device: str = "cpu") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)
        self.loss = LOSSES[name]
        self.to(device)

    def forward(self, batch: Batch, **options: Any) -> Tensor:
        return self.loss(self.layer(batch.x), self.weight, batch, **options)


def _kl_div(hidden: Tensor, weight: Tensor, batch: Batch, **options: Any) -> Tensor:
    return kl_div(F.linear(hidden, weight), batch.teacher, temperature=2.0, mask=batch.mask, **options)


def _linear_kl_div(hidden: Tensor, weight: Tensor, batch: Batch, **options: Any) -> Tensor:
    head = torch.linspace(-1, 1, WIDTH * WIDTH).view(WIDTH, WIDTH).to(batch.teacher)
    return linear_kl_div(hidden, weight, batch.teacher, head, mask=batch.mask, **options)


def _topk(batch: Batch) -> dict[str, Tensor]:
    values, ids = batch.teacher.float().topk(4)
    return {"teacher_ids": ids, "teacher_values": values, "teacher_logsumexp": batch.teacher.float().logsumexp(-1)}


def _topk_kl_div(hidden: Tensor, weight: Tensor, batch: Batch, **options: Any) -> Tensor:
    return topk_kl_div(F.linear(hidden, weight), **_topk(batch), mask=batch.mask, **options)


def _linear_topk_kl_div(hidden: Tensor, weight: Tensor, batch: Batch, **options: Any) -> Tensor:
    return linear_topk_kl_div(hidden, weight, **_topk(batch), mask=batch.mask, **options)


def _attention_kl_div(hidden: Tensor, weight: Tensor, batch: Batch, **options: Any) -> Tensor:
    if "normalizer" in options:  # of tokens; there is a map for each head
        options["normalizer"] = options["normalizer"] * HEADS
    query, key, teacher = (x.unflatten(-1, (HEADS, -1)) for x in (hidden, F.linear(hidden, weight), batch.teacher))
    return attention_kl_div(query, key, teacher, teacher, mask=batch.mask, causal=True, layout="bthd", **options)


def _low_rank_mse(hidden: Tensor, weight: Tensor, batch: Batch, **options: Any) -> Any:
    return low_rank_mse(hidden, weight[:4], weight[4:, :4], batch.teacher[..., 4:], mask=batch.mask, **options)


def _low_rank_layer(hidden: Tensor, weight: Tensor, batch: Batch, **options: Any) -> Tensor:
    loss, output = _low_rank_mse(hidden, weight, batch, return_output=True, **options)
    return loss + mse([output], [batch.teacher[..., 4:].sin()], mask=batch.mask, **options)[0]


def _mse(hidden: Tensor, weight: Tensor, batch: Batch, **options: Any) -> Tensor:
    layers = [hidden, F.linear(hidden, weight)]
    return mse(layers, [batch.teacher] * 2, mask=batch.mask, weights=[1.0, 0.5], **options)[0]


def _neighbours(batch: Batch) -> Tensor:
    """Partners in pairs, so that an even part of a batch is mixed as it is in the whole."""
    return torch.arange(len(batch.lam), device=batch.lam.device) ^ 1


def _mixup(hidden: Tensor, weight: Tensor, batch: Batch, lam: float | Tensor | None = None, **options: Any) -> Tensor:
    pair = _neighbours(batch), batch.lam if lam is None else lam
    student, teacher = mixup(F.linear(hidden, weight), *pair), mixup(batch.teacher, *pair)
    return mse([student], [teacher], mask=batch.mask, **options)[0]


def _embedding_mixup(hidden: Tensor, weight: Tensor, batch: Batch, **options: Any) -> Tensor:
    student = embedding_mixup(batch.ids, weight, _neighbours(batch), batch.lam, padding_idx=0) + hidden
    return mse([student], [batch.teacher], mask=batch.mask, **options)[0]


def _by_row(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``reduction="none"``, and the mean taken by the loop."""

    def of_rows(hidden: Tensor, weight: Tensor, batch: Batch, normalizer: float | Tensor | None = None) -> Tensor:
        rows = loss(hidden, weight, batch, reduction="none")
        return (
            rows.sum() / (rows.numel() / batch.mask.numel()) / (batch.mask.sum() if normalizer is None else normalizer)
        )

    return of_rows


LOSSES: dict[str, Callable[..., Tensor]] = {
    "kl_div": _kl_div,
    "kl_div by row": _by_row(_kl_div),
    "linear_kl_div": _linear_kl_div,
    "linear_kl_div by row": _by_row(_linear_kl_div),
    "topk_kl_div": _topk_kl_div,
    "topk_kl_div by row": _by_row(_topk_kl_div),
    "linear_topk_kl_div": _linear_topk_kl_div,
    "attention_kl_div": _attention_kl_div,
    "attention_kl_div by row": _by_row(_attention_kl_div),
    "low_rank_mse": _low_rank_mse,
    "low_rank_mse by row": _by_row(_low_rank_mse),
    "low_rank_mse and its output": _low_rank_layer,
    "mse": _mse,
    "mixup": _mixup,
    "mixup by a number": lambda *arguments, **options: _mixup(*arguments, lam=0.3, **options),
    "embedding_mixup": _embedding_mixup,
}
"""By the name of the op: (the layer's output, the weight, batch, normalizer of tokens) → loss."""

AUTOCAST_CASTS = {"linear_kl_div": ("weight", "teacher"), "embedding_mixup": ()}
"""What autocast casts besides activations, which its layers make: by default the weight, as for ``F.linear``."""
