"""The Hugging Face Trainer with the loss of a step as a mean over what the step holds, however cut into batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from fastkd.ops.kl_div import divided
from fastkd.training.attention import use_own_attention
from fastkd.training.positions import check_positions

SAMPLING_STRATEGIES = ("random", "group_by_length")


class StepMeanTrainer(Trainer):
    """Trains on the mean loss over an optimiser step's items, of whatever micro-batch or process.

    The same rows give the same gradient for any ``gradient_accumulation_steps``. What an item is, :meth:`count_items`
    says: a row, unless overridden. On a CPU a model's ``sdpa`` becomes ``fastkd.training.attention.sdpa``.

    Raises:
        ValueError: several GPUs without torchrun, which would mean ``nn.DataParallel``; an argument of Trainer that has
            no meaning here; or rows of more tokens than the model has positions.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self, model: nn.Module | None = None, args: TrainingArguments | None = None, *rest: Any, **kwargs: Any
    ) -> None:
        args = args or TrainingArguments()
        _check_arguments(args, kwargs)
        args.remove_unused_columns = False
        if model is not None and args.device.type == "cpu":
            use_own_attention(model)
        super().__init__(model, args, *rest, **kwargs)
        sets = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        check_positions(cast(nn.Module, self.model), [self.train_dataset, *sets])
        self.model_accepts_loss_kwargs = False  # or Trainer would count labels, which may be no items

    def batch_loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        """Mean loss over the batch's items, and the model's output. What a training method overrides."""
        outputs = model(**batch)
        return outputs.loss, outputs

    def count_items(self, batch: Mapping[str, Any]) -> int | torch.Tensor:
        """The number of items in a batch, over which :meth:`batch_loss` is the mean."""
        return len(batch["input_ids"])

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.as_tensor(sum(self.count_items(batch) for batch in batches), device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return batches, count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        loss, outputs = self.batch_loss(model, inputs)
        if num_items_in_batch is not None:
            # The gradient is averaged over processes, and the count is of all of them unless told otherwise.
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            items = torch.as_tensor(self.count_items(inputs) * processes, device=loss.device)
            loss = loss * divided(items, num_items_in_batch)  # 0 for a step without any, as of texts without labels
        return (loss, outputs) if return_outputs else loss


def _check_arguments(args: TrainingArguments, trainer_arguments: Mapping[str, Any]) -> None:
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, which would mean nn.DataParallel; start one "
            "process per GPU with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES to one GPU"
        )
    strategy = args.train_sampling_strategy
    if strategy not in SAMPLING_STRATEGIES:
        raise ValueError(f"train_sampling_strategy is {strategy!r}; it must be one of {', '.join(SAMPLING_STRATEGIES)}")
    if args.dataloader_drop_last:
        raise ValueError("dataloader_drop_last is not supported; a short batch counts by its rows")
    if args.label_smoothing_factor or trainer_arguments.get("compute_loss_func"):
        raise ValueError("label_smoothing_factor and compute_loss_func are not used; override batch_loss")
