"""An experiment's kinds of student, rows, methods and teachers."""

import csv
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny import bert_config, tokenizer, write_glue
from transformers import AutoModelForSequenceClassification

from fastkd.cli import main
from fastkd.data.glue import GLUE
from fastkd.methods import registry
from fastkd.methods.experiment import WITH_KD, WITHOUT_KD, Experiment, run_experiment
from fastkd.methods.makd import MaKDObjective
from fastkd.methods.mkd import MKDConfig, MKDTrainer
from fastkd.methods.objective import Objective
from fastkd.methods.registry import Method
from fastkd.methods.students import TransformerStudent
from fastkd.methods.trial import try_objective
from fastkd.training.signals import COLUMN
from fastkd.training.teacher import MultiTaskEncoder, MultiTaskEncoderConfig

TASKS = {name: {"labels": list(GLUE[name].label_names)} for name in ("sst2", "stsb")}


def save_teacher(folder, *tasks, seed=0, **options):
    torch.manual_seed(seed)
    config = bert_config(initializer_range=0.5)
    config.update({"num_hidden_layers": 2, **options})
    MultiTaskEncoder(MultiTaskEncoderConfig(config, {task: TASKS[task] for task in tasks})).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiment")
    write_glue(folder / "glue", rows=16)
    save_teacher(folder / "teacher", "sst2", "stsb")
    save_teacher(folder / "sst2", "sst2", seed=1)
    save_teacher(folder / "stsb", "stsb", seed=2, intermediate_size=64)
    return folder


@pytest.fixture
def experiment(folder, tmp_path):
    """One Transformer student of each row."""
    return Experiment(
        teacher=str(folder / "teacher"),
        tasks=("sst2", "stsb"),
        output=str(tmp_path),
        student=TransformerStudent(layers=1, head_size=8),
        data_dir=str(folder / "glue"),
        seeds=(1,),
        training={"num_train_epochs": 1, "per_device_train_batch_size": 8},
    )


def distil(folder, output, *options):
    command = ["distill", "mkd", "--teacher", str(folder / "teacher"), "--data-dir", str(folder / "glue")]
    settings = ["--tasks", "sst2,stsb", "--epochs", "1", "--seeds", "1", "--jobs", "1", "--output", str(output)]
    return main([*command, *settings, *options])


def rows_of_table(output):
    with open(output / "table.csv", newline="") as file:
        return {row["model"]: row for row in csv.DictReader(file)}


def result(folder):
    return json.loads((folder / "result.json").read_text())["result"]


def test_transformer_students_by_the_command(folder, tmp_path):
    assert distil(folder, tmp_path, "--student", "transformer", "--layers", "1") == 0
    assert list(rows_of_table(tmp_path)) == ["teacher", WITHOUT_KD, WITH_KD]
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert student.config.tasks == TASKS
    assert student.config.encoder.num_hidden_layers == 1
    assert (student.config.pooling, student.config.head_size) == ("cls_of_layers", 512)
    card = (tmp_path / "student" / "README.md").read_text()
    assert "# Transformer student (1 layer) distilled by MKD" in card
    assert "- learning_rate: 0.0001" in card


def test_a_student_starts_from_the_teachers_layers(experiment, folder, tmp_path):
    training = {"max_steps": 1, "learning_rate": 1e-12}
    run_experiment(replace(experiment, training=training, arms={WITH_KD: {}}), jobs=1)
    student = load_file(tmp_path / "student" / "model.safetensors")
    teacher = load_file(folder / "teacher" / "model.safetensors")
    name = "encoder.encoder.layer.0.intermediate.dense.weight"
    torch.testing.assert_close(student[name], teacher[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "2"], "--layers is of --student transformer"),
        (["--student", "transformer", "--preset", "mkd"], "--preset is of --student bilstm"),
        (["--student", "transformer", "--layers", "3"], "layers is 3; it must be 1 to 2"),
        (["--teacher", "sst2=a,sst2=b"], "with each task once"),
        (["--teacher", "sst2=a,b"], "with each task once"),
        (["--teacher", "sst2=a"], "teacher names folders for sst2; the tasks are sst2, stsb"),
    ],
)
def test_the_command_refuses_before_work(folder, tmp_path, options, message, capsys):
    assert distil(folder, tmp_path / "run", *options) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_rows_differ_by_their_settings_and_the_last_is_published(experiment, tmp_path):
    arms = {"labels": {"distillation_weight": 0.0, "hard_label_weight": 1.0}, "kl": {"loss": "kl"}, "mse": {}}
    run_experiment(replace(experiment, arms=arms), jobs=1)
    assert list(rows_of_table(tmp_path)) == ["teacher", "labels", "kl", "mse"]
    weights = {arm: load_file(tmp_path / arm / "seed-1" / "model" / "model.safetensors") for arm in arms}
    name = "heads.sst2.0.weight"
    assert len({weights[arm][name].sum().item() for arm in arms}) == 3
    assert torch.equal(load_file(tmp_path / "student" / "model.safetensors")[name], weights["mse"][name])
    assert 'of the row "mse"' in (tmp_path / "student" / "README.md").read_text()


