"""What is measured: the cases of an op, the inputs of a case, and the providers that compute it.

An op joins by one file, ``benchmarks/<op>.py``, which makes a ``Benchmark`` and decorates its providers.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

FORWARD = "forward"
FORWARD_BACKWARD = "forward+backward"
STEP = "step"  # forward and backward by the provider itself, which returns what is to be compared
UPSTREAM = "upstream"  # the input that is the gradient coming in, see measure.bind


@dataclass(frozen=True)
class Case:
    """One problem: a shape with the reason it is here, a dtype, a device and the options of the call.

    ``overhead=True`` marks a problem so small that the cost of the call itself is what counts.
    """

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    reason: str
    device: str = "cpu"
    directions: tuple[str, ...] = (FORWARD_BACKWARD,)
    options: Mapping[str, Any] = field(default_factory=dict)
    overhead: bool = False

    @property
    def size(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.op} {self.size} {self.precision} on {self.device}"


Function = Callable[..., Tensor]
Objection = Callable[[Case], str | None]


def no_objection(case: Case) -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    """A way to compute the op; ``objection(case)`` says why it cannot, or None when it can.

    A ``limit`` only moves the bytes that every implementation must move; nobody asks whether it is right.
    ``inductor`` holds settings of the compiler.
    """

    name: str
    function: Function
    directions: tuple[str, ...] = (FORWARD, FORWARD_BACKWARD, STEP)
    objection: Objection = no_objection
    compiled: bool = False
    limit: bool = False
    inductor: Mapping[str, Any] | None = None


REGISTRY: dict[str, Benchmark] = {}


class Benchmark:
    """An op's cases and providers. ``inputs(case)`` returns the tensors of one call by argument name.

    The provider called ``eager`` is the op as a user writes it in plain torch; run in float64 it is what all
    providers have to agree with.
    """

    def __init__(self, op: str, cases: list[Case], inputs: Callable[[Case], dict[str, Tensor]]) -> None:
        self.op = op
        self.cases = cases
        self.inputs = inputs
        self.providers: list[Provider] = []
        REGISTRY[op] = self

    def provider(
        self,
        name: str,
        *,
        objection: Objection = no_objection,
        compiled: bool = False,
        inductor: Mapping[str, Any] | None = None,
    ) -> Callable[[Function], Function]:
        """Register ``function(**inputs, **options)``; ``compiled=True`` measures ``torch.compile`` of it."""

        def register(function: Function) -> Function:
            provider = Provider(name, function, objection=objection, compiled=compiled, inductor=inductor)
            self.providers.append(provider)
            return function

        return register

    def limit(
        self, name: str, *, direction: str = FORWARD_BACKWARD, objection: Objection = no_objection
    ) -> Callable[[Function], Function]:
        """Register a candidate for the limit of one direction; the fastest candidate counts."""

        def register(function: Function) -> Function:
            self.providers.append(Provider(f"limit:{name}", function, (direction,), objection, limit=True))
            return function

        return register

    def runnable(self, case: Case, direction: str) -> list[Provider]:
        """The providers that can run the case; where the call is the cost, moving bytes is no limit."""
        return [
            p
            for p in self.providers
            if direction in p.directions and p.objection(case) is None and not (p.limit and case.overhead)
        ]

    def __getitem__(self, name: str) -> Provider:
        return next(provider for provider in self.providers if provider.name == name)


def load_benchmarks() -> dict[str, Benchmark]:
    """Import every module of this folder, so that each op's file registers itself."""
    for module in pkgutil.iter_modules(import_module("benchmarks").__path__):
        if module.name != "__main__":
            import_module(f"benchmarks.{module.name}")
    return REGISTRY
