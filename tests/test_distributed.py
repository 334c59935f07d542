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
from fastkd.methods.baselines.training import BaselineConfig, BaselineTrainer
from fastkd.methods.makd import MaKDConfig, MaKDTrainer
from fastkd.methods.mixkd import MixKDConfig, MixKDTrainer
from fastkd.mixup import Mix
from fastkd.students import factorize, plan_factorization
from fastkd.data.encode import MultiTaskCollator, MultiTaskDataset, load_encoded
from fastkd.training.teacher import MultiTaskEncoder, MultiTaskEncoderConfig
from fastkd.training.trainer import MultiTaskTrainer

folder, method, name, accumulation, stop, resume = sys.argv[1:]
rank = os.environ.get("RANK", "0")
train, validation = load_encoded(["sst2", "stsb"], tokenizer(), 16, f"{folder}/glue")
train = MultiTaskDataset({name: rows.select(range(4)) for name, rows in train.datasets.items()})
torch.manual_seed(0)
tasks = {"sst2": {"labels": ["negative", "positive"]}, "stsb": {"labels": []}}
model = MultiTaskEncoder(MultiTaskEncoderConfig(bert_config(), tasks, classifier_dropout=0.0))


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_training_stop = state.global_step == int(stop)


def within_pairs(self, rows, device):  # the same pairs whatever the process
    return Mix(torch.arange(rows) ^ 1, torch.full((rows,), 0.3))


MixKDTrainer._draw = within_pairs
kinds = {"mixkd": (MixKDConfig, MixKDTrainer), "makd": (MaKDConfig, MaKDTrainer)}
kinds |= {"makd in stages": (MaKDConfig, MaKDTrainer), "minilm": (BaselineConfig, BaselineTrainer)}
config, trainer_class = kinds.get(method, (TrainingArguments, MultiTaskTrainer))
teacher = {"teacher": MultiTaskEncoder(model.config)} if method in kinds else {}
if method not in ("teacher", "mixkd"):
    model = factorize(teacher["teacher"], plan_factorization(model, rank=4))
own = {"makd in stages": {"stages": [0.3, 0.6]}, "minilm": {"baseline": "minilm"}}.get(method, {})
args = config(
    f"{folder}/out", **own, use_cpu=True, disable_tqdm=True, save_strategy="no", num_train_epochs=3,
    learning_rate=1e-3, max_grad_norm=0.0, per_device_train_batch_size=2, train_sampling_strategy="random",
    gradient_accumulation_steps=int(accumulation), logging_steps=1,
)
callbacks = [Stop()] if int(stop) else None
trainer = trainer_class(
    model, args, MultiTaskCollator(tokenizer()), train, validation, callbacks=callbacks, **teacher
)
trainer.train(resume_from_checkpoint=resume or None)
metrics = trainer.evaluate()
part = {"teacher": None, "mixkd": "loss_tmkd", "minilm": "loss_value"}.get(method, "loss_mha")
parts = [log[part] for log in trainer.state.log_history if part in log]
kept = {"model": model.state_dict(), "average": metrics["eval_average"], "parts": parts}
torch.save(kept, f"{folder}/{name}-{rank}.pt")
"""


def run(folder, name, *, method="teacher", processes=2, accumulation=1, stop=0, resume=""):
    """Each process's final parameters, average score and logged part of the loss."""
    launch(folder, SCRIPT, [str(folder), method, name, str(accumulation), str(stop), resume], processes)
    return [torch.load(folder / f"{name}-{rank}.pt") for rank in range(processes)]


def launch(folder, script, arguments, processes):
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), str(root / "tests")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    (folder / "script.py").write_text(script)
    command = [sys.executable, *(launcher if processes > 1 else []), "script.py", *arguments]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["teacher", "mixkd", "makd", "makd in stages", "minilm"])