def test_a_finished_student_of_another_kind_is_not_taken(experiment):
    run_experiment(replace(experiment, arms={WITH_KD: {}}), jobs=1)
    deeper = replace(experiment, arms={WITH_KD: {}}, student=TransformerStudent(layers=2, head_size=8))
    with pytest.raises(ValueError, match=r"other settings \(student .*'layers': 1.*'layers': 2"):
        run_experiment(deeper, jobs=1)
    with pytest.raises(ValueError, match=r"other settings \(arm \{\} there, \{'loss': 'kl'\} here\)"):
        run_experiment(replace(experiment, arms={WITH_KD: {"loss": "kl"}}), jobs=1)


@pytest.mark.parametrize("arms", [["Student"], ["a b", "a-b"], ["../elsewhere"], [""], ["table.md"]])
def test_rows_must_name_folders_of_their_own(experiment, arms):
    with pytest.raises(ValueError, match="arms"):
        replace(experiment, arms={arm: {} for arm in arms})


def test_bad_settings_are_refused_when_they_are_made(experiment):
    with pytest.raises(ValueError, match="unknown method 'magic'; the methods are mkd"):
        replace(experiment, method="magic")
    with pytest.raises(ValueError, match="temperature must be a positive number"):
        replace(experiment, arms={WITH_KD: {"temperature": 0.0}})


@pytest.mark.parametrize("seeds", [(), (1, 1), (-1,)])
def test_seeds_must_be_different_and_some(experiment, seeds):
    with pytest.raises(ValueError, match=r"seeds is \(.*\); it must be different numbers of at least 0, one or more"):
        replace(experiment, seeds=seeds)


def test_training_departs_from_the_defaults_and_an_arm_from_both(experiment):
    training = {"bf16": False, "use_cpu": True, "logging_steps": 10, "learning_rate": 1.0}
    args = replace(experiment, training=training, arms={"a": {"learning_rate": 2.0}}).arguments("a", 7)
    assert (args.bf16, args.use_cpu, args.logging_steps, args.learning_rate, args.seed) == (False, True, 10, 2.0, 7)
    args = replace(experiment, training={"bf16": True}).arguments(WITH_KD, 7)
    assert (args.bf16, args.logging_steps, args.save_strategy) == (True, 100, "no")


@pytest.mark.parametrize("where", ["training", "arms"])
@pytest.mark.parametrize(("name", "instead"), [("seed", "seeds"), ("output_dir", "output")])
def test_what_the_experiment_sets_is_refused_by_name(experiment, where, name, instead):
    fields = {name: 3} if where == "training" else {WITH_KD: {name: 3}}
    with pytest.raises(ValueError, match=f"has {name}; it must be left out, it follows from {instead}"):
        replace(experiment, **{where: fields})


@pytest.mark.parametrize(("split", "name"), [("train", "training"), ("dev", "validation")])
def test_a_finished_student_of_other_rows_is_not_taken(experiment, folder, tmp_path, split, name):
    data = tmp_path / "data"
    shutil.copytree(folder / "glue", data)
    mine = replace(experiment, arms={"students": {}}, data_dir=str(data))
    run_experiment(mine, jobs=1)
    run_experiment(mine, jobs=1)
    table = data / "SST-2" / f"{split}.tsv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines[:-1], f"{lines[-1][:-1]}{1 - int(lines[-1][-1])}"]))
    with pytest.raises(ValueError, match=rf"other settings \({name} rows of sst2 '\w+' there, '\w+' here\)"):
        run_experiment(mine, jobs=1)


def test_nothing_of_another_teacher_is_taken(experiment, folder, tmp_path):
    mine = replace(experiment, teacher=save_teacher(tmp_path / "mine", "sst2", "stsb"), output=str(tmp_path / "run"))
    run_experiment(mine, jobs=1)
    save_teacher(tmp_path / "mine", "sst2", "stsb", seed=5)
    with pytest.raises(ValueError, match=r"run/teacher holds .* other settings \(teacher of sst2 '\w+' there"):
        run_experiment(mine, jobs=1)
    shutil.rmtree(tmp_path / "run" / "teacher")
    with pytest.raises(ValueError, match=r"seed-1 holds .* other settings \(teacher of sst2 '\w+' there"):
        run_experiment(mine, jobs=1)


