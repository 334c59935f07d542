"""``fastkd teacher``: a run that ends whole or leaves nothing, and what it refuses before it starts."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny import bert_config, save_encoder, write_glue
from transformers import AutoTokenizer

from fastkd.cli import main
from fastkd.cli.config import read_options
from fastkd.training import trainer
from fastkd.training.teacher import MultiTaskEncoder, MultiTaskEncoderConfig, load_teacher, train_teacher


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    return write_glue(tmp_path_factory.mktemp("glue"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("encoder"))


def command(encoder, glue, output, *more):
    options = ["--model", encoder, "--data-dir", str(glue), "--output", str(output), "--max-length", "16"]
    return ["teacher", *options, "--no-bf16", "--tasks", "sst2,stsb", *more]


def test_command_trains_saves_and_reports(encoder, glue, tmp_path, capsys, caplog):
    output = tmp_path / "runs" / "teacher"
    more = ["--epochs", "25", "--learning-rate", "1e-2", "--batch-size", "8", "--pooling", "mean", "--dropout", "0"]
    assert main(command(encoder, glue, output, *more)) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["sst2", "accuracy", "100.0"] in lines
    assert "no more than one answer" not in caplog.text
    metrics = json.loads((output / "eval_results.json").read_text())
    assert ["average", f"{metrics['eval_average']:.1f}"] in lines
    assert metrics["eval_stsb_pearson"] > 0.9
    assert list(output.parent.iterdir()) == [output]
    assert not list(output.glob("*.bin"))
    assert read_options(output / "options.yaml").items() >= {"pooling": ["mean"], "bf16": ["false"]}.items()
    teacher = load_teacher(output)
    assert {part.p for part in teacher.modules() if isinstance(part, torch.nn.Dropout)} == {0.0}
    words = AutoTokenizer.from_pretrained(output)(["the great film", "the awful film"], return_tensors="pt")
    assert teacher(**words, task="sst2").logits.argmax(-1).tolist() == [1, 0]
    embeddings = load_file(output / "model.safetensors")["encoder.embeddings.word_embeddings.weight"]
    assert torch.equal(embeddings, teacher.encoder.embeddings.word_embeddings.weight)


def test_a_teacher_no_better_than_one_answer_to_all_rows_is_told(encoder, tmp_path, caplog):
    table = tmp_path / "data" / "reviews"
    table.mkdir(parents=True)
    (table / "train.csv").write_text("text,label\nthe good film,good\na great plot,good\nthe bad film,bad\n")
    (table / "dev.csv").write_text("text,label\na good plot,good\n")  # one answer is right everywhere
    metrics = train_teacher(
        encoder, ["reviews"], tmp_path / "teacher", data_dir=str(tmp_path / "data"), num_train_epochs=1, bf16=False
    )
    score = f"{100 * metrics['eval_reviews_accuracy']:.1f}"
    assert f"reviews: the teacher scores {score}, no more than one answer to all rows does (100.0)" in caplog.text


def test_sampling_tau_reaches_the_sampler(encoder, glue, tmp_path, monkeypatch, capsys):
    taus = []
    sampler = trainer.MultiTaskBatchSampler
    monkeypatch.setattr(
        trainer, "MultiTaskBatchSampler", lambda *a, **options: taus.append(options["tau"]) or sampler(*a, **options)
    )
    assert main(command(encoder, glue, tmp_path / "one", "--epochs", "1", "--sampling-tau", "0.5")) == 0
    assert main(command(encoder, glue, tmp_path / "two", "--epochs", "1")) == 0
    assert taus == [0.5, None]
    assert main(command(encoder, glue, tmp_path / "bad", "--sampling-tau", "-1")) == 1
    assert "tau is -1.0; it must be a finite number >= 0" in capsys.readouterr().err


def test_same_seed_same_teacher(encoder, glue, tmp_path):
    for name in ("one", "two"):
        train_teacher(encoder, ["sst2"], tmp_path / name, data_dir=glue, max_length=16, bf16=False, num_train_epochs=1)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_interrupted_run_leaves_nothing(encoder, glue, tmp_path, monkeypatch):
    def full_disk(self, folder, **kwargs):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MultiTaskEncoder, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        train_teacher(encoder, ["sst2"], tmp_path / "out", data_dir=glue, max_length=16, max_steps=1)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_is_one_line(encoder, glue, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastkd.training.teacher.MultiTaskTrainer.train", interrupt)
    assert main(command(encoder, glue, tmp_path / "out")) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "fastkd teacher: interrupted"
    assert list(tmp_path.iterdir()) == []


def test_command_refuses_before_work(encoder, glue, tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("training started")

    monkeypatch.setattr("fastkd.training.teacher.MultiTaskTrainer", fail)
    assert main(command(encoder, glue, tmp_path / "bad", "--dropout", "1")) == 1
    assert "dropout is 1.0; it must be at least 0 and below 1" in capsys.readouterr().err
    (tmp_path / "teacher").mkdir()
    MultiTaskEncoderConfig(bert_config(), {"sst2": {"labels": ["0", "1"]}}).save_pretrained(tmp_path / "teacher")
    assert main(command(str(tmp_path / "teacher"), glue, tmp_path / "bad")) == 1
    assert capsys.readouterr().err.endswith(
        "teacher is a fastkd-multitask-encoder; a teacher is made of an encoder that transformers knows\n"
    )
    shutil.rmtree(tmp_path / "teacher")
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(command(encoder, glue, tmp_path)) == 1
    assert "holds something else" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    assert main(command(encoder, glue, tmp_path / "new", "--tasks", "sst2, sst5")) == 1
    assert "unknown task 'sst5'; the tasks are cola" in capsys.readouterr().err
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    assert main(command(encoder, glue, tmp_path / "new")) == 1
    assert "MB left" in capsys.readouterr().err
    (broken := tmp_path / "SST-2").mkdir()
    (broken / "train.tsv").write_text("sentence\tlabel\na\t3\n")
    assert main(command(encoder, tmp_path, tmp_path / "new", "--tasks", "sst2")) == 1
    assert "no file dev*" in capsys.readouterr().err
    (broken / "dev.tsv").write_text("sentence\tlabel\na\t1\n")
    assert main(command(encoder, tmp_path, tmp_path / "new", "--tasks", "sst2")) == 1
    assert "train.tsv, line 2: unknown label '3'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("option", ["--epochs", "--batch-size", "--learning-rate", "--max-train-rows"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "many"])
def test_numbers_must_be_positive(option, value, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(command("none", tmp_path, tmp_path / "new", option, value))
    assert f"argument {option}: '{value}' must be a positive number" in capsys.readouterr().err
