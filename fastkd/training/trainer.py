"""The Hugging Face Trainer on single-task batches of several tasks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from fastkd.data.encode import MultiTaskDataset
from fastkd.data.metrics import main_score, task_metrics
from fastkd.data.task import Task
from fastkd.training.sampler import MultiTaskBatchSampler
from fastkd.training.step_mean import StepMeanTrainer


class MultiTaskTrainer(StepMeanTrainer):
    """Trains a model with a head per task and evaluates every task.

    The loss of an optimiser step is the mean over all rows of its batches, of whatever task, micro-batch or
    process: see ``StepMeanTrainer``.

    ``evaluate`` reports ``eval_<set>_<metric>`` for every evaluation set (named as its task) and
    ``eval_average``, the mean of the tasks' main scores (0 to 100); a task with several sets counts once.

    Args:
        model: called as ``model(input_ids, attention_mask, token_type_ids, labels, task)``.
        args: ``train_sampling_strategy="group_by_length"`` puts rows of similar length into a batch. The
            order of batches follows ``data_seed``, or ``seed`` where that is None.
        data_collator: a ``MultiTaskCollator``.
        train_dataset: the tasks' training rows.
        eval_dataset: evaluation sets by name, each of one task.
        sampling_tau: None takes every row once per epoch; otherwise see ``MultiTaskBatchSampler``.
        **kwargs: passed to ``transformers.Trainer``.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: MultiTaskDataset | None = None,
        eval_dataset: Mapping[str, MultiTaskDataset] | None = None,
        *,
        sampling_tau: float | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("compute_metrics", self._metrics_of_task)
        sets = None if eval_dataset is None else dict(eval_dataset)
        super().__init__(model, args, data_collator, train_dataset, sets, **kwargs)
        self.sampling_tau = sampling_tau
        self._epoch_callback = _EpochOfSampler()
        self.add_callback(self._epoch_callback)

    def get_train_dataloader(self) -> DataLoader[Any]:
        if not isinstance(self.train_dataset, MultiTaskDataset):
            raise TypeError(f"train_dataset is {type(self.train_dataset).__name__}, not a MultiTaskDataset")
        args = self.args
        by_length = args.train_sampling_strategy == "group_by_length"
        sampler = MultiTaskBatchSampler(
            self.train_dataset.sizes,
            self._train_batch_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
            lengths=self.train_dataset.lengths if by_length else None,
            tau=self.sampling_tau,
        )
        self._epoch_callback.sampler = sampler
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)  # type: ignore[no-any-return]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        sets = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(sets, dict):
            scores = defaultdict(list)
            for name, dataset in sets.items():
                task = _only_task(dataset)
                prefix = f"{metric_key_prefix}_{name}_"
                named = {metric: metrics[prefix + metric] for metric in task.metrics}
                scores[task.name].append(main_score(task, named))
            means = [sum(values) / len(values) for values in scores.values()]
            average = {f"{metric_key_prefix}_average": sum(means) / len(means)}
            self.log(dict(average))
            metrics.update(average)
        return metrics

    def evaluation_loop(self, dataloader: DataLoader[Any], *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self._evaluated_task = _only_task(dataloader.dataset)
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def _metrics_of_task(self, prediction: EvalPrediction) -> dict[str, float]:
        return task_metrics(self._evaluated_task, prediction.predictions, prediction.label_ids)


def _only_task(dataset: Any) -> Task:
    tasks: dict[str, Task] = dataset.tasks
    if len(tasks) != 1:
        raise ValueError(f"an evaluation set holds rows of one task, not of {', '.join(tasks)}")
    return next(iter(tasks.values()))


class _EpochOfSampler(TrainerCallback):
    """Tells the sampler the epoch. Trainer's own call misses it when resuming in several processes."""

    sampler: MultiTaskBatchSampler | None = None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.sampler is not None:
            self.sampler.set_epoch(int(state.epoch or 0))
