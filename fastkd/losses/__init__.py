"""Distillation losses to import into any training loop."""

from fastkd.losses.attention_kl_div import AttentionKLDivLoss, attention_kl_div
from fastkd.losses.embedding_mixup import embedding_mixup
from fastkd.losses.kl_div import KLDivLoss, KLDivStats, kl_div
from fastkd.losses.linear_kl_div import LinearKLDivLoss, linear_kl_div
from fastkd.losses.linear_topk_kl_div import LinearTopkKLDivLoss, linear_topk_kl_div
from fastkd.losses.low_rank_mse import LowRankMSELoss, low_rank_mse
from fastkd.losses.mixup import mixup, mixup_cross_entropy
from fastkd.losses.mse import mse
from fastkd.losses.topk_kl_div import TopkKLDivLoss, topk_kl_div

__all__ = [
    "AttentionKLDivLoss",
    "KLDivLoss",
    "KLDivStats",
    "LinearKLDivLoss",
    "LinearTopkKLDivLoss",
    "LowRankMSELoss",
    "TopkKLDivLoss",
    "attention_kl_div",
    "embedding_mixup",
    "kl_div",
    "linear_kl_div",
    "linear_topk_kl_div",
    "low_rank_mse",
    "mixup",
    "mixup_cross_entropy",
    "mse",
    "topk_kl_div",
]
