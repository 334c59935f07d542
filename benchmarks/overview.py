"""Pictures of all ops on one machine: speed, memory and fraction of the limit against size, which eager torch tells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import results
from benchmarks.plot import COLOURS
from benchmarks.registry import FORWARD_BACKWARD
from benchmarks.results import Problem, Row

RESOLUTION = 0.5
"""Megabytes, below which the memory of a CPU is not resolved."""


class Quantity(NamedTuple):
    name: str
    title: str
    of: Callable[[dict[str, Row], str], float | None]
    logarithmic: bool = True
    reference: float | None = None


def _speed(found: dict[str, Row], name: str) -> float | None:
    return float(found["eager"]["median_ms"]) / float(found[name]["median_ms"])


def _memory(found: dict[str, Row], name: str) -> float | None:
    taken = found[name]["peak_bytes"]
    return max(int(taken) / 1e6, RESOLUTION) if taken else None


def _of_limit(found: dict[str, Row], name: str) -> float | None:
    return 100 * float(found["limit"]["median_ms"]) / float(found[name]["median_ms"]) if "limit" in found else None


QUANTITIES = (
    Quantity("speed", "times as fast as eager torch", _speed, reference=1.0),
    Quantity("memory", "peak megabytes beyond the inputs", _memory),
    Quantity("limit", "per cent of the limit's speed", _of_limit, logarithmic=False, reference=100.0),
)
STYLES = {"float32": {"linestyle": "-"}, "bfloat16": {"linestyle": "--", "markerfacecolor": "white"}}


def draw(machine: str, ops: dict[str, list[Row]], folder: Path) -> list[Path]:
    """One picture for each quantity, one panel for each op with a backward; return their paths."""
    return [_draw(quantity, machine, ops, folder) for quantity in QUANTITIES]


def _draw(quantity: Quantity, machine: str, ops: dict[str, list[Row]], folder: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    problems = {op: [p for p in results.problems(rows) if p.direction == FORWARD_BACKWARD] for op, rows in ops.items()}
    shown = {op: found for op, found in problems.items() if found}
    columns = 2
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(11, 1.2 + 2.6 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel, (op, found) in zip(panels, shown.items(), strict=False):
        _draw_panel(panel, op, quantity, found)
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    named: dict[str, Any] = {}
    for panel in panels:
        for line, name in zip(*panel.get_legend_handles_labels(), strict=True):
            named.setdefault(name, line)
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(f"{quantity.title}, forward and backward\n{machine}; dashed: bfloat16", fontsize=10)
    path = folder / f"{results.file_name(quantity.name, machine)}.png"
    figure.savefig(path, dpi=120)
    return path


def _draw_panel(panel: Any, op: str, quantity: Quantity, problems: list[Problem]) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    largest_first = sorted(problems, key=lambda problem: float(problem.found["eager"]["median_ms"]), reverse=True)
    sizes = list(dict.fromkeys(problem.size for problem in largest_first))[::-1]
    for name, colour in COLOURS.items():
        for dtype, style in STYLES.items():
            points = [
                (sizes.index(problem.size), value)
                for problem in problems
                if problem.dtype == dtype and name in problem.found
                if (value := quantity.of(problem.found, name)) is not None
            ]
            if points:
                panel.plot(*zip(*sorted(points), strict=True), "o", color=colour, label=name, markersize=4, **style)
    if quantity.reference is not None:
        panel.axhline(quantity.reference, color="black", linewidth=0.8, linestyle=":")
    if quantity.logarithmic:
        panel.set_yscale("log", subs=())
        low, high = panel.get_ylim()
        panel.yaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_locator(MaxNLocator(4) if high < 5 * low else LogLocator(subs=(1, 2, 5)))
    else:
        panel.set_ylim(bottom=0)
    panel.yaxis.set_major_formatter("{x:g}")
    panel.set_xticks(range(len(sizes)), [_wrapped(size) for size in sizes], fontsize=7)
    panel.margins(x=0.15)
    panel.set_title(op, fontsize=9, loc="left", fontweight="bold")
    panel.tick_params(axis="y", which="both", labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def _wrapped(size: str) -> str:
    """On lines of at most two numbers."""
    shape, *options = size.split(" (")
    numbers = shape.split(" × ")
    lines = [" × ".join(numbers[at : at + 2]) for at in range(0, len(numbers), 2)]
    return " ×\n".join(lines) + "".join(f"\n({option}" for option in options)
