"""MultiTaskTrainer: gradients under accumulation, exact order and resume, evaluation of every task."""

import copy

import pytest
import torch
from tiny import bert_config, tokenizer, write_glue
from transformers import TrainerCallback, TrainingArguments

from fastkd.data.encode import MultiTaskCollator, MultiTaskDataset, load_encoded
from fastkd.data.glue import GLUE
from fastkd.data.metrics import task_metrics
from fastkd.training.teacher import MultiTaskEncoder, MultiTaskEncoderConfig, task_loss
from fastkd.training.trainer import MultiTaskTrainer

TASKS = ("sst2", "stsb")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_encoded(TASKS, tokenizer(), 16, write_glue(tmp_path_factory.mktemp("glue")))


@pytest.fixture(scope="module")
def initial():
    torch.manual_seed(0)
    tasks = {name: {"labels": GLUE[name].label_names} for name in TASKS}
    return MultiTaskEncoder(MultiTaskEncoderConfig(bert_config(), tasks, classifier_dropout=0.0))


def trainer_for(initial, folder, train, evaluation=None, *, tau=None, callbacks=None, **arguments):
    defaults = {
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "learning_rate": 1e-3,
        "seed": 3,
    }
    args = TrainingArguments(str(folder), **(defaults | arguments))
    collate = MultiTaskCollator(tokenizer())
    model = copy.deepcopy(initial)
    return MultiTaskTrainer(model, args, collate, train, evaluation, sampling_tau=tau, callbacks=callbacks)


class Gradients(TrainerCallback):
    """Keeps the gradient of every optimiser step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        self.steps.append({name: grad.clone() for name, grad in named.items()})


def first_rows(data, **counts):
    return MultiTaskDataset({name: data.datasets[name].select(range(count)) for name, count in counts.items()})


def gradients(initial, folder, train, batch_size, accumulation):
    kept = Gradients()
    sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    trainer = trainer_for(initial, folder, train, callbacks=[kept], max_steps=1, max_grad_norm=0.0, **sizes)
    trainer.train()
    assert len(kept.steps) == 1
    return kept.steps[0]


def row_mean_gradients(initial, rows):
    """Gradient of the mean of every row's own loss, worked out row by row."""
    model = copy.deepcopy(initial)
    collate = MultiTaskCollator(tokenizer())
    for row in rows:
        batch = collate([row])
        labels = batch.pop("labels")
        (task_loss(model(**batch).logits, labels) / len(rows)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (2, 4), (3, 3), (1, 8)])
def test_accumulation_leaves_the_gradient_alone(initial, data, tmp_path, batch_size, accumulation):
    train = first_rows(data[0], sst2=8)
    found = gradients(initial, tmp_path, train, batch_size, accumulation)
    torch.testing.assert_close(found, row_mean_gradients(initial, list(train)), rtol=1e-4, atol=1e-7)


def test_mixed_task_window_is_the_mean_over_its_rows(initial, data, tmp_path):
    train = first_rows(data[0], sst2=5, stsb=3)
    found = gradients(initial, tmp_path, train, batch_size=2, accumulation=5)
    torch.testing.assert_close(found, row_mean_gradients(initial, list(train)), rtol=1e-4, atol=1e-7)


def test_several_steps_end_at_the_same_parameters(initial, data, tmp_path):
    train = first_rows(data[0], sst2=8)
    ends = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        trainer = trainer_for(initial, tmp_path, train, num_train_epochs=5, **sizes)
        trainer.train()
        assert trainer.state.global_step == 5
        ends.append(dict(trainer.model.named_parameters()))
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(ends[0]["heads.sst2.weight"], initial.heads["sst2"].weight, atol=1e-3)


class Seen(MultiTaskTrainer):
    """Keeps the task and rows of every training batch."""

    def batch_loss(self, model, batch):
        if model.training:
            self.__dict__.setdefault("batches", []).append((batch["task"], batch["input_ids"].tolist()))
        return super().batch_loss(model, batch)


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_training_batches_are_the_samplers(initial, data, tmp_path, strategy):
    runs = []
    for _ in range(2):
        args = TrainingArguments(
            str(tmp_path), use_cpu=True, disable_tqdm=True, save_strategy="no", num_train_epochs=2,
            per_device_train_batch_size=5, train_sampling_strategy=strategy,
        )  # fmt: skip
        trainer = Seen(copy.deepcopy(initial), args, MultiTaskCollator(tokenizer()), data[0])
        trainer.train()
        runs.append(trainer.batches)
    assert runs[0] == runs[1]
    epochs = runs[0][:10], runs[0][10:]
    assert len(epochs[1]) == 10
    assert epochs[0] != epochs[1]
    expected = sorted(row["input_ids"] for row in data[0])
    for epoch in epochs:
        rows = sorted([token for token in row if token] for _, batch in epoch for row in batch)
        assert rows == expected


