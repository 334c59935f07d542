"""Distillation losses to import into any training loop."""

from fastkd.losses.kl_div import KLDivLoss, KLDivStats, kl_div

__all__ = ["KLDivLoss", "KLDivStats", "kl_div"]
