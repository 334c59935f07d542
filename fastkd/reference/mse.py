"""Mean squared error in plain torch: the definition every kernel is held to."""

from torch import Tensor

from fastkd.reference.kl_div import _accumulation


def mse_rows(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Mean square of the error of every row, (N,) from two (N, d), twice differentiable; float64 for float64."""
    error = _accumulation(student) - _accumulation(teacher)
    if valid is not None:
        error = error.masked_fill(~valid[:, None], 0.0)
    return error.square().mean(-1)
