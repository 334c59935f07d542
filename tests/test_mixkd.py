"""MixKD: the loss against its formula, a step against the same method written plainly, exact runs, refusals."""

import copy

import pytest
import torch
from test_mkd import COLLATE, TASKS, make_student
from tiny import bert_config, tokenizer, write_glue
from torch.nn import functional as F
from transformers import TrainerCallback

from fastkd.data.encode import MultiTaskDataset, load_encoded
from fastkd.data.glue import GLUE
from fastkd.methods.mixkd import MixKDConfig, MixKDObjective, MixKDTrainer
from fastkd.mixup import Mix
from fastkd.students import BiAttentiveLSTM, BiAttentiveLSTMConfig
from fastkd.training.signals import TeacherSignal, add_teacher_logits
from fastkd.training.teacher import MultiTaskEncoder, MultiTaskEncoderConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_encoded(list(TASKS), tokenizer(), 16, write_glue(tmp_path_factory.mktemp("glue")))


def encoder(seed):
    torch.manual_seed(seed)
    config = MultiTaskEncoderConfig(bert_config(initializer_range=1.0), TASKS, classifier_dropout=0.0)
    return MultiTaskEncoder(config)


@pytest.fixture(scope="module")
def teacher():
    return encoder(0).eval()


def trainer_for(folder, train, teacher=None, *, student=None, evaluation=None, callbacks=None, **arguments):
    defaults = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "seed": 3, "num_train_epochs": 2}
    args = MixKDConfig(str(folder), **(defaults | {"per_device_train_batch_size": 8} | arguments))
    student = encoder(1) if student is None else student
    return MixKDTrainer(student, args, COLLATE, train, evaluation, teacher=teacher, callbacks=callbacks)


def trained(*args, **kwargs):
    trainer = trainer_for(*args, **kwargs)
    trainer.train()
    return dict(trainer.model.named_parameters())


def logits_of(rows, classes, seed):
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_the_loss_is_its_formula(loss):
    rows, copies, classes, temperature = 4, 2, 3, 2.0
    labels = torch.tensor([0, 2, 1, 1])
    mix = Mix(torch.tensor([1, 0, 3, 2, 6, 7, 5, 4]), torch.tensor([0.1, 0.9, 0.5, 0.7, 1.0, 0.0, 0.3, 0.6]))
    student, taught = logits_of(rows, classes, 0), logits_of(rows, classes, 1)
    mixed, mixed_taught = logits_of(rows * copies, classes, 2), logits_of(rows * copies, classes, 3)
    objective = MixKDObjective(loss, temperature, alpha_mle=0.5, alpha_sm=2.0, alpha_tmkd=3.0, alpha_kd=0.25)
    got, parts = objective(
        student, labels, teacher_logits=taught, mixed_student_logits=mixed, mixed_teacher_logits=mixed_taught, mix=mix
    )

    def distance(own, theirs):
        if loss == "mse":
            return (own - theirs).double().square().mean()
        p, q = ((x.double() / temperature).log_softmax(-1) for x in (theirs, own))
        return temperature**2 * (p.exp() * (p - q)).sum() / len(own)

    hot = F.one_hot(labels.repeat(copies), classes).double()
    lam = mix.lam.double()[:, None]
    soft = lam * hot + (1 - lam) * hot[mix.permutation]
    want = {
        "mle": F.cross_entropy(student.double(), labels),
        "sm": -(soft * mixed.double().log_softmax(-1)).sum() / (rows * copies),
        "tmkd": distance(mixed, mixed_taught),
        "kd": distance(student, taught),
    }
    weights = {"mle": 0.5, "sm": 2.0, "tmkd": 3.0, "kd": 0.25}
    assert parts.keys() == want.keys()
    for name, part in parts.items():
        torch.testing.assert_close(part.double(), want[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.double(), sum(weights[n] * want[n] for n in want), rtol=1e-5, atol=1e-6)


def test_a_regression_mixes_scores():
    mix = Mix(torch.tensor([1, 0]), torch.tensor([0.25, 0.5]))
    mixed, scores = torch.tensor([[1.0], [4.0]]), torch.tensor([2.0, 4.0])
    objective = MixKDObjective(alpha_mle=0.0, alpha_tmkd=0.0)
    loss, _ = objective(torch.zeros(2, 1), scores, mixed_student_logits=mixed, mix=mix)
    assert loss.item() == pytest.approx(((1.0 - 3.5) ** 2 + (4.0 - 3.0) ** 2) / 2)


def plain_step(student, teacher, batch, mix):
    """MixKD as one would write it down: embeddings mixed outside the models, everything apart. One sentence per row."""
    labels, task, mask = batch["labels"], batch["task"], batch["attention_mask"]
    lam, partner = mix.lam[:, None, None], mix.permutation

    def on_mixture(model):
        words = model.get_input_embeddings()(batch["input_ids"])
        states = model.encoder(
            inputs_embeds=lam * words + (1 - lam) * words[partner], attention_mask=mask | mask[partner]
        )
        return model.heads[task](states.pooler_output)

    inputs = {name: value for name, value in batch.items() if name != "labels"}
    own, mixed = student(**inputs).logits, on_mixture(student)
    with torch.no_grad():
        taught = on_mixture(teacher)
    sm = (mix.lam * F.cross_entropy(mixed, labels, reduction="none")).mean()
    sm += ((1 - mix.lam) * F.cross_entropy(mixed, labels[partner], reduction="none")).mean()
    return F.cross_entropy(own, labels) + sm + F.mse_loss(mixed, taught)


def test_a_step_is_the_method_written_plainly(data, teacher, tmp_path):
    trainer = trainer_for(tmp_path, data[0], teacher)
    rows = list(MultiTaskDataset({"sst2": data[0].datasets["sst2"].select(range(6))}))
    for short, length in ((1, 3), (4, 4)):  # pads, so that masks and pads matter
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            rows[short] = rows[short] | {name: rows[short][name][:length]}
    batch = COLLATE(rows)
    loss, _ = trainer.batch_loss(trainer.model.train(), dict(batch))
    loss.backward()
    plain = encoder(1).train()
    trainer._micro_batch = 0
    want = plain_step(plain, teacher, batch, trainer._draw(6, torch.device("cpu")))
    want.backward()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.grad is not None}
    for name, parameter in trainer.model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)
    assert gradients["encoder.embeddings.word_embeddings.weight"].abs().max() > 0