def test_grouped_batches_pad_less(initial, data, tmp_path):
    def cut(row, index):
        length = 2 + index % 4
        columns = ("input_ids", "attention_mask", "token_type_ids")
        return {**{name: row[name][:length] for name in columns}, "length": length}

    train = MultiTaskDataset({"sst2": data[0].datasets["sst2"].map(cut, with_indices=True)})
    padding = {}
    for strategy in ("random", "group_by_length"):
        trainer = trainer_for(initial, tmp_path, train, per_device_train_batch_size=6, train_sampling_strategy=strategy)
        masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
        padding[strategy] = sum(int((1 - mask).sum()) for mask in masks)
    assert padding["random"] > 0
    assert padding["group_by_length"] == 0


@pytest.mark.parametrize("tau", [None, 0.5])
@pytest.mark.parametrize("stop", [4, 10])
def test_resume_is_exact(initial, data, tmp_path, stop, tau):
    common = {"per_device_train_batch_size": 5, "num_train_epochs": 2, "tau": tau}
    whole = trainer_for(initial, tmp_path / "whole", data[0], **common)
    whole.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = control.should_training_stop = state.global_step == stop

    folder = tmp_path / "parts"
    trainer_for(initial, folder, data[0], callbacks=[Stop()], **common).train()
    resumed = trainer_for(initial, folder, data[0], **common)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{stop}"))
    assert resumed.state.global_step == whole.state.global_step == 20
    for (name, one), two in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_evaluation_covers_every_set(initial, data, tmp_path):
    train, validation = data
    sets = {**validation, "sst2_again": first_rows(validation["sst2"], sst2=5)}
    trainer = trainer_for(initial, tmp_path, train, sets, per_device_eval_batch_size=1)
    metrics = trainer.evaluate()
    scores = {}
    for name, dataset in sets.items():
        task = GLUE[name.removesuffix("_again")]
        with torch.no_grad():
            logits = torch.cat([trainer.model(**MultiTaskCollator(tokenizer())([row])).logits for row in dataset])
        expected = task_metrics(task, logits, [row["labels"] for row in dataset])
        assert {metric: metrics[f"eval_{name}_{metric}"] for metric in expected} == pytest.approx(expected, abs=1e-5)
        scores[name] = 100 * sum(expected.values()) / len(expected)
    average = ((scores["sst2"] + scores["sst2_again"]) / 2 + scores["stsb"]) / 2
    assert metrics["eval_average"] == pytest.approx(average, abs=1e-3)
    assert trainer.state.log_history[-1]["eval_average"] == metrics["eval_average"]


def test_training_learns_both_tasks(initial, data, tmp_path):
    trainer = trainer_for(
        initial, tmp_path, *data, num_train_epochs=12, learning_rate=1e-2, per_device_train_batch_size=8,
        eval_strategy="epoch", metric_for_best_model="eval_average",
    )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_sst2_accuracy"] == 1.0
    assert metrics["eval_stsb_pearson"] > 0.95


def test_data_parallel_is_refused(initial, data, tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"2 GPUs .* torchrun"):
        MultiTaskTrainer(initial, args, MultiTaskCollator(tokenizer()), data[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"train_sampling_strategy": "sequential"},
            "'sequential'; it must be one of random, group_by_length",
        ),
        ({"dataloader_drop_last": True}, "dataloader_drop_last is not supported"),
        ({"label_smoothing_factor": 0.1}, "override batch_loss"),
    ],
)
def test_arguments_without_effect_are_refused(initial, data, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        trainer_for(initial, tmp_path, data[0], **arguments)


def test_an_evaluation_set_of_two_tasks_is_refused(initial, data, tmp_path):
    trainer = trainer_for(initial, tmp_path, data[0], {"both": data[0]})
    with pytest.raises(ValueError, match="one task, not of sst2, stsb"):
        trainer.evaluate()


def test_plain_datasets_are_refused(initial, data, tmp_path):
    with pytest.raises(TypeError, match="train_dataset is Dataset, not a MultiTaskDataset"):
        trainer_for(initial, tmp_path, data[0].datasets["sst2"]).train()