def test_a_teachers_score_is_of_the_labels_there_are(experiment, folder, tmp_path):
    data, mine = tmp_path / "data", replace(experiment, data_dir=str(tmp_path / "data"), arms={WITH_KD: {}})
    shutil.copytree(folder / "glue", data)
    run_experiment(mine, jobs=1)
    table = data / "SST-2" / "dev.tsv"
    head, *lines = table.read_text().splitlines()
    table.write_text("\n".join([head, *(f"{line[:-1]}{1 - int(line[-1])}" for line in lines)]))
    shutil.rmtree(tmp_path / "student-with-kd")
    with pytest.raises(ValueError, match=r"teacher holds .* other settings \(validation rows of sst2 "):
        run_experiment(mine, jobs=1)


def test_all_stages_of_a_training_are_tried(folder):
    class Stages(Objective):
        def at(self, progress):
            return MaKDObjective(layers=(7,) if 0.6 < progress < 0.63 else None)

    teacher = AutoModelForSequenceClassification.from_pretrained(folder / "teacher")
    with pytest.raises(ValueError, match="layers has 7; there are 2 layers"):
        try_objective(Stages(), teacher, {"sst2": teacher})


def test_texts_beyond_the_teachers_positions_are_refused(experiment, tmp_path):
    short = save_teacher(tmp_path / "short", "sst2", "stsb", max_position_embeddings=4)
    with pytest.raises(ValueError, match=r"a row has \d+ tokens, and the bert 4 positions: lower max_length"):
        run_experiment(replace(experiment, teacher=short))


def test_a_method_that_asks_the_teacher_at_every_step(experiment, tmp_path, monkeypatch):
    asked = []

    class Trainer(MKDTrainer):
        def __init__(self, student, args, collate, train, validation, *, teacher, callbacks):
            asked.append((teacher, [rows.column_names for rows in train.datasets.values()]))
            super().__init__(student, args, collate, train, validation, teacher=teacher, callbacks=callbacks)

    method = Method("Live", MKDConfig, Trainer, uses_cached_logits=False, without_kd={})
    monkeypatch.setitem(registry.METHODS, "live", method)
    run_experiment(replace(experiment, method="live", arms={WITH_KD: {}}), jobs=1)
    ((teachers, columns),) = asked
    assert teachers.keys() == TASKS.keys()
    assert not any(COLUMN in names for names in columns)
    assert not (tmp_path / "teacher_logits").exists()
    assert "distilled by Live" in (tmp_path / "student" / "README.md").read_text()


def test_one_teacher_per_task(experiment, folder, tmp_path):
    by_task = {"sst2": str(folder / "sst2"), "stsb": str(folder / "stsb")}
    run_experiment(replace(experiment, teacher=by_task, arms={WITH_KD: {}}), jobs=1)
    both = result(tmp_path / "teacher")
    for task in TASKS:
        alone = replace(experiment, teacher=by_task[task], tasks=(task,), output=str(tmp_path / task))
        run_experiment(replace(alone, arms={WITH_KD: {}}), jobs=1)
        assert both[task] == pytest.approx(result(tmp_path / task / "teacher")[task])
        logits = [load_file(run / "teacher_logits" / f"{task}.safetensors") for run in (tmp_path, tmp_path / task)]
        assert torch.equal(logits[0]["logits"], logits[1]["logits"])
    assert next(iter(rows_of_table(tmp_path))) == "teachers, one per task (size of sst2's)"
    assert "sst2 from `sst2`, stsb from `stsb`" in (tmp_path / "student" / "README.md").read_text()


def test_the_command_takes_a_teacher_per_task(folder, tmp_path, capsys):
    options = ["--student", "transformer", "--layers", "2", "--no-baseline"]
    teachers = f"sst2={folder / 'sst2'},stsb={folder / 'sst2'}"
    assert distil(folder, tmp_path, "--teacher", teachers, *options) == 1
    assert "teacher has no head for stsb; its tasks are sst2" in capsys.readouterr().err
    teachers = f"sst2={folder / 'sst2'}, stsb={folder / 'stsb'}"
    assert distil(folder, tmp_path, "--teacher", teachers, *options) == 0
    assert len(rows_of_table(tmp_path)) == 2


def test_teachers_must_share_a_vocabulary(experiment, folder, tmp_path):
    words = tokenizer()
    words.add_tokens(["splendid"])
    save_teacher(tmp_path / "other", "stsb")
    words.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="have different vocabularies"):
        run_experiment(
            replace(experiment, teacher={"sst2": str(folder / "sst2"), "stsb": str(tmp_path / "other")}), jobs=1
        )
