"""``python -m benchmarks``: measure, print a table, and keep the rows and the picture of a full run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import plot, results, serving_report
from benchmarks.effort import FULL, QUICK, Effort
from benchmarks.measure import WrongResult, bind, faults, interleave
from benchmarks.memory import Peaks, peak_meter
from benchmarks.registry import Benchmark, Case, load_benchmarks
from benchmarks.serving import SERVINGS, Serving


def parse_arguments(arguments: list[str] | None, ops: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure each op against plain torch, torch.compile, the best peer and the limit, and the answers "
        "of the runtime (bilstm, student) against other runtimes.",
        epilog="example: python -m benchmarks kl_div --quick --shapes 1024x30522,32x2",
    )
    parser.add_argument("op", nargs="*", help=f"the ops to measure, of: {', '.join(ops)} (default: all)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a rough look at all ops: of each the first shape alone (or --shapes), checked as "
        f"ever, but timed for {QUICK.seconds:.0f} second or {QUICK.rounds} rounds (else {FULL.seconds:.0f} seconds or "
        f"{FULL.rounds} rounds), without memory, transformers and starts",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="threads; answers are measured on 1 besides (default: %(default)s)",
    )
    parser.add_argument("--shapes", help="only these shapes, as 1024x30522,32x2; of answers as 1x32x300x256")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for the CSV and the picture (default: benchmarks/results, but with --quick or --shapes "
        "nothing is kept)",
    )
    parsed = parser.parse_args(arguments)
    parsed.op = parsed.op or [op for op in ops if parsed.device == "cpu" or op not in SERVINGS]
    for op in parsed.op:
        if op not in ops:
            parser.error(f"no benchmark is called {op!r}; there are: {', '.join(ops)}")
    if parsed.threads < 1:
        parser.error(f"--threads is {parsed.threads}; it must be at least 1")
    return parsed


def select(benchmark: Benchmark | Serving, device: str, shapes: str | None, quick: bool) -> list[Case]:
    """The cases of a device: those of ``shapes``, else all, or when ``quick`` those of the first shape."""
    cases = [case for case in benchmark.cases if case.device == device]
    if not cases:
        sys.exit(f"--device: {benchmark.op} has no case on {device}")
    if shapes is None:
        shapes = cases[0].size if quick else ",".join(case.size for case in cases)
    wanted = shapes.split(",")
    known = list(dict.fromkeys(case.size for case in cases))
    for shape in wanted:
        if shape not in known:
            sys.exit(f"--shapes: {benchmark.op} has no case {shape!r} on {device}; it has: {', '.join(known)}")
    return [case for case in cases if case.size in wanted]


def measure(
    benchmark: Benchmark, case: Case, direction: str, effort: Effort, peaks: Peaks | None, bar: tqdm
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds per round and peak bytes, by provider."""
    bar.set_description(f"{case}, {direction}: checking")
    providers = benchmark.runnable(case, direction)
    inputs = benchmark.inputs(case)
    calls = {p.name: bind(p, case, inputs, direction) for p in providers}
    judged = {p.name: calls[p.name] for p in providers if not p.limit and p.name != "eager"}
    wrong = faults(benchmark, case, inputs, direction, judged)
    if "fastkd" in wrong:
        raise WrongResult(wrong["fastkd"])
    for name, fault in wrong.items():
        bar.write(f"left out: {fault}")
        del calls[name]
    bar.set_description(f"{case}, {direction}: timing")
    samples = interleave(case, calls, effort.seconds, effort.rounds)
    if case.overhead or peaks is None:
        return samples, {}
    bar.set_description(f"{case}, {direction}: memory")
    return samples, peaks(case, direction, list(calls))


def run(
    benchmark: Benchmark, cases: list[Case], machine: results.Row, device: str, effort: Effort
) -> list[results.Row]:
    problems = [(case, direction) for case in cases for direction in case.directions]
    rows: list[results.Row] = []
    meter = peak_meter(device, torch.get_num_threads()) if effort.whole else nullcontext()
    with meter as peaks, tqdm(problems, unit="problem") as bar:
        for case, direction in bar:
            samples, bytes_taken = measure(benchmark, case, direction, effort, peaks, bar)
            rows += results.make_rows(machine, case, direction, samples, bytes_taken)
    return rows


def left_out(page: Benchmark | Serving, cases: list[Case]) -> Iterator[str]:
    compared = page.systems if isinstance(page, Serving) else [p for p in page.providers if not p.limit]
    for one in compared:
        objections = {one.objection(case) for case in cases} - {None}
        if objections:
            yield f"{one.name} left out: {'; '.join(sorted(objections))}"


def keep(rows: list[results.Row], folder: Path) -> None:
    path = results.path_of(rows, folder)
    results.write(rows, path)
    print(f"\n{path}\n{plot.draw(path)}")


def report(page: Benchmark | Serving, options: argparse.Namespace) -> list[results.Row]:
    """Measure and print; the rows."""
    effort = QUICK if options.quick else FULL
    cases = select(page, options.device, options.shapes, options.quick)
    machine = results.environment(options.device)
    if float(machine["load"]) > int(machine["cores"]) / 2:
        message = "warning: the load of this machine is {load} on {cores} cores; a quiet one measures better"
        print(message.format(**machine), file=sys.stderr)
    if isinstance(page, Serving):
        rows = page.run(cases, machine, sorted({1, options.threads}), effort)
        print(serving_report.markdown(rows))
    else:
        rows = run(page, cases, machine, options.device, effort)
        print(results.markdown_table(rows))
    for line in left_out(page, cases):
        print(f"\n{line}")
    return rows


def main(arguments: list[str] | None = None) -> int:
    os.environ.setdefault("FASTKD_STRICT", "1")  # a fallback to plain torch must not be measured as fastkd
    pages = load_benchmarks() | SERVINGS
    options = parse_arguments(arguments, list(pages))
    torch.set_num_threads(options.threads)
    folder = options.output or (None if options.quick or options.shapes else results.RESULTS)
    for op in options.op:
        try:
            rows = report(pages[op], options)
        except WrongResult as error:
            print(f"error: {error}. Nothing is reported.", file=sys.stderr)
            return 1
        if folder is not None:
            keep(rows, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
