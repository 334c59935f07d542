"""Table, picture and verdicts, from the scores alone."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from experiments import scores as csv_file
from experiments.claims import Claim, verdicts
from experiments.kept import kept_table
from experiments.scores import MAJORITY, Score
from fastkd.training.report import ModelResult, aligned, columns_of, draw
from fastkd.training.runs import write_text

PERPLEXITY = "perplexity.md"
FILES = {
    "scores.csv": ".csv",
    "table.md": ".md",
    "scores.png": ".png",
    "verdicts.md": "-verdicts.md",
    "kept.md": "-kept.md",
    PERPLEXITY: "-perplexity.md",
}
"""What a report is made of, the last two of MKD and of decoders alone, and how the kept copies end."""
HOW_TO_READ = """Differences are in points of 100, one of the students of each seed, averaged over the columns. A claim
holds here, or does not, where their mean is above, or below, 0 by Student's t test with p < 0.05."""


def write_report(
    folder: Path,
    scores: Sequence[Score],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    claims: Sequence[Claim],
    parts: Mapping[str, Collection[str]],
) -> str:
    """Writes the files of ``FILES`` and gives the table. The picture has the rows with all columns."""
    csv_file.write(folder / "scores.csv", scores)
    scores = least_latency(scores)
    names = dict.fromkeys([*rows, *(score.row for score in scores)])
    results = [(row, [score for score in scores if score.row == row]) for row in names]
    results = [(row, lines) for row, lines in results if lines]
    table = markdown_table(results, columns)
    write_text(folder / "table.md", f"{table}\n")
    write_text(folder / "verdicts.md", f"{verdicts(claims, scores)}\n\n{HOW_TO_READ}\n")
    if parts:
        write_text(folder / "kept.md", f"{kept_table(scores, parts)}\n")
    drawn = [(row, lines) for row, lines in results if row != MAJORITY]  # which is too far to the left
    complete = [model for row, lines in drawn if (model := model_result(row, lines, columns)).scores]
    if complete:
        draw(folder / "scores.png", complete, columns, title)
    return table


def least_latency(scores: Sequence[Score]) -> list[Score]:
    """The scores with the least latency of any model of the same size: what else the machine did can only add to it."""
    least: dict[tuple[int, int], float] = {}
    for line in scores:
        size = line.parameters, line.inner_parameters
        least[size] = min(line.latency_ms, least.get(size, line.latency_ms))
    return [replace(line, latency_ms=least[line.parameters, line.inner_parameters]) for line in scores]


def model_result(row: str, lines: Sequence[Score], columns: Sequence[str]) -> ModelResult:
    """The row as the package's own pictures show it, of the seeds that have every column."""
    by_seed: dict[int, dict[str, float]] = {}
    for line in lines:
        by_seed.setdefault(line.seed, {})[line.column] = line.score
    full = [scores for scores in by_seed.values() if len(scores) == len(columns)]
    return ModelResult(row, full, lines[0].parameters, lines[0].inner_parameters, 1e-3 * lines[0].latency_ms)


def markdown_table(results: Sequence[tuple[str, Sequence[Score]]], columns: Sequence[str]) -> str:
    """Mean ± standard deviation over seeds, the size, and the mean time of training one student, of all threads.

    A row that lacks a column has no mean over columns, of scores or of times: those of others would be other tasks'.
    """
    body = []
    for row, lines in results:
        model = model_result(row, lines, columns)
        cells = [mean_and_spread([line.score for line in lines if line.column == column]) for column in columns]
        average = [statistics.fmean(scores.values()) for scores in model.scores]
        averages = [mean_and_spread(average)] if len(columns) > 1 else []
        body.append([row, *cells, *averages, *_cost(model, lines)])
    return aligned(["", *columns_of(columns), "parameters (inner)", "latency", "training"], body)


def _cost(model: ModelResult, lines: Sequence[Score]) -> list[str]:
    if not model.parameters:
        return ["–"] * 3
    minutes = f"{statistics.fmean(line.seconds * line.threads for line in lines) / 60:.1f} min" if model.scores else "–"
    size = f"{model.parameters / 1e6:.1f} M ({model.inner_parameters / 1e6:.1f} M)"
    return [size, f"{1e3 * model.latency:.2f} ms", minutes]


def mean_and_spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = statistics.fmean(values)
    return f"{mean:.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"
