"""The tolerance of the tests, which is also that of the benchmarks."""

from fastkd.reference.tolerance import GRADIENT, VALUE, assert_close

__all__ = ["GRADIENT", "VALUE", "assert_close"]
