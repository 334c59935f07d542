"""The one tolerance of this project: as exact as plain torch, from the same inputs and in the same dtype."""

import torch
from torch import Tensor

VALUE, GRADIENT = 2, 3
"""Times the error of plain torch that a result and a gradient may have: the factors of FlashAttention's own tests."""


def assert_close(actual: Tensor, exact: Tensor, plain: Tensor, factor: int = VALUE) -> None:
    """At most ``factor`` times the error of plain torch, plus two units in the last place.

    ``exact`` is the float64 reference, ``plain`` the same formula in plain torch in the dtype under test. The unit is
    that of the largest value in its dtype, and never less than a float32 unit of 1: the arithmetic is float32, on
    probabilities and logarithms of order 1 whose differences plain torch gets right to less only by luck. NaN and
    infinities must stand where the reference has them.
    """
    assert actual.shape == exact.shape
    assert torch.equal(actual.isnan(), exact.isnan()), "NaN in other places than in the reference"
    assert torch.equal(actual.isinf(), exact.isinf()), "infinities in other places than in the reference"
    finite = exact.isfinite()
    if not finite.any():
        return
    error = (actual.double() - exact)[finite].abs().max()
    unit = torch.finfo(actual.dtype).eps * exact[finite].abs().max()
    unit = unit.clamp(min=torch.finfo(torch.float32).eps)
    allowed = factor * (plain.double() - exact)[finite].nan_to_num(0.0).abs().max() + 2 * unit
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
