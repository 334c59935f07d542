"""A trial of an objective on the models that it is to compare."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

import torch
from torch import nn

from fastkd.methods.feature_distillation import map_weights
from fastkd.methods.objective import Objective
from fastkd.training.classifiers import MultiTaskEncoder
from fastkd.training.taps import Features, Taps


@torch.no_grad()
def try_objective(objective: Objective, student: nn.Module, teachers: Mapping[str, MultiTaskEncoder]) -> None:
    """Compares the student with each task's teacher on a made-up text of two tokens, before any work is done.

    Raises:
        ValueError: what the first step of a stage would raise, as of layers that one of the models does not have.
    """
    for task, teacher in teachers.items():
        classes = teacher.config.tasks[task]["labels"]
        labels = torch.zeros(1, dtype=torch.long if classes else torch.float)
        for stage, _ in groupby(objective.at(percent / 100) for percent in range(101)):
            taught = _features(stage, teacher, task) if stage.needs_teacher else Features()
            stage(_features(stage, student, task), taught, labels, torch.ones(1, 2, dtype=torch.long))


def _features(objective: Objective, model: nn.Module, task: str) -> Features:
    taps = Taps(
        model,
        attention=objective.needs_attention,
        hidden=objective.needs_hidden,
        maps=objective.needs_maps,
    )
    ids = torch.zeros(1, 2, dtype=torch.long)
    with taps.record() as features:
        features.logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), task=task).logits
    taps.close()
    if objective.needs_weights:
        features.weights = map_weights(model)
    return features