def test_two_processes_equal_one(tmp_path, method):
    write_glue(tmp_path / "glue")
    (one,) = run(tmp_path, "one", method=method, processes=1, accumulation=4)
    first, second = run(tmp_path, "two", method=method, accumulation=2)
    for name, expected in one["model"].items():
        torch.testing.assert_close(first["model"][name], expected, rtol=1e-3, atol=2e-5)
        assert torch.equal(first["model"][name], second["model"][name])
    assert first["average"] == second["average"]
    assert first["average"] == pytest.approx(one["average"], abs=0.1)
    assert first["parts"] == pytest.approx(one["parts"], abs=2e-4)
    assert bool(one["parts"]) == (method != "teacher")


@pytest.mark.slow
def test_two_processes_resume_inside_an_epoch(tmp_path):
    write_glue(tmp_path / "glue")
    whole = run(tmp_path, "whole")[0]
    run(tmp_path, "part", stop=3)
    resumed = run(tmp_path, "resumed", resume=str(tmp_path / "out" / "checkpoint-3"))[0]
    for name, expected in whole["model"].items():
        assert torch.equal(resumed["model"][name], expected), name


SHARDED = """
import os, sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from test_mixing import EXAMPLES, MIX
from tiny import bert_config
from transformers import BertModel
from fastkd.mixing import EmbeddingMixer


def gradients(shard):
    torch.manual_seed(0)
    model = BertModel(bert_config(initializer_range=1.0))
    mixer = EmbeddingMixer(model, stage="sum")
    if shard:
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.encoder.layer:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    with mixer(MIX):
        output = model(**mixer.inputs(EXAMPLES, MIX))
    output.last_hidden_state[..., :4].sum().backward()  # of all it would be constant: they are normalised
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.full_tensor() if shard else grad for name, grad in grads.items()}


dist.init_process_group("gloo")
alone, sharded = gradients(False), gradients(True)
assert alone.keys() == sharded.keys()
for name, grad in alone.items():
    torch.testing.assert_close(sharded[name], grad, rtol=1e-4, atol=1e-5)
assert alone["embeddings.word_embeddings.weight"].abs().max() > 1e-3
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_sharded_model_mixes_as_a_whole_one(tmp_path):
    launch(tmp_path, SHARDED, [], processes=2)


SHARDED_FEATURES = """
import torch
import torch.distributed as dist
from families import BATCH, make
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from fastkd.methods.feature_distillation import map_weights
from fastkd.methods.makd import MaKDObjective
from fastkd.students import factorize, plan_factorization
from fastkd.training.taps import Taps


def gradients(form, shard):
    teacher = make("bert").requires_grad_(False)
    student = factorize(teacher, plan_factorization(teacher, rank=6))
    taps = [Taps(model, maps=True) for model in (student, teacher)]
    if shard:
        mesh = init_device_mesh("cpu", (2,))
        for model in (student, teacher):
            for layer in model.bert.encoder.layer:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
    with torch.no_grad(), taps[1].record() as theirs:
        theirs.logits = teacher(**BATCH).logits
        theirs.weights = map_weights(teacher)
    with taps[0].record() as mine:
        mine.logits = student(**BATCH).logits
    mine.weights = map_weights(student)
    loss, _ = MaKDObjective(matrix_form=form)(mine, theirs, torch.tensor([0, 1]), BATCH["attention_mask"])
    loss.backward()
    grads = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return {name: grad.full_tensor() if shard else grad for name, grad in grads.items()}


dist.init_process_group("gloo")
for form in ("output", "weight"):
    alone, sharded = gradients(form, False), gradients(form, True)
    assert alone.keys() == sharded.keys()
    for name, grad in alone.items():
        torch.testing.assert_close(sharded[name], grad, rtol=1e-4, atol=1e-6)
    assert alone["bert.encoder.layer.0.attention.self.query.down"].abs().max() > 1e-5
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_sharded_models_have_the_features_of_whole_ones(tmp_path):
    launch(tmp_path, SHARDED_FEATURES, [], processes=2)
