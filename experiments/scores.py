"""The results: one CSV line per row of the table, column and seed."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import environment
from fastkd.training.runs import write_text

MAJORITY, TEACHER = "majority class", "teacher"
"""Rows of the tables that are no students."""
_KINDS = {"str": str, "int": int, "float": float}


@dataclass(frozen=True)
class Score:
    """What one model answers on one validation set.

    ``score`` is 0 to 100. ``learning_rate`` is the one that was chosen. ``seconds`` is what training took, with the
    evaluation after it. ``inner_parameters`` are all but the word embeddings. ``latency_ms`` is that of one row on one
    thread. The rest tells where, with what and when the model was trained; ``threads`` is 1 where a GPU trained it.
    """

    row: str
    column: str
    seed: int
    score: float
    learning_rate: float
    seconds: float
    parameters: int
    inner_parameters: int
    latency_ms: float
    machine: str
    cores: int
    threads: int
    torch: str
    fastkd: str
    commit: str
    date: str


_COMMIT = environment("cpu")["commit"]
"""Of the code that was loaded; the checkout may move on while it trains."""


def surroundings() -> dict[str, Any]:
    """The fields of a score that tell where, with what and when a model was trained."""
    known = environment("cuda" if torch.cuda.is_available() else "cpu") | {"commit": _COMMIT}
    if torch.cuda.is_available():
        known["threads"] = 1
    return {field.name: known[field.name] for field in fields(Score) if field.name in known}


def scores_of(row: str, seed: int, columns: Mapping[str, str], trained: Mapping[str, Any]) -> list[Score]:
    """A line for each task of a finished training, whose column is ``columns[task]``."""
    facts = {name: value for name, value in trained.items() if name != "scores"}
    return [
        _score({"row": row, "column": columns[t], "seed": seed, "score": s, **facts})
        for t, s in trained["scores"].items()
    ]


def write(path: Path, scores: Iterable[Score]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Score)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(score) for score in scores)
    write_text(path, text.getvalue())


def add(path: Path, scores: Sequence[Score]) -> None:
    """Writes the scores beside those of other seeds that the file has of the same columns and learning rates."""
    seeds = {score.seed for score in scores}
    alike = {(score.column, score.learning_rate) for score in scores}
    before = read(path) if path.exists() else []
    kept = [old for old in before if old.seed not in seeds and (old.column, old.learning_rate) in alike]
    write(path, sorted([*kept, *scores], key=lambda score: score.seed))


def read(path: Path) -> list[Score]:
    with path.open(newline="", encoding="utf-8") as file:
        return [_score(line) for line in csv.DictReader(file)]


def by_pair(scores: Sequence[Score], row: str) -> dict[tuple[str, int], float]:
    """The scores of a row by column and seed."""
    return {(score.column, score.seed): score.score for score in scores if score.row == row}


def _score(values: Mapping[str, Any]) -> Score:
    return Score(**{field.name: _KINDS[str(field.type)](values[field.name]) for field in fields(Score)})
