"""A whole distillation: the same student with and without it, over seeds, next to the teacher."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from fastkd.data.encode import MultiTaskCollator, MultiTaskDataset, load_encoded
from fastkd.data.glue import TASKS
from fastkd.data.metrics import main_score
from fastkd.data.task import Task
from fastkd.methods.mkd import MKDConfig, MKDTrainer
from fastkd.students import BiAttentiveLSTM, BiAttentiveLSTMConfig
from fastkd.training.output import check_output, new_folder
from fastkd.training.parallel import Add, ReportProgress, train_all
from fastkd.training.report import ModelResult, count_parameters, measure_latency, write_report
from fastkd.training.runs import finished_or
from fastkd.training.signals import TeacherSignal, add_teacher_logits
from fastkd.training.teacher import MultiTaskEncoder, has_fast_bf16, load_teacher
from fastkd.training.trainer import MultiTaskTrainer

WITHOUT_KD, WITH_KD = "student without KD", "student with KD"
LATENCY_ROWS = 20

Scores = dict[str, dict[int, dict[str, float]]]  # of each kind of student, seed and task


@dataclass(frozen=True)
class MKDExperiment:
    """What :func:`run_mkd` does.

    ``teacher`` is a folder that ``load_teacher`` reads; the student takes over its tokenizer. Both kinds of
    student are trained alike but for the loss: without distillation it is the hard-label loss alone, of the rows
    that have a label, so without those of ``augment``.
    ``training`` holds fields of ``MKDConfig``.
    """

    teacher: str
    tasks: tuple[str, ...]
    output: str
    data_dir: str | None = None
    preset: str = "small"
    seeds: tuple[int, ...] = (1, 2, 3)
    baseline: bool = True
    train_fraction: float | None = None
    max_train_rows: int | None = None
    paraphrases: str | None = None
    augment: int | None = None
    max_length: int = 128
    training: dict[str, Any] = field(default_factory=dict)

    def student_folder(self, arm: str, seed: int) -> Path:
        return Path(self.output) / arm.replace(" ", "-").lower() / f"seed-{seed}"


@dataclass(frozen=True)
class Material:
    """What every student is trained from; picklable."""

    train: MultiTaskDataset
    validation: dict[str, MultiTaskDataset]
    tokenizer: PreTrainedTokenizerBase
    embeddings: torch.Tensor


def run_mkd(experiment: MKDExperiment, jobs: int | None = None) -> str:
    """Trains the students that are not finished yet, writes the report, and gives its table.

    ``experiment.output`` then holds ``table.md``, ``table.csv``, ``scores.png``, ``student`` (the distilled
    student with the best validation average, its tokenizer and a model card), and what a repeated call reuses:
    the teacher's logits and a folder per student. ``jobs`` students are trained at a time, sharing the cores
    equally; by default one on a GPU, and otherwise as many as there are cores.
    """
    _arguments(experiment, WITH_KD, seed=0)  # refuses bad options before any work
    teacher, tokenizer = _load_teacher(experiment.teacher, experiment.tasks)
    labels = {task: teacher.config.tasks[task]["labels"] for task in experiment.tasks}
    size = 4 * make_student(experiment, labels, _word_embeddings(teacher)).num_parameters()
    output = Path(experiment.output)
    check_output(output / "students", needed_bytes=size * (2 * len(experiment.seeds) + 1))
    material, teacher_scores = _ask_teacher(experiment, teacher, tokenizer)
    scores = _train_all(experiment, material, jobs)
    table = _report(experiment, teacher, teacher_scores, scores, material)
    best = max(experiment.seeds, key=lambda seed: sum(scores[WITH_KD][seed].values()))
    _publish(experiment.student_folder(WITH_KD, best) / "model", output / "student", experiment, table)
    return table


def _load_teacher(folder: str, tasks: Sequence[str]) -> tuple[MultiTaskEncoder, PreTrainedTokenizerBase]:
    if not (Path(folder) / "config.json").exists():
        raise ValueError(f"no teacher in {folder}: make one with `fastkd teacher`")
    try:
        teacher, tokenizer = load_teacher(folder), AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder} is damaged, or no teacher that `fastkd teacher` made: {reason}") from error
    for task in tasks:
        if task not in teacher.config.tasks:
            raise ValueError(f"teacher has no head for {task}; its tasks are {', '.join(teacher.config.tasks)}")
    TeacherSignal(teacher, {task: TASKS[task].label_names for task in tasks if task in TASKS})  # refuses other labels
    return cast(MultiTaskEncoder, teacher), tokenizer


def _ask_teacher(
    experiment: MKDExperiment, teacher: MultiTaskEncoder, tokenizer: PreTrainedTokenizerBase
) -> tuple[Material, dict[str, float]]:
    """The students' data with the teacher's logits, and the teacher's own scores."""
    train, validation = load_encoded(
        experiment.tasks,
        tokenizer,
        experiment.max_length,
        experiment.data_dir,
        train_fraction=experiment.train_fraction,
        max_train_rows=experiment.max_train_rows,
        paraphrases=experiment.paraphrases,
        augment=experiment.augment,
    )
    output, collate = Path(experiment.output), MultiTaskCollator(tokenizer)
    signal = TeacherSignal(teacher, _labels(train), autocast=torch.bfloat16 if has_fast_bf16() else None)
    signal.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    train = add_teacher_logits(train, signal, collate, cache_dir=output / "teacher_logits")

    sets = {name: next(iter(rows.datasets.items())) for name, rows in validation.items()}
    prints = {name: signal.fingerprint(task, rows) for name, (task, rows) in sets.items()}
    args = MKDConfig(str(output / "teacher"), per_device_eval_batch_size=64, **_precision())
    trainer = MultiTaskTrainer(teacher, args, collate, eval_dataset=validation)
    scores = finished_or(output / "teacher", prints, lambda: _scores(trainer, train.tasks))
    return Material(train, validation, tokenizer, _word_embeddings(teacher)), scores


