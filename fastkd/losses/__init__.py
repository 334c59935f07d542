"""Distillation losses to import into any training loop."""

from fastkd.losses.kl_div import KLDivLoss, KLDivStats, kl_div
from fastkd.losses.low_rank_mse import LowRankMSELoss, low_rank_mse
from fastkd.losses.mse import mse

__all__ = ["KLDivLoss", "KLDivStats", "LowRankMSELoss", "kl_div", "low_rank_mse", "mse"]
