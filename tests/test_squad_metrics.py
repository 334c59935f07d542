"""SQuAD's metrics: the official rule by hand, spans from logits against a plain search, the best threshold."""

import itertools

import numpy as np
import pytest
from datasets import Dataset

from fastkd.data.squad_metrics import Spans, best_spans, best_threshold, normalize_answer, squad_metrics

CONTEXT = "zero one two three four five six seven eight nine"
WORDS = CONTEXT.split()
WIDTH = 9


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Broncos", "broncos"),
        ("an  apple,\ta pear\nand the rest", "apple pear and rest"),
        ("U.S.", "us"),
        ("“$5.50”", "“550”"),
        ("Theatre", "theatre"),
        ("the-end", "theend"),
        ("A", ""),
    ],
)
def test_normalisation(text, normal):
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("the Denver Broncos!", ["Denver Broncos"], 100, 100),
        ("Broncos", ["Denver Broncos"], 0, 200 / 3),
        ("Broncos", ["Denver Broncos", "The Broncos"], 100, 100),
        ("one one two", ["one two two"], 0, 200 / 3),
        ("three", ["four"], 0, 0),
        ("", ["four"], 0, 0),
        ("a", ["the"], 100, 100),
        ("four", ["the", "Four"], 100, 100),
    ],
)
def test_exact_match_and_f1(prediction, answers, exact, f1):
    spans = Spans([prediction], np.array([5.0]))
    assert squad_metrics(spans, [{"text": answers}]) == pytest.approx({"exact_match": exact, "f1": f1})


def test_unanswerable_questions_follow_the_threshold():
    spans = Spans(["one", "one", "two", "one two"], np.array([-1.0, 1.0, 2.0, -2.0]))
    answers = [{"text": gold} for gold in (["one"], ["one"], [], ["two"])]
    found = squad_metrics(spans, answers)
    assert found == pytest.approx(
        {"exact_match": 50, "f1": 100 * (1 + 0 + 1 + 2 / 3) / 4, "f1_best": 100 * 11 / 12, "f1_best_threshold": 1.0}
    )
    again = squad_metrics(spans, answers, null_threshold=found["f1_best_threshold"])
    assert again["f1"] == pytest.approx(found["f1_best"])
    never = squad_metrics(spans, answers, null_threshold=9.0)
    assert never["exact_match"] == 50


@pytest.mark.parametrize("seed", range(20))
def test_the_best_threshold_is_the_best_of_all(seed):
    draw = np.random.default_rng(seed)
    differences = draw.integers(-3, 4, 12).astype(float)  # with equals
    differences[draw.random(12) < 0.1] = np.inf  # a question without a span to give
    scores, null_scores = draw.random(12), draw.integers(0, 2, 12).astype(float)
    means = {t: np.where(differences > t, null_scores, scores).mean() for t in np.arange(-4.5, 5, 0.5)}
    threshold, best = best_threshold(differences, scores, null_scores)
    assert best == pytest.approx(max(means.values()))
    assert np.where(differences > threshold, null_scores, scores).mean() == pytest.approx(best)


def windows_of(*spans):
    """Windows over words [first, last) of the context, after a [CLS], a question of one token and a [SEP]."""
    starts = np.cumsum([0, *(len(word) + 1 for word in WORDS[:-1])])
    rows = []
    for question, first, last in spans:
        begin = [int(start) for start in starts[first:last]]
        ends = [start + len(word) for start, word in zip(begin, WORDS[first:last], strict=True)]
        rows.append({
            "question": question, "char_starts": [-1] * 3 + begin + [-1], "char_ends": [-1] * 3 + ends + [-1],
            "length": last - first + 4,
        })  # fmt: skip
    return Dataset.from_list(rows)


LAYOUT = ((1, 0, 4), (0, 0, 5), (1, 2, 6), (1, 5, 10), (0, 5, 8))
QUESTIONS = Dataset.from_dict({"context": [CONTEXT, CONTEXT]})


def plain_search(start, end, n_best, longest):
    """The texts and null differences, by trying every pair of every window."""
    texts, null, best = ["", ""], [np.inf, np.inf], [-np.inf, -np.inf]
    for window, (question, first, last) in enumerate(LAYOUT):
        null[question] = min(null[question], start[window, 0] + end[window, 0])
        places = range(3, 3 + last - first)
        firsts = sorted(places, key=lambda i: -start[window, i])[:n_best]
        lasts = sorted(places, key=lambda i: -end[window, i])[:n_best]
        for i, j in itertools.product(firsts, lasts):
            score = start[window, i] + end[window, j]
            if i <= j < i + longest and score > best[question]:
                best[question] = score
                texts[question] = " ".join(WORDS[first + i - 3 : first + j - 2])
    return texts, np.array(null) - best


@pytest.mark.parametrize(("n_best", "longest"), [(20, 30), (2, 30), (20, 2), (1, 1)])
@pytest.mark.parametrize("seed", range(5))
def test_spans_are_those_of_a_plain_search(seed, n_best, longest):
    draw = np.random.default_rng(seed)
    start, end = draw.normal(size=(2, len(LAYOUT), WIDTH + 2))
    for logits in (start, end):  # what no span may take: a question's token, and what lies beyond the window
        logits[:, 1], logits[:, WIDTH:] = 50.0, 99.0
    spans = best_spans(start, end, windows_of(*LAYOUT), QUESTIONS, n_best=n_best, max_answer_length=longest)
    texts, differences = plain_search(start, end, n_best, longest)
    assert spans.texts == texts
    np.testing.assert_allclose(spans.null_differences, differences, rtol=1e-5)


def test_logits_that_cannot_be_are_refused():
    windows, logits = windows_of(*LAYOUT), np.zeros((5, WIDTH))
    with pytest.raises(ValueError, match=r"shapes \(5, 9\) and \(5, 8\); both must be \(5, at least 9\)"):
        best_spans(logits, logits[:, 1:], windows, QUESTIONS)
    with pytest.raises(ValueError, match=r"\(4, 9\)"):
        best_spans(logits[1:], logits[1:], windows, QUESTIONS)
    logits[2, 3] = np.nan
    with pytest.raises(FloatingPointError, match="NaN"):
        best_spans(np.zeros((5, WIDTH)), logits, windows, QUESTIONS)
