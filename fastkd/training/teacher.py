"""Teachers: one pretrained encoder shared by a head per task, or a finished single-task classifier."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    TrainingArguments,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from fastkd.data.encode import MultiTaskCollator, load_encoded
from fastkd.data.glue import get_task
from fastkd.training.output import check_output, new_folder
from fastkd.training.trainer import MultiTaskTrainer

POOLINGS = ("cls", "mean")


class MultiTaskEncoderConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Configuration of ``MultiTaskEncoder``.

    Args:
        encoder: configuration of the shared encoder, or its dict form with ``model_type``.
        tasks: for each task ``{"labels": [names]}``, in the order of the outputs; no names for a regression.
        pooling: ``"cls"`` takes the encoder's pooler output, or the first token's state where it has no
            pooler (the MT-DNN scheme); ``"mean"`` the mean state of the tokens.
        classifier_dropout: before every head.
    """

    model_type = "fastkd-multitask-encoder"

    def __init__(
        self,
        encoder: PreTrainedConfig | dict[str, Any] | None = None,
        tasks: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
        pooling: str = "cls",
        classifier_dropout: float = 0.1,
        **kwargs: Any,
    ) -> None:
        if pooling not in POOLINGS:
            raise ValueError(f"pooling is {pooling!r}; it must be one of {', '.join(POOLINGS)}")
        if isinstance(encoder, dict):
            encoder = AutoConfig.for_model(**encoder)
        self.encoder = encoder
        self.tasks = {name: {"labels": list(task["labels"])} for name, task in (tasks or {}).items()}
        self.pooling = pooling
        self.classifier_dropout = classifier_dropout
        super().__init__(**kwargs)


