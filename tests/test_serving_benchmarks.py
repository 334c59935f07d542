"""The benchmarks of answers: wrong systems are refused, all get their turns, and rows say what was seen."""

import os
import signal

import numpy as np
import pytest
import torch

from benchmarks import __main__ as program
from benchmarks import bilstm, plot, results, roofline, service, serving, serving_report, student, summary
from benchmarks.effort import Effort
from benchmarks.latency import bursts
from benchmarks.registry import load_benchmarks

ONCE = Effort(0.0, 1, whole=False)
RAGGED = serving.Case("bilstm", "ragged-3x6x5", (4, 2, 1), (6, 5), "small")
DENSE = serving.Case("bilstm", "2x3x6x5", (3, 3), (6, 5), "small")
TINY = {
    "vocab_size": 40,
    "embedding_size": 8,
    "projection_size": 6,
    "hidden_size_per_direction": 5,
    "head_size": 7,
}
CPU = "Some(R) CPU, 2 cores, AVX2"
MACHINE = {"machine": CPU, "cores": "2", "torch": "2.13.0", "onnxruntime": "1.31", "openvino": ""}


@pytest.fixture(autouse=True)
def _few_and_short_turns(monkeypatch):
    monkeypatch.setenv("FASTKD_STRICT", "0")
    monkeypatch.setattr(roofline, "SECONDS", 0.001)
    monkeypatch.setattr(roofline, "TURNS", 2)
    roofline.peaks_of.cache_clear()


@pytest.fixture
def tiny_student(monkeypatch):
    monkeypatch.setattr(student, "CONFIGS", {"shared": student.CONFIGS["shared"] | TINY, "mkd": TINY})
    student.make_student.cache_clear()
    yield
    student.make_student.cache_clear()


def case_of_a_student(config="shared", lengths=(4, 2, 1)):
    return serving.Case("student", f"{config} tiny", lengths, (), "small")


def able(page, case):
    return [s for s in page.systems if s.objection(case) is None and not s.reference]


@pytest.mark.parametrize("case", [RAGGED, DENSE], ids=lambda case: case.size)
def test_every_system_computes_the_same_layer(case):
    layer = bilstm.Layer(case)
    assert layer.truth.shape == (sum(case.lengths), 10)
    for system in able(bilstm.SERVING, case):
        error = bilstm.SERVING.check(case, layer, system, system.start(layer, 1))
        assert error < {"float32": 1e-6, "bfloat16": 1e-3, "int8": 2e-2}[system.precision], system.name


@pytest.mark.parametrize("lengths", [(4, 2, 1), (3, 3)])
@pytest.mark.parametrize("config", ["shared", "mkd"])
def test_every_system_computes_the_same_student(tiny_student, config, lengths):
    case = case_of_a_student(config, lengths)
    problem = student.Student(case)
    assert problem.truth.shape == (len(lengths), 2)
    for system in able(student.SERVING, case):
        student.SERVING.check(case, problem, system, system.start(problem, 1))


def test_a_batch_is_ragged_as_it_says():
    lengths = bilstm.ragged(128)
    assert list(lengths) == sorted(lengths, reverse=True)
    assert 3 <= min(lengths) <= max(lengths) <= 64
    assert np.mean(lengths) == pytest.approx(20, rel=0.1)


