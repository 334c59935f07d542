"""Two processes train as one: the same gradient, each row once, whole single-task batches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import write_glue

SCRIPT = """
import os, sys
import torch
from tiny import bert_config, tokenizer, write_glue
from transformers import TrainerCallback, TrainingArguments
from fastkd.data.encode import MultiTaskCollator, MultiTaskDataset, load_encoded
from fastkd.training.teacher import MultiTaskEncoder, MultiTaskEncoderConfig
from fastkd.training.trainer import MultiTaskTrainer

folder, name, accumulation, stop, resume = sys.argv[1:]
rank = os.environ.get("RANK", "0")
train, validation = load_encoded(["sst2", "stsb"], tokenizer(), 16, f"{folder}/glue")
train = MultiTaskDataset({name: rows.select(range(4)) for name, rows in train.datasets.items()})
torch.manual_seed(0)
tasks = {"sst2": {"labels": ["negative", "positive"]}, "stsb": {"labels": []}}
model = MultiTaskEncoder(MultiTaskEncoderConfig(bert_config(), tasks, classifier_dropout=0.0))


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_training_stop = state.global_step == int(stop)


args = TrainingArguments(
    f"{folder}/out", use_cpu=True, disable_tqdm=True, save_strategy="no", num_train_epochs=3,
    learning_rate=1e-3, max_grad_norm=0.0, per_device_train_batch_size=2,
    gradient_accumulation_steps=int(accumulation),
)
trainer = MultiTaskTrainer(
    model, args, MultiTaskCollator(tokenizer()), train, validation, callbacks=[Stop()] if int(stop) else None
)
trainer.train(resume_from_checkpoint=resume or None)
metrics = trainer.evaluate()
torch.save({"model": model.state_dict(), "average": metrics["eval_average"]}, f"{folder}/{name}-{rank}.pt")
"""


def run(folder, name, *, processes=2, accumulation=1, stop=0, resume=""):
    """Each process's final parameters and average score."""
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), str(root / "tests")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    (folder / "script.py").write_text(SCRIPT)
    arguments = [str(folder), name, str(accumulation), str(stop), resume]
    command = [sys.executable, *(launcher if processes > 1 else []), "script.py", *arguments]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{name}-{rank}.pt") for rank in range(processes)]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    write_glue(tmp_path / "glue")
    (one,) = run(tmp_path, "one", processes=1, accumulation=4)
    first, second = run(tmp_path, "two", accumulation=2)
    for name, expected in one["model"].items():
        torch.testing.assert_close(first["model"][name], expected, rtol=1e-3, atol=2e-5)
        assert torch.equal(first["model"][name], second["model"][name])
    assert first["average"] == second["average"]
    assert first["average"] == pytest.approx(one["average"], abs=0.1)


@pytest.mark.slow
def test_two_processes_resume_inside_an_epoch(tmp_path):
    write_glue(tmp_path / "glue")
    whole = run(tmp_path, "whole")[0]
    run(tmp_path, "part", stop=3)
    resumed = run(tmp_path, "resumed", resume=str(tmp_path / "out" / "checkpoint-3"))[0]
    for name, expected in whole["model"].items():
        assert torch.equal(resumed["model"][name], expected), name
