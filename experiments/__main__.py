"""``python -m experiments``: train what a table of a paper needs, and report it with verdicts on the paper's claims."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from experiments import decoder, makd, mixkd, mkd, reader
from experiments.options import add_options
from experiments.report import FILES

EXPERIMENTS = {"mkd": mkd, "mixkd": mixkd, "makd": makd, "makd-squad": reader, "makd-decoder": decoder}
EPILOG = """example:
  python -m experiments mkd --model sentence-transformers/all-MiniLM-L6-v2 --output runs/experiments/mkd

docs/experiments.md tells what is trained, how learning rates are chosen and what the files hold."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one experiment; an error of its input ends it with one line on stderr and status 1."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="experiment", required=True)
    for name, module in EXPERIMENTS.items():
        command = commands.add_parser(name, help=module.__doc__)
        add_options(command, module.ROWS, module.EPOCHS)
        module.add_options(command)
    args = parser.parse_args(arguments)
    try:
        table = EXPERIMENTS[args.experiment].run(args)
        if args.keep:
            table.keep()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"experiments {args.experiment}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"experiments {args.experiment}: interrupted; the same command goes on", file=sys.stderr)
        return 130
    tables = [table.folder / file for file in FILES if file.endswith(".md") and (table.folder / file).exists()]
    print("\n".join(path.read_text() for path in tables))
    print(f"table, picture, scores and verdicts are in {table.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
