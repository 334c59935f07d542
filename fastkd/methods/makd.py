"""MaKD: a student of low-rank factors learns the teacher's answers, layers and single matrices.

Liu et al., "Multi-Aspect Knowledge Distillation for Language Model with Low-rank Factorization" (arXiv
2604.03110).
docs/makd.md tells what is known of the paper's recipe from what is a choice of this project.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeVar, cast

from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from fastkd.losses import attention_kl_div, mse
from fastkd.methods.feature_distillation import FeatureDistillationTrainer
from fastkd.methods.logits import check_temperature, check_weights
from fastkd.methods.objective import Objective, answer, label_loss, logit_loss, weighted
from fastkd.training.taps import Attention, Features

LEVELS = {"matrix": ("mha", "ffn"), "layer": ("attention", "hidden"), "model": ("logits", "labels")}
"""The parts of each level, in the order of a staged training."""
FORMS = ("output", "weight")


@dataclass(frozen=True)
class MaKDObjective(Objective):
    r"""The loss of MaKD for a student with the teacher's layers and widths.

    The total is the sum of its parts, each times its weight ``<part>_weight``; a weight of 0 leaves the part out:

    * *attention*: KL(teacher ‖ student) of the attention maps, a mean over layers, heads and valid queries;
    * *hidden*: squared error of the hidden states, the first layer's input among them, a mean over these, valid tokens
      and units;
    * *mha*, *ffn*: matrix distillation. The squared errors of the outputs of attention's linear maps, or of the
      feed-forward part's, a mean over valid tokens and units, summed over the maps, a mean over layers;
    * *logits*: T² · KL(teacher ‖ student) of the answers, or the squared error of a regression;
    * *labels*: cross-entropy with the labels, or the squared error of a regression.

    That these aspects are combined in a hierarchy is published; formulas, weights and schedule were not at hand: they
    are a reconstruction, and the weights' defaults a choice of this project.

    Args:
        matrix_form: ``"output"`` compares what the maps give; ``"weight"`` the matrices, ‖UV − W‖², a mean of entries.
        temperature: of *logits*.
        layers: which layers *attention*, *hidden*, *mha* and *ffn* compare, from 0; None for all. The embeddings are
            compared with the first one.
        stages: None trains all levels together. (a, b) trains matrices alone up to the part a of the steps, then
            layers alone up to b, then the model level alone: see :meth:`at`.
    """

    attention_weight: float = 1.0
    hidden_weight: float = 1.0
    mha_weight: float = 1.0
    ffn_weight: float = 1.0
    logits_weight: float = 1.0
    labels_weight: float = 1.0
    matrix_form: Literal["output", "weight"] = "output"
    temperature: float = 1.0
    layers: tuple[int, ...] | None = None
    stages: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_weights(**{f"{name}_weight": weight for name, weight in self.weights.items()})
        if self.matrix_form not in FORMS:
            raise ValueError(f"matrix_form must be one of {', '.join(FORMS)}, got {self.matrix_form!r}")
        check_temperature(self.temperature)
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            raise ValueError(f"layers must name layers from 0, or be None for all, got {self.layers}")
        if self.stages is not None:
            if len(self.stages) != 2 or not 0 < self.stages[0] < self.stages[1] < 1:
                raise ValueError(f"stages must be two rising numbers between 0 and 1, got {self.stages}")
            for level, parts in LEVELS.items():
                if not any(self.weights[part] for part in parts):
                    raise ValueError(f"stages gives the {level} level a part of the steps, but it has no weight")

    @property
    def weights(self) -> dict[str, float]:
        return {part: getattr(self, f"{part}_weight") for parts in LEVELS.values() for part in parts}

    @property
    def needs_teacher(self) -> bool:
        return any(weight for part, weight in self.weights.items() if part != "labels")

    @property
    def needs_logits(self) -> bool:
        return max(self.labels_weight, self.logits_weight) > 0

    @property
    def needs_attention(self) -> bool:
        return self.attention_weight > 0

    @property
    def needs_hidden(self) -> bool:
        return self.hidden_weight > 0

    @property
    def needs_maps(self) -> bool:
        return self.matrix_form == "output" and max(self.mha_weight, self.ffn_weight) > 0

    @property
    def needs_weights(self) -> bool:
        return self.matrix_form == "weight" and max(self.mha_weight, self.ffn_weight) > 0

    def at(self, progress: float) -> MaKDObjective:
        """The objective after that part, 0 to 1, of the training."""
        if self.stages is None:
            return self
        level = tuple(LEVELS)[sum(progress >= end for end in self.stages)]
        off = {f"{part}_weight": 0.0 for part in self.weights if part not in LEVELS[level]}
        return replace(self, stages=None, **cast(dict[str, Any], off))

    def __call__(
        self,
        student: Features,
        teacher: Features,
        labels: Tensor,
        mask: Tensor | None = None,
        *,
        tokens: float | Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`fastkd.methods.objective.Objective`.

        Raises:
            ValueError: a feature that a part with a weight needs is missing, or is not the student's counterpart.
        """
        parts: dict[str, Tensor] = {}
        if self.labels_weight:
            parts["labels"] = label_loss(answer(student), labels)
        if self.logits_weight:
            parts["logits"] = logit_loss(student, teacher, labels, temperature=self.temperature)
        if self.attention_weight:
            pairs = self._pairs("attention", student.attention, teacher.attention)
            losses = [_attention_kl_div(layer, *pair, mask, tokens) for layer, pair in pairs.items()]
            parts["attention"] = cast(Tensor, sum(losses)) / len(losses)
        total, parts = weighted(parts, self.weights)
        states = self._hidden(student.hidden, teacher.hidden) if self.hidden_weight else []
        if self.needs_maps:
            states += self._matrices(student.outputs, teacher.outputs)
        weights = self._matrices(student.weights, teacher.weights) if self.needs_weights else []
        rows_of_tokens = {"mask": None if mask is None else mask.flatten(), "normalizer": tokens}
        for errors, rows in ((states, rows_of_tokens), (weights, {})):
            if errors:
                loss, found = self._squared_errors(errors, **rows)
                total, parts = total + loss, parts | found
        return total, parts

    def _hidden(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[_Error]:
        """Of the embeddings, where the first layer is compared, and of the layers."""
        layers = self._pairs("hidden states", student[1:], teacher[1:])
        pairs = {f"states after layer {layer}": pair for layer, pair in layers.items()}
        if 0 in layers:
            pairs["states before layer 0"] = student[0], teacher[0]
        return [_Error("hidden", name, *pair, share=1 / len(pairs)) for name, pair in pairs.items()]

    def _matrices(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> list[_Error]:
        if student.keys() != teacher.keys() or not student:
            different = ", ".join(sorted(student.keys() ^ teacher.keys())) or "none at all"
            raise ValueError(f"matrices are compared by name, but one model alone has {different}")
        chosen = self._chosen(1 + max(map(layer_of, student)))
        names = [name for name in student if layer_of(name) in chosen]
        depth = len({layer_of(name) for name in names})
        kinds = {name: "mha" if is_attention(name) else "ffn" for name in names}
        return [_Error(kinds[n], n, student[n], teacher[n], share=1 / depth) for n in names if self.weights[kinds[n]]]

    def _pairs(self, what: str, student: Sequence[Pair], teacher: Sequence[Pair]) -> dict[int, tuple[Pair, Pair]]:
        """The counterparts of the chosen layers, by layer."""
        if len(student) != len(teacher) or not student:
            raise ValueError(
                f"{what} are compared layer by layer: the student has {len(student)}, the teacher {len(teacher)}"
            )
        return {layer: (student[layer], teacher[layer]) for layer in self._chosen(len(student))}

    def _chosen(self, count: int) -> Sequence[int]:
        """The layers to compare, once it is clear that models of so many layers have them."""
        chosen = range(count) if self.layers is None else self.layers
        if max(chosen) >= count:
            raise ValueError(f"layers has {max(chosen)}; there are {count} layers, from 0")
        return chosen

    def _squared_errors(self, errors: Sequence[_Error], **rows: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Their weighted sum, in one pass over all of them, and the parts."""
        for error in errors:
            _check_shapes(error.name, error.student, error.teacher)
        weights = [self.weights[error.part] * error.share for error in errors]
        students = [error.student.flatten(0, -2) for error in errors]  # OPT's feed-forward part has its tokens so
        teachers = [error.teacher.flatten(0, -2) for error in errors]
        total, values = mse(students, teachers, weights=weights, **rows)
        parts: dict[str, Tensor] = {}
        for error, value in zip(errors, values.unbind(), strict=True):
            parts[error.part] = parts.get(error.part, 0) + error.share * value
        return total, parts


Pair = TypeVar("Pair")


class _Error(NamedTuple):
    """A squared error, ``share`` of which counts for its part."""

    part: str
    name: str
    student: Tensor
    teacher: Tensor
    share: float


def layer_of(name: str) -> int:
    """Of a linear map, by its name among the layers."""
    return int(name.split(".", 1)[0])


def is_attention(name: str) -> bool:
    """Whether a linear map belongs to a layer's attention, not to its feed-forward part."""
    return any("attn" in part or "attention" in part for part in name.split("."))


def _check_shapes(name: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"{name}: the student's has shape {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}; MaKD's "
            "student has the teacher's layers, widths and heads"
        )


def _attention_kl_div(
    layer: int, student: Attention, teacher: Attention, mask: Tensor | None, tokens: float | Tensor | None
) -> Tensor:
    _check_shapes(f"queries of layer {layer}", student.query, teacher.query)
    return attention_kl_div(
        student.query,
        student.key,
        teacher.query,
        teacher.key,
        mask=mask,
        causal=student.causal,
        window=student.window,
        student_scale=student.scale,
        teacher_scale=teacher.scale,
        student_bias=None if student.bias is None else student.bias.detach(),
        teacher_bias=teacher.bias,
        normalizer=None if tokens is None else tokens * student.query.shape[1],
    )


@dataclass
class MaKDConfig(TrainingArguments):
    """``TrainingArguments`` and the options of :class:`MaKDObjective`, which documents them.

    Defaults that differ from ``TrainingArguments``: batches of 32 rows of similar length, a choice of this project.
    """

    per_device_train_batch_size: int = field(default=32, metadata={"help": "Rows per device and step."})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "group_by_length puts rows of similar length together."}
    )
    attention_weight: float = field(default=1.0, metadata={"help": "Weight of the attention maps' divergence."})
    hidden_weight: float = field(default=1.0, metadata={"help": "Weight of the hidden states' error."})
    mha_weight: float = field(default=1.0, metadata={"help": "Weight of matrix distillation of attention."})
    ffn_weight: float = field(default=1.0, metadata={"help": "Weight of matrix distillation of the feed-forward part."})
    logits_weight: float = field(default=1.0, metadata={"help": "Weight of the logits' divergence."})
    labels_weight: float = field(default=1.0, metadata={"help": "Weight of the hard-label loss."})
    matrix_form: str = field(default="output", metadata={"help": "Matrices by their output or their weight."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the logits."})
    layers: list[int] | None = field(default=None, metadata={"help": "Layers compared, from 0; all by default."})
    stages: list[float] | None = field(
        default=None, metadata={"help": "Parts of the steps at which layers, then the model level take over."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.objective()  # refuses bad options before any work

    def objective(self) -> MaKDObjective:
        own = {name: getattr(self, name) for name in MaKDObjective.__dataclass_fields__}
        own |= {name: tuple(own[name]) for name in ("layers", "stages") if own[name] is not None}
        return MaKDObjective(**own)


class MaKDTrainer(FeatureDistillationTrainer):
    """Trains a low-rank student of the teacher; see ``fastkd.students.factorize``.

    Args:
        model: the student, with the teacher's layers and widths.
        args: a :class:`MaKDConfig`.
        teacher: a model with a head per task, or a dict from task to model.
        **kwargs: of ``DistillationTrainer``, which tells what is logged and what becomes of the teacher.

    Raises:
        ValueError: as ``DistillationTrainer``, or a model that cannot be tapped (see ``Taps``).
    """

    args: MaKDConfig

    def __init__(self, model: PreTrainedModel, args: MaKDConfig, *arguments: Any, **kwargs: Any) -> None:
        super().__init__(model, args, *arguments, objective=args.objective(), **kwargs)