def _report(
    experiment: MKDExperiment,
    teacher: MultiTaskEncoder,
    teacher_scores: dict[str, float],
    scores: Scores,
    material: Material,
) -> str:
    collate = MultiTaskCollator(material.tokenizer)
    single = [collate([rows[i]]) for rows in material.validation.values() for i in _evenly(len(rows))]
    results = [_result("teacher", [teacher_scores], teacher.cpu(), single)]
    for arm, by_seed in scores.items():
        folder = experiment.student_folder(arm, experiment.seeds[0])
        student = BiAttentiveLSTM.from_pretrained(folder / "model")
        results.append(_result(arm, list(by_seed.values()), student, single))
    count = len(experiment.seeds)
    title = f"MKD into the BiLSTM student ({experiment.preset}), {count} seed{'s' if count > 1 else ''}"
    return write_report(Path(experiment.output), results, experiment.tasks, title)


def _train_all(experiment: MKDExperiment, material: Material, jobs: int | None) -> Scores:
    arms = (WITHOUT_KD, WITH_KD) if experiment.baseline else (WITH_KD,)
    keys = [(arm, seed) for seed in experiment.seeds for arm in arms]
    done = train_all(partial(train_student, experiment, material), keys, jobs, f"{len(keys)} students")
    return {arm: {seed: done[arm, seed] for seed in experiment.seeds} for arm in arms}


def train_student(experiment: MKDExperiment, material: Material, key: tuple[str, int], add: Add) -> dict[str, float]:
    """Scores of one student, (arm, seed), from its folder if it is finished, after training it there if not.

    ``add``: see :func:`train_all`.
    """
    arm, seed = key
    folder = experiment.student_folder(arm, seed)
    args = _arguments(experiment, arm, seed, disable_tqdm=True)

    def train() -> dict[str, float]:
        torch.manual_seed(seed)
        student = make_student(experiment, _labels(material.train), material.embeddings)
        collate = MultiTaskCollator(material.tokenizer)
        rows = material.train.labelled() if arm == WITHOUT_KD else material.train
        trainer = MKDTrainer(student, args, collate, rows, material.validation, callbacks=[ReportProgress(add)])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        scores = _scores(trainer, material.train.tasks)
        with new_folder(folder / "model", replace=True) as model:
            student.save_pretrained(model)
            material.tokenizer.save_pretrained(model)
        return scores

    shared = ("output", "seeds", "baseline")
    described = {name: value for name, value in asdict(experiment).items() if name not in shared}
    return finished_or(folder, described | {"arm": arm, "seed": seed}, train)


