"""``python -m benchmarks.summary``: the tables of pages and the pictures of all ops, from the kept results alone."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import overview, results, serving_report
from benchmarks.registry import FORWARD_BACKWARD
from benchmarks.results import Row

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "figures.md")
BLOCK = re.compile(r"(<!-- benchmarks: .*?-->\n).*?(<!-- end of benchmarks -->)", re.DOTALL)
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


def read_all(folder: Path = results.RESULTS, *, answers: bool = False) -> dict[str, dict[str, list[Row]]]:
    """The rows by machine and op: of the ops of training, or of the pages of answers."""
    found: dict[str, dict[str, list[Row]]] = {}
    for path in sorted(folder.glob("*.csv")):
        rows = results.read(path)
        if "provider" in rows[0] and serving_report.is_answers(rows) == answers:
            found.setdefault(rows[0]["machine"], {})[rows[0]["op"]] = rows
    return found


def table(ops: dict[str, list[Row]]) -> str:
    """A line for each problem of each op, forward and backward."""
    lines = [HEADER, ("---",) * 3 + ("---:",) * (len(HEADER) - 3)]
    for op, rows in ops.items():
        lines += [_line(op, problem) for problem in results.problems(rows) if problem.direction == FORWARD_BACKWARD]
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


def tables(machines: dict[str, dict[str, list[Row]]]) -> str:
    """A table for each machine, below what the measurements have in common."""
    parts = []
    for machine, ops in machines.items():
        versions = sorted({(row["threads"], row["torch"]) for rows in ops.values() for row in rows})
        common = "; ".join(f"{threads} threads, torch {torch}" for threads, torch in versions)
        parts.append(f"{machine}; {common}:\n\n{table(ops)}\n")
    return "\n" + "\n".join(parts) + "\n"


def answer_tables(machines: dict[str, dict[str, list[Row]]], page: str) -> str:
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


def rewritten(text: str, machines: dict[str, dict[str, list[Row]]], answers: dict[str, dict[str, list[Row]]]) -> str:
    """A page's text with the tables that the results give."""
    text = BLOCK.sub(lambda block: block[1] + tables(machines) + block[2], text)
    return ANSWERS.sub(lambda block: block[1] + answer_tables(answers, block[2]) + block[3], text)


def main() -> None:
    machines = read_all()
    for page in PAGES:
        page.write_text(rewritten(page.read_text("utf-8"), machines, read_all(answers=True)), "utf-8")
        print(page)
    for machine, ops in machines.items():
        for path in overview.draw(machine, ops, results.RESULTS):
            print(path)


if __name__ == "__main__":
    main()
