"""Every op in plain torch: the definition, the float64 oracle of the tests and the fallback."""

from fastkd.reference.kl_div import kl_div_rows, kl_div_stats

__all__ = ["kl_div_rows", "kl_div_stats"]
