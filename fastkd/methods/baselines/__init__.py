"""What the methods are compared with, by the names of the command line."""

from __future__ import annotations

from collections.abc import Callable

from fastkd.methods.baselines.distilbert import DistilBERT
from fastkd.methods.baselines.in_turn import InTurn
from fastkd.methods.baselines.kd import KD
from fastkd.methods.baselines.minilm import MiniLM, MiniLMv2
from fastkd.methods.baselines.pkd import PKD
from fastkd.methods.baselines.sequence import JSD, MiniLLM, ReverseKL
from fastkd.methods.baselines.theseus import ReplacementRate, Theseus
from fastkd.methods.baselines.tinybert import TinyBERT
from fastkd.methods.objective import Objective

BASELINES: dict[str, Callable[..., Objective]] = {
    "kd": KD,
    "pkd": PKD,
    "distilbert": DistilBERT,
    "tinybert": TinyBERT,
    "minilm": MiniLM,
    "minilmv2": MiniLMv2,
    "theseus": Theseus,
    "reverse-kl": ReverseKL,
    "jsd": JSD,
    "minillm": MiniLLM,
}

__all__ = [
    "BASELINES",
    "JSD",
    "KD",
    "PKD",
    "DistilBERT",
    "InTurn",
    "MiniLLM",
    "MiniLM",
    "MiniLMv2",
    "ReplacementRate",
    "ReverseKL",
    "Theseus",
    "TinyBERT",
]
