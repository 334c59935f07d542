"""Readers and language models distilled by features: a step is the objective on plain calls, however it is divided."""

import copy

import pytest
import torch
from decoder_samples import byte_tokenizer, decoder
from test_language_model import instructions  # noqa: F401
from test_language_model import rows as responses  # noqa: F401
from test_spans import data as windows  # noqa: F401
from test_trainer import Gradients
from tiny import bert_config, tokenizer
from torch.nn import functional as F
from transformers import BertForQuestionAnswering, DistilBertConfig, DistilBertForQuestionAnswering, TrainingArguments

from fastkd.data.batches import language_model_collator, span_collator
from fastkd.methods.baselines import KD, DistilBERT
from fastkd.methods.baselines.seqkd import teacher_responses
from fastkd.methods.feature_distillation import LanguageModelDistillationTrainer, SpanDistillationTrainer
from fastkd.methods.makd import MaKDConfig, MaKDObjective
from fastkd.students import factorize, plan_factorization
from fastkd.training.attention import TAPS
from fastkd.training.taps import Taps


def reader(seed):
    torch.manual_seed(seed)
    return BertForQuestionAnswering(bert_config(initializer_range=0.5))


class Kind:
    """A kind of answers: its models, trainer and rows."""

    def __init__(self, name, rows):
        self.rows = rows.select(range(8))
        self.spans = name == "spans"
        self.trainer = SpanDistillationTrainer if self.spans else LanguageModelDistillationTrainer
        self.collate = span_collator(tokenizer()) if self.spans else language_model_collator(byte_tokenizer())
        self.teacher = reader(0) if self.spans else decoder()
        if not self.spans:
            with torch.no_grad():
                for parameter in self.teacher.parameters():
                    parameter.mul_(4.0)
        self.student = factorize(self.teacher, plan_factorization(self.teacher, rank=4))

    def make(self, folder, objective=None, teacher=True, callbacks=None, **arguments):
        defaults = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "seed": 3}
        args = MaKDConfig(str(folder), **(defaults | arguments))
        return self.trainer(
            copy.deepcopy(self.student), args, self.collate, self.rows, objective=objective or args.objective(),
            teacher=copy.deepcopy(self.teacher) if teacher else None, callbacks=callbacks,
        )  # fmt: skip

    def call(self, model, batch):
        taps = Taps(model, maps=True)
        with taps.record() as features:
            names = ("input_ids", "attention_mask", "token_type_ids")
            output = model(**{name: batch[name] for name in names if name in batch})
        taps.close()
        if self.spans:
            logits = torch.stack([output.start_logits, output.end_logits], 1)
            features.logits = logits.masked_fill(batch["attention_mask"][:, None] == 0, -torch.inf)
        else:
            features.logits = output.logits[:, :-1]
        return features

    def labels(self, batch):
        if self.spans:
            return torch.stack([batch["start_positions"], batch["end_positions"]], 1)
        return batch["labels"][:, 1:]


@pytest.fixture(scope="module", params=["spans", "language"])
def kind(request, windows, responses):  # noqa: F811
    return Kind(request.param, windows[1] if request.param == "spans" else responses)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (2, 4), (3, 3)])
def test_a_step_is_the_objective_on_plain_calls(kind, tmp_path, batch_size, accumulation):
    kept = Gradients()
    sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    trainer = kind.make(tmp_path, callbacks=[kept], max_steps=1, max_grad_norm=0.0, **sizes)
    trainer.train()
    batch = kind.collate(list(kind.rows))
    student, teacher = copy.deepcopy(kind.student), copy.deepcopy(kind.teacher)
    with torch.no_grad():
        taught = kind.call(teacher, batch)
    own = kind.call(student, batch)
    loss, _ = MaKDObjective()(own, taught, kind.labels(batch), batch["attention_mask"])
    loss.backward()
    expected = {name: parameter.grad for name, parameter in student.named_parameters() if parameter.grad is not None}
    torch.testing.assert_close(kept.steps[0], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("part", ["attention", "hidden", "mha"])
def test_all_that_the_answers_come_from_has_a_gradient(kind, tmp_path, part):
    """Or data parallelism would wait for it."""
    weights = {
        f"{name}_weight": float(name == part) for name in ("attention", "hidden", "mha", "ffn", "logits", "labels")
    }
    kept, whole = Gradients(), Gradients()
    for objective, callback in ((MaKDObjective(**weights), kept), (MaKDObjective(), whole)):
        kind.make(tmp_path, objective, callbacks=[callback], max_steps=1).train()
    assert kept.steps[0].keys() == whole.steps[0].keys()


def test_a_step_without_labels_learns_nothing_and_stays_finite(kind, tmp_path):
    if kind.spans:
        pytest.skip("a window without an answer is labelled by its first token")
    rows = kind.rows.map(lambda row: {"labels": [-100] * len(row["labels"])})
    kept = Gradients()
    trainer = kind.make(tmp_path, DistilBERT(), callbacks=[kept], max_steps=1)
    trainer.train_dataset = rows
    trainer.train()
    assert all(not gradient.any() for gradient in kept.steps[0].values())


def test_answers_count_where_they_have_a_label(kind):
    batch = kind.collate(list(kind.rows))
    own, taught = (kind.call(model, batch) for model in (kind.student, kind.teacher.requires_grad_(False)))
    labels = kind.labels(batch)
    weights = {f"{part}_weight": 0.0 for part in ("attention", "hidden", "mha", "ffn")}
    _, parts = MaKDObjective(**weights, temperature=2.0)(own, taught, labels, batch["attention_mask"])
    valid = labels != -100
    mine, theirs = own.logits[valid].double(), taught.logits[valid].double()
    torch.testing.assert_close(parts["labels"].double(), F.cross_entropy(mine, labels[valid]), rtol=1e-6, atol=0)
    p, q = ((x / 2).log_softmax(-1) for x in (theirs, mine))
    kl = 4 * torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1).mean()
    torch.testing.assert_close(parts["logits"].double(), kl, rtol=1e-4, atol=1e-6)


