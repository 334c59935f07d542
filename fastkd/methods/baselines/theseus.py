"""BERT-of-Theseus: layers of the student stand in for the teacher's, more and more often."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastkd.methods.logits import check_not_negative
from fastkd.methods.objective import Batch, Objective, Terms, answer, label_loss
from fastkd.students.layers import transformer_layers
from fastkd.training.taps import Features

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Theseus(Objective):
    """Xu et al., "BERT-of-Theseus: Compressing BERT by Progressive Module Replacing" (arXiv 2002.02925).

    total = label. What the student learns of the teacher it learns inside the model that :func:`theseus` makes, whose
    modules are replaced with probability min(1, ``rate`` + ``growth`` · step), which :class:`ReplacementRate` sets.

    Args:
        rate, growth: the defaults are the released code's linear schedule; ``Theseus(0.5, 0.0, 2500)`` is its constant
            one.
        final_step: from this step on the probability is 1; None for no such step.

    Raises:
        ValueError: ``rate`` is not above 0 and at most 1, ``growth`` negative, or ``final_step`` negative.
    """

    rate: float = 0.3
    growth: float = 0.0006
    final_step: int | None = None

    @property
    def needs_teacher(self) -> bool:
        return False  # its layers are in the model

    def __post_init__(self) -> None:
        check_rate(self.rate)
        check_not_negative(growth=self.growth, final_step=self.final_step or 0)

    def rate_at(self, step: int) -> float:
        """How likely a module is replaced at an optimiser step, counted from 0."""
        if self.final_step is not None and step >= self.final_step:
            return 1.0
        return min(1.0, self.rate + self.growth * step)

    def terms(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        return {"label": (1.0, lambda: label_loss(answer(student), batch.labels))}


class Replaceable(nn.Module):
    """Some of the teacher's layers, and the student's layer that takes their place with probability ``rate``.

    One draw of torch's CPU generator per call in training; outside it always the student's layer, as in the released
    code.
    """

    def __init__(self, predecessors: nn.ModuleList, successor: nn.Module, rate: float) -> None:
        super().__init__()
        self.predecessors = predecessors
        self.successor = successor
        self.rate = rate

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.training or torch.rand(()) < self.rate:
            return self.successor(states, *args, **kwargs)
        if torch.is_grad_enabled() and not states.requires_grad:
            states = states.detach().requires_grad_()  # so that a pass that replaces nothing has a backward pass too
        for layer in self.predecessors:
            states = layer(states, *args, **kwargs)
        return states


def theseus(teacher: Model, layers: int, *, rate: float = Theseus.rate) -> Model:
    """A copy of a classifier of BERT's type whose layers are ``layers`` modules, each replaceable by a layer.

    Of L layers of the teacher the first L / ``layers`` are the first module, and so on. What replaces module i, from 0,
    starts as the teacher's layer i, and only these layers require grad: embeddings, pooler and head stay the teacher's.
    In a step some of them have no gradient, which data parallelism is to be told (``ddp_find_unused_parameters``). The
    copy is for training; what is to be saved and used is its :func:`successor`.

    Args:
        teacher: a ``MultiTaskEncoder``, or a sequence classifier of transformers; it stays as it is.
        layers: of the student; it must divide the number of the teacher's.
        rate: how likely a module is replaced; :class:`ReplacementRate` changes it.

    Raises:
        ValueError: ``layers`` or ``rate`` is none of these; a model without a stack of layers, with layers of
            several kinds, or whose head reads all layers.
    """
    check_rate(rate)
    model = copy.deepcopy(teacher).requires_grad_(False)
    owner, stack = transformer_layers(model)
    depth = len(stack)
    if layers < 1 or depth % layers:
        raise ValueError(f"layers is {layers}; it must divide {depth}, the number of layers of the teacher")
    if getattr(owner.config, "layer_types", None) is not None:
        raise ValueError(f"{type(owner).__name__} has layers of several kinds, which cannot be replaced")
    if getattr(teacher.config, "pooling", None) == "cls_of_layers":
        raise ValueError('pooling is "cls_of_layers", which reads layers that may be replaced; it must be another one')
    step = depth // layers
    successors = [copy.deepcopy(layer).requires_grad_(True) for layer in stack[:layers]]
    modules = [Replaceable(stack[i * step : (i + 1) * step], layer, rate) for i, layer in enumerate(successors)]
    _replace(owner, stack, modules)
    return model


def successor(model: Model) -> Model:
    """The plain student in a model that :func:`theseus` made: a copy with every module replaced for good.

    All its parameters require grad.

    Raises:
        ValueError: :func:`theseus` did not make the model.
    """
    _replaceable(model)
    student = copy.deepcopy(model).requires_grad_(True)
    owner, stack = transformer_layers(student)
    _replace(owner, stack, [module.successor for module in _replaceable(student)])
    return student


def set_rate(model: nn.Module, rate: float) -> None:
    """Sets how likely each module of a model that :func:`theseus` made is replaced, above 0 and at most 1."""
    check_rate(rate)
    for module in _replaceable(model):
        module.rate = rate


def check_rate(rate: float) -> None:
    if not 0 < rate <= 1:
        raise ValueError(f"rate must be above 0 and at most 1, got {rate}")


class ReplacementRate(TrainerCallback):
    """Sets the rate of a model that :func:`theseus` made, at the beginning of every optimiser step."""

    def __init__(self, schedule: Theseus) -> None:
        self.schedule = schedule

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        set_rate(kwargs["model"], self.schedule.rate_at(state.global_step))


def _replaceable(model: nn.Module) -> list[Replaceable]:
    modules = [module for module in model.modules() if isinstance(module, Replaceable)]
    if not modules:
        raise ValueError(f"model is a {type(model).__name__} without replaceable layers; it must be made by theseus")
    return modules


def _replace(owner: PreTrainedModel, stack: nn.ModuleList, layers: Sequence[nn.Module]) -> None:
    """Puts these layers in place of all in the stack, and their number into the config."""
    for index, layer in enumerate(layers):
        stack[index] = layer
    del stack[len(layers) :]
    owner.config.num_hidden_layers = len(layers)
