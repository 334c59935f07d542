"""Spans from the logits of windows, and SQuAD's exact match and F1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastkd.data.squad_windows import CHAR_ENDS, CHAR_STARTS

if TYPE_CHECKING:
    from datasets import Dataset

Array = npt.NDArray[Any]

_NOT_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Spans(NamedTuple):
    """Each question's best answer, and how much better it would be to give none."""

    texts: list[str]
    """Empty where no window has a span to give."""
    null_differences: Array
    """(questions,) float64: the score of no answer minus that of the text; a score is a sum of two logits."""


def best_spans(
    start_logits: npt.ArrayLike,
    end_logits: npt.ArrayLike,
    windows: Dataset,
    questions: Dataset,
    *,
    n_best: int = 20,
    max_answer_length: int = 30,
) -> Spans:
    """The best span of every question over all its windows.

    A span begins at one of the ``n_best`` best starts in a window's part of the context, ends at one of the ``n_best``
    best ends there and has at most ``max_answer_length`` tokens; its score is the sum of the two logits, and the
    earliest of equals wins. The score of no answer is that of the [CLS] token in the window where it is lowest, as in
    BERT's script for SQuAD 2.0.

    Args:
        start_logits, end_logits: (windows, width), at least as wide as the longest window; what lies beyond a window's
            tokens is not read.
        windows: of ``encode_squad``, all of ``questions``.

    Raises:
        ValueError: shapes that do not match.
        FloatingPointError: logits that are NaN.
    """
    starts, ends = np.asarray(start_logits, np.float32), np.asarray(end_logits, np.float32)
    width = max(windows["length"][:])
    if starts.shape != ends.shape or starts.ndim != 2 or len(starts) != len(windows) or starts.shape[1] < width:
        raise ValueError(
            f"start_logits and end_logits have shapes {starts.shape} and {ends.shape}; "
            f"both must be ({len(windows)}, at least {width})"
        )
    if np.isnan(starts).any() or np.isnan(ends).any():
        raise FloatingPointError("start_logits or end_logits hold NaN; the model has diverged")
    char_starts, char_ends = (_padded(windows[name][:], starts.shape[1]) for name in (CHAR_STARTS, CHAR_ENDS))
    outside = char_starts < 0
    scores, first, last = _best_pairs(
        np.where(outside, -np.inf, starts), np.where(outside, -np.inf, ends), n_best, max_answer_length
    )
    of = windows["question"][:]
    null = np.full(len(questions), np.inf)
    np.minimum.at(null, of, starts[:, 0] + ends[:, 0])
    texts, best, contexts = [""] * len(questions), np.full(len(questions), -np.inf), questions["context"][:]
    for window, question in enumerate(of):
        if scores[window] > best[question]:
            best[question] = scores[window]
            begin, end = char_starts[window, first[window]], char_ends[window, last[window]]
            texts[question] = contexts[question][begin:end]
    return Spans(texts, null - best)


def _padded(rows: Sequence[Sequence[int]], width: int) -> Array:
    padded = np.full((len(rows), width), -1, np.int32)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded


def _best_pairs(starts: Array, ends: Array, n_best: int, longest: int) -> tuple[Array, Array, Array]:
    """Of every row the best score of a start and an end, −inf if there is none, and the two positions."""
    n_best = min(n_best, starts.shape[1])
    first, last = (np.sort(np.argpartition(-x, n_best - 1, axis=1)[:, :n_best], axis=1) for x in (starts, ends))
    lengths = last[:, None, :] - first[:, :, None] + 1
    scores = np.take_along_axis(starts, first, 1)[:, :, None] + np.take_along_axis(ends, last, 1)[:, None, :]
    scores = np.where((lengths >= 1) & (lengths <= longest), scores, -np.inf).reshape(len(starts), -1)
    best, rows = scores.argmax(1), np.arange(len(starts))
    return scores[rows, best], first[rows, best // n_best], last[rows, best % n_best]


def squad_metrics(
    spans: Spans, answers: Sequence[Mapping[str, Any]], *, null_threshold: float = 0.0
) -> dict[str, float]:
    """Exact match and F1, from 0 to 100, after the official normalisation, each the best over a question's answers.

    Where a question of the set has no answer (SQuAD 2.0), the prediction is none if the null difference is above
    ``null_threshold``, and ``f1_best`` is the F1 at ``f1_best_threshold``, the threshold that makes it largest on these
    very predictions: an upper bound. Otherwise every question is answered.

    Args:
        answers: the column of that name of the questions.
    """
    golds = [answer["text"] for answer in answers]
    exact, f1 = _scores(spans.texts, golds)
    if all(golds):
        return {"exact_match": 100 * float(exact.mean()), "f1": 100 * float(f1.mean())}
    null_exact, null_f1 = _scores([""] * len(golds), golds)
    is_null = spans.null_differences > null_threshold
    threshold, best = best_threshold(spans.null_differences, f1, null_f1)
    return {
        "exact_match": 100 * float(np.where(is_null, null_exact, exact).mean()),
        "f1": 100 * float(np.where(is_null, null_f1, f1).mean()),
        "f1_best": 100 * best,
        "f1_best_threshold": threshold,
    }


def best_threshold(null_differences: Array, scores: Array, null_scores: Array) -> tuple[float, float]:
    """The lowest threshold of the null difference with the largest mean score, and that mean.

    A question whose difference is above the threshold scores ``null_scores``, another one ``scores``; all (questions,).
    The threshold is one of the differences, or just below them all.
    """
    order = np.argsort(null_differences, kind="stable")
    differences = np.asarray(null_differences, np.float64)[order]
    gains = np.cumsum((np.asarray(scores, np.float64) - null_scores)[order])
    last_of_equals = np.append(differences[1:] > differences[:-1], True) & np.isfinite(differences)
    thresholds = np.append(np.nextafter(differences[0], -np.inf), differences[last_of_equals])
    means = (np.sum(null_scores) + np.append(0.0, gains[last_of_equals])) / len(order)
    best = int(means.argmax())
    return float(thresholds[best]), float(means[best])


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and surplus white space: the rule of the official script."""
    without_punctuation = text.lower().translate(_NOT_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", without_punctuation).split())


def _scores(texts: Sequence[str], golds: Sequence[Sequence[str]]) -> tuple[Array, Array]:
    """Exact match and F1 of each text, the best over its answers; none, or empty ones, are the empty answer."""
    exact, f1 = np.zeros(len(texts)), np.zeros(len(texts))
    for index, (text, answers) in enumerate(zip(texts, golds, strict=True)):
        prediction = normalize_answer(text)
        accepted = {normal for answer in answers if (normal := normalize_answer(answer))} or {""}
        exact[index] = prediction in accepted
        f1[index] = max(_f1(prediction, answer) for answer in accepted)
    return exact, f1


def _f1(prediction: str, answer: str) -> float:
    """F1 of the words, counted as often as they occur; of empty texts 1 if both are."""
    predicted, gold = prediction.split(), answer.split()
    if not predicted or not gold:
        return float(predicted == gold)
    common = sum((Counter(predicted) & Counter(gold)).values())
    return 2 * common / (len(predicted) + len(gold))
