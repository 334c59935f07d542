"""``fastkd factorize``: make a low-rank student of a model, or show which ranks it would have."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkd.cli.config import CommandParser
from fastkd.cli.methods import add_rank_options, rank_options

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EXAMPLE = """examples:
  fastkd factorize --model runs/teacher --ratio 0.5 --dry-run
  fastkd factorize --model runs/teacher --ratio 0.5 --calibration-texts texts.txt --output runs/student
  fastkd factorize --model openai-community/gpt2 --parameters 66000000 --output runs/gpt2-66m

The linear maps of the layers, the pooler and, where the budget needs it, the word embedding become two factors each by
truncated SVD. With texts, a few hundred such as it will meet, the student keeps most of what the model makes of them
rather than of the weights: it may be of use at once, and learns from a far better start. `fastkd distill makd` does
this itself. The student loads with transformers' Auto classes once fastkd.students is imported; docs/makd.md tells
more."""


def add_parser(subparsers: argparse._SubParsersAction[CommandParser]) -> None:
    parser = subparsers.add_parser(
        "factorize",
        help="make a low-rank student of a model",
        description="Make a low-rank student of a model within a budget of parameters.",
        epilog=EXAMPLE,
    )
    add = parser.add_argument
    add(
        "--model", required=True, help="a folder, or a name on the Hub: a classifier, reader, language model or encoder"
    )
    add("--output", help="folder to save the student to; must be new or empty")
    add("--dry-run", action="store_true", help="show the ranks and change nothing")
    add(
        "--calibration-texts",
        metavar="FILE",
        help="keep most of what the model makes of these: a text a line, or two with a tab between, of 128 tokens "
        "at most (default: most of the weights)",
    )
    add_rank_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.output is None and not args.dry_run:
        raise ValueError("give --output, or --dry-run to see the ranks alone")
    from fastkd.students import factorize, plan_factorization
    from fastkd.training.output import check_output, new_folder
    from fastkd.training.pretrained import find_tokenizer, load_model

    if not args.dry_run:
        check_output(args.output)
    model, tokenizer = load_model(args.model), find_tokenizer(args.model)
    sample = texts_of(args.calibration_texts, model, tokenizer) if args.calibration_texts else None
    plan = plan_factorization(model, **rank_options(args))
    print(plan)
    if args.dry_run:
        return 0
    with new_folder(args.output) as folder:
        factorize(model, plan, sample).save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    print(f"saved to {args.output}" + ("" if tokenizer else f", without a tokenizer: {args.model} has none"))
    return 0


def texts_of(path: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[dict[str, Any]]:
    """The model's inputs of each line of a file that is not empty."""
    from fastkd.training.classifiers import MultiTaskEncoder
    from fastkd.training.positions import positions_of

    if tokenizer is None:
        raise ValueError("--calibration-texts needs a tokenizer, and the model has none")
    lines = [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"--calibration-texts is {path}, which has no text")
    task = {"task": next(iter(model.heads))} if isinstance(model, MultiTaskEncoder) else {}
    options = {"truncation": True, "max_length": min(128, positions_of(model) or 128), "return_tensors": "pt"}
    return [{**tokenizer(*line.split("\t", 1), **options), **task} for line in lines]
