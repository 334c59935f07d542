"""Several trainings at a time, each in a process of its own, under one progress bar."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context
from threading import Thread
from typing import Any, TypeVar

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerState, TrainingArguments

Key = TypeVar("Key")
Result = TypeVar("Result")
Add = Callable[[float], Any]

_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
_progress: Any = None  # of a process: the shared sum of the parts that are done


class ReportProgress(TrainerCallback):
    """Calls ``add`` after every step with the part of the training, 0 to 1, that the step was."""

    def __init__(self, add: Add) -> None:
        self.add = add

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        self.add(1 / state.max_steps)


def train_all(
    train: Callable[[Key, Add], Result], keys: Sequence[Key], jobs: int | None = None, description: str = "training"
) -> dict[Key, Result]:
    """``train(key, add)`` of every key, ``jobs`` at a time, sharing the cores equally.

    ``train`` calls ``add`` with the part of its work, 0 to 1, done since the last call. With several jobs it must be
    picklable. ``jobs`` None means one on a GPU, and otherwise as many as there are cores.

    Raises what ``train`` raised, and ``ChildProcessError`` when one of the processes was killed. An error or an
    interrupt ends the other trainings, too, wherever they are.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = min(len(keys), jobs or (1 if torch.cuda.is_available() else cores))
    with tqdm(desc=description, total=len(keys), bar_format=_BAR) as bar:
        if jobs <= 1:
            done = {key: train(key, lambda part: bar.update(min(part, bar.total - bar.n))) for key in keys}
        else:
            done = _in_processes(train, keys, jobs, max(1, cores // jobs), bar)
        bar.update(len(keys) - bar.n)
    return done


def _in_processes(
    train: Callable[[Key, Add], Result], keys: Sequence[Key], jobs: int, threads: int, bar: Any
) -> dict[Key, Result]:
    context = get_context("spawn")
    progress = context.Value("d", 0.0)
    theirs, ours = context.Pipe(duplex=False)
    with ours, ProcessPoolExecutor(jobs, context, _start, (threads, progress, theirs)) as pool:
        try:
            futures = {key: pool.submit(_run, train, key) for key in keys}
            waiting = set(futures.values())
            while waiting:
                finished, waiting = wait(waiting, timeout=1.0)
                bar.update(min(progress.value, bar.total) - bar.n)
                for future in finished:
                    _result(future)
        except BaseException:
            ours.close()  # else leaving the block would wait for all that is queued
            raise
    return {key: future.result() for key, future in futures.items()}


def _result(future: Future[Result]) -> Result:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a training process ended: perhaps it was killed for want of memory (try fewer jobs), or the script that "
            'starts it does not do so under `if __name__ == "__main__":`'
        ) from error


def _start(threads: int, progress: Any, parent: connection.Connection) -> None:
    global _progress
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts the parent too, which ends this process
    Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    _progress = progress


def _end_with(parent: connection.Connection) -> None:
    """Ends this process when the parent closes its end of the pipe, or was killed."""
    connection.wait([parent])
    os._exit(1)


def _run(train: Callable[[Key, Add], Result], key: Key) -> Result:
    return train(key, _add)


def _add(part: float) -> None:
    with _progress.get_lock():
        _progress.value += part
