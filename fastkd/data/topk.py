"""A teacher's most likely tokens at every position, as columns of a dataset.

``teacher_ids`` (L, k) and ``teacher_values`` (L, k) are ids and log-probabilities, ``teacher_logsumexp`` (L,) their
normaliser: the arguments of ``topk_kl_div``. Ids take 16 bits where the vocabulary allows, else 32. Values are float16,
off by at most 2⁻¹¹ of a log-probability; bfloat16, in as many bits, would be off by eight times that. The
normaliser, float32, is that of the rounded values, so that the mass they leave to other tokens is the teacher's.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastkd.training.runs import write_text
from fastkd.training.signals import fingerprint

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

IDS, VALUES, LOGSUMEXP = COLUMNS = ("teacher_ids", "teacher_values", "teacher_logsumexp")
_FEWEST = -65504.0  # the least number of float16


class TopK(NamedTuple):
    """The k most likely columns of each row of logits."""

    ids: Tensor
    """(..., k) int32."""
    values: Tensor
    """(..., k) float16 log-probabilities."""
    logsumexp: Tensor
    """(...) float32, the ``teacher_logsumexp`` of ``topk_kl_div``."""


def topk_of(logits: Tensor, k: int, *, temperature: float = 1.0) -> TopK:
    """What a cache keeps of logits (..., V): softmax(logits / temperature) at its k most likely columns.

    As :func:`fastkd.losses.topk_kl_div` reads them back, the log of a probability p_j is off by at most
    2⁻¹¹ · (|log p_j| + the mean of |log p| over the k columns, weighted by p), the mass of all k by float32's rounding.

    Raises:
        ValueError: k is not from 1 to V, or the temperature is not positive and finite.
    """
    _check_temperature(temperature)
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k must be from 1 to {logits.shape[-1]}, the size of the vocabulary, got {k}")
    exact, ids = (logits.float() / temperature).log_softmax(-1).topk(k, -1)
    values = exact.where(exact.isneginf(), exact.clamp(min=_FEWEST)).half()
    normalizer = values.double().logsumexp(-1) - exact.double().logsumexp(-1)
    return TopK(ids.int(), values, normalizer.float())


def add_teacher_topk(
    dataset: Dataset,
    teacher: nn.Module,
    k: int,
    *,
    temperature: float = 1.0,
    autocast: torch.dtype | None = None,
    cache_dir: str | Path | None = None,
    batch_size: int = 8,
) -> Dataset:
    """The dataset with the columns of a causal or masked language model's k most likely tokens at every position.

    Args:
        dataset: rows with ``input_ids``, lists of any length, none empty. Position i of the new columns is what the
            teacher's logits at position i say: for a causal model, of token i + 1.
        teacher: called with ``input_ids`` and ``attention_mask``, (B, T), padded at the end; its ``logits`` are
            (B, T, V). It is put into evaluation mode.
        k: tokens to keep per position.
        temperature: that of the loss, since what lies outside the k tokens at another one is unknown.
        autocast: dtype of the teacher's matrix products, None for its own.
        cache_dir: keep the result there, under the fingerprint of teacher, tokens and options: a later call with the
            same reads it. A file that is damaged is replaced. Without it ``datasets`` decides.
        batch_size: rows the teacher sees at once.
    """
    from datasets import Features, List, Value, concatenate_datasets

    if any(name in dataset.column_names for name in COLUMNS):
        raise ValueError(f"dataset has a column of {', '.join(COLUMNS)} already: remove_columns takes it away")
    _check_temperature(temperature)
    vocabulary = _vocabulary(teacher)
    if not 1 <= k <= vocabulary:
        raise ValueError(f"k must be from 1 to {vocabulary}, the size of the vocabulary, got {k}")
    id_type = Value("uint16" if vocabulary <= 2**16 else "int32")
    columns = {IDS: List(List(id_type, length=k)), VALUES: List(List(Value("float16"), length=k))}
    features = Features({**columns, LOGSUMEXP: List(Value("float32"))})
    tokens = dataset.with_format(None).select_columns(["input_ids"])
    name = fingerprint(["top-k", k, temperature, str(autocast)], teacher, tokens, ["input_ids"])
    path = None if cache_dir is None else Path(cache_dir) / f"topk-{name}.arrow"
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    whole = path is not None and _is_whole(path)
    known = tokens.map(
        _annotate(teacher.eval(), k, temperature, autocast, id_type.dtype),
        batched=True,
        batch_size=batch_size,
        remove_columns=["input_ids"],
        features=features,
        new_fingerprint=name,
        cache_file_name=None if path is None else str(path),
        desc=f"teacher's top {k}",
    )
    if path is not None and not whole:
        write_text(_digest_file(path), _digest(path))
    filled: Dataset = concatenate_datasets([dataset, known], axis=1)
    return filled


def collate_topk(rows: Sequence[Mapping[str, Any]], width: int, *, left: bool = False) -> dict[str, Tensor]:
    """The columns of some rows, padded to ``width`` positions at the end, or with ``left`` at the beginning.

    Gives ``teacher_ids`` (B, width, k) int32, −1 where there is nothing, ``teacher_values`` (B, width, k) float16 and
    ``teacher_logsumexp`` (B, width) float32: arguments of :func:`fastkd.losses.topk_kl_div` by their names.
    """
    k = len(rows[0][IDS][0])
    ids = np.full((len(rows), width, k), -1, np.int32)
    values, normalizers = np.zeros((len(rows), width, k), np.float16), np.zeros((len(rows), width), np.float32)
    for index, row in enumerate(rows):
        length = len(row[IDS])
        if length > width:
            raise ValueError(f"width must be at least {length}, the length of a row, got {width}")
        place = slice(width - length, width) if left else slice(length)
        ids[index, place], values[index, place], normalizers[index, place] = (row[name] for name in COLUMNS)
    return dict(zip(COLUMNS, map(torch.from_numpy, (ids, values, normalizers)), strict=True))


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def _vocabulary(teacher: nn.Module) -> int:
    size = getattr(getattr(teacher, "config", None), "vocab_size", None)
    if not isinstance(size, int):
        raise ValueError("teacher has no config.vocab_size, by which the type of ids is chosen")
    return size


def _annotate(
    teacher: nn.Module, k: int, temperature: float, autocast: torch.dtype | None, id_type: str
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    device = next(teacher.parameters()).device

    @torch.no_grad()
    def annotate(batch: Mapping[str, Any]) -> dict[str, Any]:
        rows = [torch.as_tensor(row) for row in batch["input_ids"]]
        lengths = [len(row) for row in rows]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long().to(device)
        with torch.autocast(device.type, autocast) if autocast else nullcontext():
            logits = teacher(input_ids=tokens, attention_mask=mask).logits
        kept = [
            topk_of(some[:length], k, temperature=temperature) for some, length in zip(logits, lengths, strict=True)
        ]
        arrays = ([x.cpu().numpy() for x in column] for column in zip(*kept, strict=True))
        ids, values, normalizers = arrays
        return {IDS: [x.astype(id_type) for x in ids], VALUES: values, LOGSUMEXP: normalizers}

    return annotate


def _digest_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _is_whole(path: Path) -> bool:
    """Whether the file has its digest; one with another is removed, one without may have been stopped short of it."""
    known = _digest_file(path)
    if not (path.exists() and known.exists()):
        return False
    if known.read_text() == _digest(path):
        return True
    logger.warning("%s is damaged; computing the teacher's top k anew", path)
    path.unlink()
    return False
