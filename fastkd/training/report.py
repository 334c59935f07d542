"""What a distillation run ends with: one table and one picture of its models, and how a model card has them loaded."""

import csv
import io
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkd.training.runs import write_text

AVERAGE = "average"
# Okabe and Ito: told apart by colour-blind readers
_COLOURS = ("#0072B2", "#999999", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("s", "o", "D", "^", "v", "P", "X", "*")


@dataclass(frozen=True)
class ModelResult:
    """One row of the table.

    ``scores``: for every seed, each task's score, 0..100. ``parameters`` counts all, ``inner_parameters`` all
    but the word embeddings, as the paper does. ``latency`` is the median time of one sentence or pair, in seconds.
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


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Number of all parameters, and of those that are not word embeddings."""
    total = sum(parameter.numel() for parameter in model.parameters())
    return total, total - sum(parameter.numel() for parameter in model.get_input_embeddings().parameters())


@torch.inference_mode()
def measure_latency(model: nn.Module, batches: Sequence[Mapping[str, Any]], rounds: int = 3) -> float:
    """Median time in seconds of one forward pass per batch, after a round to warm up; give batches of one row."""
    device = next(model.parameters()).device
    inputs = [
        {name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items() if name != "labels"}
        for batch in batches
    ]
    training = model.training
    model.eval()
    times = []
    for round_number in range(rounds + 1):
        for batch in inputs:
            start = time.perf_counter()
            model(**batch)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if round_number > 0:
                times.append(time.perf_counter() - start)
    model.train(training)
    return statistics.median(times)


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
    header = ["", *tasks, AVERAGE, "parameters (inner)", "latency", "speed-up"]
    body = []
    for result in results:
        scores = [_mean_and_spread_text(result, column) for column in (*tasks, AVERAGE)]
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
    """A line of points per task and for the average, a bar for the spread over seeds, the numbers beside it."""
    from matplotlib.figure import Figure

    columns = [*tasks, AVERAGE]
    height = 1.3 + 0.2 * len(results) + 0.55 * len(columns)
    figure = Figure(figsize=(9.0, height), layout="constrained")
    axes, numbers = figure.subplots(1, 2, sharey=True, width_ratios=(5, 0.9 * len(results)))
    heights = [float(len(columns) - i) for i in range(len(columns))]
    for index, (result, colour, marker) in enumerate(zip(results, cycle(_COLOURS), cycle(_MARKERS), strict=False)):
        points = [result.mean_and_spread(column) for column in columns]
        means, spreads = [mean for mean, _ in points], [spread or 0.0 for _, spread in points]
        apart = min(0.2, 0.8 / len(results))  # so that none hides another
        raised = [height + apart * ((len(results) - 1) / 2 - index) for height in heights]
        label = f"{result.name}: {result.parameters / 1e6:.1f} M parameters, {1e3 * result.latency:.1f} ms a row"
        style: dict[str, Any] = {"fmt": marker, "color": colour, "markersize": 8, "capsize": 3}
        axes.errorbar(means, raised, xerr=spreads, label=label, **style)
        heading = result.name.partition(",")[0].replace("student ", "").replace(" ", "\n")
        texts = {len(columns) + 0.8: heading, **{h: f"{mean:.1f}" for h, mean in zip(heights, means, strict=True)}}
        for height, text in texts.items():
            numbers.text(index, height, text, color=colour, ha="center", va="center")
    numbers.set_xlim(-0.5, len(results) - 0.5)
    numbers.set_axis_off()
    seeds = max(len(result.scores) for result in results)
    spread = f"bars: ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed: the spread is not known"
    axes.set_xlabel(f"score on the validation set, of 100; {spread}")
    axes.set_title(title, loc="left", pad=24)
    axes.set_yticks(heights, columns)
    axes.set_ylim(0.5, len(columns) + 0.5)
    axes.axhline(1.5, color="#BBBBBB", linewidth=0.8, linestyle=":")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(color="#EEEEEE")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower left", frameon=False, fontsize="small")
    temporary = path.with_name(f"{path.stem}.tmp{os.getpid()}.png")
    try:
        figure.savefig(temporary, dpi=150)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def usage(task: str) -> str:
    """The part of a model card that shows how the model is loaded."""
    return f"""```python
import fastkd.students  # makes the Auto classes know the model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
logits = model(**tokenizer("a fine film", return_tensors="pt"), task="{task}").logits
```"""