def test_the_student_learns_what_the_teacher_says_of_mixtures(data, teacher, tmp_path):
    before = copy.deepcopy(teacher.state_dict())
    trainer = trainer_for(
        tmp_path, data[0], teacher, student=make_student(), num_train_epochs=40, learning_rate=1e-2, logging_steps=6,
        alpha_mle=0.0, alpha_sm=0.0,
    )  # fmt: skip
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss_tmkd" in log]
    assert logs[-1]["loss_tmkd"] < 0.3 * logs[0]["loss_tmkd"]
    assert logs[-1]["agreement"] > 0.8
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)


def test_no_hook_is_left_after_training_and_a_second_one_mixes_too(data, tmp_path):
    trainer = trainer_for(tmp_path, data[0], encoder(0), max_steps=1)
    teacher = trainer.signal.teachers["sst2"]
    for _ in range(2):
        trainer.train()
        assert not any(module._forward_hooks for model in (teacher, trainer.model) for module in model.modules())
    batch, mix = COLLATE([data[0][0], data[0][1]]), Mix(torch.tensor([1, 0]), torch.zeros(2))
    copies = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    plain = teacher(**copies, task=batch["task"]).logits
    torch.testing.assert_close(trainer._teacher_logits(copies, mix, batch["task"]), plain.flip(0))


def test_draws_differ_by_step_and_are_many(data, teacher, tmp_path):
    trainer = trainer_for(tmp_path, data[0], teacher, n_mix=3)
    first, again = trainer._draw(8, torch.device("cpu")), trainer._draw(8, torch.device("cpu"))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    trainer.state.global_step += 1
    assert not torch.equal(trainer._draw(8, torch.device("cpu")).lam, first.lam)
    assert [sorted(part.tolist()) for part in first.permutation.chunk(3)] == [
        list(range(start, start + 8)) for start in (0, 8, 16)
    ]
    per_batch = trainer_for(tmp_path, data[0], teacher, lambda_per_batch=True)._draw(8, torch.device("cpu"))
    assert per_batch.lam.unique().numel() == 1
    assert first.lam.unique().numel() == 24


