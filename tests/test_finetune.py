"""``fastkd finetune``: the best epoch of all is saved, with the head of one task, for every kind of student."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny import bert_config, same_answers, tokenizer, write_glue
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification, BertModel

from fastkd.cli import main
from fastkd.cli.config import read_options
from fastkd.data.glue import GLUE
from fastkd.students import BiAttentiveLSTM, BiAttentiveLSTMConfig, transformer_student
from fastkd.training import trainer
from fastkd.training.adoption import adopt
from fastkd.training.finetune import finetune
from fastkd.training.trainer import MultiTaskTrainer

TASKS = {name: {"labels": list(GLUE[name].label_names)} for name in ("sst2", "stsb")}
SIZES = {"vocab_size": 16, "embedding_size": 8, "projection_size": 8, "hidden_size_per_direction": 8, "head_size": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    write_glue(folder / "glue")
    torch.manual_seed(0)
    students = {
        "bilstm": BiAttentiveLSTM(BiAttentiveLSTMConfig(tasks=TASKS, **SIZES)),
        "transformer": transformer_student(BertModel(bert_config()), 1, list(TASKS), head_size=8),
    }
    for name, student in students.items():
        student.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    return folder


def command(folder, student, output, *more):
    options = ["--student", str(folder / student), "--data-dir", str(folder / "glue"), "--output", str(output)]
    return ["finetune", *options, "--task", "sst2", "--max-length", "16", "--batch-size", "8", *more]


@pytest.mark.parametrize("student", ["bilstm", "transformer"])
def test_the_best_of_a_grid_is_saved(folder, tmp_path, capsys, student):
    more = ["--epochs", "12", "--learning-rate", "1e-12,1e-2"]
    assert main(command(folder, student, tmp_path / "run", *more)) == 0
    out, error = capsys.readouterr()
    lines = [line.split() for line in out.splitlines()]
    assert [line[0] for line in lines] == ["learning", "-", "1e-12", "0.01", "saved"]
    assert lines[2][1:3] == ["0", lines[1][2]]
    assert lines[3][2:] == ["100.0", "saved"]
    assert "fine-tuning on sst2: 100%" in error

    assert json.loads((tmp_path / "run" / "eval_results.json").read_text())["eval_average"] == 100.0
    tuned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").eval()
    assert tuned.config.tasks == {"sst2": TASKS["sst2"]}
    words = AutoTokenizer.from_pretrained(tmp_path / "run")(["the great film", "the awful film"], return_tensors="pt")
    assert tuned(**words).logits.argmax(-1).tolist() == [1, 0]
    before = load_file(folder / student / "model.safetensors")
    after = load_file(tmp_path / "run" / "model.safetensors")
    assert before.keys() - after.keys() == {name for name in before if name.startswith("heads.stsb")}
    assert [name for name in after if torch.equal(before[name], after[name])] == []
    assert f"fine-tuned with learning rate 0.01 for {lines[3][1]} epochs" in (tmp_path / "run/README.md").read_text()
    assert read_options(tmp_path / "run" / "options.yaml")["learning-rate"] == ["1e-12,1e-2"]


def test_the_best_epoch_is_saved_and_not_the_last(folder, tmp_path, monkeypatch):
    scores, weights = iter([50.0, 60.0, 80.0, 70.0, 80.0]), []
    evaluate = MultiTaskTrainer.evaluate

    def record(self, eval_dataset=None, *args, **kwargs):
        if eval_dataset is None:
            weights.append(self.model.heads["sst2"][0].weight.detach().clone())
        return evaluate(self, eval_dataset, *args, **kwargs)

    monkeypatch.setattr(MultiTaskTrainer, "evaluate", record)
    monkeypatch.setattr(trainer, "main_score", lambda task, metrics: next(scores))
    options = {"data_dir": folder / "glue", "max_length": 16, "num_train_epochs": 4, "learning_rates": [1e-2]}
    (candidate,) = finetune(folder / "bilstm", "sst2", tmp_path / "run", **options)
    assert (candidate.start, candidate.epoch, candidate.score) == (50.0, 2.0, 80.0)
    saved = load_file(tmp_path / "run" / "model.safetensors")["heads.sst2.0.weight"]
    assert [torch.equal(saved, weight) for weight in weights] == [False, False, True, False, False]


def test_a_student_that_no_epoch_betters_is_saved_as_it_was(folder, tmp_path, capsys):
    assert main(command(folder, "transformer", tmp_path / "run", "--epochs", "2", "--learning-rate", "1e-12")) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].endswith("saved")
    assert "no epoch is better than the student was" in out
    before = load_file(folder / "transformer" / "model.safetensors")
    for name, weight in load_file(tmp_path / "run" / "model.safetensors").items():
        assert torch.equal(weight, before[name]), name
    assert "no epoch of fine-tuning being better" in (tmp_path / "run" / "README.md").read_text()


def test_a_rate_that_diverges_does_not_cost_the_others(folder, tmp_path):
    options = {"data_dir": folder / "glue", "max_length": 16, "num_train_epochs": 2}
    good, bad = finetune(folder / "bilstm", "sst2", tmp_path / "run", learning_rates=[1e-2, 1e30], **options)
    assert (good.learning_rate, bad.learning_rate, bad.epoch) == (1e-2, 1e30, 0)
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_regression_is_fine_tuned(folder, tmp_path):
    options = {"data_dir": folder / "glue", "max_length": 16, "num_train_epochs": 8, "learning_rates": [1e-2]}
    (candidate,) = finetune(folder / "bilstm", "stsb", tmp_path / "run", **options)
    assert candidate.score > candidate.start
    assert set(GLUE["stsb"].metrics) <= {name.removeprefix("eval_stsb_") for name in candidate.metrics}


def test_the_result_is_exported(folder, tmp_path, capsys):
    pytest.importorskip("fastkd._runtime")
    from fastkd.runtime import load

    assert main(command(folder, "bilstm", tmp_path / "run", "--epochs", "1", "--learning-rate", "1e-3")) == 0
    export = ["export", str(tmp_path / "run"), "--precision", "float32", "--max-length", "16"]
    assert main([*export, "--output", str(tmp_path / "served")]) == 0
    (answer,) = load(tmp_path / "served").predict(["the great film"])
    assert answer.label in TASKS["sst2"]["labels"]


def test_same_seed_same_student(folder, tmp_path):
    options = {"data_dir": folder / "glue", "max_length": 16, "num_train_epochs": 2, "learning_rates": [1e-2]}
    one, two = (finetune(folder / "bilstm", "sst2", tmp_path / name, **options)[0] for name in ("one", "two"))
    for name, weight in one.weights.items():
        same_answers(weight, two.weights[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "rte"], "has no head for rte; its tasks are sst2, stsb"),
        (["--task", "cats"], "unknown task 'cats'"),
        (["--student", "nowhere"], "no student in nowhere"),
        (["--learning-rate", "1e-5,0"], "--learning-rate: '0' must be a positive number"),
        (["--learning-rate", "1e-5,1e-5"], "--learning-rate is '1e-5,1e-5'; it must be different"),
        (["--data-dir", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_ends_with_one_line(folder, tmp_path, options, message, capsys):
    assert main(command(folder, "bilstm", tmp_path / "run", *options)) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fastkd finetune: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused(folder, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(command(folder, "bilstm", tmp_path)) == 1
    assert "holds something else" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_damaged_student_is_refused(folder, tmp_path):
    shutil.copytree(folder / "bilstm", tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="no student can be loaded from"):
        finetune(tmp_path / "damaged", "sst2", tmp_path / "run", data_dir=folder / "glue")


def test_a_student_of_other_labels_is_refused(folder, tmp_path):
    tasks = {"sst2": {"labels": ["positive", "negative"]}}
    BiAttentiveLSTM(BiAttentiveLSTMConfig(tasks=tasks, **SIZES)).save_pretrained(tmp_path / "other")
    tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"labels of sst2 are \['negative', 'positive'\], but those of the student"):
        finetune(tmp_path / "other", "sst2", tmp_path / "run", data_dir=folder / "glue")


def test_a_classifier_without_heads_is_refused(folder, tmp_path, capsys):
    student = BertForSequenceClassification(bert_config())
    adopt(student, {"sst2": ["negative", "positive"]})
    for part in (student, tokenizer()):
        part.save_pretrained(tmp_path / "plain")
    assert main(command(folder, "bilstm", tmp_path / "run", "--student", str(tmp_path / "plain"))) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "is a BertForSequenceClassification, which has no heads: fine-tune it by MKDTrainer" in error
