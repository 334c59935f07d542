"""Every option of every command says what it is, and of each of its choices what that does."""

import argparse
import re
from importlib import import_module

import pytest

from fastkd.cli import COMMANDS
from fastkd.cli.config import CommandParser


def commands(parser, name):
    """The parser of a command and those of its own, by their names."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        return {name: parser}
    return {n: p for action in inner for each, sub in action.choices.items() for n, p in commands(sub, each).items()}


def options():
    subparsers = argparse.ArgumentParser().add_subparsers(parser_class=CommandParser)
    for command in COMMANDS:
        import_module(f"fastkd.cli.{command}").add_parser(subparsers)
    for command, parser in subparsers.choices.items():
        for name, own in commands(parser, command).items():
            yield from (pytest.param(action, id=f"{name} {action.dest}") for action in own._actions)


@pytest.mark.parametrize("action", options())
def test_the_help_says_what_the_option_is(action):
    assert action.help
    assert not action.help.startswith("default")
    for choice in action.choices or ():
        assert re.search(rf"\b{choice}(,|:| is) ", action.help), f"{choice} is not told of"
