"""The official metrics of the GLUE tasks, which are those of others too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastkd.data.task import UNLABELLED

if TYPE_CHECKING:
    from fastkd.data.task import Task

Array = npt.NDArray[Any]


def task_metrics(task: Task, logits: npt.ArrayLike, labels: npt.ArrayLike) -> dict[str, float]:
    """The task's metrics as fractions (correlations in -1..1).

    F1 is that of the second class (``equivalent``, ``duplicate``). What the formulas leave undefined counts
    as 0: F1 when that class is neither predicted nor present, a correlation with constant predictions or
    labels.

    Args:
        logits: (rows, ``task.num_labels``), any real dtype; a regression may also give (rows,).
        labels: (rows,), class numbers, or scores of a regression.

    Raises:
        ValueError: no rows, or shapes that do not match.
        FloatingPointError: logits that are not finite.
    """
    scores = np.asarray(logits, dtype=np.float64)
    targets = np.asarray(labels)
    if task.is_regression and scores.ndim == 1:
        scores = scores[:, None]
    if targets.ndim != 1 or len(targets) == 0 or scores.shape != (len(targets), task.num_labels):
        raise ValueError(
            f"{task.name}: logits have shape {scores.shape} and labels {targets.shape}; "
            f"they must be (rows, {task.num_labels}) and (rows,), with at least one row"
        )
    if not np.isfinite(scores).all():
        raise FloatingPointError(f"{task.name}: logits hold NaN or infinity; the model has diverged")
    predictions = scores[:, 0] if task.is_regression else scores.argmax(axis=1)
    return {name: METRICS[name](predictions, targets) for name in task.metrics}


def main_score(task: Task, metrics: Mapping[str, float]) -> float:
    """The task's score as GLUE reports it: the mean of its metrics, times 100."""
    return 100.0 * sum(metrics[name] for name in task.metrics) / len(task.metrics)


def majority_score(task: Task, seen: Iterable[int], labels: npt.ArrayLike) -> float:
    """``main_score`` on ``labels`` of answering every row with the most frequent class of ``seen``.

    Unlabelled rows of ``seen`` do not count. A regression has 0: so counts a correlation with one and the same answer.
    """
    if task.is_regression:
        return 0.0
    most = Counter(label for label in seen if label != UNLABELLED).most_common(1)[0][0]
    targets = np.asarray(labels)
    answers = np.zeros((len(targets), task.num_labels))
    answers[:, most] = 1
    return main_score(task, task_metrics(task, answers, targets))


def _accuracy(predictions: Array, labels: Array) -> float:
    return float((predictions == labels).mean())


def _f1(predictions: Array, labels: Array) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, zero_division=0.0))


def _matthews(predictions: Array, labels: Array) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def _pearson(predictions: Array, labels: Array) -> float:
    from scipy.stats import pearsonr

    return 0.0 if _constant(predictions, labels) else float(pearsonr(predictions, labels).statistic)


def _spearman(predictions: Array, labels: Array) -> float:
    from scipy.stats import spearmanr

    return 0.0 if _constant(predictions, labels) else float(spearmanr(predictions, labels).statistic)


def _constant(*arrays: Array) -> bool:
    return any(np.ptp(array) == 0 for array in arrays)


METRICS = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}
