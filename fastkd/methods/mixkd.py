"""MixKD: the student also learns the teacher's answers to mixtures of training examples.

Liang et al., "MixKD: Towards Efficient Distillation of Large-scale Language Models" (ICLR 2021, arXiv 2011.00593).
docs/mixkd.md tells what is known of the paper's recipe from what is a choice of this project.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from fastkd.data.task import UNLABELLED
from fastkd.losses import mixup, mixup_cross_entropy
from fastkd.methods.logits import LogitDistance, check_weights
from fastkd.mixing import EmbeddingMixer, check_options
from fastkd.mixup import Mix, MixupSampler
from fastkd.training.classifiers import check_classes, task_loss
from fastkd.training.distillation import DistillationTrainer, agreement
from fastkd.training.signals import COLUMN, TeacherSignal


@dataclass(frozen=True)
class MixKDObjective:
    """The loss of MixKD for one single-task batch.

    total = ``alpha_mle`` · mle + ``alpha_sm`` · sm + ``alpha_tmkd`` · tmkd + ``alpha_kd`` · kd, each a mean over rows:

    * *mle*: cross-entropy of the examples with their labels, or the squared error of a regression;
    * *sm*: cross-entropy of the mixtures with both labels, λ · CE(y_i) + (1−λ) · CE(y_π(i)), or the squared error
      to the mixed scores;
    * *tmkd*: distance of the student's logits of the mixtures to the teacher's;
    * *kd*: the same distance of the examples themselves. The paper compares with such distillation; it is no part of
      its loss.

    Args:
        loss: the distance, ``"mse"`` of logits or ``"kl"`` at ``temperature`` (see ``LogitDistance``). Which one the
            paper takes is not known to us; the default is a choice of this project.
        alpha_mle, alpha_sm, alpha_tmkd, alpha_kd: weights. The paper's values are not known to us.
    """

    loss: Literal["mse", "kl"] = "mse"
    temperature: float = 1.0
    alpha_mle: float = 1.0
    alpha_sm: float = 1.0
    alpha_tmkd: float = 1.0
    alpha_kd: float = 0.0

    def __post_init__(self) -> None:
        self.distance()
        check_weights(**{f"alpha_{name}": weight for name, weight in self.weights.items()})

    def distance(self) -> LogitDistance:
        return LogitDistance(self.loss, self.temperature)

    @property
    def weights(self) -> dict[str, float]:
        return {"mle": self.alpha_mle, "sm": self.alpha_sm, "tmkd": self.alpha_tmkd, "kd": self.alpha_kd}

    @property
    def mixes(self) -> bool:
        return bool(self.alpha_sm or self.alpha_tmkd)

    def __call__(
        self,
        student_logits: Tensor,
        labels: Tensor,
        *,
        teacher_logits: Tensor | None = None,
        mixed_student_logits: Tensor | None = None,
        mixed_teacher_logits: Tensor | None = None,
        mix: Mix | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted total and its unweighted parts, those with a weight.

        Args:
            student_logits, teacher_logits: (B, classes) of the examples; the teacher's for *kd* alone.
            labels: (B,) class numbers, −1 where one is missing: then 0 is added for it, in mixtures with its weight. Or
                scores of a regression, NaN where one is missing: then it and its mixtures add 0.
            mixed_student_logits, mixed_teacher_logits: (n · B, classes) of n mixtures of the batch, one after another.
            mix: how they were mixed: partner and λ of each row of n copies of the batch, one after another.

        Raises:
            ValueError: an argument that a term with a weight needs is missing, shapes differ, or a label on a CPU is no
                class.
        """
        parts = {}
        if self.alpha_mle:
            parts["mle"] = task_loss(student_logits, labels)
        if self.mixes and (mixed_student_logits is None or mix is None):
            raise ValueError("mixed_student_logits and mix must be given when alpha_sm or alpha_tmkd is above 0")
        if self.alpha_sm:
            assert mixed_student_logits is not None
            assert mix is not None
            copies = labels.repeat(len(mixed_student_logits) // len(labels))
            parts["sm"] = _mixed_task_loss(mixed_student_logits, copies, mix)
        if self.alpha_tmkd:
            assert mixed_student_logits is not None
            parts["tmkd"] = self.distance()(mixed_student_logits, mixed_teacher_logits)
        if self.alpha_kd:
            parts["kd"] = self.distance()(student_logits, teacher_logits)
        total = sum(self.weights[name] * part for name, part in parts.items())
        return cast(Tensor, total), parts


def _mixed_task_loss(logits: Tensor, labels: Tensor, mix: Mix) -> Tensor:
    if logits.shape[-1] == 1:
        return task_loss(logits, mixup(labels.float(), *mix))  # a missing score makes both its mixtures' scores missing
    check_classes(labels, logits.shape[-1])
    return mixup_cross_entropy(logits, labels, *mix, ignore_index=UNLABELLED, reduction="sum") / len(logits)


@dataclass
class MixKDConfig(TrainingArguments):
    """``TrainingArguments``, the options of :class:`MixKDObjective`, which documents them, and those of mixing.

    Defaults that differ from ``TrainingArguments``: batches of 32 rows of similar length, a choice of this project.
    """

    per_device_train_batch_size: int = field(default=32, metadata={"help": "Rows per device and step."})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "group_by_length puts rows of similar length together."}
    )
    loss: str = field(default="mse", metadata={"help": "mse of the logits, or kl at a temperature."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of kl."})
    alpha_mle: float = field(default=1.0, metadata={"help": "Weight of the examples' hard-label loss."})
    alpha_sm: float = field(default=1.0, metadata={"help": "Weight of the mixtures' hard-label loss."})
    alpha_tmkd: float = field(default=1.0, metadata={"help": "Weight of distillation on mixtures."})
    alpha_kd: float = field(default=0.0, metadata={"help": "Weight of distillation on the examples."})
    n_mix: int = field(default=1, metadata={"help": "Mixtures of each example, with independent partners."})
    beta_alpha: float = field(default=0.4, metadata={"help": "λ ~ Beta(α, α)."})
    lambda_per_batch: bool = field(default=False, metadata={"help": "One λ per mixed batch, not per example."})
    mix_stage: str = field(default="word", metadata={"help": "What is mixed: word, sum or post_ln."})
    mix_mask: str = field(default="union", metadata={"help": "Attention mask of a mixture: union or first."})
    mix_pads: str = field(default="embed", metadata={"help": "A pad in a mixture: embed or zero."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.objective()  # refuses bad options before any work
        if self.n_mix < 1:
            raise ValueError(f"n_mix must be at least 1, got {self.n_mix}")
        MixupSampler(self.beta_alpha)
        check_options(stage=self.mix_stage, mask=self.mix_mask, pads=self.mix_pads)

    def objective(self) -> MixKDObjective:
        weights = {f"alpha_{name}": getattr(self, f"alpha_{name}") for name in ("mle", "sm", "tmkd", "kd")}
        return MixKDObjective(cast(Literal["mse", "kl"], self.loss), self.temperature, **weights)


class MixKDTrainer(DistillationTrainer):
    """Trains a student on examples and on mixtures of them that the teacher answers too.

    Student and teacher mix their own embeddings with the same partners and weights (see ``EmbeddingMixer``). Examples
    and mixtures go through the student in one call, of (1 + ``n_mix``) · B rows. λ and partners follow from the seed,
    the step, the micro-batch and the process alone, so a resumed training draws the same.

    Args:
        model: the student; see ``DistillationTrainer``.
        args: a :class:`MixKDConfig`.
        teacher: a model with a head per task, or a dict from task to model. A column ``teacher_logits`` of the rows
            serves *kd* alone: nothing can be stored for mixtures.
        **kwargs: of ``DistillationTrainer``.

    Raises:
        ValueError: as ``DistillationTrainer``, or a model without the point where ``mix_stage`` mixes.
    """

    args: MixKDConfig

    def __init__(self, model: PreTrainedModel, args: MixKDConfig, *arguments: Any, **kwargs: Any) -> None:
        self.objective: MixKDObjective = args.objective()
        super().__init__(model, args, *arguments, **kwargs)
        self._student_mixer = self._mixer(model) if self.objective.mixes else None
        teachers = self.signal.teachers if self.signal and self.objective.alpha_tmkd else {}
        mixers = {id(teacher): self._mixer(teacher) for teacher in {id(t): t for t in teachers.values()}.values()}
        self._teacher_mixers = {task: mixers[id(teacher)] for task, teacher in teachers.items()}

    def _mixer(self, model: nn.Module) -> EmbeddingMixer:
        return EmbeddingMixer(model, stage=self.args.mix_stage, mask=self.args.mix_mask, pads=self.args.mix_pads)

    def release_models(self) -> None:
        for mixer in (self._student_mixer, *self._teacher_mixers.values()):
            if mixer is not None:
                mixer.close()

    def tasks_to_ask(self, datasets: Mapping[str, Any]) -> list[str]:
        if self.objective.alpha_tmkd:
            return list(datasets)
        return super().tasks_to_ask(datasets) if self.objective.alpha_kd else []

    def _why_a_teacher(self, tasks: str) -> str:
        if not self.objective.alpha_tmkd:
            return super()._why_a_teacher(tasks)
        return f"but alpha_tmkd asks it about mixtures of the rows of {tasks}, which no column {COLUMN} can hold"

    def distillation_loss(
        self, model: nn.Module, inputs: dict[str, Any], labels: Tensor, teacher_logits: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor], Any]:
        if self.objective.alpha_kd and teacher_logits is None and self.signal is not None:
            teacher_logits = self.signal(inputs)
        if self._student_mixer is None:
            outputs = self.student_outputs(model, inputs)
            loss, parts = self.objective(outputs.logits, labels, teacher_logits=teacher_logits)
            return loss, parts | _agreement(outputs.logits, teacher_logits), outputs
        examples = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        copies = {name: value.repeat(self.args.n_mix, 1) for name, value in examples.items()}
        rows, mix = len(labels), self._draw(len(labels), labels.device)
        outputs = self._student_outputs(model, examples, copies, mix, inputs["task"])
        logits, mixed_logits = outputs.logits[:rows], outputs.logits[rows:]
        mixed_teacher = self._teacher_logits(copies, mix, inputs["task"])
        loss, parts = self.objective(
            logits,
            labels,
            teacher_logits=teacher_logits,
            mixed_student_logits=mixed_logits,
            mixed_teacher_logits=mixed_teacher,
            mix=mix,
        )
        agreed = _agreement(logits, teacher_logits) if mixed_teacher is None else agreement(mixed_logits, mixed_teacher)
        return loss, parts | agreed, outputs

    def _draw(self, rows: int, device: torch.device) -> Mix:
        """A mix of ``n_mix`` copies of the batch, one after another, each within itself."""
        seed = (self.args.seed, self.args.process_index, *self.place)
        sampler = MixupSampler(self.args.beta_alpha, per_example=not self.args.lambda_per_batch, seed=seed)
        draws = [sampler(rows, device) for _ in range(self.args.n_mix)]
        partners = torch.cat([copy * rows + draw.permutation for copy, draw in enumerate(draws)])
        return Mix(partners, torch.cat([draw.lam for draw in draws]))

    def _student_outputs(
        self, model: nn.Module, examples: dict[str, Tensor], copies: dict[str, Tensor], mix: Mix, task: str
    ) -> Any:
        """The student's outputs for the examples and after them the mixtures, in one call."""
        mixer = cast(EmbeddingMixer, self._student_mixer)
        mixed = mixer.inputs(copies, mix)
        both = {name: torch.cat([value, mixed[name]]) for name, value in examples.items()}
        real = torch.cat([examples["attention_mask"], copies["attention_mask"]])
        rows, device = len(examples["input_ids"]), mix.lam.device
        permutation = torch.cat([torch.arange(rows, device=device), rows + mix.permutation])
        lam = torch.cat([torch.ones(rows, device=device), mix.lam])  # an example is a mixture of itself alone
        with mixer(Mix(permutation, lam), real):
            return self.student_outputs(model, both | {"task": task})

    def _teacher_logits(self, copies: dict[str, Tensor], mix: Mix, task: str) -> Tensor | None:
        if not self._teacher_mixers:
            return None
        mixer = self._teacher_mixers[task]
        with mixer(mix, copies["attention_mask"]):
            return cast(TeacherSignal, self.signal)(mixer.inputs(copies, mix) | {"task": task})


def _agreement(student_logits: Tensor, teacher_logits: Tensor | None) -> dict[str, Tensor]:
    return {} if teacher_logits is None else agreement(student_logits, teacher_logits)
