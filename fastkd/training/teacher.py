"""Teachers: fine-tuning one on several tasks, and loading a finished one."""

from __future__ import annotations

import functools
import json
import logging
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    TrainingArguments,
)

from fastkd.data.encode import MultiTaskCollator, MultiTaskDataset, load_encoded
from fastkd.data.metrics import main_score, majority_score
from fastkd.training.classifiers import (
    MultiTaskEncoder,
    MultiTaskEncoderConfig,
    SingleTaskTeacher,
    task_loss,
)
from fastkd.training.output import check_output, new_folder
from fastkd.training.pretrained import check_encoder, config_with_dropout, load_tokenizer
from fastkd.training.trainer import MultiTaskTrainer

__all__ = [
    "MultiTaskEncoder",
    "MultiTaskEncoderConfig",
    "SingleTaskTeacher",
    "has_fast_bf16",
    "load_teacher",
    "task_loss",
    "train_teacher",
]

logger = logging.getLogger(__name__)


def load_teacher(
    path: str | Path, *, task: str | None = None, label_names: Sequence[str] | None = None
) -> MultiTaskEncoder | SingleTaskTeacher:
    """A teacher in float32 and eval mode, with ``config.tasks``.

    Args:
        path: a ``MultiTaskEncoder``, or any checkpoint for ``AutoModelForSequenceClassification``.
        task: the task of such a checkpoint, one of ``fastkd.data.glue.TASKS`` or the user's own.
        label_names: the task's labels in the order of the checkpoint's outputs, for one that does not name
            its labels.

    Raises:
        ValueError: ``task`` is missing, or the checkpoint's labels are not the task's.
    """
    config = AutoConfig.from_pretrained(path)
    if isinstance(config, MultiTaskEncoderConfig):
        if task is not None or label_names is not None:
            raise ValueError(f"{path} is a multi-task teacher that knows its tasks; leave out task and label_names")
        teacher: MultiTaskEncoder = MultiTaskEncoder.from_pretrained(path, dtype=torch.float32)
        teacher.eval()  # type: ignore[no-untyped-call]
        return teacher
    if task is None:
        raise ValueError(f"{path} is a {config.model_type} classifier; say which task it was trained on (task=…)")
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    return SingleTaskTeacher(model, task, label_names).eval()


def train_teacher(
    name_or_path: str,
    tasks: Sequence[str],
    output_dir: str | Path,
    *,
    data_dir: str | Path | None = None,
    train_fraction: float | None = None,
    max_train_rows: int | None = None,
    paraphrases: str | Path | None = None,
    max_length: int = 128,
    pooling: str = "cls",
    dropout: float | None = None,
    seed: int = 0,
    bf16: bool | None = None,
    sampling_tau: float | None = None,
    **arguments: Any,
) -> dict[str, float]:
    """Fine-tunes a ``MultiTaskEncoder`` on several tasks together and saves it with its tokenizer.

    Args:
        name_or_path: encoder on the Hub or in a folder.
        tasks: names of ``fastkd.data.glue.TASKS``, or of folders of the user's own in ``data_dir``.
        output_dir: a new or an empty folder; filled at once when training has succeeded, never half written.
        data_dir, train_fraction, max_train_rows, paraphrases: see ``fastkd.data.glue.load_task``.
        max_length: tokens of a row, a pair counting as one.
        pooling: see ``MultiTaskEncoderConfig``.
        dropout: rate of all dropout in encoder and heads, which students of the teacher's layers take over; None
            leaves the encoder's own. Drawing the masks takes a good part of a step on a CPU; 0 draws none.
        seed: of heads, subset, order and dropout.
        bf16: autocast to bfloat16; None does so where that is faster.
        sampling_tau: see ``MultiTaskTrainer``; below 1 it gives small tasks more steps.
        **arguments: of ``transformers.TrainingArguments``, over this project's defaults: 3 epochs, 32 rows
            per batch of similar lengths, AdamW at 5e-5 with weight decay 0.01, warm-up over a tenth of the
            steps.

    Returns:
        ``MultiTaskTrainer.evaluate``'s metrics, which are also saved as ``eval_results.json``.

    Raises:
        ValueError: no encoder, or one of fewer positions than the longest row has tokens; wrong rows or options.
        FileExistsError: ``output_dir`` holds something.
    """
    check_output(output_dir)
    config = config_with_dropout(name_or_path, dropout)
    check_encoder(name_or_path, config)
    torch.manual_seed(seed)
    encoder = AutoModel.from_pretrained(name_or_path, config=config, dtype=torch.float32)
    tokenizer = load_tokenizer(name_or_path)
    train, validation = load_encoded(
        tasks,
        tokenizer,
        max_length,
        data_dir,
        train_fraction=train_fraction,
        max_train_rows=max_train_rows,
        paraphrases=paraphrases,
        seed=seed,
    )
    heads = {} if dropout is None else {"classifier_dropout": dropout}
    model = MultiTaskEncoder.from_encoder(encoder, list(train.tasks.values()), pooling=pooling, **heads)
    check_output(output_dir, needed_bytes=4 * model.num_parameters())
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "learning_rate": 5e-5,
        "weight_decay": 0.01,
        "warmup_steps": 0.1,
        "train_sampling_strategy": "group_by_length",
        "save_strategy": "no",
        "seed": seed,
        "bf16": has_fast_bf16() if bf16 is None else bf16,
        "use_cpu": not torch.accelerator.is_available(),
    }
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(scratch, **(defaults | arguments))
        trainer = MultiTaskTrainer(
            model, args, MultiTaskCollator(tokenizer), train, validation, sampling_tau=sampling_tau
        )
        trainer.train()
        metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        with new_folder(output_dir) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            (folder / "eval_results.json").write_text(json.dumps(metrics, indent=2) + "\n")
        _warn_where_nothing_shows(train, validation, metrics)
    return metrics


def _warn_where_nothing_shows(
    train: MultiTaskDataset, validation: Mapping[str, MultiTaskDataset], metrics: Mapping[str, float]
) -> None:
    for name, task in train.tasks.items():
        score = main_score(task, {metric: metrics[f"eval_{name}_{metric}"] for metric in task.metrics})
        least = majority_score(task, train.datasets[name]["labels"], validation[name].datasets[name]["labels"])
        if score <= least:
            known = f"{name}: the teacher scores {score:.1f}, no more than one answer to all rows does ({least:.1f})"
            logger.warning("%s: nothing shows that it has learned the task; train it longer or on more rows", known)


def has_fast_bf16() -> bool:
    """Whether bfloat16 products pay here: known of a GPU by its kind, measured of a CPU that has instructions for them.

    Without AMX they are no promise: with AVX512-BF16 an AMD EPYC trains 1.5 times faster, a Xeon 1.8 times slower.
    """
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16")) and _bf16_products_are_faster()


@functools.cache
def _bf16_products_are_faster() -> bool:
    """Of the least of several times each, in turn, so that other work beside it does not decide."""
    dtypes = (torch.float32, torch.bfloat16)
    pairs = {dtype: (torch.ones(512, 384, dtype=dtype), torch.ones(384, 1536, dtype=dtype)) for dtype in dtypes}
    seconds = dict.fromkeys(dtypes, math.inf)
    for _ in range(5):
        for dtype, (rows, weight) in pairs.items():
            start = time.perf_counter()
            torch.mm(rows, weight)
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    return seconds[torch.bfloat16] < seconds[torch.float32]
