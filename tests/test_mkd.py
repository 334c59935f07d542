"""The MKD objective and trainer."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from tiny import bert_config, tokenizer, write_glue
from torch.nn import functional as F
from transformers import TrainerCallback, TrainingArguments

from fastkd.data.encode import MultiTaskCollator, MultiTaskDataset, load_encoded
from fastkd.data.glue import GLUE
from fastkd.methods.mkd import MKDConfig, MKDObjective, MKDTrainer
from fastkd.students import BiAttentiveLSTM, BiAttentiveLSTMConfig
from fastkd.training.signals import TeacherSignal, add_teacher_logits
from fastkd.training.teacher import MultiTaskEncoder, MultiTaskEncoderConfig
from fastkd.training.trainer import MultiTaskTrainer

STUDENT = torch.tensor([[0.5, -1.0, 2.0], [0.0, 3.0, -1.0]], dtype=torch.float64)
TEACHER = torch.tensor([[1.0, -2.0, 2.5], [0.5, 1.0, 0.0]], dtype=torch.float64)
LABELS = torch.tensor([2, 0])


def test_mse_is_the_mean_over_rows_and_classes():
    total, parts = MKDObjective()(STUDENT, TEACHER, LABELS)
    by_hand = (0.25 + 1.0 + 0.25 + 0.25 + 4.0 + 1.0) / 6
    assert total.item() == pytest.approx(by_hand)
    assert {name: part.item() for name, part in parts.items()} == {"distillation": pytest.approx(by_hand)}
    summed, _ = MKDObjective(sum_over_classes=True)(STUDENT, TEACHER)
    assert summed.item() == pytest.approx(3 * by_hand)


def test_kl_is_teacher_to_student_with_squared_temperature():
    total, _ = MKDObjective(loss="kl", temperature=2.0)(STUDENT, TEACHER)
    teacher, student = (TEACHER / 2).softmax(-1), (STUDENT / 2).softmax(-1)
    by_hand = 4 * (teacher * (teacher / student).log()).sum(-1).mean()
    assert total.item() == pytest.approx(by_hand.item())


def test_weights_apply_to_the_total_and_not_to_the_parts():
    objective = MKDObjective(hard_label_weight=0.5, distillation_weight=2.0)
    total, parts = objective(STUDENT, TEACHER, LABELS)
    assert parts["hard_label"].item() == pytest.approx(F.cross_entropy(STUDENT, LABELS).item(), rel=1e-6)
    assert parts["distillation"].item() == pytest.approx(F.mse_loss(STUDENT, TEACHER).item(), rel=1e-6)
    assert total.item() == pytest.approx(2 * parts["distillation"].item() + 0.5 * parts["hard_label"].item())


def test_a_regression_takes_squared_errors_only():
    scores, targets = torch.tensor([[1.0], [4.0]]), torch.tensor([[2.0], [4.5]])
    total, parts = MKDObjective(loss="kl", hard_label_weight=1.0)(scores, targets, torch.tensor([0.0, 5.0]))
    assert parts["distillation"].item() == pytest.approx((1 + 0.25) / 2)
    assert parts["hard_label"].item() == pytest.approx((1 + 1) / 2)
    assert total.item() == pytest.approx(1.625)


def test_a_row_without_a_label_adds_nothing_and_counts():
    _, parts = MKDObjective(hard_label_weight=1.0)(STUDENT, TEACHER, torch.tensor([2, -1]))
    alone = F.cross_entropy(STUDENT[:1], LABELS[:1]).item()
    assert parts["hard_label"].item() == pytest.approx(alone / 2, rel=1e-6)


def test_training_without_a_teacher_needs_no_logits():
    total, parts = MKDObjective(distillation_weight=0.0, hard_label_weight=1.0)(STUDENT, labels=LABELS)
    assert list(parts) == ["hard_label"]
    assert total.item() == pytest.approx(F.cross_entropy(STUDENT, LABELS).item(), rel=1e-6)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"teacher_logits must have the student's shape \(2, 3\), got \(2, 2\)"):
        MKDObjective()(STUDENT, TEACHER[:, :2])
    with pytest.raises(ValueError, match="got None"):
        MKDObjective()(STUDENT)
    with pytest.raises(ValueError, match="labels must be given"):
        MKDObjective(hard_label_weight=1.0)(STUDENT, TEACHER)
    with pytest.raises(ValueError, match="nothing would be learned"):
        MKDObjective(distillation_weight=0.0)
    for options in ({"temperature": 0.0}, {"loss": "cosine"}, {"hard_label_weight": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(options))):
            MKDObjective(**options)


TASKS = {name: {"labels": list(GLUE[name].label_names)} for name in ("sst2", "stsb")}
COLLATE = MultiTaskCollator(tokenizer())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_encoded(list(TASKS), tokenizer(), 16, write_glue(tmp_path_factory.mktemp("glue")))


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return MultiTaskEncoder(MultiTaskEncoderConfig(bert_config(initializer_range=1.0), TASKS)).eval()


def make_student(dropout=0.0):
    torch.manual_seed(1)
    sizes = {"vocab_size": 16, "embedding_size": 8, "projection_size": 8, "hidden_size_per_direction": 8}
    return BiAttentiveLSTM(BiAttentiveLSTMConfig(**sizes, head_size=8, dropout=dropout, tasks=TASKS))


def trainer_for(folder, train, teacher=None, *, student=None, evaluation=None, callbacks=None, **arguments):
    defaults = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "seed": 3, "num_train_epochs": 2}
    args = MKDConfig(str(folder), **(defaults | {"per_device_train_batch_size": 8} | arguments))
    student = student or make_student()
    return MKDTrainer(student, args, COLLATE, train, evaluation, teacher=teacher, callbacks=callbacks)


def trained(*args, **kwargs):
    trainer = trainer_for(*args, **kwargs)
    trainer.train()
    return dict(trainer.model.named_parameters())


def test_the_student_learns_the_teachers_logits(data, teacher, tmp_path):
    before = copy.deepcopy(teacher.state_dict())
    trainer = trainer_for(tmp_path, data[0], teacher, num_train_epochs=25, learning_rate=1e-2, logging_steps=1)
    trainer.train()
    distances = [log["loss_distillation"] for log in trainer.state.log_history if "loss_distillation" in log]
    assert sum(distances[-6:]) < 0.1 * sum(distances[:6])
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)
    trainable = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not trainable & {id(p) for p in teacher.parameters()}


def test_checkpoints_hold_the_student_alone(data, teacher, tmp_path):
    trainer = trainer_for(tmp_path, data[0], teacher)
    trainer.save_model(tmp_path / "model")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert saved.keys() == make_student().state_dict().keys()


def test_online_and_column_train_the_same_student(data, teacher, tmp_path):
    column = add_teacher_logits(data[0], TeacherSignal(teacher, {t: GLUE[t].label_names for t in TASKS}), COLLATE)
    online = trained(tmp_path, data[0], teacher)
    torch.testing.assert_close(trained(tmp_path, column), online, rtol=1e-4, atol=1e-5)
    initial = dict(make_student().named_parameters())
    assert (online["heads.sst2.3.weight"] - initial["heads.sst2.3.weight"]).abs().max() > 1e-3


def test_a_teacher_for_every_task(data, teacher, tmp_path):
    apart = {task: copy.deepcopy(teacher) for task in TASKS}
    torch.testing.assert_close(trained(tmp_path, data[0], apart), trained(tmp_path, data[0], teacher), rtol=0, atol=0)


def test_accumulation_does_not_change_the_student(data, teacher, tmp_path):
    rows = MultiTaskDataset({"sst2": data[0].datasets["sst2"].select(range(8))})
    sizes = [{"per_device_train_batch_size": 8}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}]
    whole, parts = (
        trained(tmp_path, rows, teacher, num_train_epochs=5, hard_label_weight=0.5, **size) for size in sizes
    )
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-5)


def test_without_distillation_is_training_on_labels(data, tmp_path):
    mine = trained(tmp_path, data[0], distillation_weight=0.0, hard_label_weight=1.0, learning_rate=1e-3)
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, disable_tqdm=True, save_strategy="no", seed=3, num_train_epochs=2,
        per_device_train_batch_size=8, learning_rate=1e-3, train_sampling_strategy="group_by_length",
    )  # fmt: skip
    plain = MultiTaskTrainer(make_student(), args, COLLATE, data[0])
    plain.train()
    torch.testing.assert_close(mine, dict(plain.model.named_parameters()), rtol=1e-5, atol=1e-6)


def test_resume_is_bitwise_exact(data, teacher, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = control.should_training_stop = state.global_step == 4

    whole = trained(tmp_path / "whole", data[0], teacher, student=make_student(dropout=0.2))
    folder = tmp_path / "parts"
    trainer_for(folder, data[0], teacher, student=make_student(dropout=0.2), callbacks=[Stop()]).train()
    resumed = trainer_for(folder, data[0], teacher, student=make_student(dropout=0.2))
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert resumed.state.global_step == 12
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, whole[name]), name


def test_logged_parts_are_unweighted_means(data, teacher, tmp_path):
    rows = MultiTaskDataset({"sst2": data[0].datasets["sst2"].select(range(8))})
    weights = {"hard_label_weight": 0.5, "distillation_weight": 2.0}
    trainer = trainer_for(
        tmp_path, rows, teacher, num_train_epochs=1, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        logging_steps=1, **weights,
    )  # fmt: skip
    trainer.train()
    log = trainer.state.log_history[0]
    batch = COLLATE(list(rows))
    labels = batch.pop("labels")
    _, parts = MKDObjective(**weights)(make_student()(**batch).logits, teacher(**batch).logits, labels)
    assert log["loss_distillation"] == pytest.approx(parts["distillation"].item(), abs=1e-3)
    assert log["loss_hard_label"] == pytest.approx(parts["hard_label"].item(), abs=1e-3)
    assert log["loss"] == pytest.approx(2 * log["loss_distillation"] + 0.5 * log["loss_hard_label"], abs=1e-3)


def test_evaluation_reports_the_hard_label_loss(data, teacher, tmp_path):
    trainer = trainer_for(tmp_path, data[0], teacher, evaluation=data[1])
    metrics = trainer.evaluate()
    rows = COLLATE(list(data[1]["sst2"]))
    loss = trainer.model.eval()(**rows).loss.item()
    assert metrics["eval_sst2_loss"] == pytest.approx(loss, rel=1e-4)
    assert metrics["eval_average"] == pytest.approx(
        (100 * metrics["eval_sst2_accuracy"] + 50 * (metrics["eval_stsb_pearson"] + metrics["eval_stsb_spearman"])) / 2
    )


def test_a_missing_teacher_and_bad_options_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match=r"teacher is None .* sst2, stsb have no column teacher_logits"):
        trainer_for(tmp_path, data[0])
    with pytest.raises(ValueError, match="temperature must be a positive number, got -1"):
        MKDConfig(str(tmp_path), temperature=-1)
