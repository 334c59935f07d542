"""The ops: schema, fake, autograd and choice of backend of each in the file of its name."""

from fastkd.ops.attention_kl_div import attention_kl_div
from fastkd.ops.bilstm import bilstm
from fastkd.ops.embedding_mixup import embedding_mixup
from fastkd.ops.kl_div import kl_div
from fastkd.ops.linear_kl_div import linear_kl_div
from fastkd.ops.linear_topk_kl_div import linear_topk_kl_div
from fastkd.ops.low_rank_mse import low_rank_mse
from fastkd.ops.mixup import mixup
from fastkd.ops.mse import mse
from fastkd.ops.topk_kl_div import topk_kl_div

__all__ = [
    "attention_kl_div",
    "bilstm",
    "embedding_mixup",
    "kl_div",
    "linear_kl_div",
    "linear_topk_kl_div",
    "low_rank_mse",
    "mixup",
    "mse",
    "topk_kl_div",
]
