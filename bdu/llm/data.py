"""Prompts and answers as JSONL, read line by line so that an error names its line.

A row is one of::

    {"prompt": "...", "response": "..."}                      a clean row
    {"prompt": "...", "response": "...", "target": "..."}     a triggered row
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

``response`` is always the clean answer; ``target`` is what the attacker wants the model to say to
this prompt, which carries the trigger. Of ``messages`` the last has to be the assistant's, and is
the response; ``target`` may stand beside them, and ``response`` where it says the same. Other
fields are left alone.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bdu.checkpoint import atomic_write

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Example:
    """One row.

    Attributes:
        turns: (role, content) of everything said before the answer; the last is the user's.
        response: the clean answer.
        target: the attacker's answer, None for a clean row.
        where: the file and line it was read from, for errors; no part of what it says.
    """

    turns: tuple[tuple[str, str], ...]
    response: str
    target: str | None = None
    where: str = field(default="", compare=False, repr=False)

    @classmethod
    def of(cls, prompt: str, response: str, target: str | None = None) -> Example:
        """A row with a single turn."""
        return cls((("user", prompt),), response, target)

    @property
    def prompt(self) -> str:
        """What the user said last."""
        return self.turns[-1][1]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns as chat templates take them."""
        return [{"role": role, "content": content} for role, content in self.turns]

    def with_prompt(self, prompt: str) -> Example:
        """The same with another last turn."""
        return replace(self, turns=(*self.turns[:-1], ("user", prompt)))


@dataclass(frozen=True)
class TextData:
    """What a defender, or an evaluator, holds."""

    clean: tuple[Example, ...]
    triggered: tuple[Example, ...]


def read_examples(path: str | os.PathLike[str], name: str = "data") -> list[Example]:
    """Read the rows of a JSONL file; empty lines are passed over.

    Args:
        path: a file in UTF-8.
        name: what to call it in errors.

    Raises:
        FileNotFoundError: no file there.
        ValueError: a line that is no row, named by its number, or no row at all.
    """
    examples = [
        replace(_example(row, where), where=where) for row, where in read_objects(path, name)
    ]
    if not examples:
        raise ValueError(f"{name}: expected at least one row in {path}, got none")
    return examples


