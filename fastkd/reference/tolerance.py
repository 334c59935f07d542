"""The one tolerance of this project: as exact as plain torch, from the same inputs and in the same dtype."""

import torch
from torch import Tensor

VALUE, GRADIENT = 2, 3
"""Times the error of plain torch that a result and a gradient may have: the factors of FlashAttention's own tests."""


def assert_close(actual: Tensor, exact: Tensor, plain: Tensor, factor: int = VALUE) -> None:
    """At most ``factor`` times the error of plain torch, plus two units in the last place.

    ``exact`` is the float64 reference, ``plain`` the same formula in plain torch in the dtype under test, all three of
    one shape. The error is the largest of the tensor. The unit is that of the largest value in the dtype of ``actual``,
    and never less than a float32 unit of 1: the arithmetic is float32, on probabilities and logarithms of order 1
    whose differences plain torch gets right to less only by luck. NaN and infinities must stand where the reference
    has them. Raises ``AssertionError`` with the error and what is allowed.
    """
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)} instead of {tuple(exact.shape)}"
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(actual), kind(exact)), f"{kind.__name__} elsewhere than in the reference"
    finite = exact.isfinite()
    if not finite.any():
        return
    largest = exact.masked_fill(~finite, 0.0).abs_().max().item()
    unit = max(torch.finfo(actual.dtype).eps * largest, torch.finfo(torch.float32).eps)
    error, allowed = _largest_error(actual, exact, finite), factor * _largest_error(plain, exact, finite) + 2 * unit
    assert error <= allowed, f"off by {error:.3g}, at most {allowed:.3g} is allowed"


def _largest_error(result: Tensor, exact: Tensor, finite: Tensor) -> float:
    """Where plain torch itself has NaN or an infinity it excuses nothing."""
    error = torch.sub(exact, result).masked_fill_(~finite, 0.0).nan_to_num_(0.0, 0.0, 0.0)
    return error.abs_().max().item()
