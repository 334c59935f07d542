"""The tables of the benchmarks of answers, from their rows alone."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import results
from benchmarks.results import Problem, Row

START = "start"
OWN = ("fastkd float32", "fastkd bfloat16", "fastkd int8")


def is_answers(rows: Sequence[Row]) -> bool:
    return "p99_ms" in rows[0]


def markdown(rows: Sequence[Row]) -> str:
    """All of a run: answers, answers beside a neighbour, and starts."""
    parts = (_answers(_answering(rows)), _neighbours(rows), _starts([row for row in rows if row["shape"] == START]))
    return "\n\n".join(part for part in parts if part)


def summary(rows: Sequence[Row]) -> str:
    """A line for each problem of a page: fastkd and the fastest of all others that compute the same."""
    peers = ("fastest float32 peer", "fastest int8 peer", "fastest peer / int8", "fastest float32 peer / float32")
    lines = [("problem", *OWN, *peers, "limit / time, int8")]
    return _table([*lines, *map(_summary, results.problems(_answering(rows)))], text_columns=1)


def _answering(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["shape"] != START and not _is_beside(row)]


def _is_beside(row: Row) -> bool:
    return row["options"].endswith("neighbour")


def _answers(rows: Sequence[Row]) -> str:
    lines = [("problem", "system", "median", "95 %", "99 %", "limit / time", "largest error")]
    for problem in results.problems(list(rows)):
        for system, row in problem.found.items():
            times = [results.duration(float(row[key])) if row[key] else "" for key in ("median_ms", "p95_ms", "p99_ms")]
            lines.append((problem.title, system, *times, _of_limit(row), row["error"]))
    return _table(lines, text_columns=2)


def _neighbours(rows: Sequence[Row]) -> str:
    lines = [("neighbour", "system", "threads", "median", "99 %", "calls")]
    for row in filter(_is_beside, rows):
        times = [results.duration(float(row[key])) if row[key] else "" for key in ("median_ms", "p99_ms")]
        lines.append((row["options"], row["provider"], row["threads"], *times, row["rounds"]))
    return _table(lines, text_columns=2)


def _starts(rows: Sequence[Row]) -> str:
    lines = [("system", "from start to first answer", "resident MB", "files MB")]
    for row in rows:
        sizes = [results.megabytes(row[key]) for key in ("resident_bytes", "file_bytes")]
        lines.append((row["provider"], results.duration(float(row["median_ms"])), *sizes))
    return _table(lines, text_columns=1)


def _summary(problem: Problem) -> tuple[str, ...]:
    time = {name: float(row["median_ms"]) for name, row in problem.found.items()}
    peers = [name for name in time if not name.startswith(("fastkd", "BERT"))]
    exact = min((name for name in peers if not name.endswith("int8")), key=time.__getitem__)
    rough = min((name for name in peers if name.endswith("int8")), key=time.__getitem__)
    return (
        problem.title,
        *(results.duration(time[name]) for name in OWN),
        *(f"{results.duration(time[name])} ({name})" for name in (exact, rough)),
        f"{min(time[exact], time[rough]) / time['fastkd int8']:.3g}×",
        f"{time[exact] / time['fastkd float32']:.3g}×",
        _of_limit(problem.found["fastkd int8"]),
    )


def _of_limit(row: Row) -> str:
    return f"{100 / float(row['ratio_to_limit']):.0f} %" if row["ratio_to_limit"] else ""


def _table(lines: Sequence[tuple[str, ...]], text_columns: int) -> str:
    """Nothing where only the header is."""
    if len(lines) < 2:
        return ""
    rule = ("---",) * text_columns + ("---:",) * (len(lines[0]) - text_columns)
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))
