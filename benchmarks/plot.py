"""The picture of a benchmark, from its CSV alone: ``python -m benchmarks.plot results.csv``."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks import results

COLOURS = {  # Okabe and Ito
    "eager": "#BBBBBB",
    "compile": "#E69F00",
    "auto-chunker": "#56B4E9",
    "linear_cross_entropy": "#009E73",
    "liger": "#CC79A7",
    "liger JSD": "#D55E00",
    "liger chunked JSD": "#F0E442",
    "fastkd": "#0072B2",
    "torch": "#BBBBBB",
    "torch compile": "#E69F00",
    "torch int8": "#F0E442",
    "ORT": "#CC79A7",
    "ORT int8": "#D55E00",
    "OpenVINO": "#009E73",
    "fastkd float32": "#56B4E9",
    "fastkd bfloat16": "#3A93CE",
    "fastkd int8": "#0072B2",
    "maps": "#CC79A7",
    "TextBrewer": "#CC79A7",
}
NOT_DRAWN = {"limit", "BERT-base torch", "BERT-base ORT int8"}
"""The limit is a line; beside BERT-base's bars the others could not be told apart."""


def draw(path: Path) -> Path:
    """Draw one panel per problem, a bar per provider and a line at the limit; return the picture's path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = results.read(path)
    problems = list(results.problems(rows))
    columns = 2
    lines = -(-len(problems) // columns)
    height = max(1.45, 0.5 + 0.16 * max(len(problem.found) for problem in problems))
    figure = Figure(figsize=(11, 0.9 + height * lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel, problem in zip(panels, problems, strict=False):
        draw_panel(panel, problem.title, problem.found)
    for panel in panels[len(problems) :]:
        panel.set_axis_off()
    first, threads = rows[0], " and ".join(dict.fromkeys(row["threads"] for row in rows))
    dashed = "; dashed: the limit, measured in the same run" if any("limit" in p.found for p in problems) else ""
    figure.suptitle(
        f"{first['op']} on {first['machine']}, {threads} threads, torch {first['torch']}: time per call\n"
        f"median, 20th to 80th percentile{dashed}",
        fontsize=10,
    )
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=150)
    return picture


def draw_panel(panel, title: str, found: dict[str, results.Row]) -> None:
    if unknown := found.keys() - COLOURS.keys() - NOT_DRAWN:
        raise ValueError(
            f"{title} has {', '.join(sorted(unknown))}; benchmarks/plot.py needs a colour for it in COLOURS"
        )
    names = [name for name in COLOURS if name in found][::-1]
    low, median, high = ([float(found[n][key]) for n in names] for key in ("p20_ms", "median_ms", "p80_ms"))
    unit, scale = results.unit(max(median))
    for line, name in enumerate(names):
        ratio = found[name]["ratio_to_limit"]
        label = results.duration(median[line]) + (f"  ({float(ratio):.3g}× limit)" if ratio else "")
        panel.barh(line, median[line] * scale, color=COLOURS[name], height=0.7)
        panel.plot([low[line] * scale, high[line] * scale], [line, line], color="#444444", linewidth=1.5)
        panel.annotate(label, (high[line] * scale, line), (5, 0), textcoords="offset points", va="center", fontsize=8)
    if "limit" in found:
        panel.axvline(float(found["limit"]["median_ms"]) * scale, color="black", linestyle="--", linewidth=1)
    panel.set_yticks(range(len(names)), names)
    panel.set_xlim(0, 1.35 * max(high) * scale)
    panel.set_title(title, fontsize=9, loc="left", fontweight="bold")
    panel.set_xlabel(unit, fontsize=8, labelpad=1)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(draw(Path(name)))
