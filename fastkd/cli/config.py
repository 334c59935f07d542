"""``--config FILE``: the options of a command from a YAML file, and back into one."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastkd import __version__

RECORD = "options.yaml"
_NOT_OPTIONS = ("help", "config", "run", "command", "method")


class CommandParser(argparse.ArgumentParser):
    """A command's parser; with ``takes_config`` it also reads the command's options from a YAML file.

    The file's options are put in front of the flags, so a flag wins and both are checked alike.
    """

    def __init__(self, *, takes_config: bool = False, **options: Any) -> None:
        super().__init__(**options, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.takes_config = takes_config
        self.config_file: str | None = None
        if takes_config:
            self.add_argument("--config", metavar="FILE", help="YAML file of these options (`epochs: 4`); flags win")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        if not self.takes_config:
            return super().parse_known_args(args, namespace)
        finder = argparse.ArgumentParser(add_help=False)
        finder.add_argument("--config")
        self.config_file = finder.parse_known_args(args)[0].config
        flags = [] if self.config_file is None else self._flags(self.config_file, args)
        return super().parse_known_args([*flags, *args], namespace)

    def error(self, message: str) -> Any:
        super().error(message if self.config_file is None else f"{message} (options in {self.config_file} included)")

    def _flags(self, path: str, args: Sequence[str]) -> list[str]:
        """Those of the file, but what a flag among ``args`` excludes, as --rank does a ratio."""
        given = {arg.partition("=")[0] for arg in args}
        groups = [{o for a in g._group_actions for o in a.option_strings} for g in self._mutually_exclusive_groups]
        excluded = {option for options in groups if options & given for option in options}
        try:
            options = read_options(path).items()
            return [self._flag(key, ",".join(values)) for key, values in options if f"--{key}" not in excluded]
        except (ValueError, OSError) as error:
            self.config_file = None
            self.error(f"argument --config: {error}")
            raise

    def _flag(self, key: str, value: str) -> str:
        switches = {
            option.removeprefix("--"): action.nargs == 0
            for option, action in self._option_string_actions.items()
            if option.startswith("--") and action.dest not in _NOT_OPTIONS
        }
        if key not in switches:
            nearest = difflib.get_close_matches(key, switches, n=1, cutoff=0)[0]
            raise ValueError(f"{self.config_file}: unknown option {key!r}; the nearest known one is {nearest!r}")
        if not switches[key]:
            return f"--{key}={value}"
        if value not in ("true", "false"):
            raise ValueError(f"{self.config_file}: {key} must be true or false, not {value!r}")
        opposite = key.removeprefix("no-") if key.startswith("no-") else f"no-{key}"
        return f"--{key if value == 'true' else opposite}"


def read_options(path: str | Path) -> dict[str, list[str]]:
    """The values of a file's options by the names of their flags, as the text they are written with.

    Raises:
        ValueError: the file is no YAML mapping from names to a value or a list of values, or names an option twice.
        OSError: the file cannot be read.
    """
    import yaml

    try:
        content = yaml.compose(Path(path).read_text(encoding="utf-8"), yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, yaml.MappingNode):
        raise ValueError(f"{path} must hold options, one `name: value` per line")
    options: dict[str, list[str]] = {}
    for name, value in content.value:
        key = str(name.value).replace("_", "-")
        if key in options:
            raise ValueError(f"{path} gives {key} twice")
        # Nodes keep a scalar as it is written, as a command line does: a value of YAML's would make 1e-4 a string.
        items = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if not items or not all(_is_value(item) for item in items):
            raise ValueError(f"{path}: {key} must have a value or a list of values")
        options[key] = [item.value for item in items]
    return options


def _is_value(node: Any) -> bool:
    """Of YAML: a scalar, but neither empty nor null."""
    return isinstance(node.value, str) and node.value != "" and node.tag != "tag:yaml.org,2002:null"


def write_options(folder: str | Path, command: str, options: Mapping[str, Any]) -> None:
    """Writes ``options.yaml``, which repeats the run when given as ``--config``."""
    import yaml

    from fastkd.training.runs import write_text

    used = {name.replace("_", "-"): value for name, value in options.items() if value is not None}
    kept = {name: _plain(value) for name, value in used.items() if name not in _NOT_OPTIONS}
    text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    write_text(Path(folder) / RECORD, f"# fastkd {command}, version {__version__}\n{text}")


def _plain(value: Any) -> Any:
    """Settings as the text they are given by."""
    return ",".join(f"{name}={each}" for name, each in value.items()) if isinstance(value, Mapping) else value


def comma_separated(option: str, text: str) -> list[str]:
    """The parts of a comma-separated option; a ``ValueError`` names one that is empty or given twice."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts) or len(set(parts)) < len(parts):
        raise ValueError(f"{option} is {text!r}; it must be different names separated by commas")
    return parts
