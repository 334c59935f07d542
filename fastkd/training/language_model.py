"""Fine-tuning decoders on responses, and evaluating them there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import EvalPrediction

from fastkd.data.batches import IGNORED
from fastkd.training.classifiers import at_least_float32
from fastkd.training.step_mean import StepMeanTrainer

if TYPE_CHECKING:
    from datasets import Dataset


class LanguageModelTrainer(StepMeanTrainer):
    """Trains any ``AutoModelForCausalLM`` to give responses.

    The loss of an optimiser step is the mean over all labelled tokens of its batches, those of the responses: see
    ``StepMeanTrainer``. ``evaluate`` reports ``eval_loss``, the mean cross-entropy in nats over all such tokens of the
    set, and ``eval_perplexity``, its exponential.

    Args:
        model: called with ``input_ids`` and ``attention_mask``.
        args: ``train_sampling_strategy="group_by_length"`` puts rows of similar length into a batch.
        data_collator: ``fastkd.data.batches.language_model_collator(tokenizer)``.
        train_dataset: rows of ``encode_instructions``.
        eval_dataset: the same.
        **kwargs: passed to ``transformers.Trainer``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("compute_metrics", _metrics)
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, **kwargs)

    def batch_loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Any]:
        outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
        return token_loss(outputs.logits[:, :-1], batch["labels"][:, 1:]), outputs

    def count_items(self, batch: Mapping[str, Any]) -> Tensor:
        labels: Tensor = batch["labels"]
        return (labels[:, 1:] != IGNORED).sum()  # nothing predicts the first token

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        """No loss of the batch, but each row's summed loss and number of tokens, from which the set's mean is exact."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs).logits
        # row by row: a copy of all logits in float32 may not fit
        sums = [functional.cross_entropy(x[:-1].float(), y[1:], ignore_index=IGNORED, reduction="sum")
                for x, y in zip(logits, labels, strict=True)]  # fmt: skip
        return None, torch.stack(sums), (labels[:, 1:] != IGNORED).sum(1)


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the labels that are not ``IGNORED``; 0, not NaN, where all are.

    Args:
        logits: (..., classes).
        labels: (...) int64.
    """
    flat, wanted = logits.flatten(0, -2), labels.flatten()
    total = functional.cross_entropy(at_least_float32(flat), wanted, ignore_index=IGNORED, reduction="sum")
    return total / (wanted != IGNORED).sum().clamp(min=1)


def _metrics(prediction: EvalPrediction) -> dict[str, float]:
    loss = float(np.sum(prediction.predictions, dtype=np.float64) / np.sum(prediction.label_ids))
    return {"loss": loss, "perplexity": float(np.exp(loss))}
