"""What a task is."""

from __future__ import annotations

from dataclasses import dataclass

UNLABELLED = -1
"""The class of a row without a label, as in ``datasets``; the score of one is NaN."""


@dataclass(frozen=True)
class Task:
    """A sentence or sentence-pair task.

    ``columns`` are the one or two text columns; ``label_names`` in the order of the model's outputs, empty
    for a regression; ``metrics`` those that ``fastkd.data.metrics`` reports, whose mean is the task's
    score.
    """

    name: str
    columns: tuple[str, ...]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]

    @property
    def is_regression(self) -> bool:
        return not self.label_names

    @property
    def num_labels(self) -> int:
        """Number of model outputs: the number of classes, or 1 for a regression."""
        return len(self.label_names) or 1


def custom_task(name: str, columns: tuple[str, ...], label_names: tuple[str, ...]) -> Task:
    """A task of the user's own, scored by accuracy, or as a regression by Pearson and Spearman correlation."""
    return Task(name, columns, label_names, ("accuracy",) if label_names else ("pearson", "spearman"))
