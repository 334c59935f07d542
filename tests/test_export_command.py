"""``fastkd export`` and ``fastkd predict`` as their users type them."""

import json
import os
import subprocess
import sys

import pytest
from runtime_samples import save_student
from subprocesses import ROOT
from tiny import bert_config

from fastkd.cli import main
from fastkd.training.classifiers import MultiTaskEncoder, MultiTaskEncoderConfig


@pytest.fixture
def student(tmp_path, capsys):
    save_student(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), "--output", str(tmp_path / "student")]) == 0
    printed = capsys.readouterr().out
    assert "int8" in printed
    assert "a: same label on" in printed
    assert "of 12 texts" in printed
    return tmp_path / "student"


def predict(student, *options, text=b""):
    command = [
        sys.executable,
        "-c",
        "import sys; from fastkd.cli import main; sys.exit(main())",
        "predict",
        str(student),
        *options,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, input=text, capture_output=True, cwd=ROOT, env=environment)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr.decode()


def test_lines_in_json_lines_out(student):
    status, answers, _ = predict(student, "--task", "a", "--batch-size", "2", text=b"good film\n\nbad plot\r\ngreat")
    assert status == 0
    assert [answer["line"] for answer in answers] == [1, 2, 3, 4]
    assert all(answer["label"] in ("bad", "good") and 0 < answer["score"] <= 1 for answer in answers)


def test_a_bad_line_is_reported_and_the_rest_goes_on(student):
    lines = b"good\tbad\nno pair\n\xff\xfe\t\nbad\tvery bad\n"
    status, answers, _ = predict(student, "--task", "score", "--pairs", text=lines)
    assert status == 1
    assert "no tab" in answers[1]["error"]
    assert "utf-8" in answers[2]["error"]
    assert answers[0]["label"] is None
    assert isinstance(answers[3]["score"], float)


def test_errors_are_one_line(student, tmp_path, capsys):
    status, answers, errors = predict(student, text=b"good\n")
    assert (status, answers) == (1, [])
    assert errors.startswith("fastkd predict: task must be one of a, score")
    assert main(["export", str(tmp_path / "model"), "--output", str(student)]) == 1
    assert "holds something else" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "none"), "--out", str(tmp_path / "new")]) == 1  # as it was called before
    assert "is no folder" in capsys.readouterr().err


def test_another_student_is_sent_to_transformers(tmp_path, capsys):
    MultiTaskEncoder(MultiTaskEncoderConfig(bert_config(), {"a": {"labels": ["bad", "good"]}})).save_pretrained(
        tmp_path
    )
    assert main(["export", str(tmp_path), "--output", str(tmp_path / "served")]) == 1
    message = capsys.readouterr().err
    assert "holds a MultiTaskEncoder; a BiAttentiveLSTM (--student bilstm) can be exported" in message
    assert "served by transformers itself" in message


def test_the_texts_to_check_can_be_given(tmp_path, capsys):
    save_student(tmp_path / "model")
    (tmp_path / "texts").write_text("good film\nbad\tvery bad\n")
    options = ["--precision", "float32", "--check", str(tmp_path / "texts")]
    assert main(["export", str(tmp_path / "model"), "--output", str(tmp_path / "student"), *options]) == 1
    assert "line 1 of" in capsys.readouterr().err
    (tmp_path / "texts").write_text("\ufeffgood\u2028\tfilm\nbad\tvery bad\n", encoding="utf-8")
    assert main(["export", str(tmp_path / "model"), "--output", str(tmp_path / "student"), *options]) == 0
    assert "a: same label on 2 of 2 texts" in capsys.readouterr().out
