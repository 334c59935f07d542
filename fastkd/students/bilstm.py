"""The BiLSTM student of MKD: both sentences read by a BiLSTM, crossed by attention, read again, pooled.

Liu et al., "MKD: a Multi-Task Knowledge Distillation Approach for Pretrained Language Models" (arXiv
1911.03588), after the biattentive classification network of McCann et al. (2017, CoVe). docs/mkd.md tells
what is known of the paper's student from what is a choice of this project.
"""

from dataclasses import field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from fastkd.ops.bilstm import bilstm, trains_by_kernel
from fastkd.training.classifiers import task_loss

_POOLINGS = ("max", "min", "mean", "attention")
_SIZES = ("embedding_size", "projection_size", "hidden_size_per_direction", "head_size")
_PRESETS = {
    "mkd": (768, 256, 256, 512),
    "small": (384, 256, 128, 256),
}


class BiAttentiveLSTMConfig(PreTrainedConfig):
    """Sizes of a :class:`BiAttentiveLSTM`; the defaults are the preset ``mkd``.

    ``tasks`` maps a task's name to ``{"labels": [names]}``; no labels means regression with one output.
    ``pooling`` joins any of max, min, mean and attention, in the given order. ``share_integrator`` reads the
    two mixed sequences with one BiLSTM instead of two. ``dropout`` acts on the word embeddings, the pooled
    features and each head's hidden layer (choice of this project: the paper's value is not known to us).
    ``initializer_range`` is the standard deviation of new word embeddings.
    """

    model_type = "fastkd-bilstm"

    vocab_size: int = 30522
    embedding_size: int = 768
    projection_size: int = 256
    hidden_size_per_direction: int = 256
    head_size: int = 512
    share_integrator: bool = False
    pooling: list[str] | tuple[str, ...] = ("max", "mean", "attention")
    dropout: float = 0.1
    initializer_range: float = 1.0
    pad_token_id: int | None = 0
    tasks: dict[str, dict[str, list[str]]] = field(default_factory=lambda: {"default": {"labels": ["0", "1"]}})

    def __post_init__(self, **kwargs: Any) -> None:
        unknown = [name for name in self.pooling if name not in _POOLINGS]
        if unknown or not self.pooling:
            raise ValueError(f"pooling must name some of {_POOLINGS}, got {self.pooling}")
        super().__post_init__(**kwargs)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "BiAttentiveLSTMConfig":
        """``mkd`` (sizes of the paper) or ``small`` (half the width, for small data and quick runs)."""
        if name not in _PRESETS:
            raise ValueError(f"unknown preset {name!r}: choose one of {sorted(_PRESETS)}")
        return cls(**{**dict(zip(_SIZES, _PRESETS[name], strict=True)), **overrides})


