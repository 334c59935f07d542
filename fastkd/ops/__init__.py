"""The ops: schema, fake, autograd and choice of backend of each in the file of its name."""

from fastkd.ops.kl_div import kl_div
from fastkd.ops.low_rank_mse import low_rank_mse
from fastkd.ops.mse import mse

__all__ = ["kl_div", "low_rank_mse", "mse"]
