"""fastkd: distil language models with fused kernels.

``import fastkd`` is cheap: it loads neither torch nor transformers until a name is used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "attention_kl_div": "fastkd.losses",
    "AttentionKLDivLoss": "fastkd.losses",
    "kl_div": "fastkd.losses",
    "KLDivLoss": "fastkd.losses",
    "linear_kl_div": "fastkd.losses",
    "LinearKLDivLoss": "fastkd.losses",
    "linear_topk_kl_div": "fastkd.losses",
    "LinearTopkKLDivLoss": "fastkd.losses",
    "topk_kl_div": "fastkd.losses",
    "TopkKLDivLoss": "fastkd.losses",
    "EmbeddingMixer": "fastkd.mixing",
    "MixupSampler": "fastkd.mixup",
    "mix_batch": "fastkd.mixup",
    "BiAttentiveLSTMConfig": "fastkd.students",
    "BiAttentiveLSTM": "fastkd.students",
    "factorize": "fastkd.students",
    "merge": "fastkd.students",
    "plan_factorization": "fastkd.students",
    "DistillationTrainer": "fastkd.training.distillation",
    "MaKDConfig": "fastkd.methods.makd",
    "MaKDObjective": "fastkd.methods.makd",
    "MaKDTrainer": "fastkd.methods.makd",
    "MixKDConfig": "fastkd.methods.mixkd",
    "MixKDObjective": "fastkd.methods.mixkd",
    "MixKDTrainer": "fastkd.methods.mixkd",
    "MKDConfig": "fastkd.methods.mkd",
    "MKDObjective": "fastkd.methods.mkd",
    "MKDTrainer": "fastkd.methods.mkd",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastkd' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
