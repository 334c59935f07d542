"""A trainer that logs the parts of its loss and stops, before anything is saved, where one of them breaks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from fastkd.training.checkpoints import last_checkpoint
from fastkd.training.loss_parts import LossParts, Place, means
from fastkd.training.step_mean import StepMeanTrainer


class PartsTrainer(StepMeanTrainer):
    """Logs the unweighted parts of a loss as ``loss_<part>``, and ``agreement``, as they are given to :meth:`count`.

    They are means over the micro-batches of all processes since the last log, summed on the device. A part that is NaN
    or infinite ends the training with ``FloatingPointError`` at the next log, save or end, before anything is saved.

    ``train(resume_from_checkpoint=True)`` goes on from the last checkpoint that is whole, or starts anew without one.
    """

    def __init__(self, model: PreTrainedModel, args: TrainingArguments, *rest: Any, **kwargs: Any) -> None:
        args.logging_nan_inf_filter = False  # it would read the loss at every step, and hide what is to be found
        super().__init__(model, args, *rest, **kwargs)
        self._parts = LossParts()
        self._micro_batch = 0

    def count(self, parts: Mapping[str, Tensor]) -> None:
        """Takes the parts of one micro-batch's loss."""
        self._parts.add(parts, self.place)
        self._micro_batch += 1

    @property
    def place(self) -> Place:
        """The micro-batch that is being trained on."""
        return Place(self.state.global_step, self._micro_batch)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        self._micro_batch = 0
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(cast(str, self.args.output_dir), self.args.world_size)
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.release_models()
        self._stop_if_broken()
        return result

    def release_models(self) -> None:
        """Takes off the models what training has put on them, such as hooks; a later training puts it back."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            self._stop_if_broken()
            of_all = means(gather_object([self._parts.totals()]))
            logs |= {name if name == "agreement" else f"loss_{name}": round(mean, 4) for name, mean in of_all.items()}
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._stop_if_broken()
        super()._save_checkpoint(*args, **kwargs)

    def _stop_if_broken(self) -> None:
        """In all processes together: what one has seen is in every one's weights after the step."""
        found = self._parts.broken()
        here = None
        if found is not None:
            place, parts = found
            where = f"step {place.step + 1} ({self.rows_of(place)})"
            here = f"{' and '.join(parts)} of the loss is NaN or infinite in {where}"
        broken = [message for message in gather_object([here]) if message]
        if broken:
            kept = last_checkpoint(cast(str, self.args.output_dir), self.args.world_size)
            raise FloatingPointError(f"{broken[0]}; the last good checkpoint is {kept or 'none'}")

    def rows_of(self, place: Place) -> str:
        """Which rows a micro-batch of this process held, where that is known."""
        return f"micro-batch {place.micro_batch + 1}"
