"""``fastkd factorize``: make a low-rank student of a model, or show which ranks it would have."""

from __future__ import annotations

import argparse

from fastkd.cli.config import CommandParser
from fastkd.cli.methods import add_rank_options, rank_options

EXAMPLE = """examples:
  fastkd factorize --model runs/teacher --ratio 0.5 --dry-run
  fastkd factorize --model openai-community/gpt2 --parameters 66000000 --output runs/gpt2-66m

The linear maps of the layers, the pooler and, where the budget needs it, the word embedding become two factors each by
truncated SVD. `fastkd distill makd` does this itself. The student loads with transformers' Auto classes once
fastkd.students is imported; docs/makd.md tells more."""


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
    add_rank_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.output is None and not args.dry_run:
        raise ValueError("give --output, or --dry-run to see the ranks alone")
    from fastkd.students import factorize, plan_factorization
    from fastkd.training.output import check_output, new_folder
    from fastkd.training.pretrained import load_model, load_tokenizer

    if not args.dry_run:
        check_output(args.output)
    model = load_model(args.model)
    plan = plan_factorization(model, **rank_options(args))
    print(plan)
    if args.dry_run:
        return 0
    with new_folder(args.output) as folder:
        factorize(model, plan).save_pretrained(folder)
        tokenizer = load_tokenizer(args.model)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    print(f"saved to {args.output}" + ("" if tokenizer else f", without a tokenizer: {args.model} has none"))
    return 0
