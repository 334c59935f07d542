"""Distillation losses to import into any training loop."""

from fastkd.losses.kl_div import KLDivLoss, KLDivStats, kl_div
from fastkd.losses.linear_kl_div import LinearKLDivLoss, linear_kl_div

__all__ = ["KLDivLoss", "KLDivStats", "LinearKLDivLoss", "kl_div", "linear_kl_div"]
