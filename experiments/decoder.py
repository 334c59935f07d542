"""The experiment of MaKD on a small decoder: low-rank students of one size, by perplexity and ROUGE-L."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
)

from experiments import scores as csv_file
from experiments.claims import beats, verdicts
from experiments.makd import FINE_TUNED, MAKD
from experiments.options import check_names, settings_of, several
from experiments.reader import arguments
from experiments.report import PERPLEXITY, mean_and_spread
from experiments.runs import Runs
from experiments.scores import TEACHER, surroundings
from experiments.students import Trained, facts, size_and_latency
from experiments.table import Table
from experiments.teachers import DROPOUT
from fastkd.cli.arguments import fraction, positive
from fastkd.data.batches import language_model_collator
from fastkd.data.instructions import encode_instructions, load_instructions
from fastkd.methods.baselines import KD
from fastkd.methods.baselines.seqkd import teacher_responses
from fastkd.methods.feature_distillation import LanguageModelDistillationTrainer
from fastkd.methods.makd import MaKDObjective
from fastkd.students import factorize, plan_factorization
from fastkd.training.generation import SEEDS, rouge_of
from fastkd.training.language_model import LanguageModelTrainer
from fastkd.training.output import new_folder
from fastkd.training.parallel import Add, ReportProgress
from fastkd.training.report import aligned
from fastkd.training.runs import finished_or, write_text

SEQKD = "SeqKD"
OBJECTIVES = {FINE_TUNED: KD(alpha=0.0), "KD": KD(temperature=1.0), SEQKD: KD(alpha=0.0), MAKD: MaKDObjective()}
ROWS = tuple(OBJECTIVES)
EPOCHS, TEACHER_EPOCHS, END = 3.0, 3.0, "<|endoftext|>"
LEARNING_RATES = (5e-4, 1e-3)
SIZES = {"n_layer": 6, "n_embd": 256, "n_head": 4, "n_positions": 512, "vocab_size": 8192}
OPTIONS: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), DROPOUT)
OPTIONS |= {"activation_function": "gelu_pytorch_tanh"}  # GPT-2's own function, in one kernel
LENGTHS = {"max_length": 512, "max_prompt_length": 256}
HOW_TO_READ = "Differences are those of perplexity, above 0 where the first of the two has the lower one."
CLAIMS = tuple(beats(MAKD, row, f"MaKD beats {row} at one number of parameters") for row in ROWS if row != MAKD)


@dataclass(frozen=True)
class Speaking:
    """Rows to train on, those of perplexity, and the instructions of each column of ROUGE-L."""

    train: Dataset
    heldout: Dataset
    tests: Mapping[str, Dataset]
    seeds: tuple[int, ...]
    new_tokens: int


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ratio", type=fraction, default=0.5, help="students' parameters as a part of the teacher's (default 0.5)")
    add("--texts", type=several(str), required=True, help="text files that the teacher learns the language from")
    add("--train", required=True, help="instructions and responses to train on, .jsonl or .jsonl.gz (docs/data.md)")
    add("--test", type=several(str), required=True, help="name=FILE,...: instructions with references; the first also")
    add("--new-tokens", type=positive(int), default=128, help="of a sampled response at most (default 128)")
    add("--samples", type=positive(int), default=len(SEEDS), help=f"responses per instruction (default {len(SEEDS)})")


def run(args: argparse.Namespace) -> Table:
    """Trains the teacher and the students, and gives the table that is then written."""
    check_names("--rows", args.rows, ROWS)
    files = test_files(args.test)
    if args.samples > len(SEEDS):
        raise ValueError(f"--samples is {args.samples}; it must be at most {len(SEEDS)}")
    size, output = f"{100 * args.ratio:g}", Path(args.output)
    table = Table(
        name=f"makd-decoder-{size}",
        title=f"ROUGE-L of decoders in {size} % of the teacher's parameters",
        folder=output / size,
        rows=(TEACHER, *ROWS),
        columns=list(files),
        claims=CLAIMS,
        settings=settings_of(args, args.learning_rates or LEARNING_RATES),
    )
    train = load_instructions(args.train)
    train = train.shuffle(seed=0).select(range(min(len(train), args.max_train_rows)))
    tests = {name: answered(name, path) for name, path in files.items()}
    read = {"texts": args.texts, "train": args.train, "max_train_rows": args.max_train_rows}
    tokenizer = make_tokenizer(args.texts, train, output / "tokenizer", read)
    speaking = Speaking(
        encode_instructions(train, tokenizer, **LENGTHS),
        encode_instructions(next(iter(tests.values())), tokenizer, **LENGTHS),
        tests,
        SEEDS[: args.samples],
        args.new_tokens,
    )
    sources = {**read, "test": files, "new_tokens": args.new_tokens, "samples": args.samples}
    teacher = make_teacher(args.texts, speaking, tokenizer, output / TEACHER, sources, table)
    training = {"num_train_epochs": args.epochs, "warmup_steps": 0.06, "weight_decay": 0.01}
    shared = {"ratio": args.ratio, **sources, **training}
    groups = []
    for row in args.rows:
        own = replace(speaking, train=said_by(teacher, tokenizer, train)) if row == SEQKD else speaking
        student = partial(train_student, row, teacher, args.ratio, own, training)
        rates = tuple(args.learning_rates or LEARNING_RATES)
        known, folder = {"row": row, **shared}, table.group_folder(row)
        groups.append(Runs(row, folder, known, student, rates, tuple(args.seeds), quality))
    table.fill(groups, args.jobs)
    write_perplexities(table)
    return table


def test_files(parts: Sequence[str]) -> dict[str, str]:
    """The files of ``--test`` by their names."""
    pairs = [part.partition("=") for part in parts]
    for part, (name, _, path) in zip(parts, pairs, strict=True):
        if not name or not path:
            raise ValueError(f"--test has {part!r}; it must be name=FILE, as held-out=heldout.jsonl")
    return {name: path for name, _, path in pairs}


def quality(trained: Trained) -> float:
    """What a learning rate is chosen by: less noisy than ROUGE-L of a few samples."""
    return -float(trained["perplexity"])


def write_perplexities(table: Table) -> None:
    """The rows' perplexities, mean ± standard deviation over seeds, and verdicts by them, into the table's folder."""
    body, lines = [], []
    for row in table.rows:
        path = table.group_folder(row) / "students.json"
        if path.exists():
            students = json.loads(path.read_text())
            body.append([row, mean_and_spread([trained["perplexity"] for trained in students.values()])])
            for seed, trained in students.items():
                known = {**trained, "scores": {"perplexity": quality(trained)}}
                lines += csv_file.scores_of(row, int(seed), {"perplexity": "perplexity"}, known)
    parts = [aligned(["", "perplexity"], body), verdicts(table.claims, lines), HOW_TO_READ]
    write_text(table.folder / PERPLEXITY, "\n\n".join(parts) + "\n")


def make_tokenizer(texts: Sequence[str], train: Dataset, folder: Path, read: Mapping[str, Any]) -> Any:
    """A byte-level BPE of the texts and instructions, unless one of the same, ``read``, is there."""

    def learn() -> dict[str, Any]:
        tokens = ByteLevelBPETokenizer()
        lines = [Path(path).read_text(encoding="utf-8") for path in texts]
        lines += [" ".join([row["instruction"], row["input"], *row["references"]]) for row in train]
        tokens.train_from_iterator(lines, SIZES["vocab_size"], special_tokens=[END], show_progress=False)
        PreTrainedTokenizerFast(tokenizer_object=tokens._tokenizer, eos_token=END).save_pretrained(folder)
        return {}

    finished_or(folder, read, learn)
    return AutoTokenizer.from_pretrained(folder, model_max_length=SIZES["n_positions"])


def answered(name: str, path: str) -> Dataset:
    """The instructions of a file that have references, with which alone ROUGE-L has anything to compare."""
    rows = load_instructions(path).filter(lambda row: bool(row["references"]))
    if not len(rows):
        raise ValueError(f"--test has {name}={path}, none of whose instructions has a reference; ROUGE-L needs some")
    return rows


def blocks(texts: Sequence[str], tokenizer: Any) -> Dataset:
    """The texts end to end, cut into rows of half the decoder's positions, all tokens of them to be learned."""
    length = SIZES["n_positions"] // 2
    ids = [token for path in texts for token in tokenizer(Path(path).read_text(encoding="utf-8"))["input_ids"]]
    rows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    whole = {"attention_mask": [[1] * length] * len(rows), "labels": rows, "length": [length] * len(rows)}
    return Dataset.from_dict({"input_ids": rows, **whole})


