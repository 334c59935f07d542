"""What all distillations share: parts of the loss, stops at NaN, checkpoints after a kill, students of others."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import ClassLabel
from safetensors.torch import load_file
from test_mkd import COLLATE, TASKS, trainer_for
from tiny import bert_config, tokenizer, write_glue
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    DistilBertConfig,
    RobertaConfig,
    TrainingArguments,
)

from fastkd.data.encode import MultiTaskDataset, load_encoded
from fastkd.training.checkpoints import last_checkpoint
from fastkd.training.loss_parts import LossParts, Place, means
from fastkd.training.teacher import MultiTaskEncoder, MultiTaskEncoderConfig

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_encoded(list(TASKS), tokenizer(), 16, write_glue(tmp_path_factory.mktemp("glue")))


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return MultiTaskEncoder(MultiTaskEncoderConfig(bert_config(initializer_range=1.0), TASKS)).eval()


def test_parts_are_averaged_over_the_micro_batches_that_have_them():
    parts = LossParts()
    parts.add({"a": torch.tensor(1.0), "b": torch.tensor(4.0)}, Place(0, 0))
    parts.add({"a": torch.tensor(2.0)}, Place(0, 1))
    assert parts.broken() is None
    here, there = parts.totals(), {"b": (2.0, 2), "c": (3.0, 1)}
    assert means([here]) == {"a": 1.5, "b": 4.0}
    assert means([here, there]) == {"a": 1.5, "b": 2.0, "c": 3.0}
    assert parts.totals() == {}


def test_parts_tell_where_they_broke_first():
    parts = LossParts()
    nan, inf, good = torch.tensor(torch.nan), torch.tensor(torch.inf), torch.tensor(1.0)
    parts.add({"a": good, "b": good}, Place(4, 0))
    parts.add({"a": good, "b": inf}, Place(4, 1))
    parts.add({"a": nan, "b": nan}, Place(5, 0))
    assert parts.broken() == (Place(4, 1), ["b"])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_nan_stops_the_training_and_saves_nothing_of_it(data, teacher, tmp_path, accumulation):
    trainer = trainer_for(
        tmp_path, data[0], teacher, num_train_epochs=4, save_strategy="steps", save_steps=2, logging_steps=100,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    ask, batches = trainer.signal, []

    def nan_in_the_ninth(batch):
        batches.append(batch)
        return ask(batch) * (torch.nan if len(batches) == 9 else 1)

    trainer.signal = nan_in_the_ninth
    with pytest.raises(FloatingPointError) as caught:
        trainer.train()
    message, bad, step = str(caught.value), batches[8], 8 // accumulation
    assert f"distillation of the loss is NaN or infinite in step {step + 1} (task {bad['task']}, rows " in message
    rows = [int(row) for row in message.split("rows ")[1].split(")")[0].split(", ")]
    again = COLLATE([{**data[0].datasets[bad["task"]][row], "task": bad["task"]} for row in rows])
    assert torch.equal(again["input_ids"], bad["input_ids"])
    kept = tmp_path / f"checkpoint-{step}"
    assert message.endswith(f"the last good checkpoint is {kept}")
    assert last_checkpoint(tmp_path) == str(kept)
    assert all(tensor.isfinite().all() for tensor in load_file(kept / "model.safetensors").values())


@pytest.mark.parametrize(("batch_size", "processes"), [(5, 2), (5, 3), (7, 2), (24, 3)])
def test_the_rows_of_a_place_are_those_that_a_process_was_given(
    data, teacher, tmp_path, monkeypatch, batch_size, processes
):
    rows = MultiTaskDataset({"sst2": data[0].datasets["sst2"]})
    trainer = trainer_for(tmp_path, rows, teacher, per_device_train_batch_size=batch_size)
    sampler = trainer.get_train_dataloader().batch_sampler
    monkeypatch.setattr(TrainingArguments, "world_size", processes)
    for process in range(processes):
        given = BatchSamplerShard(sampler, processes, process)
        monkeypatch.setattr(TrainingArguments, "process_index", process)
        monkeypatch.setattr(trainer, "get_train_dataloader", lambda given=given: given)
        for epoch in range(2):
            sampler.set_epoch(epoch)
            for step, batch in enumerate(list(given)):
                place = Place(epoch * len(given) + step, 0)
                assert trainer.rows_of(place) == f"task sst2, rows {', '.join(str(rows[i]['row']) for i in batch)}"


def test_a_checkpoint_cut_short_is_not_the_last_one(data, teacher, tmp_path):
    trainer = trainer_for(tmp_path, data[0], teacher, save_strategy="steps", save_steps=4)
    trainer.train()
    whole, cut = tmp_path / "checkpoint-8", tmp_path / "checkpoint-12"
    shutil.copytree(cut, tmp_path / "checkpoint-99-best")  # a user's own copy
    assert last_checkpoint(tmp_path) == str(cut)
    assert last_checkpoint(tmp_path, processes=2) is None
    state = cut / "trainer_state.json"
    state.write_text(state.read_text()[:50])
    assert last_checkpoint(tmp_path) == str(whole)
    state.unlink()
    assert last_checkpoint(tmp_path) == str(whole)
    assert last_checkpoint(tmp_path / "nothing") is None


RUN = """
import sys
import torch
from test_mixkd import TASKS, encoder, make_student, trainer_for
from tiny import tokenizer
from fastkd.data.encode import load_encoded
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
folder, glue = sys.argv[1:]
train, _ = load_encoded(list(TASKS), tokenizer(), 16, glue)
trainer = trainer_for(
    folder, train, encoder(0).eval(), student=make_student(0.2), num_train_epochs=8,
    save_strategy="steps", save_steps=2, save_total_limit=2,
)
trainer.train(resume_from_checkpoint=True)
trainer.save_model(folder + "/model")
"""


def newest_step(folder):
    return max((int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")), default=0)


def test_a_run_killed_at_random_moments_ends_bitwise_as_one_that_was_not(tmp_path):
    glue, script = write_glue(tmp_path / "glue"), tmp_path / "run.py"
    script.write_text(RUN)
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def start(folder):
        return subprocess.Popen(
            [sys.executable, script, folder, glue], env=env, cwd=tmp_path, stdout=subprocess.DEVNULL
        )

    pick, folder = random.Random(0), tmp_path / "killed"
    for _ in range(3):
        process, before = start(folder), newest_step(folder)
        while newest_step(folder) <= before:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.001)
        time.sleep(pick.uniform(0, 0.03))  # while the checkpoint is written, or in the steps after it
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert start(folder).wait(timeout=300) == 0
    assert start(tmp_path / "whole").wait(timeout=300) == 0
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


SIZES = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
STUDENTS = {
    "bert": bert_config(),
    "roberta": RobertaConfig(**SIZES, max_position_embeddings=32, pad_token_id=0),
    "distilbert": DistilBertConfig(vocab_size=16, dim=16, n_layers=1, n_heads=2, hidden_dim=32),
}


@pytest.mark.parametrize("family", STUDENTS)
def test_any_classifier_can_be_the_student(data, teacher, tmp_path, family):
    torch.manual_seed(1)
    student = AutoModelForSequenceClassification.from_config(STUDENTS[family])
    rows = MultiTaskDataset({"sst2": data[0].datasets["sst2"]})
    options = {"num_train_epochs": 10, "learning_rate": 1e-2, "logging_steps": 3}
    trainer = trainer_for(tmp_path, rows, teacher, student=student, evaluation={"sst2": data[1]["sst2"]}, **options)
    trainer.train()
    logs = [log["loss_distillation"] for log in trainer.state.log_history if "loss_distillation" in log]
    assert logs[-1] < 0.5 * logs[0]
    assert trainer.evaluate()["eval_sst2_accuracy"] >= 0.5
    trainer.save_model(tmp_path / "model")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert loaded.config.id2label == {0: "negative", 1: "positive"}


def test_a_classifier_of_other_labels_or_of_several_tasks_is_refused(data, teacher, tmp_path):
    rows = MultiTaskDataset({"sst2": data[0].datasets["sst2"]})
    turned = bert_config(id2label={0: "positive", 1: "negative"})
    three = bert_config(num_labels=3)
    for config, train, message in (
        (turned, rows, "outputs are positive, negative; those of sst2 are negative, positive"),
        (three, rows, "has 3 outputs; sst2 needs 2"),
        (bert_config(), data[0], "has no config.tasks; on sst2, stsb it needs a head for each"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_for(tmp_path, train, teacher, student=BertForSequenceClassification(config))


def test_a_student_without_a_task_or_with_its_labels_turned_is_refused(data, teacher, tmp_path):
    turned, stsb = {"sst2": {"labels": ["positive", "negative"]}}, {"stsb": TASKS["stsb"]}
    rows = MultiTaskDataset({"sst2": data[0].datasets["sst2"]})
    for tasks, message in (
        (turned, r"labels of sst2 are \['negative', 'positive'\], but those of the student are \['positive', 'negat"),
        (stsb, "the student has no head for sst2; its tasks are stsb"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_for(tmp_path, rows, teacher, student=MultiTaskEncoder(MultiTaskEncoderConfig(bert_config(), tasks)))


def test_evaluation_rows_with_their_labels_turned_are_refused(data, teacher, tmp_path):
    train, turned = (
        MultiTaskDataset({"mine": data[0].datasets["sst2"].cast_column("labels", ClassLabel(names=names))})
        for names in (["bad", "good"], ["good", "bad"])
    )
    student = BertForSequenceClassification(bert_config())
    with pytest.raises(ValueError, match=r"labels of mine are \['good', 'bad'\], but those of the student are"):
        trainer_for(tmp_path, train, teacher, student=student, evaluation={"mine": turned})


def test_a_teacher_may_have_the_labels_in_another_order(data, tmp_path):
    torch.manual_seed(0)
    turned = MultiTaskEncoderConfig(bert_config(initializer_range=1.0), {"sst2": {"labels": ["positive", "negative"]}})
    teacher, rows = MultiTaskEncoder(turned), MultiTaskDataset({"sst2": data[0].datasets["sst2"]})
    trainer = trainer_for(tmp_path, rows, teacher)
    batch = COLLATE([rows[index] for index in range(4)])
    want = teacher(**{name: value for name, value in batch.items() if name != "labels"}).logits.flip(1)
    torch.testing.assert_close(trainer.signal(batch), want)