@pytest.mark.parametrize("options", [{}, {"alpha_sm": 0.0, "alpha_tmkd": 0.0, "alpha_kd": 1.0}], ids=["mixing", "kd"])
def test_resume_is_bitwise_exact(data, teacher, tmp_path, options):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = control.should_training_stop = state.global_step == 4

    whole = trained(tmp_path / "whole", data[0], teacher, student=make_student(0.2), **options)
    folder = tmp_path / "parts"
    trainer_for(folder, data[0], teacher, student=make_student(0.2), callbacks=[Stop()], **options).train()
    resumed = trainer_for(folder, data[0], teacher, student=make_student(0.2), **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, whole[name]), name


def test_accumulation_does_not_change_the_student(data, teacher, tmp_path, monkeypatch):
    def within_pairs(self, rows, device):  # the same pairs whatever the batch
        return Mix(torch.arange(rows) ^ 1, torch.full((rows,), 0.3))

    monkeypatch.setattr(MixKDTrainer, "_draw", within_pairs)
    rows = MultiTaskDataset({"sst2": data[0].datasets["sst2"].select(range(8))})
    sizes = [{"per_device_train_batch_size": 8}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}]
    options = {"num_train_epochs": 5, "alpha_kd": 0.5, "max_grad_norm": 0.0, "learning_rate": 1e-3}
    whole, parts = (trained(tmp_path, rows, teacher, student=make_student(), **options, **size) for size in sizes)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-5)


def test_a_column_of_logits_serves_the_examples_alone(data, teacher, tmp_path):
    column = add_teacher_logits(data[0], TeacherSignal(teacher, {t: GLUE[t].label_names for t in TASKS}), COLLATE)
    only_kd = {"alpha_sm": 0.0, "alpha_tmkd": 0.0, "alpha_kd": 1.0}
    online, stored = trained(tmp_path, data[0], teacher, **only_kd), trained(tmp_path, column, **only_kd)
    torch.testing.assert_close(stored, online, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="asks it about mixtures of the rows of sst2, stsb, which no column"):
        trainer_for(tmp_path, column)
    with pytest.raises(ValueError, match="sst2, stsb have no column teacher_logits"):
        trainer_for(tmp_path, data[0], **only_kd)


def test_bad_options_are_refused(data, teacher, tmp_path):
    refused = {
        "n_mix must be at least 1, got 0": {"n_mix": 0},
        "alpha must be positive and finite, got 0": {"beta_alpha": 0.0},
        "stage must be one of word, sum, post_ln": {"mix_stage": "pre"},
        "mask must be one of union, first": {"mix_mask": "both"},
        "pads must be one of embed, zero": {"mix_pads": "drop"},
        "alpha_sm must be a number of at least 0, got -1": {"alpha_sm": -1.0},
        'loss must be "mse" or "kl"': {"loss": "l1"},
    }
    for message, options in refused.items():
        with pytest.raises(ValueError, match=message):
            MixKDConfig(str(tmp_path), **options)
    with pytest.raises(ValueError, match="all 0: nothing would be learned"):
        MixKDObjective(alpha_mle=0.0, alpha_sm=0.0, alpha_tmkd=0.0)
    with pytest.raises(ValueError, match="does not normalise its embeddings"):
        trainer_for(tmp_path, data[0], teacher, student=make_student(), mix_stage="post_ln")
    other = BiAttentiveLSTM(BiAttentiveLSTMConfig(vocab_size=20, embedding_size=8, head_size=8, tasks=TASKS))
    with pytest.raises(ValueError, match="has 16 word embeddings and the student 20"):
        trainer_for(tmp_path, data[0], teacher, student=other)


def test_a_missing_score_takes_its_mixtures_out_of_the_mean():
    mix = Mix(torch.tensor([1, 0, 2]), torch.tensor([0.5, 0.5, 1.0]))
    mixed = torch.tensor([[1.0], [4.0], [3.0]], requires_grad=True)
    objective = MixKDObjective(alpha_mle=0.0, alpha_tmkd=0.0)
    loss, _ = objective(torch.zeros(3, 1), torch.tensor([2.0, torch.nan, 1.0]), mixed_student_logits=mixed, mix=mix)
    assert loss.item() == pytest.approx((3.0 - 1.0) ** 2 / 3)
    assert torch.autograd.grad(loss, mixed)[0].flatten().tolist() == pytest.approx([0.0, 0.0, 4 / 3])
