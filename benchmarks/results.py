"""The results: one CSV row per measurement, and the table made from such rows."""

from __future__ import annotations

import csv
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import fastkd
from benchmarks.registry import Case

Row = dict[str, str]
RESULTS = Path(__file__).parent / "results"


def _cpu_name() -> str:
    try:
        name = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        name = None
    model = name[1] if name else platform.processor()
    return f"{model}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def environment(device: str) -> Row:
    """What a measurement depends on besides the code that is measured."""
    return {
        "machine": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "fastkd": fastkd.__version__,
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "dirty": str(bool(_git("status", "--porcelain"))),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load": f"{os.getloadavg()[0]:.2f}",
    }


def peer_versions() -> Row:
    """Of those that answers are compared with, besides torch."""
    return {package: _installed(package) for package in ("onnxruntime", "openvino", "transformers")}


def make_rows(
    machine: Row, case: Case, direction: str, samples: dict[str, list[float]], peaks: dict[str, int]
) -> list[Row]:
    """A row per provider; ``ratio_to_limit`` divides by the fastest candidate for the limit, where one runs."""
    quantiles = {name: np.percentile(s, (50, 20, 80)) * 1e3 for name, s in samples.items()}
    limit = min((q[0] for name, q in quantiles.items() if name.startswith("limit:")), default=None)
    rows = []
    for name, (median, low, high) in quantiles.items():
        rows.append(
            machine
            | {
                "op": case.op,
                "shape": case.size,
                "dtype": case.precision,
                "options": " ".join(f"{key}={value}" for key, value in case.options.items()),
                "direction": direction,
                "provider": name,
                "median_ms": f"{median:.6g}",
                "p20_ms": f"{low:.6g}",
                "p80_ms": f"{high:.6g}",
                "rounds": str(len(samples[name])),
                "peak_bytes": str(peaks.get(name, "")),
                "ratio_to_limit": "" if limit is None else f"{median / limit:.4g}",
            }
        )
    return rows


def file_name(what: str, machine: str) -> str:
    words = re.findall(r"[a-z0-9]+", machine.replace("(R)", "").lower())
    return "-".join((what, *words))


def path_of(rows: list[Row], folder: Path) -> Path:
    return folder / f"{file_name(rows[0]['op'], rows[0]['machine'])}.csv"


def write(rows: list[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def read(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Problem(NamedTuple):
    size: str
    dtype: str
    direction: str
    found: dict[str, Row]
    """By provider; the fastest candidate for the limit is ``limit``."""

    @property
    def title(self) -> str:
        return ", ".join(filter(None, (f"{self.size} {self.dtype}".strip(), self.direction)))


def problems(rows: list[Row]) -> Iterable[Problem]:
    """The problems of one op; options are named where they are not all the same."""
    several = len({row["options"] for row in rows}) > 1
    for key, group in groupby(rows, lambda row: (row["shape"], row["options"], row["dtype"], row["direction"])):
        providers: dict[str, Row] = {}
        for row in sorted(group, key=lambda row: float(row["median_ms"]) if is_limit(row) else -1.0):
            providers.setdefault("limit" if is_limit(row) else row["provider"], row)
        shape, options, dtype, direction = key
        size = shape.replace("x", " × ")
        yield Problem(f"{size} ({options})" if several else size, dtype, direction, providers)


def is_limit(row: Row) -> bool:
    return row["provider"].startswith("limit:")


def unit(milliseconds: float) -> tuple[str, float]:
    """The unit that suits a time, and how many of them a millisecond is."""
    if milliseconds >= 1e3:
        return "s", 1e-3
    return ("ms", 1.0) if milliseconds >= 0.1 else ("µs", 1e3)


def duration(milliseconds: float) -> str:
    name, scale = unit(milliseconds)
    return f"{milliseconds * scale:.3g} {name}"


def markdown_table(rows: list[Row]) -> str:
    """Times, how much faster fastkd is, how far from the limit, and the peak memory beyond the inputs."""
    names = list(dict.fromkeys("limit" if is_limit(row) else row["provider"] for row in rows))
    rivals = [name for name in names if name not in ("fastkd", "limit")]
    lines = [
        [
            "problem",
            *names,
            *(f"faster than {name}" for name in rivals),
            "time / limit",
            f"peak MB: {' / '.join(names)}",
        ],
    ]
    lines.append(["---"] + ["---:"] * (len(lines[0]) - 1))
    for problem in problems(rows):
        found = problem.found
        times = {name: float(row["median_ms"]) for name, row in found.items()}
        ratio = found["fastkd"]["ratio_to_limit"]
        peaks = [megabytes(found[name]["peak_bytes"]) if name in found else "" for name in names]
        lines.append(
            [
                problem.title,
                *(duration(times[name]) if name in times else "" for name in names),
                *(f"{times[name] / times['fastkd']:.3g}×" if name in times else "" for name in rivals),
                f"{float(ratio):.3g}×" if ratio else "",
                " / ".join(peaks) if any(row["peak_bytes"] for row in found.values()) else "",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def megabytes(count: str) -> str:
    return f"{int(count) / 1e6:.0f}" if count else "–"
