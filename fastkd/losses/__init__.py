"""Distillation losses to import into any training loop."""

from fastkd.losses.embedding_mixup import embedding_mixup
from fastkd.losses.kl_div import KLDivLoss, KLDivStats, kl_div
from fastkd.losses.linear_kl_div import LinearKLDivLoss, linear_kl_div
from fastkd.losses.mixup import mixup, mixup_cross_entropy

__all__ = [
    "KLDivLoss",
    "KLDivStats",
    "LinearKLDivLoss",
    "embedding_mixup",
    "kl_div",
    "linear_kl_div",
    "mixup",
    "mixup_cross_entropy",
]
