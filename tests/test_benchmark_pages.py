"""What the benchmarks leave: rows of a CSV, the pictures of it, and the tables of the pages."""

import csv
from dataclasses import replace

import pytest
import torch

from benchmarks import overview, plot, results, summary
from benchmarks.registry import FORWARD, FORWARD_BACKWARD, STEP, Case

CASE = Case("kl_div", (16, 50), torch.float32, "small", options={"temperature": 2.0})
MACHINE = {"machine": "Some(R) CPU, 2 cores, AVX2", "cores": "2", "threads": "2", "torch": "2.13.0", "op": "kl_div"}


@pytest.fixture
def rows():
    samples = {
        "eager": [0.030, 0.010, 0.020, 0.040, 0.050],
        "fastkd": [0.002] * 5,
        "limit:add": [0.002] * 5,
        "limit:add-huge-pages": [0.001] * 5,
    }
    peaks = {"eager": 40_000_000, "fastkd": 4_000_000, "limit:add": 4_000_000}
    return results.make_rows(MACHINE, CASE, FORWARD_BACKWARD, samples, peaks)


def test_rows_hold_medians_percentiles_and_the_ratio_to_the_fastest_limit(rows):
    eager, fastkd, *_ = rows
    assert [float(eager[key]) for key in ("median_ms", "p20_ms", "p80_ms")] == pytest.approx([30.0, 18.0, 42.0])
    assert (eager["ratio_to_limit"], fastkd["ratio_to_limit"]) == ("30", "2")
    assert (eager["rounds"], eager["peak_bytes"], rows[-1]["peak_bytes"]) == ("5", "40000000", "")
    assert (eager["shape"], eager["dtype"], eager["options"]) == ("16x50", "float32", "temperature=2.0")


def test_the_table_compares_with_each_rival_and_the_fastest_limit(rows):
    header, _, line = results.markdown_table(rows).splitlines()
    assert header == (
        "| problem | eager | fastkd | limit | faster than eager | time / limit | peak MB: eager / fastkd / limit |"
    )
    assert line == ("| 16 × 50 float32, forward+backward | 30 ms | 2 ms | 1 ms | 15× | 2× | 40 / 4 / – |")


def test_without_a_limit_the_ratio_stays_empty():
    rows = results.make_rows(MACHINE, CASE, FORWARD, {"fastkd": [2e-5]}, {})
    assert rows[0]["ratio_to_limit"] == ""
    assert results.markdown_table(rows).splitlines()[-1] == "| 16 × 50 float32, forward | 20 µs |  |  |"


def test_a_failed_write_leaves_the_old_results(rows, tmp_path, monkeypatch):
    path = results.path_of(rows, tmp_path)
    assert path.name == "kl_div-some-cpu-2-cores-avx2.csv"
    results.write(rows, path)
    assert results.read(path) == rows

    def full_disk(self, rows):
        raise OSError("No space left on device")

    monkeypatch.setattr(csv.DictWriter, "writerows", full_disk)
    with pytest.raises(OSError, match="No space left"):
        results.write(rows[:1], path)
    assert results.read(path) == rows


def test_the_picture_is_drawn_from_the_csv_alone(rows, tmp_path):
    from matplotlib.image import imread

    path = tmp_path / "kl_div.csv"
    results.write(rows, path)
    picture = imread(plot.draw(path))[:, :, :3]
    blue = torch.tensor([0.0, 0x72 / 255, 0xB2 / 255])
    grey = torch.tensor([0xBB / 255] * 3)
    fastkd, eager = (((torch.tensor(picture) - colour).abs().amax(-1) < 0.01).sum().item() for colour in (blue, grey))
    assert eager / fastkd == pytest.approx(15, rel=0.25)


def test_a_picture_leaves_no_system_out(rows, tmp_path):
    results.write([*rows, rows[0] | {"provider": "newcomer"}], tmp_path / "kl_div.csv")
    with pytest.raises(ValueError, match=r"has newcomer; .* needs a colour"):
        plot.draw(tmp_path / "kl_div.csv")


def test_a_brief_table_has_the_first_shape_of_each_op_in_all_dtypes(rows):
    wide = [row | {"shape": "64x50"} for row in rows]
    lines = [row | {"provider": "compile"} for row in (rows[0], wide[0])]
    half = [row | {"dtype": "bfloat16"} for row in (*rows, lines[0])]
    ops = {"kl_div": [*rows, lines[0], *half, *wide, lines[1]]}
    cells = [
        [cell.strip() for cell in line.split("|")[2:4]] for line in summary.table(ops, brief=True).splitlines()[2:]
    ]
    assert cells == [["16 × 50", "float32"], ["16 × 50", "bfloat16"]]
    assert len(summary.table(ops).splitlines()) == 2 + 3


