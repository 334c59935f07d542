"""A whole distillation: a table whose rows are the teacher and students of several kinds of training, over seeds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PrinterCallback, TrainingArguments

from fastkd.data.encode import MultiTaskCollator, MultiTaskDataset, load_encoded
from fastkd.data.glue import TASKS
from fastkd.data.metrics import main_score
from fastkd.data.task import Task
from fastkd.methods.baselines.training import BaselineConfig
from fastkd.methods.makd import MaKDConfig
from fastkd.methods.publish import publish, report
from fastkd.methods.registry import get_method
from fastkd.methods.students import BiLSTMStudent, Student
from fastkd.methods.teachers import Folders, Teachers, load_teachers
from fastkd.methods.trial import try_objective
from fastkd.training.output import check_output, new_folder
from fastkd.training.parallel import Add, ReportProgress, train_all
from fastkd.training.positions import check_positions
from fastkd.training.runs import finished_or
from fastkd.training.sampler import MultiTaskBatchSampler
from fastkd.training.signals import TeacherSignal, add_teacher_logits, fingerprint
from fastkd.training.teacher import has_fast_bf16
from fastkd.training.trainer import MultiTaskTrainer

WITHOUT_KD, WITH_KD = "student without KD", "student with KD"
Scores = dict[str, dict[int, dict[str, float]]]  # of each row of the table, seed and task
_TAKEN = ("teacher", "student", "teacher_logits", "table.md", "table.csv", "scores.png", "options.yaml")
_OWN = {"seed": "seeds", "output_dir": "output"}  # fields of a configuration that the experiment sets, and by what


@dataclass(frozen=True)
class Experiment:
    """What :func:`run_experiment` does; picklable.

    Args:
        teacher: a folder that ``fastkd teacher`` made, or one for each task, all of one vocabulary. The students
            take over the tokenizer, and start from the teacher of the first task.
        tasks: names of ``fastkd.data.glue.TASKS``, or of folders of the user's own in ``data_dir``.
        output: see :func:`run_experiment`.
        method: one of ``fastkd.methods.registry.METHODS``.
        student: the kind of student.
        arms: the students' rows of the table, in order, each with the fields of the method's configuration by
            which it departs from ``training``. Its students are alike in everything else: start, order of
            batches, number of steps; but one that learns from labels alone is not given the rows without. The
            best student of the last row is published.
        data_dir, train_fraction, max_train_rows, paraphrases, augment, max_length: see ``load_encoded``.
        seeds: one student of each row per seed.
        training: fields of the method's configuration. Unless they are given, no checkpoints are kept, a line is
            logged every 100 steps, and students are trained on a GPU if there is one, in bfloat16 where it is fast.
    """

    teacher: Folders
    tasks: tuple[str, ...]
    output: str
    method: str = "mkd"
    student: Student = field(default_factory=BiLSTMStudent)
    arms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    data_dir: str | None = None
    seeds: tuple[int, ...] = (1, 2, 3)
    train_fraction: float | None = None
    max_train_rows: int | None = None
    paraphrases: str | None = None
    augment: int | None = None
    max_length: int = 128
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds is {self.seeds}; it must be different numbers of at least 0, one or more")
        if not self.arms:
            object.__setattr__(self, "arms", arms_of(self.method))
        folders = {_folder_name(arm) for arm in self.arms}
        if len(folders) < len(self.arms) or folders.intersection(_TAKEN):
            raise ValueError(f"arms are {list(self.arms)}; their folders must differ and not be {', '.join(_TAKEN)}")
        for arm in self.arms:
            if not re.fullmatch(r"\w[\w .=+()-]*", arm):
                raise ValueError(f"arms has {arm!r}; it becomes a folder's name, so it must be words")
            self.arguments(arm, seed=0)  # refuses bad options before any work

    def arguments(self, arm: str, seed: int, **options: Any) -> TrainingArguments:
        """The method's configuration for one student."""
        folder = self.student_folder(arm, seed) / "trainer"
        given = {**self.training, **self.arms[arm]}
        if taken := [name for name in _OWN if name in given]:
            raise ValueError(f"training or arms has {taken[0]}; it must be left out, it follows from {_OWN[taken[0]]}")
        settings = {"save_strategy": "no", "logging_steps": 100, **_precision(), **given, **options}
        return get_method(self.method).config(str(folder), seed=seed, **settings)

    def student_folder(self, arm: str, seed: int) -> Path:
        return Path(self.output) / _folder_name(arm) / f"seed-{seed}"

    def needs_labels(self, arm: str) -> bool:
        """Whether the row's students learn from labels alone."""
        settings = {**self.training, **self.arms[arm]}
        return get_method(self.method).without_kd.items() <= settings.items()

    def described(self, arm: str, seed: int) -> dict[str, Any]:
        """All settings that one student depends on, JSON values; a finished one is known by them and its rows."""
        shared = ("output", "seeds", "arms")
        own = {name: value for name, value in asdict(self).items() if name not in shared}
        return own | {"arm": dict(self.arms[arm]), "seed": seed}


