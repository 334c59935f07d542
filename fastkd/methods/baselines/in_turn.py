"""Two objectives one after the other, for the methods that distil in stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastkd.methods.objective import Objective


@dataclass(frozen=True)
class InTurn(Objective):
    """``first`` up to the part ``switch`` of the training, ``then`` from there on.

    An objective with stages of its own is told of the whole training's progress.

    The released codes train twice, each time with a schedule of the learning rate of its own; one training with one
    schedule is a choice of this project.

    Raises:
        ValueError: ``switch`` is not between 0 and 1.
    """

    first: Objective
    then: Objective
    switch: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.switch < 1:
            raise ValueError(f"switch must be between 0 and 1, got {self.switch}")

    @property
    def needs_teacher(self) -> bool:
        return self.first.needs_teacher or self.then.needs_teacher

    @property
    def needs_logits(self) -> bool:
        return self.first.needs_logits or self.then.needs_logits

    @property
    def needs_attention(self) -> bool:
        return self.first.needs_attention or self.then.needs_attention

    @property
    def needs_hidden(self) -> bool:
        return self.first.needs_hidden or self.then.needs_hidden

    @property
    def needs_maps(self) -> bool:
        return self.first.needs_maps or self.then.needs_maps

    @property
    def needs_weights(self) -> bool:
        return self.first.needs_weights or self.then.needs_weights

    @property
    def modules(self) -> list[str]:
        return self.first.modules + self.then.modules

    def at(self, progress: float) -> Objective:
        return (self.first if progress < self.switch else self.then).at(progress)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        raise TypeError("which of the two depends on the training: call at(progress) for it")
