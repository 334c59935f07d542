"""Inputs of linear_kl_div that every backend is checked with."""

from typing import Any

import torch
from torch import Tensor

ROWS, VOCABULARY, HIDDEN, TEACHER_HIDDEN = 37, 300, 24, 40


def heads(dtype: torch.dtype = torch.float32, seed: int = 0, vocabulary: int = VOCABULARY) -> tuple[Tensor, ...]:
    """Hidden states and weight of student and teacher, of which some rows are peaked, flat, and alike."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    student, teacher = normal(ROWS, HIDDEN), normal(ROWS, TEACHER_HIDDEN)
    student[1] *= 5
    teacher[2] *= 5
    student[3] = 0
    weights = normal(vocabulary, HIDDEN) * 0.5, normal(vocabulary, TEACHER_HIDDEN) * 0.4
    return tuple(x.to(dtype) for x in (student, weights[0], teacher, weights[1]))


def labels(seed: int = 0) -> Tensor:
    drawn = torch.randint(VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(seed))
    drawn[0] = drawn[13] = -100
    return drawn


def options() -> dict[str, dict[str, Any]]:
    """Keyword arguments by name; small memory budgets make many chunks."""
    generator = torch.Generator().manual_seed(1)
    biases = {name: torch.randn(VOCABULARY, generator=generator) for name in ("student_bias", "teacher_bias")}
    labelled = {"labels": labels(), "cross_entropy_weight": 0.7}
    some = torch.arange(ROWS) % 3 != 1
    temperatures = 0.5 + 3 * torch.rand(ROWS, generator=generator)
    capped = {"student_softcap": 3.0, "teacher_softcap": 5.0}
    scaled = {"student_logit_scale": 0.5, "teacher_logit_scale": 2.0}
    return {
        "plain": {},
        "chunked": {"memory_budget": 20_000, "temperature": 2.0},
        "row by row": {"memory_budget": 1},
        "biased": biases,
        "masked": {"mask": some, "memory_budget": 20_000},
        "nothing valid": {"mask": torch.zeros(ROWS)},
        "labelled": labelled | {"temperature": 2.0},
        "capped": capped,
        "scaled": scaled | biases,
        "jsd": {"divergence": "jsd", "beta": 0.3, "temperature": 1.5},
        "everything": biases | labelled | capped | scaled | {"temperature": temperatures, "mask": some}
        | {"divergence": "reverse", "memory_budget": 30_000},
    }  # fmt: skip
