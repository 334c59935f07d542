"""Several trainings at a time: each one's result by its key, the cores shared, an error passed on."""

import os
import signal
import time
from functools import partial
from multiprocessing import active_children

import pytest
import torch

from fastkd.training.parallel import train_all


def describe(key, add):
    add(0.5)
    if key == "bad":
        raise ValueError("a bad key")
    if key == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if key == "interrupted":
        signal.raise_signal(signal.SIGINT)
    return key.upper(), os.getpid(), torch.get_num_threads()


def test_every_key_in_a_process_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    done = train_all(describe, ["a", "interrupted"], jobs=2, description="letters")
    assert {key: name for key, (name, _, _) in done.items()} == {"a": "A", "interrupted": "INTERRUPTED"}
    assert os.getpid() not in {process for _, process, _ in done.values()}
    assert {threads for _, _, threads in done.values()} == {3}
    assert "letters: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        ("bad", ValueError, "a bad key"),
        ("killed", ChildProcessError, "killed for want of memory .*__name__ =="),
    ],
)
def test_an_error_is_passed_on(key, error, message):
    with pytest.raises(error, match=message):
        train_all(describe, [key, "a"], jobs=2)


def meet(folder, key, add):
    """The first two wait for each other; then one of them is interrupted."""
    (folder / key).touch()
    while not all((folder / name).exists() for name in ("interrupted", "slow")):
        time.sleep(0.01)
    if key == "interrupted":
        raise KeyboardInterrupt
    time.sleep(20)
    (folder / f"{key} is done").touch()


def test_an_interrupt_ends_the_trainings_that_run_and_wait(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train_all(partial(meet, tmp_path), ["interrupted", "slow", "later"], jobs=2)
    assert not list(tmp_path.glob("*is done"))
    assert active_children() == []


def test_no_key_needs_no_process():
    assert train_all(describe, []) == {}


def test_one_job_stays_in_this_process(capsys):
    def train(key, add):
        add(0.5)
        time.sleep(0.2)  # the bar is drawn anew every tenth of a second at most
        add(0.25)
        return key, os.getpid()

    assert train_all(train, ["a", "b"], jobs=1) == {key: (key, os.getpid()) for key in "ab"}
    shown = capsys.readouterr().err
    assert "training:  38%" in shown
    assert "training: 100%" in shown
