"""Several trainings at a time: each one's result by its key, the cores shared, an error passed on."""

import os
import signal
import time

import pytest
import torch

from fastkd.training.parallel import train_all


def describe(key, add):
    add(0.5)
    if key == "bad":
        raise ValueError("a bad key")
    if key == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return key.upper(), os.getpid(), torch.get_num_threads()


def test_every_key_in_a_process_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    done = train_all(describe, ["a", "b"], jobs=2, description="letters")
    assert {key: name for key, (name, _, _) in done.items()} == {"a": "A", "b": "B"}
    assert os.getpid() not in {process for _, process, _ in done.values()}
    assert {threads for _, _, threads in done.values()} == {3}
    assert "letters: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [("bad", ValueError, "a bad key"), ("killed", ChildProcessError, "was killed, perhaps for want of memory")],
)
def test_an_error_is_passed_on(key, error, message):
    with pytest.raises(error, match=message):
        train_all(describe, [key, "a"], jobs=2)


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
