"""Students that know nothing of tasks: any sequence classifier of transformers, trained on one task."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence

from transformers import PreTrainedModel


def adopt(model: PreTrainedModel, tasks: Mapping[str, Sequence[str]]) -> None:
    """Gives a student without ``config.tasks`` the one task it is trained on, and its outputs the task's label names.

    Raises:
        ValueError: outputs that are not a task's labels in their order, no head for a task, or several tasks for a
            student without ``config.tasks``.
    """
    if own := getattr(model.config, "tasks", None):
        refuse_missing_heads("the student", tasks, own)
        for task, labels in tasks.items():
            refuse_other_labels("the student", task, own[task]["labels"], labels)
        return
    if len(tasks) != 1:
        raise ValueError(f"{type(model).__name__} has no config.tasks; on {', '.join(tasks)} it needs a head for each")
    ((task, labels),) = tasks.items()
    config, names = model.config, list(labels)
    if config.num_labels != max(1, len(names)):
        raise ValueError(f"{type(model).__name__} has {config.num_labels} outputs; {task} needs {max(1, len(names))}")
    own = [name for _, name in sorted((config.id2label or {}).items())]
    if names and own != names:
        if own != [f"LABEL_{i}" for i in range(len(own))]:
            raise ValueError(f"the student's outputs are {', '.join(own)}; those of {task} are {', '.join(names)}")
        config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    config.tasks = {task: {"labels": names}}


def refuse_missing_heads(student: str, tasks: Iterable[str], own: Iterable[str]) -> None:
    if missing := [task for task in tasks if task not in own]:
        raise ValueError(f"{student} has no head for {', '.join(missing)}; its tasks are {', '.join(own) or 'none'}")


def refuse_other_labels(student: str, task: str, theirs: Sequence[str], names: Sequence[str]) -> None:
    if list(theirs) != list(names):
        raise ValueError(f"labels of {task} are {list(names)}, but those of {student} are {list(theirs)}")


def accepted_inputs(model: PreTrainedModel) -> frozenset[str]:
    """Which of a batch's entries the model's forward takes; token types only where the model tells types apart."""
    taken = frozenset(inspect.signature(model.forward).parameters)
    return taken - {"token_type_ids"} if getattr(model.config, "type_vocab_size", 2) < 2 else taken