WRONG = {
    "directions swapped": lambda states: np.roll(states, states.shape[1] // 2, axis=1),
    "off by a tenth": lambda states: states + 0.1,
    "not a number": lambda states: states * np.nan,
    "a row too few": lambda states: states[1:],
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_system_is_refused_and_nothing_reported(monkeypatch, capsys, tmp_path, wrong):
    def start(layer, threads):
        return lambda: wrong(layer.truth)

    rival = serving.System("rival", "int8", start, serving.no_objection, reference=False)
    monkeypatch.setattr(bilstm.SERVING, "cases", [DENSE])
    monkeypatch.setattr(bilstm.SERVING, "systems", [rival])
    assert program.main(["bilstm", "--device", "cpu", "--quick", "--output", str(tmp_path)]) == 1
    assert "error: rival is wrong for bilstm 2x3x6x5: off by" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_bursts_give_every_system_a_turn_in_each_round():
    turns = []
    samples = bursts({name: lambda name=name: turns.append(name) for name in "abc"}, budget=0.0, least=4)
    assert {name: len(seconds) for name, seconds in samples.items()} == dict.fromkeys("abc", 80)
    rounds = ["".join(turns[at::21][:3]) for at in range(6, 6 + 4 * 63, 63)]
    bursts_of_rounds = [turns[6 + 63 * i : 6 + 63 * (i + 1)] for i in range(4)]
    assert all(len(set(burst[at : at + 21])) == 1 for burst in bursts_of_rounds for at in (0, 21, 42))
    assert len(set(rounds)) > 1


class FlatPeaks(roofline.Peaks):
    """1000 operations and 100 bytes per second."""

    def _operations(self, precision):
        return 1000.0

    def _bandwidth(self, size):
        return 100.0


def test_a_product_takes_its_operations_or_one_reading_of_its_weights():
    peaks = FlatPeaks(threads=1)
    assert peaks.product(rows=1, weights=50, size=4, precision="float32") == 2.0
    assert peaks.product(rows=100, weights=50, size=4, precision="float32") == 10.0
    # Three and one tokens, sizes 2 to 1: the input's product reads 8 weights, each of three steps reads 4.
    assert peaks.bilstm([3, 1], inputs=2, hidden=1, precision="float32") == pytest.approx(2 * (0.32 + 3 * 0.16))
    assert peaks.bilstm([3, 1], inputs=2, hidden=1, precision="bfloat16") == pytest.approx(2 * (0.32 + 3 * 0.08))
    assert peaks.bilstm([3, 1], inputs=2, hidden=1, precision="int8") == pytest.approx(2 * (0.08 + 3 * 0.04))


@pytest.mark.skipif(roofline.compiler() is None, reason="the peaks need a C++ compiler")
def test_peaks_are_of_this_machine(monkeypatch):
    monkeypatch.setattr(roofline, "TURNS", 25)  # a busy machine must leave one of them alone
    peaks = roofline.Peaks(threads=1)
    matrix = torch.randn(256, 256)
    seconds = min(bursts({"product": lambda: matrix @ matrix}, 0.0, 3)["product"])
    threads = torch.get_num_threads()
    assert peaks.operations("float32") * threads > 0.3 * 2 * 256**3 / seconds
    assert peaks.operations("int8") == 0 or peaks.operations("int8") > peaks.operations("float32")
    assert peaks.bandwidth(16384) > 1e9


def test_rows_hold_percentiles_and_tails_only_of_many_calls():
    few = serving.make_row("bilstm", "1x2", 2, "torch", [0.001, 0.002, 0.003], limit=0.001, error=1.23e-7)
    assert (few["median_ms"], few["p99_ms"], few["ratio_to_limit"], few["error"]) == ("2", "", "2", "1.2e-07")
    assert few["options"] == "2 threads"
    many = serving.make_row("bilstm", "1x2", 1, "torch", np.linspace(0, 0.001, 201), neighbour="busy")
    assert (many["p95_ms"], many["p99_ms"], many["ratio_to_limit"]) == ("0.95", "0.99", "")
    assert many["options"] == "busy neighbour"


@pytest.fixture
def rows():
    times = {"torch": 8, "torch int8": 4, "ORT": 6, "BERT-base torch": 0.5}
    times |= {"fastkd float32": 3, "fastkd bfloat16": 2, "fastkd int8": 1}
    answers = [
        serving.make_row("student", "mkd 1x24", threads, name, [ms / threads / 1e3], limit=5e-4, error=1e-7)
        for threads in (1, 2)
        for name, ms in times.items()
    ]
    beside = serving.make_row("student", "mkd 1x24", 2, "torch", [0.5] * 200, neighbour="busy")
    start = serving.make_row("student", "start", 1, "torch", [2.0], resident_bytes=300_000_000, file_bytes=16_000_000)
    return [MACHINE | row for row in (*answers, beside, start)]


def test_the_tables_say_what_was_measured(rows):
    answers, beside, starts = serving_report.markdown(rows).split("\n\n")
    assert answers.splitlines()[2] == "| mkd 1 × 24 (1 thread) | torch | 8 ms |  |  | 6 % | 1e-07 |"
    assert beside.splitlines()[2:] == ["| busy neighbour | torch | 2 | 500 ms | 500 ms | 200 |"]
    assert starts.splitlines()[2:] == ["| torch | 2 s | 300 | 16 |"]


def test_the_summary_compares_with_the_fastest_of_those_that_compute_the_same(rows, tmp_path):
    results.write(rows, tmp_path / "student-some-cpu.csv")
    found = summary.read_all(tmp_path)
    assert found.ops == found.steps == {}
    machines = found.answers
    text = summary.rewritten("<!-- answers of student: x -->\nold<!-- end of answers -->", found)
    assert f"{CPU}; torch 2.13.0, onnxruntime 1.31:" in text
    one, two = text.splitlines()[6:8]
    problem, peers = "| mkd 1 × 24 (1 thread) | 3 ms | 2 ms | 1 ms |", "6 ms (ORT) | 4 ms (torch int8) |"
    assert one == f"{problem} {peers} 4× | 2× | 50 % |"
    assert "(2 threads) | 1.5 ms" in two
    assert "old" not in text
    assert summary.answer_tables(machines, "bilstm") == ""


def test_a_run_keeps_rows_and_a_picture_of_them_alone(monkeypatch, capsys, tmp_path):
    load_benchmarks()
    monkeypatch.setattr(bilstm.SERVING, "cases", [RAGGED])
    monkeypatch.setattr(program, "QUICK", ONCE)
    assert program.main(["bilstm", "--device", "cpu", "--quick", "--threads", "2", "--output", str(tmp_path)]) == 0
    assert "OpenVINO left out: its backward direction starts in the padding" in capsys.readouterr().out
    (table,) = tmp_path.glob("*.csv")
    found = results.read(table)
    assert [row["options"] for row in found if row["provider"] == "fastkd int8"] == ["1 thread", "2 threads"]
    assert all(float(row["error"]) <= bilstm.SERVING.error["int8"] for row in found)
    assert table.with_suffix(".png").exists()
    assert {row["provider"] for row in found} <= set(plot.COLOURS)


def test_requests_are_timed_beside_an_idle_and_a_busy_neighbour(tiny_student, monkeypatch):
    monkeypatch.setattr(service, "CASE", case_of_a_student())
    monkeypatch.setattr(service, "BLOCKS", 1)
    monkeypatch.setattr(service, "BLOCK_SECONDS", 0.05)
    burners, start = [], service.subprocess.Popen
    monkeypatch.setattr(service.subprocess, "Popen", lambda *given: burners.append(start(*given)) or burners[-1])
    found = [(row["options"], row["provider"], row["threads"]) for row in service.neighbours()]
    assert found == [
        ("idle neighbour", "fastkd int8", "1"),
        ("idle neighbour", "torch", "2"),
        ("busy neighbour", "fastkd int8", "1"),
        ("busy neighbour", "torch", "2"),
    ]
    assert len(burners) == 2 * max(1, os.cpu_count() - 1)
    assert all(burner.returncode == -signal.SIGKILL for burner in burners)


def test_a_start_is_timed_up_to_an_answer(tiny_student, monkeypatch):
    export = service.exported
    monkeypatch.setattr(service, "CASE", case_of_a_student())
    monkeypatch.setattr(service, "STARTS", 1)
    monkeypatch.setattr(service, "exported", lambda place: {"fastkd int8": export(place)["fastkd int8"]})
    (row,) = service.starts()
    assert 0.02e3 < float(row["median_ms"]) < 100e3
    assert 1e6 < int(row["resident_bytes"]) < 1e9
    assert 1000 < int(row["file_bytes"]) < 100_000
    with pytest.raises(RuntimeError, match="did not start"):
        service._start("raise SystemExit(3)", "nowhere")
