"""The benchmark bed: a wrong provider is refused, all providers get equal turns, and the rows say what was seen."""

import csv
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import __main__ as program
from benchmarks import overview, plot, results, summary
from benchmarks.measure import CALLS_PER_OVERHEAD_SAMPLE, MAX_ROUNDS, WrongResult, bind, check, interleave
from benchmarks.memory import peak_meter
from benchmarks.registry import FORWARD, FORWARD_BACKWARD, STEP, Case, Provider, load_benchmarks

CASE = Case("kl_div", (16, 50), torch.float32, "small", options={"temperature": 2.0})


@pytest.fixture(autouse=True)
def _plain_torch_will_do(monkeypatch):
    monkeypatch.setenv("FASTKD_STRICT", "0")


@pytest.fixture
def benchmark():
    return load_benchmarks()["kl_div"]


def divergence(student_logits, teacher_logits, temperature):
    student, teacher = F.log_softmax(student_logits / temperature, -1), F.softmax(teacher_logits / temperature, -1)
    return F.kl_div(student, teacher, reduction="batchmean") * temperature**2


class OffByAnEighth(torch.autograd.Function):
    """A right value with a wrong gradient."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.125


WRONG = {
    "no T squared": lambda **a: divergence(**a) / 4,
    "roles swapped": lambda student_logits, teacher_logits, temperature: divergence(
        teacher_logits + 0 * student_logits, student_logits.detach(), temperature
    ),
    "mean over all elements": lambda **a: divergence(**a) / 50,
    "off by a ten-thousandth": lambda **a: divergence(**a) * 1.0001,
    "not a number": lambda **a: divergence(**a) * float("nan"),
    "gradient off": lambda **a: OffByAnEighth.apply(divergence(**a)),
}


def checked(benchmark, function, direction=FORWARD_BACKWARD, case=CASE):
    inputs = benchmark.inputs(case)
    check(benchmark, case, inputs, direction, {"rival": bind(Provider("rival", function), case, inputs, direction)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direction", [FORWARD, FORWARD_BACKWARD])
def test_right_providers_pass(benchmark, direction, dtype):
    case = replace(CASE, dtype=dtype)
    checked(benchmark, benchmark["fastkd"].function, direction, case)
    checked(benchmark, benchmark["eager"].function, direction, case)


@pytest.mark.parametrize("function", WRONG.values(), ids=WRONG)
def test_wrong_providers_are_refused(benchmark, function):
    with pytest.raises(WrongResult, match=r"rival is wrong for kl_div 16x50 float32 on cpu \(forward\+backward\)"):
        checked(benchmark, function)


def test_a_wrong_result_is_not_reported(benchmark, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(benchmark, "cases", [CASE])
    monkeypatch.setattr(benchmark, "providers", [benchmark["eager"], Provider("rival", WRONG["no T squared"])])
    assert program.main(["kl_div", "--device", "cpu", "--output", str(tmp_path)]) == 1
    assert "rival is wrong" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_bound_calls_do_what_their_direction_says(benchmark):
    inputs = benchmark.inputs(CASE)
    eager = benchmark["eager"]
    (loss,) = bind(eager, CASE, inputs, FORWARD)()
    assert not loss.requires_grad
    call = bind(eager, CASE, inputs, FORWARD_BACKWARD)
    _, gradient = call()
    student = inputs["student_logits"].detach().requires_grad_()
    divergence(student, inputs["teacher_logits"], 2.0).backward()
    torch.testing.assert_close(gradient, student.grad)
    assert inputs["student_logits"].grad is None
    (total,) = bind(benchmark["limit:add"], CASE, inputs, FORWARD_BACKWARD)()
    assert not total.requires_grad
    assert torch.equal(total, inputs["student_logits"].detach() + inputs["teacher_logits"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_limit_writes_every_byte_whatever_the_pages(benchmark, dtype):
    case = replace(CASE, shape=(1024, 2048), dtype=dtype)
    inputs = benchmark.inputs(case)
    small, huge = (bind(benchmark[f"limit:{n}"], case, inputs, FORWARD_BACKWARD)() for n in ("add", "add-huge-pages"))
    assert small[0].nbytes == inputs["teacher_logits"].nbytes
    assert torch.equal(small[0], huge[0])


def test_rounds_give_every_provider_the_same_number_of_turns_in_changing_order():
    turns = []
    calls = {name: lambda name=name: turns.append(name) for name in "abc"}
    samples = interleave(CASE, calls, budget=1.0, least=5)
    assert {len(values) for values in samples.values()} == {MAX_ROUNDS}
    rounds = [turns[i : i + 3] for i in range(3, len(turns), 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) == 6


def test_rounds_follow_the_budget_and_overhead_is_measured_over_many_calls():
    turns = []
    samples = interleave(replace(CASE, overhead=True), {"a": lambda: turns.append("a")}, budget=0.0, least=5)
    assert len(samples["a"]) == 5
    assert len(turns) == CALLS_PER_OVERHEAD_SAMPLE * (1 + 5)


def test_peak_memory_is_that_of_the_call():
    megabyte = 1024 * 1024
    case = replace(CASE, shape=(8192, 128))
    with peak_meter("cpu", threads=1) as peaks:
        taken = peaks(case, FORWARD_BACKWARD, ["eager", "limit:add"])
    assert abs(taken["limit:add"] - 4 * megabyte) < megabyte
    assert taken["eager"] > 3 * taken["limit:add"]


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


def test_the_pages_say_what_the_results_say():
    readme, figures = (page.read_text("utf-8") for page in summary.PAGES)
    assert "| `kl_div` |" in summary.BLOCK.search(readme)[0]
    assert "| mkd 1 × 24 (1 thread) |" in summary.ANSWERS.search(readme)[0]
    assert "| 1 × 32 × 300 × 256 (1 thread) |" in summary.ANSWERS.search(figures)[0]
    for page in (readme, figures):
        assert summary.rewritten(page, summary.read_all()) == page


def test_the_machine_measured_last_is_told_from_the_others():
    dates = {"a": "2026-01", "b": "2026-03", "c": "2026-02"}
    dated = {name: {"kl_div": [{"date": date}]} for name, date in dates.items()}
    assert list(summary.by_age(dated, older=False)) == ["b"]
    assert list(summary.by_age(dated, older=True)) == ["a", "c"]


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


def test_a_quick_run_takes_the_first_shape_in_all_dtypes(benchmark):
    quick = program.select(benchmark, "cpu", None, quick=True)
    assert [(case.size, case.dtype) for case in quick] == [
        ("1024x30522", torch.float32),
        ("1024x30522", torch.bfloat16),
    ]
    assert program.select(benchmark, "cpu", "32x2", quick=True)[0].size == "32x2"
    assert program.select(benchmark, "cpu", None, quick=False) == [c for c in benchmark.cases if c.device == "cpu"]


def test_a_full_run_keeps_rows_and_picture_and_a_quick_one_nothing(benchmark, monkeypatch, capsys, tmp_path):
    case = replace(CASE, shape=(1024, 2048))
    monkeypatch.setattr(benchmark, "cases", [case])
    monkeypatch.setattr(benchmark, "providers", [p for p in benchmark.providers if not p.compiled])
    monkeypatch.setattr(program, "FULL", program.FULL._replace(seconds=0.0))
    monkeypatch.setattr(program, "QUICK", program.QUICK._replace(seconds=0.0))
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    threads = str(torch.get_num_threads())
    assert program.main(["kl_div", "--device", "cpu", "--quick", "--threads", threads]) == 0
    assert not (tmp_path / "results").exists()
    assert capsys.readouterr().out.splitlines()[2].endswith(" |  |"), "a quick run measures no memory"
    assert program.main(["kl_div", "--device", "cpu", "--threads", threads]) == 0
    output = capsys.readouterr().out
    assert "liger left out: liger-kernel's Triton kernels run on GPUs only" in output
    (table,) = (tmp_path / "results").glob("*.csv")
    assert table.with_suffix(".png").exists()
    rows = results.read(table)
    assert [row["provider"] for row in rows] == ["eager", "fastkd", "limit:add", "limit:add-huge-pages"]
    assert all(float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"]) for row in rows)
    assert {row["threads"] for row in rows} == {threads}
    assert all(int(row["peak_bytes"]) > 4e6 for row in rows)
    assert min(float(row["ratio_to_limit"]) for row in rows if results.is_limit(row)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kl_dif"], "no benchmark is called 'kl_dif'; there are: "),
        (["--threads", "0"], "--threads is 0; it must be at least 1"),
        (["kl_div", "--device", "cpu", "--shapes", "7x7"], "kl_div has no case '7x7' on cpu; it has: 1024x30522"),
    ],
)
def test_bad_arguments_say_what_is_allowed(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(arguments)
    assert message in capsys.readouterr().err + str(stop.value)
