"""Metrics against values worked out by hand from their definitions."""

import math

import numpy as np
import pytest

from fastkd.data.glue import GLUE
from fastkd.data.metrics import main_score, majority_score, task_metrics
from fastkd.data.task import UNLABELLED

# predictions 1 1 1 0 0 0 against 1 1 0 1 0 0: tp 2, fp 1, fn 1, tn 2
LOGITS = np.array([[0.0, 1], [-1, 3], [2, 5], [1, 0], [4, -4], [0.5, 0.25]])
LABELS = np.array([1, 1, 0, 1, 0, 0])


def test_classification():
    expected = {
        "accuracy": 4 / 6,
        "f1": 2 * 2 / (2 * 2 + 1 + 1),
        "matthews": (2 * 2 - 1 * 1) / math.sqrt(3 * 3 * 3 * 3),
    }
    for name in ("cola", "sst2", "mrpc", "qqp", "rte", "wnli", "qnli"):
        metrics = task_metrics(GLUE[name], LOGITS, LABELS)
        assert metrics == pytest.approx({metric: expected[metric] for metric in GLUE[name].metrics})


def test_f1_is_of_the_second_class():
    logits = np.eye(2)[[1, 0, 0, 0, 0]]
    metrics = task_metrics(GLUE["mrpc"], logits, np.array([1, 1, 0, 0, 0]))
    assert metrics == pytest.approx({"accuracy": 0.8, "f1": 2 / 3})


def test_three_classes():
    logits = np.array([[3.0, 2, 1], [0, 1, 2], [0, 2, 1], [1, 0, 0]])
    assert task_metrics(GLUE["mnli"], logits, np.array([0, 2, 0, 0])) == {"accuracy": 0.75}


def test_correlations():
    # deviations from the means: (-2, -1, 0, 3) and (-1, -2, 1, 2); ranks (1, 2, 3, 4) and (2, 1, 3, 4)
    predictions, labels = np.array([0.0, 1, 2, 5]), np.array([2.0, 1, 4, 5])
    expected = {"pearson": 10 / math.sqrt(14 * 10), "spearman": 1 - 6 * 2 / (4 * 15)}
    for logits in (predictions, predictions[:, None]):
        assert task_metrics(GLUE["stsb"], logits, labels) == pytest.approx(expected)


def test_undefined_metrics_are_zero():
    constant = np.tile([1.0, 0.0], (6, 1))
    assert task_metrics(GLUE["cola"], constant, LABELS) == {"matthews": 0.0}
    assert task_metrics(GLUE["mrpc"], constant, LABELS) == {"accuracy": 0.5, "f1": 0.0}
    scores = np.arange(6.0)
    for predictions, labels in ((np.ones(6), scores), (scores, np.ones(6)), (np.ones(1), np.ones(1))):
        assert task_metrics(GLUE["stsb"], predictions, labels) == {"pearson": 0.0, "spearman": 0.0}


def test_main_score_is_the_mean_in_percent():
    assert main_score(GLUE["mrpc"], {"accuracy": 0.8, "f1": 0.9, "loss": 3.0}) == pytest.approx(85.0)
    assert main_score(GLUE["cola"], {"matthews": -0.1}) == pytest.approx(-10.0)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (
            np.zeros((6, 3)),
            LABELS,
            r"sst2: logits have shape \(6, 3\) and labels \(6,\); they must be \(rows, 2\)",
        ),
        (np.zeros((5, 2)), LABELS, "logits have shape"),
        (np.zeros((0, 2)), LABELS[:0], "at least one row"),
    ],
)
def test_bad_input(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        task_metrics(GLUE["sst2"], logits, labels)


def test_a_model_that_has_diverged():
    with pytest.raises(FloatingPointError, match="sst2: logits hold NaN or infinity"):
        task_metrics(GLUE["sst2"], np.full((6, 2), np.nan), LABELS)


def test_the_most_frequent_class_is_that_of_the_rows_with_labels():
    seen = [UNLABELLED] * 5 + [0, 1, 1]
    assert majority_score(GLUE["sst2"], seen, [1, 0, 0, 0]) == 25.0
    assert majority_score(GLUE["mrpc"], seen, [1, 0, 0, 0]) == pytest.approx(100 * (0.25 + 0.4) / 2)
    assert majority_score(GLUE["stsb"], [2.5, 2.5], [2.5, 3.0]) == 0.0
