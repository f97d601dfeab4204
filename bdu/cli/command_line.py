"""Reads the command line, or a YAML file that flags win over, and calls the command."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml

from bdu import __version__
from bdu.cli import audit, demo, doctor, evaluate, fisher, poison, report, unlearn, unlearn_lm
from bdu.runs import DATA, STARTED_IN

COMMANDS = {
    "demo": demo,
    "poison": poison,
    "unlearn": unlearn,
    "unlearn-lm": unlearn_lm,
    "audit": audit,
    "evaluate": evaluate,
    "fisher": fisher,
    "report": report,
    "doctor": doctor,
}


# Told in one line.
_TOLD = (
    *(OSError, ValueError, TypeError, ImportError, FloatingPointError),
    *(RuntimeError, MemoryError),
)


# Files that there is nothing in to go on from.
_NO_STATE = {"config.yaml", "metrics.jsonl", "attention.npz", "seconds.json"}


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(
        prog="bdu", description="Remove backdoors from neural networks by unlearning."
    )
    top.add_argument("--version", action="version", version=f"bdu {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").strip().splitlines()[0]
        command = commands.add_parser(
            name, prog=f"bdu {_called(name)}", help=summary, description=module.__doc__
        )
        command.add_argument(
            "--config", type=Path, metavar="FILE", help="YAML with any of these; flags win"
        )
        module.add_arguments(command)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 1 on an error that is told in one line."""
    arguments = _for_task(list(sys.argv[1:] if arguments is None else arguments))
    top = parser()
    options = _with_config(top, arguments)
    try:
        COMMANDS[options.command].run(options)
    except _TOLD as error:
        if options.traceback:
            raise
        print(f"bdu {_called(options.command)}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        hint = ""
        if hasattr(options, "resume"):
            kept = {file.name for file in Path(options.out).glob("*")} - _NO_STATE
            what = "continue" if kept else "nothing was kept yet, start over"
            hint = f"; {what} with --resume --out {options.out}"
        print(f"bdu {_called(options.command)}: interrupted{hint}", file=sys.stderr)
        return 130
    return 0


def _called(command: str) -> str:
    """As it is typed."""
    return command.removesuffix("-lm")


def _for_task(arguments: list[str]) -> list[str]:
    """``unlearn`` of a language model has flags of its own, and a parser: ``unlearn-lm``."""
    pre = argparse.ArgumentParser(add_help=False)
    pre.add_argument("--task")
    task, file = pre.parse_known_args(arguments)[0].task, _config_file(arguments)
    if task is None and file is not None and file.is_file():
        with contextlib.suppress(yaml.YAMLError, UnicodeDecodeError):  # told of later
            values = yaml.safe_load(file.read_text())
            task = values.get("task") if isinstance(values, dict) else None
    if arguments[:1] == ["unlearn"] and task == "lm":
        return ["unlearn-lm", *arguments[1:]]
    return arguments


def _with_config(top: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    # The file's values become defaults, so that flags win and required flags may stand in it.
    file = _config_file(arguments)
    if file is not None and arguments:
        command = next((a for a in arguments if a in COMMANDS), None)
        if command is not None:
            # flags that may be repeated would be added to those of the run
            leave_out = {"set"} if file != _given_config(arguments) and _sets(arguments) else set()
            _set_defaults(top, command, file, leave_out)
    return top.parse_args(arguments)


def _sets(arguments: Sequence[str]) -> bool:
    return any(a == "--set" or a.startswith("--set=") for a in arguments)


def _given_config(arguments: Sequence[str]) -> Path | None:
    pre = argparse.ArgumentParser(add_help=False)
    pre.add_argument("--config", type=Path)
    given: Path | None = pre.parse_known_args(arguments)[0].config
    return given


def _config_file(arguments: Sequence[str]) -> Path | None:
    """What is given, or else the settings of the run that is to go on."""
    given = _given_config(arguments)
    if given is not None or "--resume" not in arguments:
        return given
    pre = argparse.ArgumentParser(add_help=False)
    pre.add_argument("--out", type=Path)
    out = pre.parse_known_args(arguments)[0].out
    file = None if out is None else out / "config.yaml"
    return file if file is not None and file.is_file() else None


def _set_defaults(
    top: argparse.ArgumentParser, command: str, file: Path, leave_out: Collection[str] = ()
) -> None:
    try:
        values: Any = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        top.error(f"--config: {' '.join(str(error).split())}")
    if not isinstance(values, dict):
        top.error(f"--config: expected names and values in {file}, got {type(values).__name__}")
    commands = next(a for a in top._actions if isinstance(a, argparse._SubParsersAction))
    chosen = commands.choices[command]
    known = {action.dest: action for action in chosen._actions if action.dest != "help"}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in (STARTED_IN, DATA) or name in leave_out:
            continue
        if name == "command":
            if value != command and f"{value}-lm" != command:
                top.error(f"--config: {file} is of bdu {value}, got bdu {command}")
            continue
        if name not in known:
            top.error(f"--config: expected one of {', '.join(sorted(known))}, got {key!r}")
        action = known[name]
        if value is not None and action.choices is not None and value not in action.choices:
            top.error(f"--config: {key}: expected one of {list(action.choices)}, got {value!r}")
        action.required = False
        # argparse converts defaults only where they are text
        plain = value is None or isinstance(value, (bool, list, dict))
        action.default = value if plain else str(value)
