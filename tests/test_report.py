"""The final table and picture, latency, and runs that are done once."""

import csv
import json
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image

from fastkd.students import BiAttentiveLSTM, BiAttentiveLSTMConfig
from fastkd.training import report
from fastkd.training.report import ModelResult, count_parameters, measure_latency, write_report
from fastkd.training.runs import MARKER, finished_or

TASKS = ["sst2", "rte"]
RESULTS = [
    ModelResult("teacher", [{"sst2": 90.0, "rte": 70.0}], 22_700_000, 11_000_000, 0.0100),
    ModelResult(
        "student with KD",
        [{"sst2": 80.0, "rte": 60.0}, {"sst2": 82.0, "rte": 62.0}, {"sst2": 84.0, "rte": 58.0}],
        12_900_000,
        1_200_000,
        0.0025,
    ),
]


def test_table_has_means_spreads_and_speed_ups(tmp_path):
    table = write_report(tmp_path, RESULTS, TASKS, "a title")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert cells[0][1:5] == ["sst2", "rte", "average", "parameters (inner)"]
    assert cells[2] == ["teacher", "90.0", "70.0", "80.0", "22.7 M (11.0 M)", "10.00 ms", "1.0x"]
    # Averages of the seeds are 70, 72 and 71: their spread is 1, not the mean of the tasks' spreads.
    assert cells[3][1:4] == ["82.0 ± 2.0", "60.0 ± 2.0", "71.0 ± 1.0"]
    assert cells[3][4:] == ["12.9 M (1.2 M)", "2.50 ms", "4.0x"]
    assert len({len(line) for line in table.splitlines()}) == 1
    assert (tmp_path / "table.md").read_text() == f"{table}\n"


def test_csv_holds_the_numbers_of_the_table(tmp_path):
    write_report(tmp_path, RESULTS, TASKS, "a title")
    with open(tmp_path / "table.csv", newline="") as file:
        teacher, student = csv.DictReader(file)
    assert teacher["sst2_std"] == ""
    assert student["seeds"] == "3"
    assert float(student["average_mean"]) == pytest.approx(71)
    assert float(student["average_std"]) == pytest.approx(1)
    assert float(student["latency_ms"]) == pytest.approx(2.5)


@pytest.mark.parametrize(("tasks", "panels"), [(TASKS, [*TASKS, "average"]), (TASKS[:1], TASKS[:1])])
@pytest.mark.parametrize("models", [2, 11])
def test_picture_shows_every_model_in_every_panel(tasks, panels, models):
    results = [RESULTS[0], *(replace(RESULTS[1], name=f"student {index}") for index in range(1, models))]
    figure = report.figure_of(results, tasks, "a title")
    names = [label.get_text().partition("\n")[0] for label in figure.axes[0].get_yticklabels()]
    assert names == [result.name for result in results]
    shown = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title(loc="left") for axes in shown] == panels
    means = {"sst2": ["90.0", "82.0"], "rte": ["70.0", "60.0"], "average": ["80.0", "71.0"]}
    for axes, panel in zip(shown, panels, strict=True):
        teacher, student = means[panel]
        assert [text.get_text() for text in axes.texts] == [teacher, *[student] * (models - 1)]
        assert [bar.lines[0].get_xdata()[0] for bar in axes.containers][:2] == [float(teacher), float(student)]


def test_picture_is_not_cut(tmp_path):
    report.draw(tmp_path / "scores.png", RESULTS, TASKS[:1], "a title of some length, as one panel has them")
    with Image.open(tmp_path / "scores.png") as image:
        pixels = image.convert("L")
    edges = [(0, 0, 1, pixels.height), (pixels.width - 1, 0, pixels.width, pixels.height)]
    assert all(pixels.crop(edge).getextrema() == (255, 255) for edge in edges)


class Sleeper(torch.nn.Module):
    """Takes the time it is given, and a third of a second more on its first call."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.calls = []

    def forward(self, seconds, task):
        self.calls.append((self.training, task))
        time.sleep(float(seconds) + (0.3 if len(self.calls) == 1 else 0))


def test_latency_is_the_median_in_evaluation_mode():
    model = Sleeper().train()
    batches = [{"seconds": torch.tensor(s), "task": "rte", "labels": 0} for s in (0.0, 0.02, 0.3)]
    assert 0.02 <= measure_latency(model, batches, rounds=1) < 0.3
    assert model.calls == [(False, "rte")] * 6
    assert model.training


def test_latency_leaves_out_a_round_to_warm_up():
    assert measure_latency(Sleeper(), [{"seconds": torch.tensor(0.0), "task": "rte"}], rounds=1) < 0.2


def test_latency_of_a_row_is_its_least():
    class Disturbed(Sleeper):
        def forward(self, seconds, task):
            super().forward(0.2 * (len(self.calls) not in (4, 5)), task)

    rows = [{"seconds": torch.tensor(0.0), "task": "rte"}] * 2
    assert measure_latency(Disturbed(), rows, rounds=3) < 0.1


def test_inner_parameters_leave_out_the_word_embeddings():
    model = BiAttentiveLSTM(BiAttentiveLSTMConfig.preset("small", vocab_size=100))
    total, inner = count_parameters(model)
    assert total - inner == 100 * 384
    assert total == sum(parameter.numel() for parameter in model.parameters())


def test_a_finished_run_is_not_computed_again(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"sst2": 80.0}

    configuration = {"seed": 1, "tasks": ("sst2", "rte")}
    for _ in range(2):
        assert finished_or(tmp_path / "run", configuration, compute) == {"sst2": 80.0}
    assert len(calls) == 1
    with pytest.raises(ValueError, match=r"finished run with other settings \(seed 1 there, 2 here\)"):
        finished_or(tmp_path / "run", {**configuration, "seed": 2}, compute)


def test_a_run_that_fails_leaves_no_marker(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finished_or(tmp_path, {}, interrupted)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError, match="JSON serializable"):
        finished_or(tmp_path, {}, lambda: {"score": object()})
    assert not (tmp_path / MARKER).exists()
    finished_or(tmp_path, {}, lambda: {"score": 1})
    assert json.loads((tmp_path / MARKER).read_text())["result"] == {"score": 1}
