"""Training students of sequence classification by the baselines."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from fastkd.methods.baselines import BASELINES, KD, InTurn, MiniLM, MiniLMv2, ReplacementRate, Theseus, TinyBERT
from fastkd.methods.feature_distillation import FeatureDistillationTrainer
from fastkd.methods.objective import Objective

LABELS = KD(alpha=0.0)


@dataclass
class BaselineConfig(TrainingArguments):
    """``TrainingArguments`` and a baseline with its options, which its class documents.

    TinyBERT's prediction, and for MiniLM and MiniLMv2 the labels, follow in a second part of the training. Defaults
    that differ from ``TrainingArguments``: batches of 32 rows of similar length, a choice of this project.
    """

    per_device_train_batch_size: int = field(default=32, metadata={"help": "Rows per device and step."})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "group_by_length puts rows of similar length together."}
    )
    baseline: str = field(default="kd", metadata={"help": "Name of the baseline, see docs/baselines.md."})
    options: dict[str, Any] | None = field(default=None, metadata={"help": "Options of its class."})
    switch: float = field(default=0.5, metadata={"help": "Where the second part of the training begins, if any."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.objective()  # refuses bad options before any work

    def objective(self) -> Objective:
        if self.baseline not in BASELINES:
            raise ValueError(f"baseline must be one of {', '.join(BASELINES)}, got {self.baseline!r}")
        try:
            own = BASELINES[self.baseline](**(self.options or {}))
        except TypeError as error:
            raise ValueError(f"options of {self.baseline}: {error}") from error
        if isinstance(own, TinyBERT):
            return InTurn(own, replace(own, stage="prediction"), self.switch)
        return InTurn(own, LABELS, self.switch) if isinstance(own, MiniLM | MiniLMv2) else own


class BaselineTrainer(FeatureDistillationTrainer):
    """Trains a student by the baseline of its arguments; one of BERT-of-Theseus is a model that ``theseus`` made.

    Args:
        model: the student.
        args: a :class:`BaselineConfig`.
        teacher: a model with a head per task, or a dict from task to model.
        **kwargs: of ``FeatureDistillationTrainer``.
    """

    args: BaselineConfig

    def __init__(self, model: PreTrainedModel, args: BaselineConfig, *rest: Any, **kwargs: Any) -> None:
        objective = args.objective()
        super().__init__(model, args, *rest, objective=objective, **kwargs)
        if isinstance(objective, Theseus):
            self.add_callback(ReplacementRate(objective))
