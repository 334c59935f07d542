"""Mean squared error of a low-rank projection, with the projection itself on request."""

from typing import Literal, overload

from torch import Tensor, nn

from fastkd import ops
from fastkd.losses import _checks
from fastkd.losses._checks import REDUCTIONS, Reduction


@overload
def low_rank_mse(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    weights: Tensor | None = ...,
    reduction: Reduction = ...,
    normalizer: float | Tensor | None = ...,
    return_output: Literal[False] = ...,
) -> Tensor: ...
@overload
def low_rank_mse(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    weights: Tensor | None = ...,
    reduction: Reduction = ...,
    normalizer: float | Tensor | None = ...,
    return_output: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def low_rank_mse(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    return_output: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Mean squared error of ``(x · downᵀ) · upᵀ + bias`` against a target, with no error matrix in memory.

    The loss of row i is wᵢ / d_out · Σⱼ (projectionᵢⱼ − targetᵢⱼ)². It is the output form of matrix distillation in
    MaKD (arXiv 2604.03110), as reconstructed: a factorised linear map of the student against the output of the
    teacher's map. The paper's own formula was not at hand, the row weights are a choice of this project.

    Args:
        x: (..., d_in), float32, bfloat16, float16 or float64. Rows may have any stride.
        down: (r, d_in), the first factor, of the dtype of ``x``.
        up: (d_out, r), the second factor, of the dtype of ``x``.
        target: (..., d_out); must not require grad. Of another dtype it is converted to that of ``x``.
        bias: (d_out,), added to the projection.
        mask: (...) bool, or numbers where 0 means: the row does not count.
        weights: (...) one factor wᵢ per row; a row of weight 0 contributes nothing, but is counted by ``"mean"``.
        reduction: ``"mean"`` divides the sum over the rows that the mask leaves by their number (not by the sum of
            the weights), ``"sum"`` does not divide, ``"none"`` returns the loss of every row (...).
        normalizer: a positive number or 0-d tensor that replaces the number of rows in ``"mean"``: the global count
            under gradient accumulation or data parallelism, or ``weights.sum()`` for a weighted mean.
        return_output: also return the projection (..., d_out) in the dtype of ``x``, of all rows, masked or not. Both
            results may take part in further computation.

    Returns:
        The loss, float32 (float64 for float64 ``x``), or (loss, projection).

    ``x``, ``down``, ``up`` and ``bias`` get gradients where they require them; what is frozen costs nothing. The
    products take operands in the dtype of ``x`` and sum in float32; errors, losses and the sums of the factors'
    gradients over blocks of rows are float32. Under autocast ``x`` and the factors are cast as for a linear layer.
    Masked rows stay out of the arithmetic: a NaN in one of them goes nowhere, unless ``return_output`` asks for its
    projection. Nothing valid, or no rows at all: loss 0, with zero gradients attached. A scalar loss computes its
    gradients in the forward pass; ``reduction="none"`` and ``return_output`` compute them in the backward pass. The
    fused backends raise on a second derivative; float64 takes the plain torch path, which has one.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it must be.
    """
    _checks.tensors(x=x, down=down, up=up, target=target, **_checks.given(bias=bias))
    _checks.reduction(reduction, normalizer)
    _check_shapes(x, down, up, target, bias)
    _checks.frozen("target", target)
    valid = _checks.row_mask(mask, "x", x)
    weights = None if weights is None else _checks.row_values("weights", weights, "x", x)
    rows = x.shape[:-1]
    x, down, up = _checks.autocast(x, down, up)
    _check_dtypes(x, down, up)
    d_out = up.shape[0]
    loss, output = ops.low_rank_mse(
        _checks.as_rows(x),
        down,
        up,
        _checks.as_rows(target.to(x.dtype)),
        bias=bias,
        valid=valid,
        weights=weights,
        reduction=REDUCTIONS.index(reduction),
        normalizer=normalizer,
        need_output=return_output,
    )
    if reduction == "none":
        loss = loss.reshape(rows)
    return (loss, output.reshape(*rows, d_out)) if return_output else loss


class LowRankMSELoss(nn.Module):
    """:func:`low_rank_mse` as a module: the reduction at construction, tensors at the call; returns the loss alone."""

    def __init__(self, *, reduction: Reduction = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(
        self,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        target: Tensor,
        *,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return low_rank_mse(
            x, down, up, target, bias=bias, mask=mask, weights=weights, reduction=self.reduction, normalizer=normalizer
        )

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


def _check_shapes(x: Tensor, down: Tensor, up: Tensor, target: Tensor, bias: Tensor | None) -> None:
    _checks.columns("x", x, "d_in")
    if down.dim() != 2 or down.shape[1] != x.shape[-1] or down.shape[0] < 1:
        raise ValueError(
            f"down has shape {tuple(down.shape)}; it must be (r, d_in) with r >= 1 and d_in = {x.shape[-1]} as in x"
        )
    if up.dim() != 2 or up.shape[1] != down.shape[0] or up.shape[0] < 1:
        raise ValueError(
            f"up has shape {tuple(up.shape)}; it must be (d_out, r) with d_out >= 1 and r = {down.shape[0]} as in down"
        )
    expected = (*x.shape[:-1], up.shape[0])
    if tuple(target.shape) != expected:
        raise ValueError(f"target has shape {tuple(target.shape)}; it must be (..., d_out) = {expected}")
    if bias is not None and bias.shape != up.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be (d_out,) = {tuple(up.shape[:1])}")


def _check_dtypes(x: Tensor, down: Tensor, up: Tensor) -> None:
    for name, factor in (("down", down), ("up", up)):
        if factor.dtype != x.dtype:
            raise TypeError(f"{name} is {factor.dtype}, but x is {x.dtype}: they must be equal outside autocast")