def test_a_teacher_reads_token_types_that_its_student_does_not_have(windows, tmp_path):  # noqa: F811
    config = DistilBertConfig(vocab_size=16, dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=32)
    args = TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True, save_strategy="no", max_steps=1)
    teacher, seen = reader(0), []
    teacher.register_forward_pre_hook(lambda *call: seen.append(call[2]), with_kwargs=True)
    student, collate = DistilBertForQuestionAnswering(config), span_collator(tokenizer())
    SpanDistillationTrainer(student, args, collate, windows[1], objective=KD(), teacher=teacher).train()
    assert [call["token_type_ids"].max().item() for call in seen] == [1]


def test_training_brings_the_student_closer(kind, tmp_path):
    trainer = kind.make(tmp_path, num_train_epochs=15, learning_rate=5e-3, logging_steps=1)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss_mha" in entry]
    for part in ("attention", "hidden", "mha", "ffn"):
        assert logged[-1][f"loss_{part}"] < 0.9 * logged[0][f"loss_{part}"], part


def hooked(model):
    return any(
        module._forward_hooks or module._forward_pre_hooks or vars(module).get(TAPS) for module in model.modules()
    )


def test_trainers_may_share_a_teacher_and_leave_it_as_it_was(kind, tmp_path):
    args = MaKDConfig(str(tmp_path), use_cpu=True, disable_tqdm=True, save_strategy="no", max_steps=1)
    students, teacher = [copy.deepcopy(kind.student) for _ in range(2)], copy.deepcopy(kind.teacher)
    trainers = [
        kind.trainer(student, args, kind.collate, kind.rows, objective=args.objective(), teacher=teacher)
        for student in students
    ]
    for trainer in (*trainers, trainers[0]):
        trainer.train()
    assert not any(map(hooked, (*students, teacher)))


def test_labels_alone_need_no_teacher(kind, tmp_path):
    weights = {f"{part}_weight": 0.0 for part in ("attention", "hidden", "mha", "ffn", "logits")}
    trainer = kind.make(tmp_path, teacher=False, max_steps=1, **weights)
    trainer.train()
    assert trainer.teacher is None
    with pytest.raises(ValueError, match="teacher is None, but the loss compares the student with it"):
        kind.make(tmp_path, teacher=False)


def test_a_teacher_of_another_vocabulary_is_refused(kind, tmp_path):
    other = copy.deepcopy(kind.teacher)
    other.resize_token_embeddings(300)
    objective = MaKDObjective()
    with pytest.raises(ValueError, match="the teacher has 300 word embeddings"):
        kind.trainer(kind.student, MaKDConfig(str(tmp_path), use_cpu=True), objective=objective, teacher=other)


def test_a_student_learns_the_responses_of_its_teacher(instructions):  # noqa: F811
    teacher = decoder()
    made = teacher_responses(teacher, byte_tokenizer(), instructions, max_new_tokens=4)
    assert made.features == instructions.features
    assert 0 < len(made) <= len(instructions)
    again = teacher_responses(teacher, byte_tokenizer(), instructions, max_new_tokens=4)
    other = teacher_responses(teacher, byte_tokenizer(), instructions, max_new_tokens=4, seed=11)
    assert made["references"][:] == again["references"][:] != other["references"][:]
    silent = decoder()
    with torch.no_grad():
        silent.lm_head.weight[256].mul_(10.0)  # the end of a text, whatever came before
        silent.transformer.ln_f.weight.zero_()
        silent.transformer.ln_f.bias.copy_(silent.lm_head.weight[256] * 1e4)
    with pytest.raises(ValueError, match="responses to all 8 instructions are empty"):
        teacher_responses(silent, byte_tokenizer(), instructions, max_new_tokens=4)
