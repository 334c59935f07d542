"""Squared error of a low-rank projection in plain torch: the definition every kernel is held to."""

import torch.nn.functional as F
from torch import Tensor

from fastkd.reference.kl_div import _accumulation


def low_rank_mse_rows(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    valid: Tensor | None = None,
    weights: Tensor | None = None,
    all_rows: bool = False,
) -> tuple[Tensor, Tensor]:
    """Loss of every row (N,) and the projection (N, d_out), differentiable twice in ``x``, ``down``, ``up``, ``bias``.

    ``x`` is (N, d_in), ``down`` (r, d_in), ``up`` (d_out, r), ``target`` (N, d_out), ``valid`` (N,) bool and
    ``weights`` (N,). The products have the dtype of ``x``; errors are float64 for float64, else float32. Rows that do
    not count are kept out of the arithmetic, unless ``all_rows`` asks for their projection.
    """
    ignored = None
    if weights is not None:
        ignored = weights == 0
    if valid is not None:
        ignored = ~valid if ignored is None else ignored | ~valid
    if ignored is not None and not all_rows:
        x = x.masked_fill(ignored[:, None], 0.0)
    projection = F.linear(F.linear(x, down), up, None if bias is None else bias.to(x.dtype))
    error = _accumulation(projection) - _accumulation(target)
    if ignored is not None:
        error = error.masked_fill(ignored[:, None], 0.0)
    rows = error.square().mean(-1)
    return (rows if weights is None else rows * weights.to(rows.dtype)), projection
