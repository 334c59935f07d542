"""``fastkd distill`` by each of the baselines, from a teacher's folder to table and student."""

import csv

import pytest
import torch
from tiny import bert_config, tokenizer, write_glue
from transformers import AutoModelForSequenceClassification

from fastkd.cli import main
from fastkd.cli.methods import BASELINES, TWO_STAGES
from fastkd.data.glue import GLUE
from fastkd.methods.baselines import InTurn
from fastkd.methods.baselines.training import BaselineConfig
from fastkd.methods.experiment import WITH_KD, WITHOUT_KD
from fastkd.training.teacher import MultiTaskEncoder, MultiTaskEncoderConfig

TASKS = {task: {"labels": list(GLUE[task].label_names)} for task in ("sst2", "stsb")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baselines")
    write_glue(folder / "glue", rows=16)
    torch.manual_seed(0)
    config = bert_config()
    config.num_hidden_layers = 4
    MultiTaskEncoder(MultiTaskEncoderConfig(config, TASKS, pooling="mean")).save_pretrained(folder / "teacher")
    tokenizer().save_pretrained(folder / "teacher")
    return folder


def distil(folder, output, name, *options):
    command = ["distill", name, "--teacher", str(folder / "teacher"), "--data-dir", str(folder / "glue")]
    settings = ["--tasks", "sst2", "--epochs", "2", "--batch-size", "4", "--seeds", "1", "--jobs", "1"]
    return main([*command, *settings, "--layers", "2", "--learning-rate", "1e-3", "--output", str(output), *options])


def student_of(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder / "student")


@pytest.mark.parametrize("name", BASELINES)
def test_a_run_ends_with_a_table_and_a_student_of_the_teachers_layers(folder, tmp_path, name):
    assert distil(folder, tmp_path, name, *(["--options", "relation_heads=4"] if name == "minilmv2" else [])) == 0
    with open(tmp_path / "table.csv", newline="") as file:
        assert [row["model"] for row in csv.DictReader(file)] == ["teacher", WITHOUT_KD, WITH_KD]
    student = student_of(tmp_path)
    assert student.config.encoder.num_hidden_layers == 2
    assert len(student.encoder.encoder.layer) == 2
    assert list(student.heads) == ["sst2"]
    without = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student-without-kd" / "seed-1" / "model")
    weights = zip(student.parameters(), without.parameters(), strict=True)
    assert not all(torch.equal(mine, other) for mine, other in weights), "it learned the same as without the teacher"
    assert distil(folder, tmp_path, name, "--config", str(tmp_path / "options.yaml")) == 0


def test_options_reach_the_training(folder, tmp_path):
    weights = []
    for number, options in enumerate(([], ["--options", "alpha=0.9,temperature=5"])):
        assert distil(folder, tmp_path / str(number), "kd", "--no-baseline", *options) == 0
        weights.append(student_of(tmp_path / str(number)).state_dict())
    assert not all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_options_reach_both_parts_of_a_training(tmp_path):
    objective = BaselineConfig(
        str(tmp_path), use_cpu=True, baseline="tinybert", options={"temperature": 4.0}
    ).objective()
    assert [(part.stage, part.temperature) for part in map(objective.at, (0.0, 1.0))] == [
        ("intermediate", 4.0),
        ("prediction", 4.0),
    ]


def test_a_budget_makes_the_word_embedding_thin(folder, tmp_path):
    assert distil(folder, tmp_path, "kd", "--no-baseline", "--parameters", "5500") == 0
    student = student_of(tmp_path)
    assert sum(parameter.numel() for parameter in student.parameters()) <= 5500
    assert list(student.config.quantization_config.ranks) == ["encoder.embeddings.word_embeddings"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "none"}, "baseline must be one of kd, pkd"),
        ({"options": {"heat": 1}}, "options of kd: .*heat"),
        ({"options": {"alpha": 2.0}}, "alpha must be"),
        ({"options": {"alpha": "high"}}, "alpha must be a number from 0 to 1, got 'high'"),
        ({"options": {"temperature": "high"}}, "temperature must be a positive number, got 'high'"),
        ({"baseline": "pkd", "options": {"beta": "high"}}, "beta must be a number of at least 0, got 'high'"),
        ({"baseline": "minilmv2", "options": {"relation_heads": 2.5}}, "relation_heads must be a whole number"),
        ({"baseline": "tinybert", "options": {"projection": "x"}}, "projection must be a module, or None"),
        ({"baseline": "tinybert", "switch": 1.0}, "switch must be between 0 and 1, got 1.0"),
    ],
)
def test_bad_options_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        BaselineConfig(str(tmp_path), use_cpu=True, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["pkd", "--options", "layers=last"], 'layers is "last", which leaves out the last layer'),
        (["minilmv2", "--options", "relation_heads=7"], "relation_heads"),
    ],
)
def test_models_that_do_not_fit_are_refused_before_any_work(folder, tmp_path, options, message, monkeypatch, capsys):
    monkeypatch.setattr("fastkd.methods.experiment.load_encoded", lambda *a, **k: pytest.fail("data were read"))
    assert distil(folder, tmp_path / "out", *options, "--layers", "1") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_stages_are_those_that_the_trainer_has(tmp_path):
    objectives = {name: BaselineConfig(str(tmp_path), use_cpu=True, baseline=name).objective() for name in BASELINES}
    assert {name for name, objective in objectives.items() if isinstance(objective, InTurn)} == set(TWO_STAGES)


@pytest.mark.parametrize(
    ("name", "option"), [("theseus", "--parameters=5500"), ("theseus", "--switch=0.3"), ("kd", "--switch=0.3")]
)
def test_options_that_would_do_nothing_are_refused(folder, tmp_path, name, option, capsys):
    with pytest.raises(SystemExit):
        distil(folder, tmp_path, name, option)
    assert f"unrecognized arguments: {option}" in capsys.readouterr().err


def test_settings_must_have_values(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        distil(folder, tmp_path, "kd", "--options", "alpha")
    assert "must be name=value" in capsys.readouterr().err
