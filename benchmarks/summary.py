"""``python -m benchmarks.summary``: the tables of pages and the pictures of all ops, from the kept results alone."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from benchmarks import overview, results, serving_report
from benchmarks.registry import FORWARD_BACKWARD, STEP
from benchmarks.results import Row

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "figures.md")
BLOCK = re.compile(r"(<!-- (?:(other|all) )?benchmarks: .*?-->\n).*?(<!-- end of benchmarks -->)", re.DOTALL)
STEPS = re.compile(r"(<!-- steps: .*?-->\n).*?(<!-- end of steps -->)", re.DOTALL)
ANSWERS = re.compile(r"(<!-- answers of (\w+): .*?-->\n).*?(<!-- end of answers -->)", re.DOTALL)
HEADER = (
    "op",
    "shape",
    "dtype",
    "time",
    "faster than eager",
    "faster than compile",
    "time / limit",
    "peak MB: eager / compile / fastkd",
)


Results = dict[str, dict[str, list[Row]]]  # rows by machine and op


class Kinds(NamedTuple):
    """What was measured of ops, of whole training steps, and of answers; a part of a step is on no page's table."""

    ops: Results
    steps: Results
    answers: Results


def read_all(folder: Path = results.RESULTS) -> Kinds:
    """The results kept, the machine of most pages first."""
    found, pages = Kinds({}, {}, {}), Counter[str]()
    for path in sorted(folder.glob("*.csv")):
        rows = results.read(path)
        kind = _kind(found, rows)
        if kind is not None:
            kind.setdefault(rows[0]["machine"], {})[rows[0]["op"]] = rows
            pages[rows[0]["machine"]] += 1
    order = [machine for machine, _ in pages.most_common()]
    return Kinds(*({machine: kind[machine] for machine in order if machine in kind} for kind in found))


def _kind(found: Kinds, rows: list[Row]) -> Results | None:
    first = rows[0]
    if "provider" not in first:
        return None
    if serving_report.is_answers(rows):
        return found.answers
    if first["direction"] != STEP:
        return found.ops
    return found.steps if first["options"].startswith("method=") else None


def table(ops: dict[str, list[Row]], brief: bool = False) -> str:
    """A line for each problem of each op, forward and backward; in ``brief`` of each op's first shape."""
    lines = [HEADER, ("---",) * 3 + ("---:",) * (len(HEADER) - 3)]
    for op, rows in ops.items():
        problems = [problem for problem in results.problems(rows) if problem.direction == FORWARD_BACKWARD]
        lines += [_line(op, problem) for problem in problems if not brief or problem.size == problems[0].size]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _line(op: str, problem: results.Problem) -> tuple[str, ...]:
    ours = problem.found["fastkd"]
    time = float(ours["median_ms"])
    rivals = [problem.found[name] for name in ("eager", "compile")]
    return (
        f"`{op}`",
        problem.size,
        problem.dtype,
        results.duration(time),
        *(f"{float(rival['median_ms']) / time:.3g}×" for rival in rivals),
        f"{float(ours['ratio_to_limit']):.3g}×" if ours["ratio_to_limit"] else "",
        " / ".join(results.megabytes(row["peak_bytes"]) for row in (*rivals, ours)) if ours["peak_bytes"] else "",
    )


def tables(machines: Results, brief: bool = False) -> str:
    """A table for each machine, below what the measurements have in common."""
    parts = []
    for machine, ops in machines.items():
        versions = sorted({(row["threads"], row["torch"]) for rows in ops.values() for row in rows})
        common = "; ".join(f"{threads} threads, torch {torch}" for threads, torch in versions)
        parts.append(f"{machine}; {common}:\n\n{table(ops, brief)}\n")
    return "\n" + "\n".join(parts) + "\n"


def shown(machines: Results, other: bool) -> Results:
    """The machine on which most ops were measured, of equals the one measured last; or the ``other`` ones."""

    def rank(name: str) -> tuple[int, str]:
        return len(machines[name]), max(row["date"] for rows in machines[name].values() for row in rows)

    first = max(machines, key=rank)
    return {name: ops for name, ops in machines.items() if (name != first) == other}


def answer_tables(machines: Results, page: str) -> str:
    """A table for each machine of one page of answers."""
    parts = []
    for machine, pages in machines.items():
        if page not in pages:
            continue
        first = pages[page][0]
        packages = [package for package in ("torch", "onnxruntime", "openvino") if first[package]]
        versions = ", ".join(f"{package} {first[package]}" for package in packages)
        parts.append(f"{machine}; {versions}:\n\n{serving_report.summary(pages[page])}\n")
    return "\n" + "\n".join(parts) + "\n" if parts else ""


def step_tables(machines: Results) -> str:
    """A table for each machine of whole training steps, against the method written plainly and the passes alone."""
    parts = []
    header = ("method", "rows × tokens", "plainly", "fastkd", "rows a second", "faster", "time / passes", "peak MB")
    for machine, pages in machines.items():
        lines = [header, ("---",) * 2 + ("---:",) * (len(header) - 2)]
        for rows in pages.values():
            lines += [_step_line(problem) for problem in results.problems(rows)]
        first = next(iter(pages.values()))[0]
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"{machine}; {first['threads']} threads, torch {first['torch']}:\n\n{body}\n")
    return "\n" + "\n".join(parts) + "\n"


def _step_line(problem: results.Problem) -> tuple[str, ...]:
    plain, ours = problem.found["eager"], problem.found["fastkd"]
    times = [float(row["median_ms"]) for row in (plain, ours)]
    rows = int(ours["shape"].split("x")[0])
    peaks = [results.megabytes(row["peak_bytes"]) for row in (plain, ours)] if ours["peak_bytes"] else []
    return (
        ours["options"].removeprefix("method="),
        ours["shape"].replace("x", " × "),
        *map(results.duration, times),
        f"{1e3 * rows / times[1]:.3g}",
        f"{times[0] / times[1]:.3g}×",
        f"{float(ours['ratio_to_limit']):.3g}×" if ours["ratio_to_limit"] else "",
        " / ".join(peaks),
    )


def _tables_of_kind(machines: Results, kind: str | None) -> str:
    return tables(shown(machines, other=kind == "other"), brief=kind is None)


def rewritten(text: str, found: Kinds) -> str:
    """A page's text with the tables that the results give."""
    text = BLOCK.sub(lambda block: block[1] + _tables_of_kind(found.ops, block[2]) + block[3], text)
    text = STEPS.sub(lambda block: block[1] + step_tables(found.steps) + block[2], text)
    return ANSWERS.sub(lambda block: block[1] + answer_tables(found.answers, block[2]) + block[3], text)


def main() -> None:
    found = read_all()
    for page in PAGES:
        page.write_text(rewritten(page.read_text("utf-8"), found), "utf-8")
        print(page)
    for machine, ops in found.ops.items():
        for path in overview.draw(machine, ops, results.RESULTS):
            print(path)


if __name__ == "__main__":
    main()
