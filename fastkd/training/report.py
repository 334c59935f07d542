"""What a distillation run ends with: one table and one picture of its models, and how a model card has them loaded."""

import csv
import io
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkd.training.runs import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AVERAGE = "average"


@dataclass(frozen=True)
class ModelResult:
    """One row of the table.

    ``scores``: for every seed, each task's score, 0..100. ``parameters`` counts all, ``inner_parameters`` all
    but the word embeddings, as the paper does. ``latency`` is the time of one sentence or pair, in seconds.
    """

    name: str
    scores: Sequence[Mapping[str, float]]
    parameters: int
    inner_parameters: int
    latency: float

    def mean_and_spread(self, column: str) -> tuple[float, float | None]:
        """Mean over seeds of a task's score, or of the average over tasks, and its sample standard deviation."""
        values = [statistics.fmean(s.values()) if column == AVERAGE else s[column] for s in self.scores]
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def columns_of(tasks: Sequence[str]) -> list[str]:
    """The columns of a table: the tasks and, of several, their average."""
    return [*tasks, AVERAGE] if len(tasks) > 1 else [*tasks]


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Number of all parameters, and of those that are not word embeddings."""
    total = sum(parameter.numel() for parameter in model.parameters())
    return total, total - sum(parameter.numel() for parameter in model.get_input_embeddings().parameters())


@torch.inference_mode()
def measure_latency(model: nn.Module, batches: Sequence[Mapping[str, Any]], rounds: int = 3) -> float:
    """Median over the batches of their least time in seconds, after a round to warm up; give batches of one row.

    The least of a batch's rounds, because whatever else the machine does can only add to it.
    """
    device = next(model.parameters()).device
    inputs = [
        {name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items() if name != "labels"}
        for batch in batches
    ]
    training = model.training
    model.eval()
    times: list[list[float]] = [[] for _ in inputs]
    for _ in range(rounds + 1):
        for taken, batch in zip(times, inputs, strict=True):
            start = time.perf_counter()
            model(**batch)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - start)
    model.train(training)
    return statistics.median(min(taken[1:]) for taken in times)


def write_report(folder: Path, results: Sequence[ModelResult], tasks: Sequence[str], title: str) -> str:
    """Writes ``table.csv``, ``table.md`` and ``scores.png`` and gives the table as markdown.

    The first result is the teacher: speed-ups are relative to it.
    """
    table = markdown_table(results, tasks)
    write_text(folder / "table.csv", csv_table(results, tasks))
    write_text(folder / "table.md", f"{table}\n")
    draw(folder / "scores.png", results, tasks, title)
    return table


def markdown_table(results: Sequence[ModelResult], tasks: Sequence[str]) -> str:
    columns = columns_of(tasks)
    header = ["", *columns, "parameters (inner)", "latency", "speed-up"]
    body = []
    for result in results:
        scores = [_mean_and_spread_text(result, column) for column in columns]
        speed_up = f"{results[0].latency / result.latency:.1f}x"
        size = f"{result.parameters / 1e6:.1f} M ({result.inner_parameters / 1e6:.1f} M)"
        body.append([result.name, *scores, size, f"{1e3 * result.latency:.2f} ms", speed_up])
    return aligned(header, body)


def aligned(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A markdown table that is one in plain text too; all columns but the first are numbers."""
    widths = [max(3, *(len(row[i]) for row in (header, *body))) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(_markdown_row(row, widths) for row in (header, rule, *body))


def _markdown_row(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (
        cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return f"| {' | '.join([first, *rest])} |"


def _mean_and_spread_text(result: ModelResult, column: str) -> str:
    mean, spread = result.mean_and_spread(column)
    return f"{mean:.1f}" if spread is None else f"{mean:.1f} ± {spread:.1f}"


def csv_table(results: Sequence[ModelResult], tasks: Sequence[str]) -> str:
    columns = [*tasks, AVERAGE]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    spreads = [f"{column}_{kind}" for column in columns for kind in ("mean", "std")]
    writer.writerow(["model", "seeds", *spreads, "parameters", "inner_parameters", "latency_ms"])
    for result in results:
        values = [value for column in columns for value in result.mean_and_spread(column)]
        cells = ["" if value is None else f"{value:.3f}" for value in values]
        sizes = [result.parameters, result.inner_parameters, f"{1e3 * result.latency:.4f}"]
        writer.writerow([result.name, len(result.scores), *cells, *sizes])
    return out.getvalue()


def draw(path: Path, results: Sequence[ModelResult], tasks: Sequence[str], title: str) -> None:
    """Writes the picture of :func:`figure_of`."""
    temporary = path.with_name(f"{path.stem}.tmp{os.getpid()}.png")
    try:
        figure_of(results, tasks, title).savefig(temporary, dpi=150)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def figure_of(results: Sequence[ModelResult], tasks: Sequence[str], title: str) -> "Figure":
    """A panel per task and for their average, in it a point per model with a bar for the spread over seeds."""
    from matplotlib.figure import Figure

    columns = columns_of(tasks)
    across = min(3, len(columns))
    down = -(-len(columns) // across)
    size = (3.0 + 2.2 * across, 1.1 + down * (0.5 + 0.42 * len(results)))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
    for panel, column in zip(panels, columns, strict=False):
        _draw_column(panel, results, column)
    for panel in panels[len(columns) :]:
        panel.set_axis_off()
    names = [f"{r.name}\n{r.parameters / 1e6:.1f} M, {1e3 * r.latency:.1f} ms" for r in results]
    for panel in panels[::across]:
        panel.set_yticks(range(len(results)), names, fontsize="small")
    panels[0].set_ylim(len(results) - 0.4, -0.6)
    seeds = max(len(result.scores) for result in results)
    spread = f"bars: ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed: the spread is not known"
    figure.suptitle(title, x=0.01, ha="left")
    figure.supxlabel(f"score on the validation set, of 100; {spread}", fontsize="small")
    return figure


def _draw_column(panel: Any, results: Sequence[ModelResult], column: str) -> None:
    for line, result in enumerate(results):
        mean, spread = result.mean_and_spread(column)
        panel.errorbar(mean, line, xerr=spread, fmt="o", color="#0072B2", markersize=7, capsize=3)
        panel.annotate(f"{mean:.1f}", (mean, line), (0, 6), textcoords="offset points", ha="center", fontsize="small")
    panel.set_title(column, loc="left", fontsize="medium", fontweight="bold")
    panel.margins(x=0.15)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(axis="y", length=0)
    panel.tick_params(axis="x", labelsize="small")
    panel.grid(color="#EEEEEE")
    panel.set_axisbelow(True)


def usage(task: str) -> str:
    """The part of a model card that shows how the model is loaded."""
    return f"""```python
import fastkd.students  # makes the Auto classes know the model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
logits = model(**tokenizer("a fine film", return_tensors="pt"), task="{task}").logits
```"""