def make_teacher(
    texts: Sequence[str], speaking: Speaking, tokenizer: Any, folder: Path, sources: dict[str, Any], table: Table
) -> str:
    """A GPT-2 of small sizes, trained on the texts and then on the instructions unless it is there, and its lines."""

    def train() -> Trained:
        start = time.monotonic()
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(**SIZES, **OPTIONS, bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id)
        )
        collate = language_model_collator(tokenizer)
        for rows in (blocks(texts, tokenizer), speaking.train):
            options = {"num_train_epochs": TEACHER_EPOCHS, "warmup_steps": 0.06, "weight_decay": 0.01}
            args = arguments(folder / "trainer", learning_rate=1e-3, seed=0, **options)
            trainer = LanguageModelTrainer(model, args, collate, rows, speaking.heldout)
            trainer.train()
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        return finish(trainer, start, 1e-3, speaking, tokenizer)

    trained = finished_or(folder, {"sizes": SIZES, **OPTIONS, **sources}, train)
    lines = csv_file.scores_of(TEACHER, 0, {name: name for name in trained["scores"]}, trained)
    csv_file.write(table.group_folder(TEACHER) / "scores.csv", lines)
    write_text(table.group_folder(TEACHER) / "students.json", json.dumps({0: trained}))
    return str(folder / "model")


