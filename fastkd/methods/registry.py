"""The methods that an experiment can run, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from fastkd.methods.baselines import BASELINES
from fastkd.methods.baselines.theseus import successor
from fastkd.methods.baselines.training import BaselineConfig, BaselineTrainer
from fastkd.methods.makd import LEVELS, MaKDConfig, MaKDTrainer
from fastkd.methods.mixkd import MixKDConfig, MixKDTrainer
from fastkd.methods.mkd import MKDConfig, MKDTrainer
from fastkd.training.trainer import MultiTaskTrainer


@dataclass(frozen=True)
class Method:
    """How a student is trained.

    ``trainer`` is called as ``trainer(student, args, collate, train, validation, teacher=…, callbacks=…)``, ``args``
    being a ``config``. With ``uses_cached_logits`` the training rows carry the teacher's logits and ``teacher`` is
    None; otherwise it is a dict from task to model, which the trainer asks at every step. ``without_kd`` holds the
    fields of ``config`` that leave the labels alone to learn from. ``finish`` makes what is kept of a trained model.
    """

    title: str
    config: Callable[..., TrainingArguments]
    trainer: Callable[..., MultiTaskTrainer]
    uses_cached_logits: bool
    without_kd: Mapping[str, Any]
    finish: Callable[[PreTrainedModel], PreTrainedModel] = lambda model: model


def _baseline(name: str) -> Method:
    title = BASELINES[name].__name__
    config = partial(BaselineConfig, baseline=name)
    if name == "theseus":
        return Method(title, config, BaselineTrainer, False, {"options": {"rate": 1.0, "growth": 0.0}}, successor)
    return Method(title, config, BaselineTrainer, False, {"baseline": "kd", "options": {"alpha": 0.0}})


_MAKD_LABELS = {f"{part}_weight": float(part == "labels") for parts in LEVELS.values() for part in parts}
_MIXKD_LABELS = {"alpha_mle": 1.0, "alpha_sm": 0.0, "alpha_tmkd": 0.0, "alpha_kd": 0.0}
METHODS: dict[str, Method] = {
    "mkd": Method("MKD", MKDConfig, MKDTrainer, True, {"distillation_weight": 0.0, "hard_label_weight": 1.0}),
    "makd": Method("MaKD", MaKDConfig, MaKDTrainer, False, _MAKD_LABELS | {"stages": None}),
    **{name: _baseline(name) for name in BASELINES},
    "mixkd": Method("MixKD", MixKDConfig, MixKDTrainer, False, _MIXKD_LABELS),
}


def get_method(name: str) -> Method:
    """The method of that name; a ``ValueError`` that lists the names if there is none."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; the methods are {', '.join(METHODS)}")
    return METHODS[name]
