"""How it is measured: first whether every provider is right, then how long each takes, all in turn.

Shared machines drift and stall, so only ratios within one run mean anything. Every round therefore runs all
providers in a new order, and the figures are medians over the rounds with the 20th and 80th percentile.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from functools import cache
from time import perf_counter

import torch
from torch import Tensor

from benchmarks.registry import FORWARD_BACKWARD, UPSTREAM, Benchmark, Case, Provider
from fastkd.reference.tolerance import GRADIENT, VALUE, assert_close

MAX_ROUNDS = 100
CALLS_PER_OVERHEAD_SAMPLE = 200

Call = Callable[[], tuple[Tensor, ...]]


class WrongResult(AssertionError):
    """fastkd disagrees with the reference, or an answer does: its speed means nothing, so nothing is reported."""


def bind(provider: Provider, case: Case, inputs: dict[str, Tensor], direction: str) -> Call:
    """The call that is timed: one forward on tensors that need no gradient, or a forward and its backward.

    The gradient is asked for by ``torch.autograd.grad``. In a real step the logits are the output of a model
    and their gradient is passed on as it is; ``backward()`` into a leaf would instead copy any gradient that
    the op still holds, a full extra pass which no user of a model pays. An input called ``upstream`` is no argument:
    it is the gradient that comes in, for an op whose output is no number; a limit reads it as it does all inputs.
    """
    function = provider.function
    if provider.compiled:
        torch.compiler.reset()  # else the limit on recompilations silently turns later cases into eager ones
        settings = None if provider.inductor is None else dict(provider.inductor)
        function = torch.compile(function, fullgraph=True, dynamic=False, options=settings)
    arguments = {name: tensor for name, tensor in inputs.items() if provider.limit or name != UPSTREAM}
    if direction != FORWARD_BACKWARD or provider.limit:
        detached = {name: tensor.detach() for name, tensor in arguments.items()}
        return lambda: (function(**detached, **case.options),)
    wanted = [tensor for tensor in arguments.values() if tensor.requires_grad]
    upstream = inputs.get(UPSTREAM)

    def forward_backward() -> tuple[Tensor, ...]:
        output = function(**arguments, **case.options)
        return output, *torch.autograd.grad(output, wanted, upstream)

    return forward_backward


def _in_float64(tensor: Tensor) -> Tensor:
    wide = tensor.detach().double() if tensor.is_floating_point() else tensor
    return wide.requires_grad_(tensor.requires_grad)


def faults(
    benchmark: Benchmark, case: Case, inputs: dict[str, Tensor], direction: str, calls: dict[str, Call]
) -> dict[str, str]:
    """By name, what is wrong with each call that is not as right as plain torch in the dtype of the case.

    The truth is plain torch in float64; the tolerance is that of the tests.
    """
    eager = benchmark["eager"]
    wide = {name: _in_float64(tensor) for name, tensor in inputs.items()}
    truth = tuple(t.detach() for t in bind(eager, case, wide, direction)())
    del wide
    plain = tuple(p.detach() for p in bind(eager, case, inputs, direction)())
    found = {name: _fault(call(), truth, plain) for name, call in calls.items()}
    return {name: f"{name} is wrong for {case} ({direction}): {fault}" for name, fault in found.items() if fault}


def _fault(results: tuple[Tensor, ...], truth: tuple[Tensor, ...], plain: tuple[Tensor, ...]) -> str | None:
    for index, (result, *known) in enumerate(zip(results, truth, plain, strict=True)):
        try:
            assert_close(result.detach(), *known, VALUE if index == 0 else GRADIENT)
        except AssertionError as error:
            return f"{f'gradient {index}' if index else 'the output'}: {error}"
    return None


def _cpu_seconds(call: Call, repeats: int) -> float:
    start = perf_counter()
    for _ in range(repeats):
        call()
    return (perf_counter() - start) / repeats


@cache
def _l2_flusher() -> Tensor:
    l2_bytes = torch.cuda.get_device_properties("cuda").L2_cache_size
    return torch.empty(4 * l2_bytes, dtype=torch.int8, device="cuda")


def _cuda_seconds(call: Call, repeats: int) -> float:
    if repeats > 1:
        torch.cuda.synchronize()
        start = perf_counter()
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
        return (perf_counter() - start) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _l2_flusher().zero_()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def interleave(case: Case, calls: dict[str, Call], budget: float, least: int) -> dict[str, list[float]]:
    """Seconds per call, one number per round and provider; ``budget`` seconds decide how many rounds beyond ``least``.

    A first round, not counted, warms up and tells how long a round takes.
    """
    seconds = _cuda_seconds if case.device == "cuda" else _cpu_seconds
    repeats = CALLS_PER_OVERHEAD_SAMPLE if case.overhead else 1
    start = perf_counter()
    for call in calls.values():
        seconds(call, repeats)
    rounds = min(MAX_ROUNDS, max(least, int(budget / (perf_counter() - start))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                samples[name].append(seconds(calls[name], repeats))
    finally:
        gc.enable()
    return samples
