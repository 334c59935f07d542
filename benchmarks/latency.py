"""How long a single call takes, of several systems in turn, each undisturbed by the threads of the one before."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Mapping
from time import perf_counter, sleep
from typing import Any

BURST_SECONDS, BURST_CALLS, MAX_ROUNDS = 0.02, 20, 100
PAUSE_SECONDS = 0.005
"""Worker threads of some systems keep spinning for a while after a call, on a core that the next system needs."""

Call = Callable[[], Any]


def bursts(calls: Mapping[str, Call], budget: float, least: int) -> dict[str, list[float]]:
    """Seconds of each call, by name; ``budget`` seconds decide how many rounds beyond ``least``.

    A round gives every system a burst of calls, in a new order. The first call of a burst warms the caches and is not
    counted where that costs less than the budget of a burst: a server's requests too follow one another.
    """
    plan = {}
    for name, call in calls.items():
        call()
        taken = _seconds(call)
        plan[name] = max(1, min(BURST_CALLS, int(BURST_SECONDS / taken))), taken < BURST_SECONDS, taken
    cost = sum(PAUSE_SECONDS + (count + warm) * taken for count, warm, taken in plan.values())
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        for _ in range(min(MAX_ROUNDS, max(least, int(budget / cost)))):
            shuffle(order)
            for name in order:
                count, warm, _ = plan[name]
                sleep(PAUSE_SECONDS)
                if warm:
                    calls[name]()
                samples[name] += [_seconds(calls[name]) for _ in range(count)]
    finally:
        gc.enable()
    return samples


def _seconds(call: Call) -> float:
    begin = perf_counter()
    call()
    return perf_counter() - begin