def said_by(teacher: str, tokenizer: Any, train: Dataset) -> Dataset:
    """The training instructions with the teacher's responses, sampled unless they are there, beside the teacher."""
    folder = Path(teacher).with_name("seqkd")
    if not folder.exists():
        model = AutoModelForCausalLM.from_pretrained(teacher)
        prompt, whole = LENGTHS["max_prompt_length"], LENGTHS["max_length"]
        said = teacher_responses(model, tokenizer, train, max_prompt_length=prompt, max_new_tokens=whole - prompt)
        with new_folder(folder) as whole_or_nothing:
            said.save_to_disk(whole_or_nothing)
    return encode_instructions(Dataset.load_from_disk(str(folder)), tokenizer, **LENGTHS)


def train_student(
    row: str, teacher: str, ratio: float, speaking: Speaking, training: dict[str, Any], rate: float, seed: int, add: Add
) -> Trained:
    start = time.monotonic()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(teacher)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    torch.manual_seed(seed)
    student = factorize(model, plan_factorization(model, ratio=ratio))
    args = arguments(Path(teacher).with_name("trainer"), learning_rate=rate, seed=seed, disable_tqdm=True, **training)
    trainer = LanguageModelDistillationTrainer(
        student, args, language_model_collator(tokenizer), speaking.train, speaking.heldout,
        objective=OBJECTIVES[row], teacher=model, callbacks=[ReportProgress(add)],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return finish(trainer, start, rate, speaking, tokenizer)


def finish(trainer: Any, start: float, rate: float, speaking: Speaking, tokenizer: Any) -> Trained:
    """ROUGE-L of each column, size, time and the perplexity on the first one's references."""
    model = trainer.model
    perplexity = trainer.evaluate()["eval_perplexity"]
    sampling: dict[str, Any] = {"seeds": speaking.seeds, "max_new_tokens": speaking.new_tokens, "batch_size": 32}
    sampling["max_prompt_length"] = LENGTHS["max_prompt_length"]
    rouge = {name: rouge_of(model, tokenizer, rows, **sampling).mean for name, rows in speaking.tests.items()}
    collate = language_model_collator(tokenizer)
    rows = [
        {"input_ids": collate([row])["input_ids"]}
        for row in speaking.heldout.select(range(min(10, len(speaking.heldout))))
    ]
    sizes = size_and_latency(model.cpu().eval(), rows)
    return {**facts(start, rouge, rate), **sizes, **surroundings(), "perplexity": perplexity}
