"""Fine-tuning and evaluating models that mark an answer's first and last token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from fastkd.data.squad_metrics import best_spans, squad_metrics
from fastkd.training.adoption import accepted_inputs
from fastkd.training.step_mean import StepMeanTrainer

if TYPE_CHECKING:
    from datasets import Dataset

POSITIONS = ("start_positions", "end_positions")


class SpanTrainer(StepMeanTrainer):
    """Trains any ``AutoModelForQuestionAnswering`` on windows and evaluates it on the questions behind them.

    The loss of an optimiser step is the mean over all windows of its batches: see ``StepMeanTrainer``. ``evaluate``
    reports ``eval_loss``, ``eval_exact_match`` and ``eval_f1`` (0 to 100) and, where a question has no answer,
    ``eval_f1_best`` and ``eval_f1_best_threshold``: see ``fastkd.data.squad_metrics``.

    Args:
        model: called with those of ``input_ids``, ``attention_mask`` and ``token_type_ids`` that it takes.
        args: ``train_sampling_strategy="group_by_length"`` puts windows of similar length into a batch.
        data_collator: ``fastkd.data.batches.span_collator(tokenizer)``.
        train_dataset: windows of ``encode_squad``.
        eval_dataset: windows too, all of ``eval_questions``. They are evaluated by length, so that a batch pads little.
        eval_questions: the questions whose windows are evaluated.
        null_threshold: see ``squad_metrics``.
        **kwargs: passed to ``transformers.Trainer``.

    Raises:
        ValueError: windows to evaluate without their questions, or what ``StepMeanTrainer`` refuses.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        *,
        eval_questions: Dataset | None = None,
        null_threshold: float = 0.0,
        **kwargs: Any,
    ) -> None:
        if eval_dataset is not None:
            if eval_questions is None:
                raise ValueError("eval_questions is None; it must be the questions whose windows are in eval_dataset")
            eval_dataset = eval_dataset.select(np.argsort(eval_dataset["length"][:], kind="stable"))
        kwargs.setdefault("compute_metrics", self._metrics)
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, **kwargs)
        self.label_names = list(POSITIONS)
        self.eval_questions = eval_questions
        self.null_threshold = null_threshold
        self._accepted = accepted_inputs(model) - set(POSITIONS)

    def batch_loss(self, model: torch.nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Any]:
        outputs = model(**{name: value for name, value in batch.items() if name in self._accepted})
        positions = (batch[name] for name in POSITIONS)
        return span_loss(outputs.start_logits, outputs.end_logits, *positions, mask=batch["attention_mask"]), outputs

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return SequentialSampler(eval_dataset)  # predictions are matched with windows by their order

    def evaluation_loop(self, dataloader: DataLoader[Any], *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self._evaluated: Any = dataloader.dataset
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        if self.eval_questions is None:
            raise ValueError("eval_questions is None; give SpanTrainer the questions whose windows are evaluated")
        logits: Any = prediction.predictions
        spans = best_spans(logits[0], logits[1], self._evaluated, self.eval_questions)
        return squad_metrics(spans, self.eval_questions["answers"][:], null_threshold=self.null_threshold)


def span_loss(
    start_logits: Tensor, end_logits: Tensor, start_positions: Tensor, end_positions: Tensor, *, mask: Tensor
) -> Tensor:
    """Mean over windows of half the cross-entropies of an answer's first and last token.

    Padding, where ``mask`` is 0, is no candidate: a window's loss does not depend on what it is batched with. (The
    models' own loss reads the logits of padding too, and equals this one where there is none.)

    Args:
        start_logits, end_logits: (windows, width).
        start_positions, end_positions: (windows,) int64.
        mask: (windows, width).
    """
    pairs = ((start_logits, start_positions), (end_logits, end_positions))
    losses = [functional.cross_entropy(x.float().masked_fill(mask == 0, -torch.inf), target) for x, target in pairs]
    return (losses[0] + losses[1]) / 2
