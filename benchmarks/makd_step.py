"""Benchmark of MaKD: a whole step, and its losses alone, against the method written plainly.

A step is everything from a batch to the gradients, without the optimizer. Written plainly the models give their
attention maps, and every matrix is compared by itself. The limit of a step is the passes of teacher and student alone.
"""

from __future__ import annotations

import copy
import tempfile
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.registry import STEP, Benchmark, Case
from benchmarks.train_step import TASK, batch_of, encoder, make_inputs, taken
from fastkd.methods.makd import MaKDObjective
from fastkd.training.taps import Features, Taps

LAYERS = 6
ALL, LOSSES = "makd", "makd losses"

CASES = [
    Case("makd_step", shape, torch.float32, reason, directions=(STEP,), options={"method": method})
    for method, shape, reason in (
        (ALL, (32, 128), "a MiniLM and its factors of half the size, all parts of the loss"),
        (ALL, (8, 512), "the same on as many tokens in long texts, as in reading tasks"),
        *((ALL, (2, tokens), "how time and memory grow with the length") for tokens in (128, 256, 512, 1024)),
        (LOSSES, (32, 128), "what the kernels replace, from queries, keys and outputs on"),
        (LOSSES, (8, 512), "the same for long texts"),
    )
]
BENCHMARK = Benchmark("makd_step", CASES, make_inputs)


@cache
def models(dtype: torch.dtype) -> tuple[Any, Any]:
    """Teacher and student, without dropout so that all steps are the same."""
    from fastkd.students import factorize, plan_factorization

    teacher = encoder(LAYERS, dtype, max_position_embeddings=1024).eval().requires_grad_(False)
    return teacher, factorize(teacher, plan_factorization(teacher, ratio=0.5))


@cache
def plain_models(dtype: torch.dtype) -> tuple[Any, Any]:
    """The same with attention that gives its maps, and lists that collect the outputs of the linear maps."""
    pair = copy.deepcopy(models(dtype))
    for model in pair:
        model.encoder.set_attn_implementation("eager")
        model.outputs = []
        for module in model.encoder.encoder.layer.modules():
            if isinstance(module, nn.Linear) or hasattr(module, "down"):
                module.register_forward_hook(lambda module, inputs, output, kept=model.outputs: kept.append(output))
    return pair


def squared_error(mine: Tensor, theirs: Tensor, mask: Tensor) -> Tensor:
    """A mean over valid tokens and units."""
    return ((mine - theirs).square() * mask[..., None]).sum() / mask.sum() / mine.shape[-1]


def divergence(mine: Tensor, theirs: Tensor, mask: Tensor) -> Tensor:
    """Of attention maps (B, H, T, T), a mean over heads and valid queries."""
    tiny = torch.finfo(mine.dtype).tiny
    rows = (theirs * (theirs.clamp(min=tiny).log() - mine.clamp(min=tiny).log())).sum(-1)
    return (rows * mask[:, None]).sum() / mask.sum() / mine.shape[1]


def plain_losses(maps: Any, outputs: Any, mask: Tensor) -> Tensor:
    """Attention and matrices: maps of both models' layers, outputs of their linear maps."""
    attention = sum(divergence(*pair, mask) for pair in zip(*maps, strict=True)) / len(maps[0])
    return attention + sum(squared_error(*pair, mask) for pair in zip(*outputs, strict=True)) / LAYERS


@BENCHMARK.provider("eager")
def written_plainly(input_ids: Tensor, labels: Tensor, stored: Tensor, like: Tensor, method: str) -> Tensor:
    batch = batch_of(input_ids)
    mask = batch["attention_mask"].to(like.dtype)
    if method == LOSSES:
        leaves, mine, theirs = features_of(tuple(input_ids.shape), like.dtype)
        maps = [[_maps(a, mask) for a in features.attention] for features in (mine, theirs)]
        loss = plain_losses(maps, (mine.outputs.values(), theirs.outputs.values()), mask)
        return _gradients(loss, leaves)
    teacher, student = plain_models(like.dtype)
    student.train()
    with torch.no_grad():
        taught = _call(teacher, batch)
    own = _call(student, batch)
    loss = plain_losses((own.attentions, taught.attentions), (student.outputs, teacher.outputs), mask)
    states = zip(own.hidden_states, taught.hidden_states, strict=True)
    loss = loss + sum(squared_error(*pair, mask) for pair in states) / (LAYERS + 1)
    logits, wanted = own.logits, taught.logits
    loss = loss + F.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean")
    loss = loss + F.cross_entropy(logits, labels)
    loss.backward()
    teacher.outputs.clear()
    student.outputs.clear()
    return taken(loss, student)


