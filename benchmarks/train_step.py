"""Benchmark of whole training steps: a trainer's forward and backward against the same method written plainly.

A step is everything from a batch to the gradients, without the optimizer. The limit is the passes of teacher and
student alone that a method cannot do without, with the sum of the logits in place of a loss.
"""

from __future__ import annotations

import tempfile
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.registry import STEP, Benchmark, Case
from fastkd.mixup import Mix, MixupSampler

TASK, CLASSES, VOCABULARY = "sst2", 2, 30522
TASKS = {TASK: {"labels": ["negative", "positive"]}}
SEED = 42

CASES = [
    Case("train_step", shape, torch.float32, reason, directions=(STEP,), options={"method": method})
    for method, shape, reason in (
        ("mixkd", (32, 32), "three layers of a MiniLM learn of six, on examples and one mixture of each"),
        ("kd", (32, 32), "the same students on the examples alone, as other toolkits can"),
        ("mkd", (128, 24), "the small BiLSTM learns of a MiniLM that answers at every step"),
        ("mkd-cached", (128, 24), "the same from stored logits"),
    )
]


def make_inputs(case: Case) -> dict[str, Tensor]:
    """Token ids (B, T) of texts of similar lengths, labels, logits of a teacher; ``like`` tells the dtype."""
    pick = torch.Generator().manual_seed(0)
    rows, tokens = case.shape
    lengths = torch.randint(3 * tokens // 4, tokens + 1, (rows,), generator=pick)
    real = torch.arange(tokens) < lengths[:, None]
    return {
        "input_ids": torch.randint(4, VOCABULARY, case.shape, generator=pick) * real,
        "labels": torch.randint(CLASSES, (rows,), generator=pick),
        "stored": torch.randn(rows, CLASSES, generator=pick),
        "like": torch.zeros((), dtype=case.dtype),
    }


BENCHMARK = Benchmark("train_step", CASES, make_inputs)


@cache
def models(method: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Teacher and student, without dropout so that all steps are the same."""
    from fastkd.students import BiAttentiveLSTM, BiAttentiveLSTMConfig

    if method.startswith("mkd"):
        torch.manual_seed(0)
        config = BiAttentiveLSTMConfig.preset("small", dropout=0.0, tasks=TASKS)
        return encoder(6, dtype).eval().requires_grad_(False), BiAttentiveLSTM(config).to(dtype)
    return encoder(6, dtype).eval().requires_grad_(False), encoder(3, dtype)


def encoder(layers: int, dtype: torch.dtype, **options: Any) -> Any:
    """Of MiniLM's sizes, with random weights."""
    from transformers import BertConfig

    from fastkd.training.classifiers import MultiTaskEncoder, MultiTaskEncoderConfig

    torch.manual_seed(layers)
    sizes = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(num_hidden_layers=layers, **sizes, **still, **options)
    return MultiTaskEncoder(MultiTaskEncoderConfig(config, TASKS, classifier_dropout=0.0)).to(dtype)


def batch_of(input_ids: Tensor) -> dict[str, Any]:
    mask = (input_ids > 0).long()
    return {"input_ids": input_ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(mask), "task": TASK}


def taken(loss: Tensor, student: nn.Module) -> Tensor:
    """The loss and the gradients of the biases, which took the whole backward; all gradients are dropped."""
    biases = [parameter.grad for name, parameter in student.named_parameters() if name.endswith("bias")]
    kept = torch.cat([loss.detach().reshape(1), *(grad.flatten() for grad in biases if grad is not None)])
    student.zero_grad()
    return kept


def draw(rows: int) -> Mix:
    return MixupSampler(seed=(SEED, 0, 0, 0))(rows)


def on_mixture(model: Any, batch: dict[str, Any], mix: Mix) -> Tensor:
    """Logits of mixed word embeddings, computed outside the model."""
    lam, mask = mix.lam[:, None, None].to(model.dtype), batch["attention_mask"]
    words = model.get_input_embeddings()(batch["input_ids"])
    states = model.encoder(
        inputs_embeds=lam * words + (1 - lam) * words[mix.permutation], attention_mask=mask | mask[mix.permutation]
    )
    logits: Tensor = model.heads[TASK](states.pooler_output)
    return logits


@BENCHMARK.provider("eager")
def written_plainly(input_ids: Tensor, labels: Tensor, stored: Tensor, like: Tensor, method: str) -> Tensor:
    teacher, student = models(method, like.dtype)
    student.train()
    batch = batch_of(input_ids)
    logits = student(**batch).logits
    if method == "mkd-cached":
        loss = F.mse_loss(logits, stored)
    elif method != "mixkd":
        with torch.no_grad():
            taught = teacher(**batch).logits
        loss = F.mse_loss(logits, taught)
    else:
        mix = draw(len(labels))
        lam = mix.lam.to(like.dtype)
        mixed = on_mixture(student, batch, mix)
        with torch.no_grad():
            taught = on_mixture(teacher, batch, mix)
        both = [F.cross_entropy(mixed, those, reduction="none") for those in (labels, labels[mix.permutation])]
        loss = F.cross_entropy(logits, labels) + (lam * both[0] + (1 - lam) * both[1]).mean()
        loss = loss + F.mse_loss(mixed, taught)
    loss.backward()
    return taken(loss, student)


@cache
def trainer_of(method: str) -> Any:
    from datasets import Dataset

    from fastkd.data.encode import MultiTaskDataset
    from fastkd.methods.mixkd import MixKDConfig, MixKDTrainer
    from fastkd.methods.mkd import MKDConfig, MKDTrainer

    teacher, student = models(method, torch.float32)
    row = {"input_ids": [[1]], "labels": [0]} | ({"teacher_logits": [[0.0, 0.0]]} if method == "mkd-cached" else {})
    rows = MultiTaskDataset({TASK: Dataset.from_dict(row)})
    config, trainer = (MixKDConfig, MixKDTrainer) if method == "mixkd" else (MKDConfig, MKDTrainer)
    args = config(tempfile.mkdtemp(), use_cpu=True, seed=SEED, save_strategy="no", disable_tqdm=True)
    return trainer(student, args, train_dataset=rows, teacher=teacher)


@BENCHMARK.provider("fastkd")
def trained(input_ids: Tensor, labels: Tensor, stored: Tensor, like: Tensor, method: str) -> Tensor:
    trainer = trainer_of(method)
    batch = batch_of(input_ids) | {"labels": labels} | ({"teacher_logits": stored} if method == "mkd-cached" else {})
    (batch,), count = trainer.get_batch_samples(iter([batch]), 1, input_ids.device)
    return taken(trainer.training_step(trainer.model, batch, count), trainer.model)


@cache
def textbrewer_of(method: str) -> Any:
    from textbrewer import BasicDistiller, DistillationConfig, TrainingConfig

    teacher, student = models(method, torch.float32)
    training = TrainingConfig(log_dir=None, output_dir=tempfile.mkdtemp(), device="cpu")
    config = DistillationConfig(temperature=1, kd_loss_type="mse", hard_label_weight=0)
    adaptor = lambda batch, outputs: {"logits": outputs.logits}  # noqa: E731
    return BasicDistiller(training, config, teacher, student, adaptor, adaptor)


def _textbrewer(case: Case) -> str | None:
    if find_spec("textbrewer") is None:
        return "textbrewer is not installed"
    return None if case.options["method"] == "kd" else "textbrewer has no such method"


@BENCHMARK.provider("TextBrewer", objection=_textbrewer)
def textbrewer(input_ids: Tensor, labels: Tensor, stored: Tensor, like: Tensor, method: str) -> Tensor:
    distiller = textbrewer_of(method)
    distiller.model_S.train()
    loss, _ = distiller.train_on_batch(batch_of(input_ids), {})
    loss.backward()
    return taken(loss, distiller.model_S)


@BENCHMARK.limit("passes", direction=STEP)
def passes(input_ids: Tensor, labels: Tensor, stored: Tensor, like: Tensor, method: str) -> Tensor:
    """One pass of the teacher over B rows, and of the student over B, or with mixtures 2 B."""
    teacher, student = models(method, like.dtype)
    student.train()
    batch = batch_of(input_ids)
    loss = torch.zeros(())
    if method != "mkd-cached":
        with torch.no_grad():
            loss = loss + teacher(**batch).logits.sum()
    if method == "mixkd":
        batch = {name: torch.cat([v, v]) if isinstance(v, Tensor) else v for name, v in batch.items()}
    loss = loss + student(**batch).logits.sum()
    loss.backward()
    return taken(loss, student)
