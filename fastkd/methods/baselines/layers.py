"""Which layers of the teacher the student's layers learn from.

Layers are counted from 1, as they lie in ``Features.hidden``, whose first entry is the embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

Layers = Literal["uniform", "skip", "last"] | Sequence[tuple[int, int]]

MAPS = ("uniform", "skip", "last")


def check_layers(layers: Layers) -> None:
    """Refuses an unknown name and an empty list."""
    if layers not in MAPS if isinstance(layers, str) else not layers:
        raise ValueError(f"layers must be one of {', '.join(MAPS)} or (student, teacher) pairs, got {layers!r}")


def layer_pairs(layers: Layers, student: int, teacher: int) -> list[tuple[int, int]]:
    """(student layer, teacher layer) for models of so many layers.

    Args:
        layers: ``"uniform"``: student layer m learns from teacher layer m · ``teacher`` / ``student`` (TinyBERT);
            ``"skip"``: the same without the last layer (PKD-skip); ``"last"``: the student's layers but the last from
            the teacher's layers just before its last (PKD-last); or the pairs themselves.
        student, teacher: numbers of layers.

    Raises:
        ValueError: the numbers do not allow that map, or a layer of a pair does not exist.
    """
    models = f"a student of {student} layers and a teacher of {teacher}"
    if not isinstance(layers, str):
        absent = [pair for pair in layers if not (1 <= pair[0] <= student and 1 <= pair[1] <= teacher)]
        if absent:
            raise ValueError(f"layers holds the pair {absent[0]}, which {models}, counted from 1, do not have")
        return list(layers)
    if layers in ("uniform", "skip") and (student < 1 or teacher % student):
        raise ValueError(f'layers is "{layers}", which takes a multiple of the student\'s layers, not {models}')
    if student > teacher:
        raise ValueError(f'layers is "{layers}", which takes no deeper student than the teacher, not {models}')
    if layers in ("skip", "last") and student < 2:
        raise ValueError(f'layers is "{layers}", which leaves out the last layer and takes 2 or more, not {models}')
    if layers == "last":
        return [(m, teacher - student + m) for m in range(1, student)]
    step = teacher // student
    return [(m, m * step) for m in range(1, student + (layers == "uniform"))]


def state_pairs(
    student: Sequence[Tensor], teacher: Sequence[Tensor], pairs: Sequence[tuple[int, int]]
) -> tuple[list[Tensor], list[Tensor]]:
    """The states of those layers, 0 being the embeddings, once it is clear that they have one width."""
    mine = [student[layer] for layer, _ in pairs]
    theirs = [teacher[layer] for _, layer in pairs]
    same_width(mine[0], theirs[0])
    return mine, theirs


def same_width(student: Tensor, teacher: Tensor) -> None:
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"the student's hidden states have width {student.shape[-1]} and the teacher's {teacher.shape[-1]}: they "
            "must be equal, or projected"
        )
