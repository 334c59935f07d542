"""A full disk and a killed process: an error that names the file, and nothing half-written taken for good."""

import json
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny import bert_config, save_encoder, tokenizer, write_glue
from transformers import AutoModelForSequenceClassification

from fastkd.cli import main
from fastkd.data.glue import GLUE
from fastkd.training import signals
from fastkd.training.teacher import MultiTaskEncoder, MultiTaskEncoderConfig

TASKS = {"sst2": {"labels": list(GLUE["sst2"].label_names)}}
TESTS = Path(__file__).parent

KILLED_WHILE_SAVING = """
import os, signal, sys
from fastkd.cli import main
from fastkd.students import BiAttentiveLSTM
save = BiAttentiveLSTM.save_pretrained

def save_half(self, folder):
    save(self, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    os.kill(os.getpid(), signal.SIGKILL)

BiAttentiveLSTM.save_pretrained = save_half
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted")
    write_glue(folder / "glue", rows=16)
    save_encoder(folder / "encoder")
    torch.manual_seed(0)
    MultiTaskEncoder(MultiTaskEncoderConfig(bert_config(), TASKS)).save_pretrained(folder / "teacher")
    tokenizer().save_pretrained(folder / "teacher")
    return folder


def distil(folder, output):
    command = ["distill", "mkd", "--teacher", str(folder / "teacher"), "--data-dir", str(folder / "glue")]
    return [*command, "--tasks", "sst2", "--epochs", "1", "--seeds", "1", "--no-baseline", "--output", str(output)]


@contextmanager
def files_of_at_most(size):
    """Stands for a full disk: a file can grow to ``size`` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_fills_while_a_teacher_is_saved(folder, tmp_path, capsys):
    command = ["teacher", "--model", str(folder / "encoder"), "--data-dir", str(folder / "glue"), "--tasks", "sst2"]
    with files_of_at_most(12_000):
        assert main([*command, "--epochs", "1", "--max-length", "16", "--output", str(tmp_path / "teacher")]) == 1
    assert f"cannot save {tmp_path / 'teacher'}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_while_a_student_is_saved(folder, tmp_path, capsys):
    with files_of_at_most(600_000):
        assert main(distil(folder, tmp_path)) == 1
    assert "seed-1/model: " in capsys.readouterr().err
    assert not list(tmp_path.rglob("*model*"))
    assert main(distil(folder, tmp_path)) == 0
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")


def test_a_disk_that_fills_while_logits_are_saved(tmp_path):
    with files_of_at_most(12_000), pytest.raises(OSError, match=r"cannot save .*sst2\.safetensors"):
        signals._write(tmp_path / "sst2.safetensors", "print", range(1000), torch.zeros(1000, 2))
    assert list(tmp_path.iterdir()) == []


def test_a_student_whose_saving_was_killed_is_trained_again(folder, tmp_path):
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, *distil(folder, tmp_path)]
    killed = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (left,) = tmp_path.rglob("model.safetensors")
    assert ".partial-" in left.parent.name
    assert not list(tmp_path.rglob("student*/**/result.json"))
    assert main(distil(folder, tmp_path)) == 0
    result = json.loads((tmp_path / "student-with-kd" / "seed-1" / "result.json").read_text())
    assert 0 <= result["result"]["sst2"] <= 100
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")


def damage(name):
    def apply(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return apply


def rename_labels(folder):
    config = json.loads((folder / "config.json").read_text())
    config["tasks"]["sst2"]["labels"] = ["bad", "good"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage("model.safetensors"), "is damaged, or no teacher"),
        (damage("config.json"), "is damaged, or no teacher"),
        (damage("tokenizer.json"), "is damaged, or no teacher"),
        (rename_labels, "labels of sst2 are ['negative', 'positive'], but the teacher's are ['bad', 'good']"),
    ],
)
def test_a_bad_teacher_is_refused_before_the_data_are_read(folder, tmp_path, capsys, change, message):
    teacher = tmp_path / "teacher"
    MultiTaskEncoder.from_pretrained(folder / "teacher").save_pretrained(teacher)
    tokenizer().save_pretrained(teacher)
    change(teacher)
    options = ["--teacher", str(teacher), "--data-dir", str(tmp_path / "no data")]
    assert main([*distil(folder, tmp_path / "run"), *options]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