class Material(NamedTuple):
    """What the students of an experiment learn from and are judged by, and the teachers' own scores.

    ``fingerprints`` name the teachers, and the tokens and labels of all rows: of others nothing finished is used.
    """

    train: MultiTaskDataset
    validation: Mapping[str, MultiTaskDataset]
    teacher_scores: Mapping[str, float]
    fingerprints: Mapping[str, str]


def arms_of(method: str) -> dict[str, Mapping[str, Any]]:
    """A method's two usual rows: students that learn from the labels alone, and its own."""
    return {WITHOUT_KD: get_method(method).without_kd, WITH_KD: {}}


def run_experiment(experiment: Experiment, jobs: int | None = None) -> str:
    """Trains the students that are not finished yet, writes the report, and gives its table.

    ``experiment.output`` then holds ``table.md``, ``table.csv``, ``scores.png``, ``student`` (that of the last row
    with the best validation average, its tokenizer and a model card), and what a repeated call reuses: the
    teacher's logits, where the method can use them, and a folder per student. ``jobs`` students are trained at a
    time, sharing the cores equally; by default one on a GPU, and otherwise as many as there are cores. Several are
    trained in processes of their own, so that a script must call this under ``if __name__ == "__main__":``.
    """
    teachers = load_teachers(experiment.teacher, experiment.tasks)
    material = prepare(experiment, teachers)
    keys = [(arm, seed) for seed in experiment.seeds for arm in experiment.arms]
    train = partial(train_student, experiment, material)
    done = train_all(train, keys, jobs, f"{len(keys)} students")
    scores = {arm: {seed: done[arm, seed] for seed in experiment.seeds} for arm in experiment.arms}
    table = report(experiment, teachers, scores, material)
    publish(experiment, scores, table)
    return table


def _labels(teachers: Teachers) -> dict[str, Sequence[str]]:
    """Label names of each task in the order of the students' outputs; a task of the user's own has its teacher's."""
    own = {task: model.config.tasks.get(task, {"labels": ()})["labels"] for task, model in teachers.by_task.items()}
    return {task: TASKS[task].label_names if task in TASKS else names for task, names in own.items()}


def prepare(experiment: Experiment, teachers: Teachers) -> Material:
    """Loads the rows, once it is clear that students of these teachers can be taught and saved; asks the teachers."""
    labels = _labels(teachers)
    TeacherSignal(teachers.by_task, labels)  # refuses a teacher of other tasks or labels before the data are read
    student = experiment.student.make(teachers.first, labels)
    for arm in experiment.arms:
        args: Any = experiment.arguments(arm, seed=0)
        if isinstance(args, MaKDConfig | BaselineConfig):
            try_objective(args.objective(), student, teachers.by_task)
    size = 4 * student.num_parameters()
    students = len(experiment.arms) * len(experiment.seeds)
    check_output(Path(experiment.output) / "the students", needed_bytes=size * (students + 1))
    train, validation = load_encoded(
        experiment.tasks,
        teachers.tokenizer,
        experiment.max_length,
        experiment.data_dir,
        train_fraction=experiment.train_fraction,
        max_train_rows=experiment.max_train_rows,
        paraphrases=experiment.paraphrases,
        augment=experiment.augment,
    )
    for model, _ in teachers.tasks:
        check_positions(model, (train, *validation.values()))
    names = {name: task.label_names for name, task in train.tasks.items()}
    signal = TeacherSignal(teachers.by_task, names, autocast=torch.bfloat16 if has_fast_bf16() else None)
    output, collate = Path(experiment.output), MultiTaskCollator(teachers.tokenizer)
    signal.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    prints = {f"teacher of {task}": signal.fingerprint(task, rows) for task, rows in train.datasets.items()}
    prints |= _fingerprints(train, validation)
    if get_method(experiment.method).uses_cached_logits:
        train = add_teacher_logits(train, signal, collate, cache_dir=output / "teacher_logits")

    sets = {name: next(iter(rows.datasets.items())) for name, rows in validation.items()}

    def evaluate() -> dict[str, float]:
        args = TrainingArguments(str(output / "teacher"), per_device_eval_batch_size=64, **_precision())
        scores: dict[str, float] = {}
        for model, tasks in teachers.tasks:
            own = {name: validation[name] for name, (task, _) in sets.items() if task in tasks}
            taught = {name: task for name, task in train.tasks.items() if name in tasks}
            scores |= _scores(MultiTaskTrainer(model, args, collate, eval_dataset=own), taught)
        return scores

    return Material(train, validation, finished_or(output / "teacher", prints, evaluate), prints)


