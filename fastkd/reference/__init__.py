"""Every op in plain torch: the definition, the float64 oracle of the tests and the fallback."""

from fastkd.reference.kl_div import kl_div_rows, kl_div_stats
from fastkd.reference.low_rank_mse import low_rank_mse_rows
from fastkd.reference.mse import mse_rows

__all__ = ["kl_div_rows", "kl_div_stats", "low_rank_mse_rows", "mse_rows"]
