"""Argument types that say what a value must be."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

Number = TypeVar("Number", int, float)


def fraction(text: str) -> float:
    """Parses a number above 0 and at most 1."""
    value = positive(float)(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be at most 1")
    return value


def positive(kind: Callable[[str], Number]) -> Callable[[str], Number]:
    """Parses a number > 0, for ``ArgumentParser.add_argument(type=…)``."""

    def parse(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = kind("0")
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} must be a positive number")
        return value

    return parse


def numbers(kind: Callable[[str], Number]) -> Callable[[str], list[Number]]:
    """Parses numbers separated by commas."""

    def parse(text: str) -> list[Number]:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} must be numbers separated by commas") from error

    return parse


def settings(text: str) -> dict[str, int | float | str]:
    """Parses names with their values, ``alpha=0.7,layers=skip``."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name.strip() and value.strip() for name, _, value in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} must be name=value, separated by commas")
    return {name.strip(): _value(value.strip()) for name, _, value in pairs}


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
