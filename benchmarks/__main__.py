"""``python -m benchmarks``: measure, print a table, and keep the rows and the picture of a full run."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from benchmarks import plot, results
from benchmarks.measure import WrongResult, bind, check, interleave
from benchmarks.memory import Peaks, peak_meter
from benchmarks.registry import Benchmark, Case, load_benchmarks


class Effort(NamedTuple):
    """What a run spends on a problem."""

    seconds: float
    rounds: int
    """At least, whatever the seconds."""
    memory: bool


FULL = Effort(30.0, 5, memory=True)
QUICK = Effort(1.0, 3, memory=False)


def parse_arguments(arguments: list[str] | None, ops: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure each op against plain torch, torch.compile, the best peer and the limit.",
        epilog="example: python -m benchmarks kl_div --quick --shapes 1024x30522,32x2",
    )
    parser.add_argument("op", nargs="*", help=f"the ops to measure, of: {', '.join(ops)} (default: all)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a rough look at all ops: of each the first shape alone (or --shapes), checked as "
        f"ever, but timed for {QUICK.seconds:.0f} second or {QUICK.rounds} rounds (else {FULL.seconds:.0f} seconds or "
        f"{FULL.rounds} rounds), without memory",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads (default: %(default)s)")
    parser.add_argument("--shapes", help="only these shapes, as 1024x30522,32x2")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for the CSV and the picture (default: benchmarks/results, but with --quick or --shapes "
        "nothing is kept)",
    )
    parsed = parser.parse_args(arguments)
    parsed.op = parsed.op or ops
    for op in parsed.op:
        if op not in ops:
            parser.error(f"no benchmark is called {op!r}; there are: {', '.join(ops)}")
    if parsed.threads < 1:
        parser.error(f"--threads is {parsed.threads}; it must be at least 1")
    return parsed


def select(benchmark: Benchmark, device: str, shapes: str | None, quick: bool) -> list[Case]:
    """The cases of a device: those of ``shapes``, else all, or when ``quick`` those of the first shape."""
    cases = [case for case in benchmark.cases if case.device == device]
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
    check(benchmark, case, inputs, direction, judged)
    bar.set_description(f"{case}, {direction}: timing")
    samples = interleave(case, calls, effort.seconds, effort.rounds)
    if case.overhead or peaks is None:
        return samples, {}
    bar.set_description(f"{case}, {direction}: memory")
    return samples, peaks(case, direction, list(calls))


def run(benchmark: Benchmark, cases: list[Case], device: str, effort: Effort) -> list[results.Row]:
    machine = results.environment(device)
    if float(machine["load"]) > int(machine["cores"]) / 2:
        message = "warning: the load of this machine is {load} on {cores} cores; a quiet one measures better"
        print(message.format(**machine), file=sys.stderr)
    problems = [(case, direction) for case in cases for direction in case.directions]
    rows: list[results.Row] = []
    meter = peak_meter(device, torch.get_num_threads()) if effort.memory else nullcontext()
    with meter as peaks, tqdm(problems, unit="problem") as bar:
        for case, direction in bar:
            samples, bytes_taken = measure(benchmark, case, direction, effort, peaks, bar)
            rows += results.make_rows(machine, case, direction, samples, bytes_taken)
    return rows


def main(arguments: list[str] | None = None) -> int:
    os.environ.setdefault("FASTKD_STRICT", "1")  # a fallback to plain torch must not be measured as fastkd
    benchmarks = load_benchmarks()
    options = parse_arguments(arguments, list(benchmarks))
    torch.set_num_threads(options.threads)
    folder = options.output or (None if options.quick or options.shapes else results.RESULTS)
    for op in options.op:
        cases = select(benchmarks[op], options.device, options.shapes, options.quick)
        try:
            rows = run(benchmarks[op], cases, options.device, QUICK if options.quick else FULL)
        except WrongResult as error:
            print(f"error: {error}. Nothing is reported.", file=sys.stderr)
            return 1
        print(results.markdown_table(rows))
        for provider in benchmarks[op].providers:
            objections = {provider.objection(case) for case in cases} - {None}
            if objections and not provider.limit:
                print(f"\n{provider.name} left out: {'; '.join(sorted(objections))}")
        if folder is not None:
            path = results.path_of(rows, folder)
            results.write(rows, path)
            print(f"\n{path}\n{plot.draw(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