def _call(model: Any, batch: dict[str, Any]) -> Any:
    inputs = {name: value for name, value in batch.items() if name != "task"}
    states = model.encoder(**inputs, output_attentions=True, output_hidden_states=True)
    states.logits = model.heads[TASK](states.pooler_output)
    return states


def _maps(attention: Any, mask: Tensor) -> Tensor:
    scores = attention.query @ attention.key.mT * attention.scale
    return scores.masked_fill(mask[:, None, None] == 0, torch.finfo(scores.dtype).min).softmax(-1)


@cache
def trainer() -> Any:
    from datasets import Dataset

    from fastkd.data.encode import MultiTaskDataset
    from fastkd.methods.makd import MaKDConfig, MaKDTrainer

    teacher, student = models(torch.float32)
    rows = MultiTaskDataset({TASK: Dataset.from_dict({"input_ids": [[1]], "labels": [0]})})
    args = MaKDConfig(tempfile.mkdtemp(), use_cpu=True, save_strategy="no", disable_tqdm=True)
    return MaKDTrainer(student, args, train_dataset=rows, teacher=teacher)


@BENCHMARK.provider("fastkd")
def trained(input_ids: Tensor, labels: Tensor, stored: Tensor, like: Tensor, method: str) -> Tensor:
    batch = batch_of(input_ids)
    if method == LOSSES:
        leaves, mine, theirs = features_of(tuple(input_ids.shape), like.dtype)
        objective = MaKDObjective(hidden_weight=0.0, logits_weight=0.0, labels_weight=0.0)
        loss, _ = objective(mine, theirs, labels, batch["attention_mask"])
        return _gradients(loss, leaves)
    (batch,), count = trainer().get_batch_samples(iter([batch | {"labels": labels}]), 1, input_ids.device)
    return taken(trainer().training_step(trainer().model, batch, count), trainer().model)


@cache
def features_of(shape: tuple[int, int], dtype: torch.dtype) -> tuple[list[Tensor], Features, Features]:
    """Queries, keys and outputs of both models on the case's tokens; the student's are leaves."""
    tokens = make_inputs(Case("makd_step", shape, dtype, ""))["input_ids"]
    found = []
    for model in reversed(models(dtype)):
        taps = Taps(model, hidden=False, maps=True)
        with torch.no_grad(), taps.record() as features:
            model.eval()(**batch_of(tokens))
        taps.close()
        found.append(features)
    mine = found[0]
    mine.attention = [a._replace(query=_leaf(a.query), key=_leaf(a.key)) for a in mine.attention]
    mine.outputs = {name: _leaf(output) for name, output in mine.outputs.items()}
    leaves = [tensor for a in mine.attention for tensor in (a.query, a.key)] + list(mine.outputs.values())
    return leaves, mine, found[1]


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _gradients(loss: Tensor, leaves: list[Tensor]) -> Tensor:
    gradients = torch.autograd.grad(loss, leaves)
    return torch.cat([loss.detach().reshape(1), *(gradient[0].flatten() for gradient in gradients)])


@BENCHMARK.limit("passes", direction=STEP, objection=lambda case: None if case.options["method"] == ALL else "no pass")
def passes(input_ids: Tensor, labels: Tensor, stored: Tensor, like: Tensor, method: str) -> Tensor:
    """One pass of the teacher and of the student."""
    teacher, student = models(like.dtype)
    student.train()
    batch = batch_of(input_ids)
    with torch.no_grad():
        loss = teacher(**batch).logits.sum()
    loss = loss + student(**batch).logits.sum()
    loss.backward()
    return taken(loss, student)