def _arguments(experiment: MKDExperiment, arm: str, seed: int, **options: Any) -> MKDConfig:
    settings = experiment.training | _precision() | options
    if arm == WITHOUT_KD:
        settings |= {"distillation_weight": 0.0, "hard_label_weight": 1.0}
    folder = experiment.student_folder(arm, seed) / "trainer"
    return MKDConfig(str(folder), seed=seed, save_strategy="no", logging_steps=100, **settings)


def make_student(
    experiment: MKDExperiment, labels: Mapping[str, Sequence[str]], embeddings: torch.Tensor
) -> BiAttentiveLSTM:
    """A new student that starts from the teacher's word embeddings, where the preset's width allows it."""
    vocab_size, width = embeddings.shape
    sizes = {"embedding_size": width} if experiment.preset == "small" else {}
    tasks = {task: {"labels": list(names)} for task, names in labels.items()}
    config = BiAttentiveLSTMConfig.preset(experiment.preset, vocab_size=vocab_size, tasks=tasks, **sizes)
    student = BiAttentiveLSTM(config)
    if config.embedding_size == width:
        student.use_embeddings(embeddings)
    return student


def _labels(rows: MultiTaskDataset) -> dict[str, tuple[str, ...]]:
    return {name: task.label_names for name, task in rows.tasks.items()}


def _scores(trainer: MultiTaskTrainer, tasks: Mapping[str, Task]) -> dict[str, float]:
    metrics = trainer.evaluate()
    return {
        name: main_score(task, {metric: metrics[f"eval_{name}_{metric}"] for metric in task.metrics})
        for name, task in tasks.items()
    }


def _word_embeddings(model: PreTrainedModel) -> torch.Tensor:
    weight: torch.Tensor = model.get_input_embeddings().get_parameter("weight")
    return weight.detach().cpu()


def _precision() -> dict[str, Any]:
    return {"bf16": has_fast_bf16(), "use_cpu": not torch.cuda.is_available()}


def _evenly(count: int) -> range:
    return range(0, count, max(1, count // LATENCY_ROWS))


def _result(
    name: str, scores: list[dict[str, float]], model: PreTrainedModel, batches: list[dict[str, Any]]
) -> ModelResult:
    return ModelResult(name, scores, *count_parameters(model), measure_latency(model, batches))


def _publish(model: Path, target: Path, experiment: MKDExperiment, table: str) -> None:
    with new_folder(target, replace=True) as folder:
        shutil.copytree(model, folder, dirs_exist_ok=True)
        (folder / "README.md").write_text(_card(experiment, table))


def _card(experiment: MKDExperiment, table: str) -> str:
    settings: Mapping[str, Any] = experiment.training
    options = "\n".join(f"- {name}: {value}" for name, value in sorted(settings.items()))
    return f"""---
library_name: transformers
tags: [fastkd, knowledge-distillation, mkd]
---

# BiLSTM student distilled by MKD

A `fastkd.BiAttentiveLSTM` (preset `{experiment.preset}`) for {", ".join(experiment.tasks)}, distilled from the
multi-task teacher `{Path(experiment.teacher).name}` with `fastkd distill mkd`. Of the seeds trained this is the
one with the best average on the validation sets.

```python
import fastkd.students  # makes the Auto classes know the model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
logits = model(**tokenizer("a fine film", return_tensors="pt"), task="{experiment.tasks[0]}").logits
```

Validation scores (0 to 100, mean ± standard deviation over {len(experiment.seeds)} seeds; latency of one row):

{table}

Training:

{options}
- seeds: {", ".join(map(str, experiment.seeds))}
- rows per task: {_rows_per_task(experiment)}
- tokens per row: {experiment.max_length}
"""


def _rows_per_task(experiment: MKDExperiment) -> str:
    part = "all" if experiment.train_fraction is None else f"{100 * experiment.train_fraction:g} %"
    if experiment.max_train_rows is not None:
        part += f", at most {experiment.max_train_rows}"
    return part if experiment.augment is None else f"{part}, with up to {experiment.augment} variants of each"
