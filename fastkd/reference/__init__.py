"""Every op in plain torch: the definition, the float64 oracle of the tests and the fallback."""

from fastkd.reference.embedding_mixup import embedding_mixup
from fastkd.reference.kl_div import kl_div_rows, kl_div_stats
from fastkd.reference.linear_kl_div import linear_kl_div_rows
from fastkd.reference.mixup import mixup

__all__ = ["embedding_mixup", "kl_div_rows", "kl_div_stats", "linear_kl_div_rows", "mixup"]
