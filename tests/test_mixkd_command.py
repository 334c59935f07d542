"""``fastkd distill mixkd`` and the example of MixKD, from a teacher's folder to table and student."""

import csv
import runpy
from pathlib import Path

import pytest
import torch
from tiny import bert_config, tokenizer, write_glue
from transformers import AutoModelForSequenceClassification

from fastkd.cli import main
from fastkd.data.glue import GLUE
from fastkd.methods.experiment import WITH_KD, WITHOUT_KD
from fastkd.training.signals import TeacherSignal
from fastkd.training.teacher import MultiTaskEncoder, MultiTaskEncoderConfig

TASKS = {"sst2": {"labels": list(GLUE["sst2"].label_names)}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixkd")
    write_glue(folder / "glue", rows=16)
    torch.manual_seed(0)
    MultiTaskEncoder(MultiTaskEncoderConfig(bert_config(), TASKS, pooling="mean")).save_pretrained(folder / "teacher")
    tokenizer().save_pretrained(folder / "teacher")
    return folder


def distil(folder, output, *options):
    command = ["distill", "mixkd", "--teacher", str(folder / "teacher"), "--data-dir", str(folder / "glue")]
    settings = ["--tasks", "sst2", "--epochs", "1", "--batch-size", "4", "--seeds", "1", "--jobs", "1"]
    return main([*command, *settings, "--output", str(output), *options])


def test_a_run_ends_with_a_table_and_a_student_of_the_teachers_layers(folder, tmp_path):
    assert distil(folder, tmp_path, "--layers", "1") == 0
    with open(tmp_path / "table.csv", newline="") as file:
        rows = [row["model"] for row in csv.DictReader(file)]
    assert rows == ["teacher", WITHOUT_KD, WITH_KD]
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert student.config.encoder.num_hidden_layers == 1
    assert student.config.pooling == "mean"  # the teacher's, and a head as its own
    assert isinstance(student.heads["sst2"], torch.nn.Linear)
    assert not (tmp_path / "teacher_logits").exists()  # they could not answer for mixtures


def test_a_student_without_kd_learns_the_labels_whatever_the_other_learns(folder, tmp_path):
    assert distil(folder, tmp_path, "--layers", "1", "--alpha-mle", "0") == 0


@pytest.mark.parametrize(
    ("student", "option"),
    [(["--layers", "1"], ["--mix-stage", "post_ln"]), (["--student", "bilstm"], ["--beta-alpha", "5"])],
)
def test_options_reach_the_training(folder, tmp_path, student, option):
    models = []
    for number, options in enumerate(([], [], option)):
        output = tmp_path / str(number)
        settings = [*student, "--no-baseline", "--alpha-kd", "0.5", "--n-mix", "2", "--lambda-per-batch"]
        assert distil(folder, output, *settings, *options) == 0
        models.append(AutoModelForSequenceClassification.from_pretrained(output / "student").state_dict())
    plain, again, other = models
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert not all(torch.allclose(plain[name], other[name], rtol=0, atol=1e-6) for name in plain)


def test_a_loss_that_breaks_ends_the_command_with_one_line(folder, tmp_path, monkeypatch, capsys):
    answer = TeacherSignal.__call__
    monkeypatch.setattr(TeacherSignal, "__call__", lambda self, batch: answer(self, batch) * torch.nan)
    assert distil(folder, tmp_path, "--layers", "1", "--no-baseline") == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "fastkd distill: tmkd of the loss is NaN or infinite in step 1 (task sst2, rows " in message


def test_bad_options_are_refused(folder, tmp_path, capsys):
    assert distil(folder, tmp_path, "--alpha-sm", "-1") == 1
    assert "alpha_sm must be a number of at least 0, got -1.0" in capsys.readouterr().err
    assert distil(folder, tmp_path, "--student", "bilstm", "--mix-stage", "post_ln") == 1
    assert "BiAttentiveLSTM does not normalise its embeddings" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        distil(folder, tmp_path, "--mix-mask", "both")


def test_the_example_runs(folder, tmp_path, monkeypatch, capsys):
    example = Path(__file__).resolve().parents[1] / "examples" / "distil_mixkd.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(example), str(folder / "teacher"), str(folder / "glue")])
    runpy.run_path(str(example))
    assert "tensor([[" in capsys.readouterr().out
    assert (tmp_path / "runs" / "student" / "model.safetensors").exists()
