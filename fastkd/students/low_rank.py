"""Linear maps and embeddings of two low-rank factors, by truncated singular value decomposition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from fastkd.students.calibration import fitted_factors


class LowRankLinear(nn.Module):
    """y = (x · ``down``ᵀ) · ``up``ᵀ + ``bias``: two plain products, of r · (in + out) in place of in · out weights.

    ``down`` (r, in) and ``up`` (out, r) are named as in :func:`fastkd.losses.low_rank_mse`. No fused forward is needed:
    at half the weights two products take 0.5 to 0.8 of the dense map's time on CPU (``docs/makd.md``).

    New factors are random, and keep the variance of what they map; ``from_dense`` makes those of a dense map.

    Args:
        transposed: the map stands for a ``Conv1D`` of transformers, as in GPT-2, whose weight is (in, out).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        transposed: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank, self.transposed = in_features, out_features, rank, transposed
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.down = nn.Parameter(torch.empty(rank, in_features, **where))
        self.up = nn.Parameter(torch.empty(out_features, rank, **where))
        self.bias = nn.Parameter(torch.zeros(out_features, **where)) if bias else None
        nn.init.normal_(self.down, std=in_features**-0.5)
        nn.init.normal_(self.up, std=rank**-0.5)

    @classmethod
    def like(cls, dense: nn.Module, rank: int) -> LowRankLinear:
        """Of a dense map's shape, device and dtype; the factors are not set."""
        out_features, in_features = dense_weight(dense).shape
        weight = dense.get_parameter("weight")
        where: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        return cls(
            in_features, out_features, rank, dense.bias is not None, transposed=isinstance(dense, Conv1D), **where
        )

    @classmethod
    def from_dense(cls, dense: nn.Module, rank: int, moment: Tensor | None = None) -> LowRankLinear:
        """The best approximation of a dense map of that rank, with its bias.

        Best by the squared error of the weights, or with the ``moment`` of inputs, of
        :func:`fastkd.students.calibration.token_moments`, by that of the outputs.
        """
        weight = dense_weight(dense).detach()
        if moment is None:
            factors = truncated_svd(weight, rank)
        else:
            factors = fitted_factors(weight, weight.float() @ moment @ weight.float().T, rank)
        layer = _set_factors(cls.like(dense, rank), factors, dense.training)
        if layer.bias is not None:
            layer.bias.data.copy_(dense.get_parameter("bias"))
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up, self.bias)

    @property
    def weight(self) -> Tensor:
        """(out, in), the product of the factors, for code that reads a dense map's."""
        return whole(self.up) @ whole(self.down)

    def merged(self) -> nn.Module:
        """The dense map that it equals."""
        where: dict[str, Any] = {"device": self.up.device, "dtype": self.up.dtype}
        with torch.no_grad():
            if self.transposed:
                conv = Conv1D(self.out_features, self.in_features).to(**where)
                conv.weight.copy_(self.weight.T)
                conv.bias.copy_(cast(Tensor, self.bias))
                return conv.train(self.training)
            linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, **where)
            linear.weight.copy_(self.weight)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
            return linear.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"


class LowRankEmbedding(nn.Module):
    """Rows of ``up`` (V, r) · ``down`` (r, d): the factors of an embedding table.

    They have the names and shapes of the factors of a ``LowRankLinear`` from d to V, so a language model's head can
    share them.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        padding_idx: int | None = None,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.rank = num_embeddings, embedding_dim, rank
        self.padding_idx = padding_idx
        self.up = nn.Parameter(torch.empty(num_embeddings, rank, device=device, dtype=dtype))
        self.down = nn.Parameter(torch.empty(rank, embedding_dim, device=device, dtype=dtype))
        nn.init.normal_(self.up)
        nn.init.normal_(self.down, std=rank**-0.5)

    @classmethod
    def like(cls, table: nn.Module, rank: int) -> LowRankEmbedding:
        """Of a table's shape, device and dtype; the factors are not set."""
        weight = table.get_parameter("weight")
        where: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        count, width = weight.shape
        return cls(count, width, rank, cast(nn.Embedding, table).padding_idx, **where)

    @classmethod
    def from_dense(cls, table: nn.Module, rank: int, moment: Tensor | None = None) -> LowRankEmbedding:
        """The best approximation of a table of that rank: of all rows alike, or given a ``moment``, as they come."""
        weight = dense_weight(table).detach()
        if moment is None:
            return _set_factors(cls.like(table, rank), truncated_svd(weight, rank), table.training)
        down, up = fitted_factors(weight.T, moment, rank)
        return _set_factors(cls.like(table, rank), (up.T, down.T), table.training)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.up, self.padding_idx) @ self.down

    @property
    def weight(self) -> Tensor:
        """(V, d), the product of the factors, for code that reads a dense table."""
        return whole(self.up) @ whole(self.down)

    def merged(self) -> nn.Embedding:
        """The table that it equals."""
        table = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, _weight=self.weight.detach())
        return table.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"


def factor_class(dense: nn.Module) -> type[LowRankLinear] | type[LowRankEmbedding]:
    """What stands in for a dense module."""
    return LowRankEmbedding if isinstance(dense, nn.Embedding) else LowRankLinear


def dense_weight(module: nn.Module) -> Tensor:
    """(out, in) of an ``nn.Linear``, a ``Conv1D`` or their factors, or of an ``nn.Embedding`` its table."""
    weight = whole(cast(Tensor, module.weight))
    return weight.T if isinstance(module, Conv1D) else weight


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or gathered from its shards, as between two forward passes under FSDP2."""
    gather: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)  # of a DTensor
    return tensor if gather is None else gather()


Layer = TypeVar("Layer", LowRankLinear, LowRankEmbedding)


def _set_factors(layer: Layer, factors: tuple[Tensor, Tensor], training: bool) -> Layer:
    for parameter, factor in zip((layer.up, layer.down), factors, strict=True):
        parameter.data.copy_(factor)
    return layer.train(training)


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``up`` (m, r) and ``down`` (r, n) with the least ‖up · down − weight‖_F; each has the square root of Σ.

    Raises:
        ValueError: ``rank`` is not 1 up to the smaller side of ``weight``.
    """
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank is {rank}; it must be 1 to {min(weight.shape)} for a matrix of {tuple(weight.shape)}")
    u, s, vh = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]