class BiLSTM(nn.Module):
    """One bidirectional layer over right-padded sequences; outputs are zero at the pads.

    Two unidirectional LSTMs. Where gradients are wanted of a CPU, both are ``fastkd.ops.bilstm`` over the tokens alone,
    without pads. Else the second is fed each sequence reversed within its own length: on a CPU this keeps oneDNN's
    fused layer, which a ``PackedSequence`` leaves for a slower loop over time steps.
    """

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.forwards = nn.LSTM(input_size, hidden_size, batch_first=True)
        self.backwards = nn.LSTM(input_size, hidden_size, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """x (B, L, input_size), lengths (B,) -> (B, L, 2 * hidden_size)."""
        batch, longest, _ = x.shape
        positions = torch.arange(longest, device=x.device)
        real = positions < lengths[:, None]
        if torch.is_grad_enabled() and trains_by_kernel(x, self.forwards.hidden_size):
            return self._over_tokens(x, lengths, real)
        # Maps i to length-1-i inside a sequence and the pads onto themselves, so it is its own inverse; rows of
        # the flattened batch, because looking up whole rows is many times faster than a gather.
        reverse = (lengths[:, None] - 1 - positions) % longest
        reverse += longest * torch.arange(batch, device=x.device)[:, None]
        ahead, _ = self.forwards(x)
        back, _ = self.backwards(F.embedding(reverse, x.flatten(0, 1)))
        states = torch.cat([ahead, F.embedding(reverse, back.flatten(0, 1))], dim=-1)
        return states.masked_fill(~real[..., None], 0)

    def _over_tokens(self, x: Tensor, lengths: Tensor, real: Tensor) -> Tensor:
        tokens = real.flatten().nonzero()[:, 0]
        ways = [dict(way.named_parameters()) for way in (self.forwards, self.backwards)]
        of_input, recurrent, bias, another = (
            torch.stack([way[f"{name}_l0"] for way in ways])
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        words = F.embedding(tokens, x.flatten(0, 1))  # a lookup: many times faster than a gather
        states = bilstm(words, lengths, of_input, recurrent, bias + another)
        padded = states.new_zeros(real.numel(), states.shape[-1]).index_copy(0, tokens, states)
        return padded.view(*real.shape, -1)


class Pool(nn.Module):
    """Masked pooling of a sequence (B, L, D) to (B, len(kinds) * D)."""

    def __init__(self, size: int, kinds: tuple[str, ...]):
        super().__init__()
        self.kinds = kinds
        if "attention" in kinds:
            self.scorer = nn.Linear(size, 1, bias=False)  # a bias would cancel in the softmax

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        pads = ~mask[..., None]
        return torch.cat([getattr(self, f"_{kind}")(states, pads) for kind in self.kinds], dim=-1)

    def _max(self, states: Tensor, pads: Tensor) -> Tensor:
        return states.masked_fill(pads, -torch.inf).amax(1)

    def _min(self, states: Tensor, pads: Tensor) -> Tensor:
        return states.masked_fill(pads, torch.inf).amin(1)

    def _mean(self, states: Tensor, pads: Tensor) -> Tensor:
        return states.masked_fill(pads, 0).sum(1) / (~pads).sum(1)

    def _attention(self, states: Tensor, pads: Tensor) -> Tensor:
        weights: Tensor = self.scorer(states).masked_fill(pads, -torch.inf).softmax(1)
        return torch.sum(weights * states, dim=1)


def _select(states: Tensor, selected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The selected tokens of each row moved to the front: states (B, L', D), mask (B, L') and lengths (B,)."""
    batch, longest, _ = states.shape
    lengths = selected.sum(1)
    order = selected.byte().argsort(dim=1, descending=True, stable=True)[:, : int(lengths.max())]
    mask = torch.arange(order.shape[1], device=selected.device) < lengths[:, None]
    rows = order + longest * torch.arange(batch, device=selected.device)[:, None]
    return F.embedding(rows, states.flatten(0, 1)), mask, lengths


class BiAttentiveLSTM(PreTrainedModel):
    """The multi-task BiLSTM student: shared layers and one two-layer head per task.

    With X and Y the sentences' states after the first BiLSTM and A = X Yᵀ, each x token attends over y by a
    softmax of its row of A, giving C_y, and each y token over x by its column, giving C_x. The second BiLSTMs
    read [X, X - C_y, X ⊙ C_y] and [Y, Y - C_x, Y ⊙ C_x]; both are pooled and joined. A single sentence
    attends to itself.
    """

    config_class = BiAttentiveLSTMConfig
    base_model_prefix = ""
    _input_embed_layer = "word_embeddings"

    def __init__(self, config: BiAttentiveLSTMConfig):
        super().__init__(config)
        hidden, width = config.hidden_size_per_direction, 2 * config.hidden_size_per_direction
        pooling = tuple(config.pooling)
        sides = 1 if config.share_integrator else 2
        self.word_embeddings = nn.Embedding(config.vocab_size, config.embedding_size, config.pad_token_id)
        self.projection = nn.Linear(config.embedding_size, config.projection_size)
        self.encoder = BiLSTM(config.projection_size, hidden)
        self.integrators = nn.ModuleList(BiLSTM(3 * width, hidden) for _ in range(sides))
        self.pools = nn.ModuleList(Pool(width, pooling) for _ in range(sides))
        self.dropout = nn.Dropout(config.dropout)
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Linear(2 * len(pooling) * width, config.head_size),
                    nn.ReLU(),
                    nn.Dropout(config.dropout),
                    nn.Linear(config.head_size, max(1, len(task["labels"]))),
                )
                for name, task in config.tasks.items()
            }
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.LSTM):
            for name, parameter in module.named_parameters():
                if name.startswith("weight_ih"):
                    initialization.xavier_uniform_(parameter)
                elif name.startswith("weight_hh"):
                    initialization.orthogonal_(parameter)
                else:
                    initialization.zeros_(parameter)
        elif isinstance(module, nn.Linear):
            initialization.xavier_uniform_(module.weight)
            if module.bias is not None:
                initialization.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def use_embeddings(self, table: Tensor, *, freeze: bool = True) -> None:
        """Starts from pretrained word embeddings (vocab_size, embedding_size), scaled to unit variance.

        Unscaled, a table as small as BERT's (a deviation of 0.05) lets the LSTMs start nearly linear and the
        attention nearly uniform. ``freeze`` keeps the table as it is, which saves about a third of a training
        step on CPU. Both are choices of this project.
        """
        with torch.no_grad():
            self.word_embeddings.weight.copy_(table / table.std())
        self.word_embeddings.weight.requires_grad_(not freeze)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        task: str | None = None,
    ) -> SequenceClassifierOutput:
        """Logits (B, labels) of one task, and with ``labels`` their ``task_loss``, a mean over rows.

        ``input_ids`` (B, L) holds one sentence, or two told apart by ``token_type_ids`` 0 and 1; pads may stand
        on either side. Raises ValueError for a row without first sentence, and for a ``task`` that is unknown,
        or not given though the model has several.
        """
        head = self.heads[self._task_name(task)]
        real = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
        second = torch.zeros_like(real) if token_type_ids is None else real & (token_type_ids == 1)
        empty = ~(real & ~second).any(1)
        if empty.any():
            row = int(empty.nonzero()[0])
            raise ValueError(f"every row of input_ids needs a first sentence, row {row} has none")
        logits = head(self.dropout(self._features(input_ids, real, second)))
        loss = None if labels is None else task_loss(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _task_name(self, task: str | None) -> str:
        if task is None and len(self.heads) == 1:
            return next(iter(self.heads))
        if task is None or task not in self.heads:
            raise ValueError(f"task must be one of {sorted(self.heads)}, got {task!r}")
        return task

    def _features(self, input_ids: Tensor, real: Tensor, second: Tensor) -> Tensor:
        # Looked up before the sentences are told apart, so that a hook on the table meets every token in its place.
        embedded = self.word_embeddings(input_ids)
        if not second.any():
            words, mask, lengths = _select(embedded, real)
            x = self._encode(words, lengths)
            mixed = self._attend(x, x, mask)
            sides = [self._integrate(side, mixed, mask, lengths) for side in range(len(self.integrators))]
            return torch.cat([sides[0], sides[-1]], dim=-1)
        alone = ~second.any(1, keepdim=True)
        x_words, x_mask, x_lengths = _select(embedded, real & ~second)
        y_words, y_mask, y_lengths = _select(embedded, torch.where(alone, real, second))
        x, y = self._encode(x_words, x_lengths), self._encode(y_words, y_lengths)
        x_features = self._integrate(0, self._attend(x, y, y_mask), x_mask, x_lengths)
        y_features = self._integrate(1, self._attend(y, x, x_mask), y_mask, y_lengths)
        return torch.cat([x_features, y_features], dim=-1)

    def _encode(self, words: Tensor, lengths: Tensor) -> Tensor:
        states: Tensor = self.encoder(self.projection(self.dropout(words)).relu(), lengths)
        return states

    @staticmethod
    def _attend(states: Tensor, others: Tensor, others_mask: Tensor) -> Tensor:
        """[S, S - C, S ⊙ C] with C the other sentence as every token of this one attends to it."""
        affinity = (states @ others.transpose(1, 2)).masked_fill(~others_mask[:, None], -torch.inf)
        context = affinity.softmax(-1) @ others
        return torch.cat([states, states - context, states * context], dim=-1)

    def _integrate(self, side: int, mixed: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
        side = min(side, len(self.integrators) - 1)
        pooled: Tensor = self.pools[side](self.integrators[side](mixed, lengths), mask)
        return pooled


AutoConfig.register(BiAttentiveLSTMConfig.model_type, BiAttentiveLSTMConfig, exist_ok=True)
AutoModelForSequenceClassification.register(BiAttentiveLSTMConfig, BiAttentiveLSTM, exist_ok=True)