def _unlabelled_batches(train: MultiTaskDataset, collate: MultiTaskCollator, seed: int) -> Iterator[dict[str, Any]]:
    """Batches of random rows, each task's as often, without labels."""
    for indices in MultiTaskBatchSampler(train.sizes, batch_size=32, seed=seed, tau=0.0):
        batch = collate(train.__getitems__(indices))
        yield {name: batch[name] for name in (*collate.pad_values, "task")}


def _fingerprints(train: MultiTaskDataset, validation: Mapping[str, MultiTaskDataset]) -> dict[str, str]:
    """Names the tokens and labels of all training and validation rows."""
    sets = {f"training rows of {task}": rows for task, rows in train.datasets.items()}
    for name, datasets in validation.items():
        sets |= {f"validation rows of {name}": rows for rows in datasets.datasets.values()}
    return {name: fingerprint([], None, rows, ("input_ids", "token_type_ids", "labels")) for name, rows in sets.items()}


def train_student(experiment: Experiment, material: Material, key: tuple[str, int], add: Add) -> dict[str, float]:
    """Scores of one student, (arm, seed), from its folder if it is finished, after training it there if not.

    ``add``: see :func:`train_all`.
    """
    arm, seed = key
    known = {**experiment.described(arm, seed), **material.fingerprints}
    train = partial(train_new_student, experiment, material, arm, seed, add)
    return finished_or(experiment.student_folder(arm, seed), known, train)


def train_new_student(experiment: Experiment, material: Material, arm: str, seed: int, add: Add) -> dict[str, float]:
    """Trains one student, saves it with its tokenizer as ``model`` in its folder, and gives its scores."""
    method, args = get_method(experiment.method), experiment.arguments(arm, seed, disable_tqdm=True)
    teachers = load_teachers(experiment.teacher, experiment.tasks)
    torch.manual_seed(seed)
    collate = MultiTaskCollator(teachers.tokenizer)
    batches = _unlabelled_batches(material.train, collate, seed)
    student = experiment.student.make(teachers.first, _labels(teachers), batches)
    trainer = method.trainer(
        student,
        args,
        collate,
        material.train.labelled() if experiment.needs_labels(arm) else material.train,
        material.validation,
        teacher=None if method.uses_cached_logits else teachers.by_task,
        callbacks=[ReportProgress(add)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    scores = _scores(trainer, material.train.tasks)
    with new_folder(experiment.student_folder(arm, seed) / "model", replace=True) as model:
        method.finish(student).save_pretrained(model)
        teachers.tokenizer.save_pretrained(model)
    return scores


def _scores(trainer: MultiTaskTrainer, tasks: Mapping[str, Task]) -> dict[str, float]:
    metrics = trainer.evaluate()
    return {
        name: main_score(task, {metric: metrics[f"eval_{name}_{metric}"] for metric in task.metrics})
        for name, task in tasks.items()
    }


def _folder_name(arm: str) -> str:
    return arm.replace(" ", "-").lower()


def _precision() -> dict[str, Any]:
    return {"bf16": has_fast_bf16(), "use_cpu": not torch.cuda.is_available()}
