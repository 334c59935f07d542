"""The papers' experiments on tiny models: tables, resumption, tuning and verdicts."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file
from tiny import bert_config, tokenizer, write_glue
from torch.testing import assert_close
from transformers import BertModel

from experiments import makd, students, table
from experiments.__main__ import main
from experiments.scores import MAJORITY, read
from experiments.students import TUNING_SEED, tuned
from fastkd.training import finetune, parallel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiments")
    write_glue(folder / "glue", rows=16)
    torch.manual_seed(0)
    config = bert_config(initializer_range=0.5)
    config.num_hidden_layers = 3
    BertModel(config).save_pretrained(folder / "encoder")
    tokenizer().save_pretrained(folder / "encoder")
    return folder


@pytest.fixture
def trained(monkeypatch):
    """Names every student that is trained, and every fine-tuning, by what decides about it."""
    names = []
    train_new_student, train_candidate = students.train_new_student, finetune.train_candidate

    def student(experiment, material, arm, seed, add):
        names.append((experiment.output.rpartition("/")[2], arm, seed))
        return train_new_student(experiment, material, arm, seed, add)

    def candidate(model, task, collate, rows, validation, arguments, rate, add):
        names.append((f"fine-tuned-{task}", rate, arguments["seed"]))
        return train_candidate(model, task, collate, rows, validation, arguments, rate, add)

    def train_all(train, groups, *others):
        return parallel.train_all(train, pickle.loads(pickle.dumps(groups)), *others)

    monkeypatch.setattr(table, "train_all", train_all)
    monkeypatch.setattr(students, "train_new_student", student)
    monkeypatch.setattr(finetune, "train_candidate", candidate)
    monkeypatch.setattr(finetune, "LEARNING_RATES", (1e-4,))
    return names


def run(name, folder, output, *options):
    places = ["--model", str(folder / "encoder"), "--data-dir", str(folder / "glue"), "--output", str(output)]
    return main([name, *places, "--epochs", "1", "--jobs", "1", *options])


def test_makd(folder, tmp_path, trained, monkeypatch, capsys):
    monkeypatch.setattr(makd, "TASKS", ("sst2", "stsb"))
    options = [
        "--ratio",
        "0.7",
        "--layers",
        "1",
        "--learning-rates",
        "1e-3",
        "--least-steps",
        "1",
        "--seeds",
        "1,2",
        "--tasks",
    ]
    rows = ["low-rank fine-tuned", "DistilBERT", "TinyBERT", "MaKD", "MaKD without matrices"]
    assert run("makd", folder, tmp_path, *options, "sst2", "--rows", ",".join(rows)) == 0
    assert len(trained) == 2 * len(rows)
    scores = read(tmp_path / "70" / "scores.csv")
    assert list(dict.fromkeys(score.row for score in scores)) == [MAJORITY, "teacher", *rows]
    sizes = {score.row: score.parameters for score in scores}
    assert all(0 < sizes[row] <= 0.7 * sizes["teacher"] for row in rows)
    assert sizes["MaKD"] == sizes["low-rank fine-tuned"]
    for row in rows:
        record = tmp_path / "70" / "groups" / students.folder_name(row, "sst2") / "lr-0.001" / "seed-1" / "result.json"
        known = json.loads(record.read_text())["configuration"]
        assert (known["method"], known["arm"]) == (
            makd.ROWS[row].method,
            {**makd.ROWS[row].fields, "learning_rate": 1e-3},
        )
    assert run("makd", folder, tmp_path, *options, "sst2,stsb", "--rows", "MaKD") == 0
    assert len(trained) == 2 * len(rows) + 2
    scores = read(tmp_path / "70" / "scores.csv")
    assert {score.row for score in scores if score.column == "stsb"} == {MAJORITY, "teacher", "MaKD"}
    assert {score.row for score in scores if score.column == "sst2"} == {MAJORITY, "teacher", *rows}
    capsys.readouterr()
    assert run("makd", folder, tmp_path, *options, "sst2", "--rows", "PKD", "--epochs", "2") == 1
    assert "settings.json is of a table with other settings (epochs 1.0 there, 2.0 here)" in capsys.readouterr().err
    assert run("makd", folder, tmp_path, *options, "sst2", "--rows", "MaKD", "--ratio", "0.1") == 1
    assert "cannot be met" in capsys.readouterr().err
    assert len(trained) == 2 * len(rows) + 2


def test_mkd(folder, tmp_path, trained, monkeypatch, capsys):
    monkeypatch.setattr(table, "RESULTS", tmp_path / "results")
    options = ["--student", "transformer", "--tasks", "sst2,stsb", "--learning-rates", "1e-9,1e-2"]
    options += ["--least-steps", "2"]
    rows = ["--rows", "single-task,multi-task fine-tuned", "--seeds", "1"]
    assert run("mkd", folder, tmp_path / "runs", *options, *rows, "--keep") == 0
    out = capsys.readouterr().out
    groups = ("single-task-sst2", "single-task-stsb", "multi-task")
    assert [name for name in trained if name[0] in groups and name[2] == TUNING_SEED] == [
        (group, arm, TUNING_SEED) for group in groups for arm in ("lr 1e-09", "lr 0.01")
    ]
    assert len(trained) == 3 * (2 + 1) + 2
    scores = read(tmp_path / "runs" / "transformer" / "scores.csv")
    names = [MAJORITY, "teacher", "single-task", "multi-task", "multi-task fine-tuned"]
    assert list(dict.fromkeys(score.row for score in scores)) == names
    seeds = [0, 0, 1, 1, 1]
    assert [(s.column, s.seed) for s in scores] == [(task, seed) for seed in seeds for task in ("sst2", "stsb")]
    assert [s.score for s in scores if s.row == MAJORITY] == [50, 0]
    assert {s.learning_rate for s in scores if s.row == "multi-task fine-tuned"} == {1e-4}
    assert {s.learning_rate for s in scores if s.row == "single-task"} <= {1e-9, 1e-2}
    measured = [s for s in scores if s.row != MAJORITY]
    assert all(-100 <= s.score <= 100 and s.seconds > 0 and s.latency_ms > 0 and s.machine for s in measured)
    for line in (tmp_path / "runs" / "transformer" / "table.md").read_text(), out:
        assert "| multi-task fine-tuned " in line
    assert "a shared student learns better from multi-task than from single-task distillation" in out
    kept = sorted(path.name for path in (tmp_path / "results").iterdir())
    endings = ["-kept.md", "-verdicts.md", ".csv", ".json", ".md", ".png"]
    assert kept == [f"mkd-transformer{ending}" for ending in endings]
    lines = (tmp_path / "results" / "mkd-transformer-kept.md").read_text().splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == names[2:]
    assert lines[0].replace(" ", "") == "||singlesentences|pairs|"

    assert [_epochs(tmp_path / "runs" / "transformer" / "groups" / name) for name in groups] == [4, 4, 1]

    trained.clear()
    assert run("mkd", folder, tmp_path / "runs", *options, *rows) == 0
    assert trained == []
    assert read(tmp_path / "runs" / "transformer" / "scores.csv") == scores
    assert run("mkd", folder, tmp_path / "runs", *options, "--rows", "single-task", "--seeds", "1,3") == 0
    assert {(name, seed) for name, _, seed in trained} == {("single-task-sst2", 3), ("single-task-stsb", 3)}
    assert list(dict.fromkeys(score.row for score in read(tmp_path / "runs" / "transformer" / "scores.csv"))) == names


def _epochs(group):
    record = json.loads((group / "lr-1e-09" / f"seed-{TUNING_SEED}" / "result.json").read_text())
    return record["configuration"]["training"]["num_train_epochs"]


def test_mkd_on_augmented_rows(folder, tmp_path, trained):
    options = ["--tasks", "sst2", "--learning-rates", "1e-3", "--seeds", "1", "--augment", "3", "--epochs", "3"]
    assert run("mkd", folder, tmp_path, *options, "--rows", "augmented") == 0
    assert run("mkd", folder, tmp_path, *options, "--rows", "augmented fine-tuned") == 0
    assert trained == [("augmented", "lr 0.001", 1), ("fine-tuned-sst2", 1e-4, 1)]
    record = json.loads((tmp_path / "bilstm/groups/augmented/lr-0.001/seed-1/result.json").read_text())
    assert record["configuration"]["augment"] == 3
    finetuned = tmp_path / "bilstm/groups/augmented/lr-0.001/seed-1/fine-tuned-sst2/lr-0.0001/result.json"
    assert json.loads(finetuned.read_text())["configuration"]["num_train_epochs"] == 2
    assert run("mkd", folder, tmp_path, *options, "--rows", "augmented") == 0
    rows = [score.row for score in read(tmp_path / "bilstm" / "scores.csv")]
    assert rows == [MAJORITY, "teacher", "augmented", "augmented fine-tuned"]


def test_mkd_on_more_texts_than_the_teacher_learned_from(folder, tmp_path, trained, capsys):
    options = ["--tasks", "sst2", "--learning-rates", "1e-3", "--seeds", "1", "--max-train-rows", "8", "--rows"]
    options += ["multi-task,more texts", "--more-texts"]
    assert run("mkd", folder, tmp_path, *options, "8") == 1
    assert "--more-texts is 8; it must be above --max-train-rows, 8" in capsys.readouterr().err
    assert run("mkd", folder, tmp_path, *options, "12") == 0
    assert trained == [("multi-task", "lr 0.001", 1), ("more-texts", "lr 0.001", 1)]
    caches = [load_file(tmp_path / rows / "teacher_logits/sst2.safetensors") for rows in ("rows", "more-rows")]
    known, more = (next(iter(cache.values())) for cache in caches)
    assert (len(known), len(more)) == (8, 12)
    assert_close(more[:8], known)


def test_mixkd(folder, tmp_path, trained, capsys):
    options = ["--cells", "sst2:25%,sst2:100%", "--learning-rates", "1e-3", "--seeds", "1,2", "--least-steps", "2"]
    assert run("mixkd", folder, tmp_path, *options, "--rows", "KD,SM+TMKD") == 0
    out = capsys.readouterr().out
    groups = [f"sst2-{part}-{row}" for part in (25, 100) for row in ("KD", "SM+TMKD")]
    assert trained == [(group, "lr 0.001", seed) for group in groups for seed in (1, 2)]
    scores = read(tmp_path / "scores.csv")
    assert {s.column for s in scores if s.row == "teacher"} == {"sst2:25%", "sst2:100%"}
    record = json.loads((tmp_path / "groups/sst2-25-SM+TMKD/lr-0.001/seed-1/result.json").read_text())["configuration"]
    arm = {"alpha_sm": 1.0, "alpha_tmkd": 1.0, "alpha_kd": 0.0, "learning_rate": 1e-3}
    assert (record["train_fraction"], record["training"]["num_train_epochs"], record["arm"]) == (0.25, 16, arm)
    assert "MixKD gains most over KD with little data" in out
    assert (tmp_path / "scores.png").stat().st_size > 0
    trained.clear()
    assert run("mixkd", folder, tmp_path, *options, "--rows", "KD,SM+TMKD") == 0
    assert trained == []


def test_what_is_finished_is_reported_when_a_run_stops(folder, tmp_path, trained, monkeypatch):
    options = ["--tasks", "sst2", "--learning-rates", "1e-3", "--seeds", "1", "--rows", "no distillation,multi-task"]
    train = students.train_new_student

    def stop(experiment, material, arm, seed, add):
        if experiment.output.endswith("multi-task"):
            raise KeyboardInterrupt
        return train(experiment, material, arm, seed, add)

    with monkeypatch.context() as patch:
        patch.setattr(students, "train_new_student", stop)
        assert run("mkd", folder, tmp_path, *options) == 130
    rows = [score.row for score in read(tmp_path / "bilstm" / "scores.csv")]
    assert rows == [MAJORITY, "teacher", "no distillation"]
    assert "| no distillation " in (tmp_path / "bilstm" / "kept.md").read_text()
    trained.clear()
    assert run("mkd", folder, tmp_path, *options) == 0
    assert trained == [("multi-task", "lr 0.001", 1)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["mkd", "--rows", "multitask"], "--rows has 'multitask'; there are no distillation, single-task"),
        (["mkd", "--tasks", "sst3"], "unknown task 'sst3'"),
        (["mixkd", "--rows", "PKD"], "--rows has 'PKD'; there are fine-tuned, KD, SM, TMKD, SM+TMKD"),
        (["mixkd", "--cells", "sst2"], "--cells has 'sst2'"),
        (["mixkd", "--cells", "sst2:0%"], "--cells has 'sst2:0%'"),
        (["mixkd", "--cells", "sst2:101%"], "--cells has 'sst2:101%'"),
        (["mixkd", "--cells", "sst3:10%"], "unknown task 'sst3'"),
    ],
)
def test_unknown_names_are_refused_before_work(folder, tmp_path, options, message, capsys):
    name, *more = options
    assert run(name, folder, tmp_path / "run", *more) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_tuning_seed_is_not_reported(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("mkd", folder, tmp_path, "--seeds", "0,1")
    assert "'0' must be a whole number above 0" in capsys.readouterr().err


def test_the_choice_follows_the_tuning_seed_alone():
    scores = {("low", TUNING_SEED): 60, ("high", TUNING_SEED): 70, ("low", 1): 90, ("high", 1): 50}
    asked = []

    def train(choice, seed):
        asked.append((choice, seed))
        return {"scores": {"a": scores[choice, seed], "b": 0}}

    best, found = tuned(train, ["low", "high"], [1])
    assert (best, list(found)) == ("high", [1])
    assert ("low", 1) not in asked
    asked.clear()
    assert tuned(train, ["low"], [1])[0] == "low"
    assert asked == [("low", 1)]


def test_a_rate_that_diverges_is_not_chosen():
    def train(choice, seed):
        if choice == "diverges":
            raise FloatingPointError
        return {"scores": {"a": 1}}

    assert tuned(train, ["diverges", "low"], [1])[0] == "low"
    with pytest.raises(FloatingPointError):
        tuned(train, ["diverges", "diverges"], [1])
