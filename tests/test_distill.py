"""``fastkd distill mkd`` from a teacher's folder to table, picture and student."""

import csv
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import bert_config, tokenizer, write_glue
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastkd.cli import main
from fastkd.data.glue import GLUE
from fastkd.methods.experiment import WITH_KD, WITHOUT_KD
from fastkd.methods.mkd import MKDTrainer
from fastkd.training.teacher import MultiTaskEncoder, MultiTaskEncoderConfig

TASKS = {name: {"labels": list(GLUE[name].label_names)} for name in ("sst2", "stsb")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill")
    write_glue(folder / "glue", rows=16)
    torch.manual_seed(0)
    MultiTaskEncoder(MultiTaskEncoderConfig(bert_config(), TASKS)).save_pretrained(folder / "teacher")
    tokenizer().save_pretrained(folder / "teacher")
    return folder


def distil(folder, output, *options):
    command = ["distill", "mkd", "--teacher", str(folder / "teacher"), "--data-dir", str(folder / "glue")]
    settings = ["--tasks", "sst2,stsb", "--epochs", "1", "--output", str(output)]
    return main([*command, *settings, *options])


@pytest.fixture(scope="module")
def finished(folder):
    """The output of a run with two seeds, trained in two processes."""
    assert distil(folder, folder / "run", "--seeds", "1,2", "--jobs", "2") == 0
    return folder / "run"


def test_a_run_ends_with_table_picture_and_student(finished):
    with open(finished / "table.csv", newline="") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert {name: row["seeds"] for name, row in rows.items()} == {"teacher": "1", WITHOUT_KD: "2", WITH_KD: "2"}
    mean = sum(result(finished, WITH_KD, seed)["sst2"] for seed in (1, 2)) / 2
    assert float(rows[WITH_KD]["sst2_mean"]) == pytest.approx(mean, abs=1e-3)
    assert (finished / "scores.png").stat().st_size > 10_000


def test_the_student_is_the_best_distilled_one_and_loads(finished):
    best = max((1, 2), key=lambda seed: sum(result(finished, WITH_KD, seed).values()))
    trained = finished / "student-with-kd" / f"seed-{best}" / "model" / "model.safetensors"
    assert (finished / "student" / "model.safetensors").read_bytes() == trained.read_bytes()
    student = AutoModelForSequenceClassification.from_pretrained(finished / "student").eval()
    text = AutoTokenizer.from_pretrained(finished / "student")("the good film", return_tensors="pt")
    assert torch.isfinite(student(**text, task="sst2").logits).all()
    assert (finished / "table.md").read_text() in (finished / "student" / "README.md").read_text()


def result(output, arm, seed):
    marker = output / arm.lower().replace(" ", "-") / f"seed-{seed}" / "result.json"
    return json.loads(marker.read_text())["result"]


def test_finished_students_are_not_trained_again(folder, finished, monkeypatch, capsys):
    trained = []
    train = MKDTrainer.train
    monkeypatch.setattr(MKDTrainer, "train", lambda self: trained.append(1) or train(self))
    assert distil(folder, finished, "--seeds", "1,2", "--jobs", "1") == 0
    assert trained == []
    assert (finished / "table.md").read_text() in capsys.readouterr().out
    assert distil(folder, finished, "--seeds", "1,3", "--jobs", "1", "--no-baseline") == 0
    assert len(trained) == 1
    assert distil(folder, finished, "--jobs", "1", "--loss", "kl") == 1
    message = capsys.readouterr().err
    assert "finished run with other settings" in message
    assert "'loss': 'mse'" in message


def test_the_options_beside_the_results_repeat_the_run(finished, monkeypatch, capsys):
    monkeypatch.setattr(MKDTrainer, "train", lambda self: pytest.fail("a finished student is trained again"))
    assert main(["distill", "mkd", "--config", str(finished / "options.yaml"), "--jobs", "1"]) == 0
    assert (finished / "table.md").read_text() in capsys.readouterr().out


def test_both_kinds_of_student_start_alike_and_differ_in_their_loss(folder, finished):
    with_kd, without = (
        AutoModelForSequenceClassification.from_pretrained(finished / arm / "seed-1" / "model")
        for arm in ("student-with-kd", "student-without-kd")
    )
    assert torch.equal(with_kd.word_embeddings.weight, without.word_embeddings.weight)
    table = MultiTaskEncoder.from_pretrained(folder / "teacher").get_input_embeddings().weight
    torch.testing.assert_close(with_kd.word_embeddings.weight, table / table.std())
    assert not torch.equal(with_kd.projection.weight, without.projection.weight)


def test_a_disk_too_small_is_told_before_the_teacher_is_asked(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert distil(folder, tmp_path / "run", "--seeds", "1") == 1
    assert "0 MB left; saving the students needs" in capsys.readouterr().err
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "sst2,cats"], "unknown task 'cats'"),
        (["--tasks", "rte"], "teacher has no head for rte"),
        (["--seeds", "one"], "--seeds is 'one'"),
        (["--temperature", "0"], "temperature must be a positive number"),
        (["--teacher", "nowhere"], "no teacher in nowhere"),
    ],
)
def test_bad_input_ends_with_one_line(folder, tmp_path, options, message, capsys):
    assert distil(folder, tmp_path / "run", *options) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fastkd distill: ")
    assert message in error
    assert not (tmp_path / "run" / "table.md").exists()


def test_the_example_runs(folder, tmp_path, monkeypatch, capsys):
    example = Path(__file__).resolve().parents[1] / "examples" / "distil_mkd.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(example), str(folder / "teacher"), str(folder / "glue")])
    runpy.run_path(str(example), run_name="__main__")
    assert "tensor([[" in capsys.readouterr().out
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "runs" / "student").config.tasks == TASKS