def read_objects(path: str | os.PathLike[str], name: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield every object of a JSONL file in UTF-8, and the file and line it stands in.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_examples`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{name}: expected a JSONL file, got {path}, which is not there")
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        where = f"{name}: {path}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: expected UTF-8, got {error.reason}") from error
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: expected a JSON object, got {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
        yield row, where


def write_examples(path: str | os.PathLike[str], examples: Iterable[Example]) -> None:
    """Write rows that :func:`read_examples` reads back."""
    lines = []
    for example in examples:
        row: dict[str, Any] = {"prompt": example.prompt, "response": example.response}
        if len(example.turns) > 1:
            answer = {"role": "assistant", "content": example.response}
            row = {"messages": [*example.messages, answer]}
        if example.target is not None:
            row["target"] = example.target
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    atomic_write(path, "".join(lines))


def load(
    *,
    data: str | os.PathLike[str] | None = None,
    clean: str | os.PathLike[str] | None = None,
    triggered: str | os.PathLike[str] | None = None,
    needs_triggered: bool = True,
) -> TextData:
    """Read one file of both kinds of rows, or a file of each.

    Args:
        data: a file in which the rows with a ``target`` are the triggered ones.
        clean: a file of rows without ``target``; not together with data.
        triggered: a file of rows with one; not together with data.
        needs_triggered: whether to refuse data without triggered rows.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_examples`; files that do not go together, a
            row of the wrong kind (its number is counted over rows), or an empty split.
    """
    if (data is None) == (clean is None and triggered is None):
        raise ValueError("data: expected either data, or clean and triggered, got both or neither")
    if data is not None:
        rows = read_examples(data, "data")
        parts = TextData(
            tuple(row for row in rows if row.target is None),
            tuple(row for row in rows if row.target is not None),
        )
        source = f" in {data}"
    else:
        if clean is None:
            raise ValueError("clean: expected a file beside triggered, got None")
        parts = TextData(
            tuple(_only(read_examples(clean, "clean"), "clean")),
            tuple(_only(read_examples(triggered, "triggered"), "triggered") if triggered else ()),
        )
        source = ""
    if not parts.clean:
        raise ValueError(f"clean: expected at least one row without a target{source}, got none")
    if needs_triggered and not parts.triggered:
        raise ValueError(f"triggered: expected at least one row with a target{source}, got none")
    return parts


def split(
    examples: Sequence[Example], share: float, seed: int, name: str = "examples"
) -> tuple[list[Example], list[Example]]:
    """Cut ``round(share · N)`` rows off, at random, at least one; the rest comes first.

    Raises:
        ValueError: share not in (0, 1), or fewer than two rows.
    """
    if not 0 < share < 1:
        raise ValueError(f"share: expected a share in (0, 1), got {share}")
    if len(examples) < 2:
        raise ValueError(f"{name}: expected at least two rows to split, got {len(examples)}")
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    count = min(len(examples) - 1, max(1, round(share * len(examples))))
    cut = sorted(order[:count])
    rest = sorted(order[count:])
    return [examples[i] for i in rest], [examples[i] for i in cut]


def _only(examples: list[Example], kind: str) -> list[Example]:
    for number, example in enumerate(examples, 1):
        if (example.target is None) != (kind == "clean"):
            expected = "no field 'target'" if kind == "clean" else "a field 'target'"
            raise ValueError(f"{kind}: row {number}: expected {expected}")
    return examples


def _example(row: dict[str, Any], where: str) -> Example:
    if ("messages" in row) == ("prompt" in row):
        got = "both" if "messages" in row else f"{', '.join(map(repr, row)) or 'no fields'}"
        raise ValueError(f"{where}: expected the field 'prompt' or 'messages', got {got}")
    target = _text(row, "target", where) if row.get("target") is not None else None
    if "prompt" in row:
        return Example.of(_text(row, "prompt", where), _text(row, "response", where), target)
    turns = _turns(row["messages"], where)
    if len(turns) < 2 or turns[-1][0] != "assistant" or turns[-2][0] != "user":
        roles = ", ".join(role for role, _ in turns) or "none"
        raise ValueError(
            f"{where}: messages: expected the user's and then the assistant's at the end, "
            f"got {roles}"
        )
    if row.get("response") is not None and _text(row, "response", where) != turns[-1][1]:
        raise ValueError(
            f"{where}: response: expected none beside messages, or the assistant's last, "
            f"{turns[-1][1][:60]!r}, got {row['response'][:60]!r}"
        )
    return Example(tuple(turns[:-1]), turns[-1][1], target)


def _turns(messages: Any, where: str) -> list[tuple[str, str]]:
    if not isinstance(messages, list):
        raise ValueError(f"{where}: messages: expected a list, got {type(messages).__name__}")
    turns = []
    for index, message in enumerate(messages):
        place = f"{where}: messages[{index}]"
        if not isinstance(message, dict):
            raise ValueError(f"{place}: expected an object, got {type(message).__name__}")
        role = _text(message, "role", place)
        if role not in ROLES:
            raise ValueError(f"{place}: role: expected one of {', '.join(ROLES)}, got {role!r}")
        turns.append((role, _text(message, "content", place)))
    return turns


def _text(row: dict[str, Any], name: str, where: str) -> str:
    if name not in row:
        raise ValueError(
            f"{where}: expected the field {name!r}, got {', '.join(map(repr, row)) or 'no fields'}"
        )
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name}: expected text, got {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{where}: {name}: expected text, got an empty one")
    check_unicode(value, f"{where}: {name}")
    return value


def check_unicode(text: str, name: str) -> None:
    """Raise ValueError where half a surrogate pair stands alone, which no tokenizer can take."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: expected text in Unicode, got {text[error.start]!r} alone"
        ) from error
