"""Two processes train as one: the same gradient, each row once, whole single-task batches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import os, sys
import torch
from tiny import bert_config, tokenizer, write_glue
from transformers import TrainingArguments
from fastkd.data.encode import MultiTaskCollator, MultiTaskDataset, load_encoded
from fastkd.training.teacher import MultiTaskEncoder, MultiTaskEncoderConfig
from fastkd.training.trainer import MultiTaskTrainer

folder, name = sys.argv[1:]
rank, processes = os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", "1"))
train, validation = load_encoded(["sst2", "stsb"], tokenizer(), 16, f"{folder}/glue")
train = MultiTaskDataset({name: rows.select(range(4)) for name, rows in train.datasets.items()})
torch.manual_seed(0)
tasks = {"sst2": {"labels": ["negative", "positive"]}, "stsb": {"labels": []}}
model = MultiTaskEncoder(MultiTaskEncoderConfig(bert_config(), tasks, classifier_dropout=0.0))
args = TrainingArguments(
    f"{folder}/out", use_cpu=True, disable_tqdm=True, save_strategy="no", num_train_epochs=3,
    learning_rate=1e-3, max_grad_norm=0.0, per_device_train_batch_size=2,
    gradient_accumulation_steps=4 // processes,
)
trainer = MultiTaskTrainer(model, args, MultiTaskCollator(tokenizer()), train, validation)
trainer.train()
assert trainer.state.global_step == 3
metrics = trainer.evaluate()
torch.save({"model": model.state_dict(), "average": metrics["eval_average"]}, f"{folder}/{name}-{rank}.pt")
"""


def run(command, tmp_path):
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), str(root / "tests")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    from tiny import write_glue

    write_glue(tmp_path / "glue")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run([sys.executable, str(script), str(tmp_path), "one"], tmp_path)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run([*launcher, str(script), str(tmp_path), "two"], tmp_path)
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("one-0", "two-0", "two-1"))
    for name, expected in one["model"].items():
        torch.testing.assert_close(first["model"][name], expected, rtol=1e-3, atol=2e-5)
        assert torch.equal(first["model"][name], second["model"][name])
    assert first["average"] == second["average"]
    assert first["average"] == pytest.approx(one["average"], abs=0.1)