def test_the_pages_say_what_the_results_say():
    readme, figures = (page.read_text("utf-8") for page in summary.PAGES)
    assert "| `kl_div` |" in summary.BLOCK.search(readme)[0]
    assert "| mkd 1 × 24 (1 thread) |" in summary.ANSWERS.search(readme)[0]
    assert "| 1 × 32 × 300 × 256 (1 thread) |" in summary.ANSWERS.search(figures)[0]
    for page in (readme, figures):
        assert summary.rewritten(page, summary.read_all()) == page


def test_the_machine_with_most_ops_and_of_equals_the_one_measured_last_is_told_from_the_others():
    dates = {"a": "2026-01", "b": "2026-03", "c": "2026-02"}
    found = {name: {"kl_div": [{"date": date}]} for name, date in dates.items()}
    assert list(summary.shown(found, other=False)) == ["b"]
    assert list(summary.shown(found, other=True)) == ["a", "c"]
    found["c"]["mse"] = [{"date": "2026-01"}]
    assert list(summary.shown(found, other=False)) == ["c"]


def test_the_summary_has_a_line_for_each_problem_and_leaves_out_what_was_not_measured(rows, tmp_path):
    overhead = results.make_rows(
        MACHINE,
        replace(CASE, shape=(3, 2)),
        FORWARD_BACKWARD,
        {"eager": [3e-5], "compile": [6e-5], "fastkd": [2e-5]},
        {},
    )
    compiled = [row | {"provider": "compile", "median_ms": "5"} for row in rows[:1]]
    masked = [row | {"options": "temperature=1.0"} for row in overhead]
    results.write([*rows, *compiled, *masked], tmp_path / "kl_div-some-cpu.csv")
    (tmp_path / "mkd.csv").write_text("model,score\nteacher,86.8\n")
    ((machine, ops),) = summary.read_all(tmp_path).ops.items()
    assert machine == MACHINE["machine"]
    assert summary.table(ops).splitlines()[2:] == [
        "| `kl_div` | 16 × 50 (temperature=2.0) | float32 | 2 ms | 15× | 2.5× | 2× | 40 / 40 / 4 |",
        "| `kl_div` | 3 × 2 (temperature=1.0) | float32 | 20 µs | 1.5× | 3× |  |  |",
    ]


def test_the_machine_of_most_pages_comes_first(rows, tmp_path):
    for machine, ops in {"a": ["kl_div"], "b": ["kl_div", "mse"]}.items():
        for op in ops:
            results.write([row | {"machine": machine, "op": op} for row in rows], tmp_path / f"{op}-{machine}.csv")
    assert list(summary.read_all(tmp_path).ops) == ["b", "a"]


def test_steps_have_a_table_of_their_own(tmp_path):
    case = replace(CASE, op="train_step", shape=(32, 24), options={"method": "mixkd"})
    seconds = {"eager": [1.0], "fastkd": [0.8], "limit:passes": [0.64]}
    results.write(
        results.make_rows(MACHINE, case, STEP, seconds, {"eager": 10**8, "fastkd": 8 * 10**7}), tmp_path / "a.csv"
    )
    found = summary.read_all(tmp_path)
    assert found.ops == found.answers == {}
    text = summary.rewritten("<!-- steps: x -->\nold<!-- end of steps -->", found)
    assert "| mixkd | 32 × 24 | 1 s | 800 ms | 40 | 1.25× | 1.25× | 100 / 80 |" in text
    assert "old" not in text


def test_the_pictures_of_all_ops_show_what_was_measured(rows, tmp_path):
    larger = [row | {"shape": "64x50", "median_ms": f"{4 * float(row['median_ms'])}"} for row in rows]
    paths = overview.draw(MACHINE["machine"], {"kl_div": [*rows, *larger]}, tmp_path)
    assert [path.name for path in paths] == [
        f"{name}-some-cpu-2-cores-avx2.png" for name in ("speed", "memory", "limit")
    ]
    problem, _ = results.problems([*rows, *larger])
    assert [quantity.of(problem.found, "fastkd") for quantity in overview.QUANTITIES] == [15.0, 4.0, 50.0]
    assert [quantity.of(problem.found, "eager") for quantity in overview.QUANTITIES[:2]] == [1.0, 40.0]
