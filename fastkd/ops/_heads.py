"""A language model's head as chunks of rows go through it: logits forwards, gradients of its parts backwards."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

FEW = 3
"""Chunks whose sum may be rounded to half precision each time: more exact than their rounded products in float32."""


class Head(NamedTuple):
    """One model's map from hidden states to logits."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def logits(self, rows: slice, out: Tensor) -> Tensor:
        torch.mm(self.hidden[rows], self.weight.T, out=out)
        if self.bias is not None:
            out.add_(self.bias)
        if self.scale != 1.0:
            out.mul_(self.scale)
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
        return out


def through_softcap(logits: Tensor, softcap: float | None, differentiate: Callable[[], Tensor]) -> Tensor:
    """What ``differentiate`` returns, which puts a gradient in place of ``logits``: then that before the cap."""
    capped = None if softcap is None else logits / softcap
    losses = differentiate()
    if capped is not None:
        logits.addcmul_(logits * capped, capped, value=-1)  # the derivative of c tanh(z / c) is 1 - tanh²
    return losses


class Gradients:
    """Sums of the chunks' gradients, each row weighted; of the weight in float32 when there are more than ``FEW``.

    ``memory`` of the weight's gradient (vocabulary, width) is free for other use until the first chunk is added.
    """

    def __init__(self, head: Head, row_weight: Tensor | None, hidden: bool, weight: bool, bias: bool) -> None:
        self.head = head
        self.memory = head.hidden.new_empty(head.weight.shape) if weight else None
        self.needed = hidden or weight or bias
        self.hidden = torch.empty_like(head.hidden, memory_format=torch.contiguous_format) if hidden else None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.need_weight, self.need_bias = weight, bias
        # Half precision would flush gradients divided by the count: there the largest weight is 1 until the end.
        self.peak = None
        if row_weight is not None:
            row_weight = row_weight * head.scale
            if head.hidden.dtype == torch.float16 and len(head.hidden) > 0:
                self.peak = row_weight.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
                row_weight = row_weight / self.peak
            row_weight = row_weight.expand(len(head.hidden))
        self.row_weight = row_weight

    def add(self, rows: slice, logits: Tensor, chunks: int) -> None:
        """Take in the gradient of one of so many chunks of logits."""
        if not self.needed:
            return
        assert self.row_weight is not None
        row_weight = self.row_weight[rows, None]
        if self.hidden is not None:
            torch.mm(logits, self.head.weight, out=self.hidden[rows]).mul_(row_weight)
        if self.need_weight:
            weighted = (self.head.hidden[rows] * row_weight).to(logits.dtype)
            dtype = torch.float32 if chunks > FEW else logits.dtype
            if self.weight is None:
                self.weight = torch.mm(logits.T, weighted, out=self.memory).to(dtype)
            elif dtype == logits.dtype:
                self.weight.addmm_(logits.T, weighted)
            else:
                self.weight.add_(torch.mm(logits.T, weighted, out=self.memory))
        if self.need_bias:
            part = torch.mv(logits.T, row_weight[:, 0].to(logits.dtype)).float()
            self.bias = part if self.bias is None else self.bias.add_(part)

    def results(self, losses: Tensor, index: Tensor | None, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Losses and gradients of all rows, those that do not count included."""
        head, hidden, weight, bias = self.head, self.hidden, self.weight, self.bias
        if weight is None and self.need_weight:
            weight = head.weight.new_zeros(head.weight.shape)
        if bias is None and self.need_bias:
            bias = head.weight.new_zeros(len(head.weight))
        if index is not None:
            losses = losses.new_zeros(count).index_copy_(0, index, losses)
            if hidden is not None:
                hidden = hidden.new_zeros(count, hidden.shape[1]).index_copy_(0, index, hidden)
        grads = (hidden, weight, bias)
        if self.peak is not None:
            grads = tuple(None if grad is None else grad * self.peak for grad in grads)  # type: ignore[assignment]
        dtype = head.hidden.dtype
        return losses, *(losses.new_empty(0, dtype=dtype) if g is None else g.to(dtype) for g in grads)  # type: ignore[return-value]
