"""The teachers of an experiment: one model for all tasks, or one per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from fastkd.training.classifiers import MultiTaskEncoder
from fastkd.training.pretrained import load_tokenizer
from fastkd.training.teacher import load_teacher

Folders = str | Mapping[str, str]  # of one teacher, or of each task's


@dataclass(frozen=True)
class Teachers:
    """Each task's teacher, and the tokenizer of them all."""

    by_task: Mapping[str, MultiTaskEncoder]
    tokenizer: PreTrainedTokenizerBase

    @property
    def first(self) -> MultiTaskEncoder:
        """The first task's teacher, which students start from."""
        return next(iter(self.by_task.values()))

    @property
    def tasks(self) -> list[tuple[MultiTaskEncoder, list[str]]]:
        """Every model with the tasks it teaches."""
        models = {id(model): model for model in self.by_task.values()}
        return [(model, [t for t, m in self.by_task.items() if m is model]) for model in models.values()]

    @property
    def title(self) -> str:
        """What the table calls them; parameters and latency beside it are those of :attr:`first`."""
        sizes = {model.encoder.num_parameters() for model in self.by_task.values()}
        if len(self.tasks) == 1:
            return "teacher"
        return "teachers, one per task" + (f" (size of {next(iter(self.by_task))}'s)" if len(sizes) > 1 else "")


def load_teachers(folders: Folders, tasks: Sequence[str]) -> Teachers:
    """The teachers of ``tasks`` from folders that ``fastkd teacher`` made.

    Raises:
        ValueError: a folder is no teacher's, a task has none or a teacher no task, or the teachers' vocabularies
            are not the same.
    """
    by_task = dict.fromkeys(tasks, folders) if isinstance(folders, str) else dict(folders)
    if sorted(by_task) != sorted(tasks):
        raise ValueError(f"teacher names folders for {', '.join(by_task)}; the tasks are {', '.join(tasks)}")
    loaded = {folder: _load(folder) for folder in dict.fromkeys(by_task[task] for task in tasks)}
    first, *others = loaded
    for folder in others:
        if loaded[folder][1].get_vocab() != loaded[first][1].get_vocab():
            raise ValueError(
                f"the teachers in {first} and {folder} have different vocabularies; one student can only learn "
                "from teachers that share a tokenizer"
            )
    return Teachers({task: loaded[by_task[task]][0] for task in tasks}, loaded[first][1])


def _load(folder: str) -> tuple[MultiTaskEncoder, PreTrainedTokenizerBase]:
    if not (Path(folder) / "config.json").exists():
        raise ValueError(f"no teacher in {folder}: make one with `fastkd teacher`")
    try:
        teacher, tokenizer = load_teacher(folder), load_tokenizer(folder)
    except (ValueError, OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder} is damaged, or no teacher that `fastkd teacher` made: {reason}") from error
    return cast(MultiTaskEncoder, teacher), tokenizer
