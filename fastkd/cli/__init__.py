"""The command line: ``fastkd <command>``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from fastkd import __version__
from fastkd.cli.config import CommandParser

COMMANDS = ("teacher", "factorize", "distill", "finetune", "export", "predict")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; an error of its input ends it with one line on stderr and status 1."""
    parser = argparse.ArgumentParser(prog="fastkd", description="Distil language models with fused kernels.")
    parser.add_argument("--version", action="version", version=f"fastkd {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=CommandParser)
    for command in COMMANDS:
        import_module(f"fastkd.cli.{command}").add_parser(subparsers)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"fastkd {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"fastkd {args.command}: interrupted", file=sys.stderr)
        return 130
