"""MaKD's trainer: it learns every part, does not depend on how rows are divided, and goes on where it was stopped."""

import pytest
import torch
from test_mkd import COLLATE, TASKS
from tiny import bert_config, tokenizer, write_glue
from transformers import TrainerCallback

from fastkd.data.encode import MultiTaskDataset, load_encoded
from fastkd.methods.makd import MaKDConfig, MaKDTrainer
from fastkd.students import factorize, plan_factorization
from fastkd.training.classifiers import MultiTaskEncoder, MultiTaskEncoderConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_encoded(list(TASKS), tokenizer(), 16, write_glue(tmp_path_factory.mktemp("glue")))


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    config = MultiTaskEncoderConfig(bert_config(initializer_range=0.5), TASKS, classifier_dropout=0.0)
    return MultiTaskEncoder(config).eval()


def trainer_for(folder, data, teacher, **arguments):
    defaults = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "seed": 3, "num_train_epochs": 2}
    args = MaKDConfig(str(folder), **(defaults | {"per_device_train_batch_size": 8} | arguments))
    student = factorize(teacher, plan_factorization(teacher, rank=4))
    return MaKDTrainer(student, args, COLLATE, *data, teacher=teacher)


def trained(*args, **kwargs):
    trainer = trainer_for(*args, **kwargs)
    trainer.train()
    return dict(trainer.model.named_parameters())


def test_the_student_comes_closer_in_every_part(tmp_path, data, teacher):
    trainer = trainer_for(tmp_path, data, teacher, num_train_epochs=20, learning_rate=1e-2, logging_steps=6)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss_attention" in entry]
    for part in ("attention", "hidden", "mha", "ffn"):
        assert logged[-1][f"loss_{part}"] < 0.7 * logged[0][f"loss_{part}"], part
    assert "loss_labels" in logged[0]
    assert all(not parameter.requires_grad for parameter in teacher.parameters())


def of_many_lengths(rows):
    """Rows whose number of tokens differs, so that a mean over tokens is not one over rows."""

    def cut(row, index):
        length = 2 + index % 4
        names = ("input_ids", "attention_mask", "token_type_ids")
        return {**row, **{name: row[name][:length] for name in names}, "length": length}

    return rows.map(cut, with_indices=True)


@pytest.mark.parametrize("arguments", [{}, {"stages": [0.3, 0.6]}, {"matrix_form": "weight"}])
def test_accumulation_does_not_change_the_student(arguments, tmp_path, data, teacher):
    rows = MultiTaskDataset({"sst2": of_many_lengths(data[0].datasets["sst2"].select(range(8)))})
    sizes = [{"per_device_train_batch_size": 8}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}]
    options = {"num_train_epochs": 5, "learning_rate": 1e-2, "max_grad_norm": 0.0, "optim": "sgd"}
    options |= arguments  # not Adam, which makes much of the rounding in gradients that are 0
    whole, parts = (trained(tmp_path, (rows, data[1]), teacher, **options, **size) for size in sizes)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-5)


def test_resume_is_bitwise_exact(tmp_path, data, teacher):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = control.should_training_stop = state.global_step == 4

    options = {"stages": [0.3, 0.6]}
    whole = trained(tmp_path / "whole", data, teacher, **options)
    stopped = trainer_for(tmp_path / "parts", data, teacher, **options)
    stopped.add_callback(Stop())
    stopped.train()
    resumed = trainer_for(tmp_path / "parts", data, teacher, **options)
    resumed.train(resume_from_checkpoint=True)
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, whole[name]), name


def test_a_teacher_is_needed(tmp_path, data, teacher):
    with pytest.raises(ValueError, match="compares its features on the rows of sst2, stsb"):
        MaKDTrainer(teacher, MaKDConfig(str(tmp_path), use_cpu=True), COLLATE, *data)
