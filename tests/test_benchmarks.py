"""The benchmark bed: a wrong provider is left out, all providers get equal turns, and a run keeps what it should."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import __main__ as program
from benchmarks import results
from benchmarks.effort import Effort
from benchmarks.measure import CALLS_PER_OVERHEAD_SAMPLE, MAX_ROUNDS, bind, faults, interleave
from benchmarks.memory import peak_meter
from benchmarks.registry import FORWARD, FORWARD_BACKWARD, Case, Provider, load_benchmarks

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


def fault(benchmark, function, direction=FORWARD_BACKWARD, case=CASE):
    inputs = benchmark.inputs(case)
    calls = {"rival": bind(Provider("rival", function), case, inputs, direction)}
    return faults(benchmark, case, inputs, direction, calls).get("rival")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direction", [FORWARD, FORWARD_BACKWARD])
def test_right_providers_pass(benchmark, direction, dtype):
    case = replace(CASE, dtype=dtype)
    assert fault(benchmark, benchmark["fastkd"].function, direction, case) is None
    assert fault(benchmark, benchmark["eager"].function, direction, case) is None


@pytest.mark.parametrize("function", WRONG.values(), ids=WRONG)
def test_wrong_providers_are_found(benchmark, function):
    assert fault(benchmark, function).startswith("rival is wrong for kl_div 16x50 float32 on cpu (forward+backward): ")


def measured(benchmark, monkeypatch, folder, **functions):
    """The exit code of a run with these providers beside plain torch."""
    providers = [Provider(name, function) for name, function in functions.items()]
    monkeypatch.setattr(benchmark, "cases", [CASE])
    monkeypatch.setattr(benchmark, "providers", [benchmark["eager"], *providers])
    monkeypatch.setattr(program, "FULL", Effort(seconds=0.0, rounds=3, whole=False))
    return program.main(["kl_div", "--device", "cpu", "--output", str(folder)])


def test_nothing_is_reported_where_fastkd_is_wrong(benchmark, monkeypatch, capsys, tmp_path):
    assert measured(benchmark, monkeypatch, tmp_path, fastkd=WRONG["no T squared"]) == 1
    assert "fastkd is wrong" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_rival_is_left_out(benchmark, monkeypatch, capsys, tmp_path):
    right, wrong = benchmark["fastkd"].function, WRONG["no T squared"]
    assert measured(benchmark, monkeypatch, tmp_path, fastkd=right, rival=wrong) == 0
    assert "left out: rival is wrong for kl_div 16x50" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.csv")
    assert {row["provider"] for row in results.read(path)} == {"eager", "fastkd"}


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
