"""The user's own tables from `fastkd teacher` to `fastkd predict`."""

import dataclasses
import io
import json
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from tiny import WORDS, save_encoder
from transformers import AutoModelForSequenceClassification

from fastkd.cli import main
from fastkd.methods import registry
from fastkd.training.teacher import load_teacher

TASKS = {"reviews": {"labels": ["bad", "good"]}, "alike": {"labels": []}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with data, and the teacher and students of two tasks: single texts without dev.csv, and pairs."""
    folder = tmp_path_factory.mktemp("custom")
    (data := folder / "data").mkdir()
    reviews = "".join(f'"the {WORDS[i % 6]} film, a plot",{"good" if i % 6 < 3 else "bad"}\n' for i in range(36))
    alike = "".join(f"{WORDS[i % 6]} film,{WORDS[i % 5]} plot,{0.5 + 3 * (i % 6 < 3)}\n" for i in range(24))
    for name, text in {"reviews/train": f"text,label\n{reviews}", "alike/train": f"a,b,label\n{alike}"}.items():
        (data / name).parent.mkdir()
        (data / f"{name}.csv").write_text(text)
    (data / "alike" / "dev.csv").write_text(f"a,b,label\n{alike}")
    shared = ["--tasks", "reviews,alike", "--data-dir", str(data), "--max-length", "16", "--batch-size", "8"]
    command = ["teacher", "--model", save_encoder(folder / "encoder"), "--no-bf16", "--pooling", "mean", *shared]
    settings = ["--epochs", "25", "--learning-rate", "1e-2"]
    assert main([*command, *settings, "--output", str(folder / "teacher")]) == 0
    command = ["distill", "mkd", "--teacher", str(folder / "teacher"), "--seeds", "1", "--no-baseline", *shared]
    assert main([*command, "--output", str(folder / "mkd")]) == 0
    return folder


def test_teacher_and_student_learn_the_own_tasks(folder):
    metrics = json.loads((folder / "teacher" / "eval_results.json").read_text())
    assert metrics["eval_reviews_accuracy"] == 1
    assert metrics["eval_alike_spearman"] > 0.8
    assert load_teacher(folder / "teacher").config.tasks == TASKS
    student = AutoModelForSequenceClassification.from_pretrained(folder / "mkd" / "student")
    assert student.config.tasks == TASKS
    assert "reviews" in (folder / "mkd" / "table.md").read_text().splitlines()[0]


def test_the_exported_student_answers(folder, monkeypatch, capsys):
    student = str(folder / "exported")
    assert main(["export", str(folder / "mkd" / "student"), "--output", student, "--precision", "float32"]) == 0
    capsys.readouterr()

    def answers(text, *options):
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(text)))
        assert main(["predict", student, *options]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    reviews = answers(b"the great film, a plot\nthe awful film, a plot\n", "--task", "reviews")
    assert [answer["label"] for answer in reviews] == ["good", "bad"]
    alike = answers(b"great film\tgood plot\nawful film\tgood plot\n", "--task", "alike", "--pairs")
    assert alike[0]["score"] > alike[1]["score"] + 1


def test_a_fraction_of_the_rows(folder, tmp_path, capsys):
    command = ["distill", "mkd", "--teacher", str(folder / "teacher"), "--data-dir", str(folder / "data"), "--seeds=1"]
    options = ["--tasks", "reviews,alike", "--no-baseline", "--epochs", "1", "--output", str(tmp_path / "mkd")]
    assert main([*command, *options, "--train-fraction", "0.25"]) == 0
    rows = {task: load_file(tmp_path / "mkd" / "teacher_logits" / f"{task}.safetensors")["row"] for task in TASKS}
    assert {task: len(numbers) for task, numbers in rows.items()} == {"reviews": 8, "alike": 6}
    assert "rows per task: 25 %" in (tmp_path / "mkd" / "student" / "README.md").read_text()
    with pytest.raises(SystemExit):
        main([*command, *options, "--train-fraction", "2"])
    assert "argument --train-fraction: '2' must be at most 1" in capsys.readouterr().err


def test_only_distillation_trains_on_unlabelled_variants(folder, tmp_path, monkeypatch, capsys, caplog):
    sizes = []
    mkd = registry.METHODS["mkd"]

    def spy(student, args, collate, rows, *others, **options):
        sizes.append((args.distillation_weight, rows.sizes))
        return mkd.trainer(student, args, collate, rows, *others, **options)

    monkeypatch.setitem(registry.METHODS, "mkd", dataclasses.replace(mkd, trainer=spy))
    command = ["distill", "mkd", "--teacher", str(folder / "teacher"), "--data-dir", str(folder / "data"), "--jobs=1"]
    options = ["--tasks", "reviews,alike", "--epochs", "1", "--output", str(tmp_path / "mkd"), "--augment", "3"]
    assert main([*command, *options, "--seeds", "1", "--hard-label-weight", "0.5"]) == 0
    (_, without), (_, with_kd) = sorted(sizes, key=lambda size: size[0])
    assert without == {"reviews": 32, "alike": 24}
    assert with_kd["reviews"] > 32
    assert with_kd["alike"] > 24
    assert "with up to 3 variants of each" in (tmp_path / "mkd" / "student" / "README.md").read_text()
    sizes.clear()
    assert main([*command, *options, "--seeds", "1,2", "--hard-label-weight", "0.5"]) == 0
    assert sorted(size["reviews"] for _, size in sizes) == [32, with_kd["reviews"]]
    assert "computing the teacher's logits anew" not in caplog.text


def test_paraphrases_reach_teacher_and_student(folder, tmp_path, capsys):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "alike.csv").write_text("row,a,b\n3,very good,the plot\n")
    shared = ["--tasks", "alike", "--data-dir", str(folder / "data"), "--epochs", "1"]
    distil = ["distill", "mkd", "--teacher", str(folder / "teacher"), "--seeds=1", "--no-baseline", *shared]
    for command in (["teacher", "--model", str(folder / "encoder"), "--max-length", "16", *shared], distil):
        output = ["--output", str(tmp_path / command[0]), "--paraphrases"]
        assert main([*command, *output, str(tmp_path)]) == 1
        assert "has no table of paraphrases, alike.csv" in capsys.readouterr().err
        assert main([*command, *output, str(tmp_path / "more")]) == 0
        assert "25/25" in capsys.readouterr().err
    rows = load_file(tmp_path / "distill" / "teacher_logits" / "alike.safetensors")["row"]
    assert rows.tolist() == [*range(24), 24]


def test_a_misspelt_name_is_refused_at_once(folder, capsys):
    for command in (["teacher", "--model", "none"], ["distill", "mkd", "--teacher", str(folder / "teacher")]):
        options = ["--tasks", "revues", "--data-dir", str(folder / "data"), "--output", str(folder / "new")]
        assert main([*command, *options]) == 1
        assert "unknown task 'revues'" in capsys.readouterr().err
