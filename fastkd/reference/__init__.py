"""Every op in plain torch: the definition, the float64 oracle of the tests and the fallback."""

from fastkd.reference.attention_kl_div import attention_kl_div_rows
from fastkd.reference.bilstm import bilstm
from fastkd.reference.embedding_mixup import embedding_mixup
from fastkd.reference.kl_div import kl_div_rows, kl_div_stats
from fastkd.reference.linear_kl_div import linear_kl_div_rows
from fastkd.reference.linear_topk_kl_div import linear_topk_kl_div_rows
from fastkd.reference.low_rank_mse import low_rank_mse_rows
from fastkd.reference.mixup import mixup
from fastkd.reference.mse import mse_rows
from fastkd.reference.topk_kl_div import topk_kl_div_rows

__all__ = [
    "attention_kl_div_rows",
    "bilstm",
    "embedding_mixup",
    "kl_div_rows",
    "kl_div_stats",
    "linear_kl_div_rows",
    "linear_topk_kl_div_rows",
    "low_rank_mse_rows",
    "mixup",
    "mse_rows",
    "topk_kl_div_rows",
]