class MultiTaskEncoder(PreTrainedModel):  # type: ignore[no-untyped-call]
    """A shared encoder and, per task, dropout and a linear head on the pooled state (the MT-DNN scheme)."""

    config_class = MultiTaskEncoderConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: MultiTaskEncoderConfig) -> None:
        super().__init__(config)
        if config.encoder is None:
            raise ValueError("config.encoder is None; it must be the configuration of an encoder")
        self.encoder = AutoModel.from_config(config.encoder)  # type: ignore[no-untyped-call]
        self.dropout = nn.Dropout(config.classifier_dropout)
        hidden_size = config.encoder.hidden_size
        self.heads = nn.ModuleDict(
            {name: nn.Linear(hidden_size, len(task["labels"]) or 1) for name, task in config.tasks.items()}
        )
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_encoder(cls, name_or_path: str, tasks: Sequence[str], **config: Any) -> MultiTaskEncoder:
        """Fresh heads for ``tasks`` on a pretrained encoder in float32."""
        encoder = AutoModel.from_pretrained(name_or_path, dtype=torch.float32)
        labels = {name: {"labels": get_task(name).label_names} for name in tasks}
        model = cls(MultiTaskEncoderConfig(encoder.config, labels, **config))
        model.encoder = encoder
        return model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        task: str | None = None,
    ) -> SequenceClassifierOutput:
        """Logits (rows, outputs of the task) and, with ``labels``, their mean loss over the rows.

        The loss is cross-entropy, or the squared error of a regression. ``task`` may be left out when the
        model has one.
        """
        task = self._resolve(task)
        inputs = _encoder_inputs(self.encoder.config, input_ids, attention_mask, token_type_ids)
        logits = self.heads[task](self.dropout(self._pool(self.encoder(**inputs), attention_mask)))
        loss = None if labels is None else task_loss(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _resolve(self, task: str | None) -> str:
        if task is None and len(self.heads) == 1:
            return next(iter(self.heads))
        if task is None or task not in self.heads:
            raise ValueError(f"task is {task!r}; this model has heads for {', '.join(self.heads)}")
        return task

    def _pool(self, outputs: Any, attention_mask: torch.Tensor | None) -> torch.Tensor:
        states: torch.Tensor = outputs.last_hidden_state
        if self.config.pooling == "cls":
            pooled = getattr(outputs, "pooler_output", None)
            return states[:, 0] if pooled is None else pooled
        if attention_mask is None:
            return states.mean(dim=1)
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(dim=1) / weights.sum(dim=1)


def _encoder_inputs(
    config: PreTrainedConfig,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
) -> dict[str, torch.Tensor | None]:
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if getattr(config, "type_vocab_size", 0) > 1:  # RoBERTa has one type, DistilBERT and ModernBERT none
        inputs["token_type_ids"] = token_type_ids
    return inputs


def task_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over the rows of the cross-entropy, or of the squared error where ``logits`` is (rows, 1)."""
    if logits.shape[-1] == 1:
        return nn.functional.mse_loss(logits.squeeze(-1).float(), labels.float())
    return nn.functional.cross_entropy(logits.float(), labels)


class SingleTaskTeacher(nn.Module):
    """A finished sequence classifier under the multi-task calling convention.

    Its logits come in the order of the task's labels, which are matched by name with the checkpoint's.
    """

    def __init__(self, model: PreTrainedModel, task: str, label_names: Sequence[str] | None = None) -> None:
        super().__init__()
        names = get_task(task).label_names
        self.model = model
        self.config = model.config
        self.config.tasks = {task: {"labels": list(names)}}
        self.order = _label_order(self.config, task, names, label_names)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        task: str | None = None,
    ) -> SequenceClassifierOutput:
        """As ``MultiTaskEncoder.forward``."""
        only = next(iter(self.config.tasks))
        if task not in (None, only):
            raise ValueError(f"task is {task!r}; this teacher knows {only} alone")
        inputs = _encoder_inputs(self.config, input_ids, attention_mask, token_type_ids)
        logits = self.model(**inputs).logits[..., self.order]
        loss = None if labels is None else task_loss(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def _label_order(
    config: PreTrainedConfig, task: str, names: Sequence[str], stated: Sequence[str] | None
) -> list[int]:
    """For each of the task's labels, the checkpoint's output that stands for it."""
    own = (
        [str(name) for _, name in sorted((config.id2label or {}).items())] if stated is None else list(stated)
    )
    if not names:
        if len(own) != 1:
            raise ValueError(f"{task} is a regression; a teacher of it has one output, not {len(own)}")
        return [0]
    if stated is None and all(name.upper() == f"LABEL_{i}" for i, name in enumerate(own)):
        raise ValueError(
            f"the checkpoint does not name its labels ({', '.join(own)}); state the order of its outputs as "
            f"label_names, some order of {', '.join(names)}"
        )
    spelled = [re.sub(r"[\s-]+", "_", name.strip().lower()) for name in own]
    if len(own) != config.num_labels or sorted(spelled) != sorted(names):
        raise ValueError(
            f"{config.num_labels} outputs of the teacher are labelled {', '.join(own)}; "
            f"the labels of {task} are {', '.join(names)}"
        )
    return [spelled.index(name) for name in names]


def load_teacher(
    path: str | Path, *, task: str | None = None, label_names: Sequence[str] | None = None
) -> MultiTaskEncoder | SingleTaskTeacher:
    """A teacher in float32 and eval mode, with ``config.tasks``.

    Args:
        path: a ``MultiTaskEncoder``, or any checkpoint for ``AutoModelForSequenceClassification``.
        task: the task of such a checkpoint, one of ``fastkd.data.glue.TASKS``.
        label_names: the task's labels in the order of the checkpoint's outputs, for one that does not name
            its labels.

    Raises:
        ValueError: ``task`` is missing or unknown, or the checkpoint's labels are not the task's.
    """
    config = AutoConfig.from_pretrained(path)
    if isinstance(config, MultiTaskEncoderConfig):
        if task is not None or label_names is not None:
            raise ValueError(
                f"{path} is a multi-task teacher that knows its tasks; leave out task and label_names"
            )
        teacher: MultiTaskEncoder = MultiTaskEncoder.from_pretrained(path, dtype=torch.float32)
        teacher.eval()  # type: ignore[no-untyped-call]
        return teacher
    if task is None:
        raise ValueError(
            f"{path} is a {config.model_type} classifier; say which task it was trained on (task=…)"
        )
    get_task(task)
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    return SingleTaskTeacher(model, task, label_names).eval()


def train_teacher(
    name_or_path: str,
    tasks: Sequence[str],
    output_dir: str | Path,
    *,
    data_dir: str | Path | None = None,
    max_train_rows: int | None = None,
    max_length: int = 128,
    pooling: str = "cls",
    seed: int = 0,
    bf16: bool | None = None,
    **arguments: Any,
) -> dict[str, float]:
    """Fine-tunes a ``MultiTaskEncoder`` on several tasks together and saves it with its tokenizer.

    Args:
        name_or_path: encoder on the Hub or in a folder.
        tasks: names of ``fastkd.data.glue.TASKS``.
        output_dir: a new or an empty folder; filled at once when training has succeeded, never half written.
        data_dir, max_train_rows: see ``fastkd.data.glue.load_task``.
        max_length: tokens of a row, a pair counting as one.
        pooling: see ``MultiTaskEncoderConfig``.
        seed: of heads, subset, order and dropout.
        bf16: autocast to bfloat16; None does so where the processor multiplies bfloat16 natively.
        **arguments: of ``transformers.TrainingArguments``, over this project's defaults: 3 epochs, 32 rows
            per batch of similar lengths, AdamW at 5e-5 with weight decay 0.01, warm-up over a tenth of the
            steps.

    Returns:
        ``MultiTaskTrainer.evaluate``'s metrics, which are also saved as ``eval_results.json``.
    """
    check_output(output_dir)
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    train, validation = load_encoded(
        tasks, tokenizer, max_length, data_dir, max_train_rows=max_train_rows, seed=seed
    )
    torch.manual_seed(seed)
    model = MultiTaskEncoder.from_encoder(name_or_path, tasks, pooling=pooling)
    check_output(output_dir, needed_bytes=4 * model.num_parameters())
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "learning_rate": 5e-5,
        "weight_decay": 0.01,
        "warmup_steps": 0.1,
        "train_sampling_strategy": "group_by_length",
        "save_strategy": "no",
        "seed": seed,
        "bf16": has_fast_bf16() if bf16 is None else bf16,
        "use_cpu": not torch.accelerator.is_available(),
    }
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(scratch, **(defaults | arguments))
        trainer = MultiTaskTrainer(model, args, MultiTaskCollator(tokenizer), train, validation)
        trainer.train()
        metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        with new_folder(output_dir) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            (folder / "eval_results.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def has_fast_bf16() -> bool:
    """Whether this machine's GPU, or its CPU where there is none, multiplies bfloat16 matrices natively."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


AutoConfig.register(MultiTaskEncoderConfig.model_type, MultiTaskEncoderConfig)
AutoModelForSequenceClassification.register(MultiTaskEncoderConfig, MultiTaskEncoder)
