"""``fastkd factorize`` and ``fastkd distill makd``, from a teacher's folder to table and student."""

import csv
import json
import runpy
from pathlib import Path

import pytest
import torch
from families import make
from tiny import bert_config, tokenizer, write_glue
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fastkd.cli import main
from fastkd.data.glue import GLUE
from fastkd.methods.experiment import WITH_KD, WITHOUT_KD
from fastkd.methods.makd import LEVELS
from fastkd.training.teacher import MultiTaskEncoder, MultiTaskEncoderConfig

TASKS = {task: {"labels": list(GLUE[task].label_names)} for task in ("sst2", "stsb")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("makd")
    write_glue(folder / "glue", rows=16)
    torch.manual_seed(0)
    MultiTaskEncoder(MultiTaskEncoderConfig(bert_config(), TASKS, pooling="mean")).save_pretrained(folder / "teacher")
    tokenizer().save_pretrained(folder / "teacher")
    return folder


def distil(folder, output, *options):
    command = ["distill", "makd", "--teacher", str(folder / "teacher"), "--data-dir", str(folder / "glue")]
    settings = ["--tasks", "sst2", "--epochs", "1", "--batch-size", "4", "--seeds", "1", "--jobs", "1"]
    return main([*command, *settings, "--output", str(output), *options])


def ranks_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]["ranks"]


def test_a_run_ends_with_a_table_and_a_low_rank_student(folder, tmp_path):
    assert distil(folder, tmp_path, "--ratio", "0.8") == 0
    with open(tmp_path / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["teacher", WITHOUT_KD, WITH_KD]
    assert int(rows[1]["parameters"]) == int(rows[2]["parameters"]) <= 0.8 * int(rows[0]["parameters"])
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert list(student.heads) == ["sst2"]
    assert len(set(ranks_of(tmp_path / "student").values())) == 1
    assert distil(folder, tmp_path, "--config", str(tmp_path / "options.yaml")) == 0


@pytest.mark.parametrize(
    "option",
    [
        "--stages=0.3,0.6",
        "--matrix-form=weight",
        *(f"--{part}-weight=5" for parts in LEVELS.values() for part in parts),
        "--temperature=0.01",
        "--allocation=spectrum",
        "--calibration-rows=0",
    ],
)
def test_options_reach_the_training(folder, tmp_path, option):
    models = []
    for number, options in enumerate(([], [option])):
        output = tmp_path / str(number)
        assert distil(folder, output, "--no-baseline", "--ratio", "0.7", *options) == 0
        models.append(AutoModelForSequenceClassification.from_pretrained(output / "student").state_dict())
    pairs = [(models[0][name], models[1][name]) for name in models[0]]
    assert not all(mine.shape == theirs.shape and torch.equal(mine, theirs) for mine, theirs in pairs)


@pytest.mark.parametrize("option", ["--stages=0.3,0.6", "--labels-weight=0"])
def test_options_of_the_method_leave_its_comparison_alone(folder, tmp_path, option):
    without = []
    for number, options in enumerate(([], [option])):
        assert distil(folder, tmp_path / str(number), "--ratio", "0.8", *options) == 0
        model = tmp_path / str(number) / "student-without-kd" / "seed-1" / "model"
        without.append(AutoModelForSequenceClassification.from_pretrained(model))
    for mine, other in zip(*(model.parameters() for model in without), strict=True):
        assert torch.equal(mine, other)


def test_factorize_shows_the_ranks_and_saves_what_it_showed(folder, tmp_path, capsys):
    command = ["factorize", "--model", str(folder / "teacher"), "--rank", "3"]
    assert main([*command, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "encoder.encoder.layer.0.attention.self.query" in shown
    assert "all parameters:" in shown
    assert main([*command, "--output", str(tmp_path / "student")]) == 0
    assert shown in capsys.readouterr().out
    assert set(ranks_of(tmp_path / "student").values()) == {3}
    assert (tmp_path / "student" / "tokenizer.json").exists()


def test_factorize_keeps_most_of_the_texts_it_is_given(folder, tmp_path):
    command = ["factorize", "--model", str(folder / "teacher"), "--rank", "3"]
    teacher = AutoModelForSequenceClassification.from_pretrained(folder / "teacher").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    texts = ["a good film", "one\tanother", "", "so bad"]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    errors = []
    for number, options in enumerate(([], ["--calibration-texts", str(tmp_path / "texts.txt")])):
        output = tmp_path / str(number)
        assert main([*command, "--output", str(output), *options]) == 0
        student = AutoModelForSequenceClassification.from_pretrained(output).eval()
        batches = [{**tokenizer(*text.split("\t"), return_tensors="pt"), "task": "sst2"} for text in texts if text]
        differences = [student(**batch).logits - teacher(**batch).logits for batch in batches]
        errors.append(sum(difference.square().sum().item() for difference in differences))
    assert errors[1] < 0.5 * errors[0]


def test_factorize_takes_a_decoder(tmp_path):
    make("gpt2").save_pretrained(tmp_path / "gpt2")
    assert main(["factorize", "--model", str(tmp_path / "gpt2"), "--output", str(tmp_path / "student")]) == 0
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    dense = sum(parameter.numel() for parameter in make("gpt2").parameters())
    assert sum(parameter.numel() for parameter in student.parameters()) <= dense / 2
    student.generate(torch.tensor([[3, 4]]), max_new_tokens=2, do_sample=False)


def test_bad_input_is_refused_before_any_work(folder, tmp_path, capsys):
    teacher, blank = str(folder / "teacher"), tmp_path / "blank.txt"
    blank.write_text("\n  \n")
    cases = {
        ("--ratio", "0.01", "--dry-run"): "cannot be met",
        ("--ratio", "0.5"): "give --output, or --dry-run",
        ("--ratio", "0.5", "--output", teacher): "holds something else",
        ("--dry-run", "--calibration-texts", str(tmp_path / "none.txt")): "No such file",
        ("--dry-run", "--calibration-texts", str(blank)): "which has no text",
    }
    for options, message in cases.items():
        assert main(["factorize", "--model", teacher, *options]) == 1
        assert message in capsys.readouterr().err
    assert main(["factorize", "--model", teacher, "--rank", "3", "--output", str(tmp_path / "student")]) == 0
    assert main(["factorize", "--model", str(tmp_path / "student"), "--dry-run"]) == 1
    assert "is low-rank already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["factorize", "--model", teacher, "--rank", "3", "--ratio", "0.5", "--dry-run"])
    assert distil(folder, tmp_path / "out", "--stages", "0.6,0.3") == 1
    assert "stages must be two rising numbers" in capsys.readouterr().err
    assert distil(folder, tmp_path / "out", "--layers", "0,3") == 1
    assert "layers has 3; there are 1 layers, from 0" in capsys.readouterr().err
    assert distil(folder, tmp_path / "out", "--calibration-rows=-1") == 1
    assert "calibration_rows is -1; it must be at least 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    make("gpt2").save_pretrained(tmp_path / "gpt2")
    texts = ["--calibration-texts", str(blank)]
    assert main(["factorize", "--model", str(tmp_path / "gpt2"), "--dry-run", *texts]) == 1
    assert "--calibration-texts needs a tokenizer, and" in capsys.readouterr().err


def test_the_example_runs(folder, tmp_path, monkeypatch, capsys):
    example = Path(__file__).resolve().parents[1] / "examples" / "distil_makd.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(example), str(folder / "teacher"), str(folder / "glue")])
    runpy.run_path(str(example))
    assert "energy kept" in capsys.readouterr().out
    assert "ranks" in (tmp_path / "runs" / "student" / "config.json").read_text()
