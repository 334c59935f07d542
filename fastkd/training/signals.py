"""Teacher logits: computed while the student trains, or once, as a column of its data."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastkd.data.encode import INPUTS
from fastkd.training.output import saving

if TYPE_CHECKING:
    from datasets import Dataset

    from fastkd.data.encode import MultiTaskDataset

logger = logging.getLogger(__name__)

COLUMN = "teacher_logits"


class TeacherSignal:
    """Frozen teachers of the tasks, their logits in the order of the student's labels.

    Args:
        teacher: one model with a head per task, or a model for each task. Each has ``config.tasks`` and the
            forward of ``MultiTaskEncoder``. It is put into evaluation mode and its parameters are frozen.
        labels: label names of each task, in the order of the student's outputs; none for a regression. They
            are matched by name.
        autocast: dtype of the teacher's matrix products, for example ``torch.bfloat16``; None for float32.

    Raises:
        ValueError: a task no teacher knows, or label names that are not the teacher's.
    """

    def __init__(
        self,
        teacher: nn.Module | Mapping[str, nn.Module],
        labels: Mapping[str, Sequence[str]],
        *,
        autocast: torch.dtype | None = None,
    ) -> None:
        by_task = dict.fromkeys(labels, teacher) if isinstance(teacher, nn.Module) else dict(teacher)
        missing = [task for task in labels if task not in by_task]
        if missing:
            raise ValueError(f"teacher has no model for {', '.join(missing)}; it has {', '.join(by_task)}")
        self.teachers = {task: by_task[task].eval().requires_grad_(False) for task in labels}
        self.orders = {task: _label_order(task, self.teachers[task], names) for task, names in labels.items()}
        self.autocast = autocast

    def to(self, device: torch.device) -> TeacherSignal:
        for model in self.teachers.values():
            model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits (B, labels) of the batch's task, float32, without gradient."""
        task, device = batch["task"], batch["input_ids"].device.type
        inputs = {name: batch[name] for name in INPUTS if name in batch}
        with torch.autocast(device, self.autocast) if self.autocast else nullcontext():
            logits: Tensor = self.teachers[task](**inputs, task=task).logits
        return logits.float()[:, self.orders[task]]

    def fingerprint(self, task: str, rows: Dataset) -> str:
        """Names everything the logits depend on: the teacher's weights, its labels' order, the dtype, the tokens.

        The tokens stand for texts, tokenizer and maximal length together.
        """
        columns = [name for name in ("row", *INPUTS) if name in rows.column_names]
        return fingerprint([task, self.orders[task], str(self.autocast)], self.teachers[task], rows, columns)


def fingerprint(settings: list[Any], model: nn.Module | None, rows: Dataset, columns: Sequence[str]) -> str:
    """Names settings, weights of a model and columns of data together, so that what came of others is not used."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, tensor in sorted(model.state_dict().items() if model else ()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    for batch in rows.select_columns(list(columns)).iter(1000):
        digest.update(json.dumps([batch[name] for name in columns]).encode())
    return digest.hexdigest()


def _label_order(task: str, model: nn.Module, names: Sequence[str]) -> list[int]:
    known: Mapping[str, Any] = getattr(model.config, "tasks", {})
    if task not in known:
        raise ValueError(f"teacher has no head for {task}; its tasks are {', '.join(known)}")
    theirs = list(known[task]["labels"])
    if sorted(theirs) != sorted(names):
        raise ValueError(f"labels of {task} are {list(names)}, but the teacher's are {theirs}")
    return [theirs.index(name) for name in names] or [0]


def add_teacher_logits(
    dataset: MultiTaskDataset,
    signal: TeacherSignal,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    *,
    cache_dir: str | Path | None = None,
    batch_size: int = 64,
) -> MultiTaskDataset:
    """The dataset with a column ``teacher_logits``, so that training needs the teacher no more.

    With ``cache_dir`` each task's logits are kept there in a safetensors file with their fingerprint and row
    numbers; a later call takes them from it. A file that is damaged, or made with another teacher or from other
    texts, is not used but replaced.
    """
    from fastkd.data.encode import MultiTaskDataset

    filled = {}
    for task, rows in dataset.datasets.items():
        path = None if cache_dir is None else Path(cache_dir) / f"{task}.safetensors"
        fingerprint = "" if path is None else signal.fingerprint(task, rows)
        logits = None if path is None else _read(path, fingerprint, rows["row"][:])
        if logits is None:
            logits = _compute(MultiTaskDataset({task: rows}), signal, collate, batch_size)
            if path is not None:
                _write(path, fingerprint, rows["row"][:], logits)
        rows = rows.remove_columns(COLUMN) if COLUMN in rows.column_names else rows
        filled[task] = rows.add_column(COLUMN, logits.tolist())
    return MultiTaskDataset(filled)


def _compute(
    rows: MultiTaskDataset, signal: TeacherSignal, collate: Callable[..., dict[str, Any]], batch_size: int
) -> Tensor:
    from tqdm import tqdm

    task = next(iter(rows.datasets))
    device = next(signal.teachers[task].parameters()).device
    by_length = torch.tensor(rows.lengths).argsort(stable=True)
    logits = torch.empty(len(rows), len(signal.orders[task]))
    with tqdm(total=len(rows), desc=f"teacher logits {task}", unit="row") as progress:
        for indices in by_length.split(batch_size):
            batch = collate(rows.__getitems__(indices.tolist()))
            moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items()}
            logits[indices] = signal(moved).cpu()
            progress.update(len(indices))
    return logits


def _write(path: Path, fingerprint: str, rows: Sequence[int], logits: Tensor) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    try:
        with saving(path):
            save_file({"row": torch.tensor(rows), "logits": logits}, temporary, {"fingerprint": fingerprint})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path, fingerprint: str, rows: Sequence[int]) -> Tensor | None:
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            found = (file.metadata() or {}).get("fingerprint")
            cached: Tensor = file.get_tensor("row")
            logits: Tensor = file.get_tensor("logits")
    except (SafetensorError, OSError) as error:
        logger.warning("%s is damaged (%s); computing the teacher's logits anew", path, error)
        return None
    if found != fingerprint or cached.tolist() != list(rows):
        logger.warning("%s is of another teacher or other texts; computing the teacher's logits anew", path)
        return None
    return logits
