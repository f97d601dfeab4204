"""What a language model said to the same prompts before and after, as a part of the report."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHOWN = 12  # prompts of a kind

_KINDS = {
    "triggered": "With the trigger",
    "planted": "With the trigger that the defender planted",
    "clean": "Without a trigger",
}
_STAGES = {"before": "before", "after": "after"}
_STAGES_PLANTED = {"planted": "before removal", "after": "after removal"}


def answers_section(file: Path) -> str:
    """A table of prompts, verbatim as they were rendered, and both answers; "" without a file.

    Args:
        file: ``answers.jsonl``: a line an answer, of stage ("before", "planted", "after"), kind
            ("triggered", "planted", "clean"), prompt and answer; and what was expected, which runs
            of earlier versions did not write.
    """
    if not file.exists():
        return ""
    said: dict[tuple[str, str], dict[str, str]] = {}
    expected: dict[tuple[str, str], str] = {}
    for record in _records(file):
        key = (str(record["kind"]), str(record["prompt"]))
        said.setdefault(key, {})[str(record["stage"])] = str(record["answer"])
        if record.get("expected") is not None:
            expected[key] = str(record["expected"])
    parts = []
    for kind, title in _KINDS.items():
        stages = _STAGES_PLANTED if kind == "planted" else _STAGES
        rows = [
            [key[1], expected.get(key, "–"), *(answers.get(stage, "–") for stage in stages)]
            for key, answers in said.items()
            if key[0] == kind
        ]
        if rows:
            parts.append(_table(title, ["prompt", "expected", *stages.values()], rows))
    if not parts:
        return ""
    return (
        "<h2>What it was asked, and what it said</h2>"
        '<p class="soft">Prompts as the model was given them, every token of the template '
        "included; greedy answers. All of them are in answers.jsonl.</p>" + "".join(parts)
    )


def _records(file: Path) -> Iterator[dict[str, Any]]:
    # Not splitlines: an answer may hold other characters that end a line.
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            needed = {name: record[name] for name in ("stage", "kind", "prompt", "answer")}
            yield {**needed, "expected": record.get("expected")}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file}: expected an answer with its prompt in line {number}, got {line[:60]!r}"
            ) from error


def _table(title: str, columns: list[str], of_kind: list[list[str]]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in columns)
    rows = []
    for cells in of_kind[:SHOWN]:
        texts = "".join(f'<td class="said">{html.escape(cell)}</td>' for cell in cells)
        rows.append(f"<tr>{texts}</tr>")
    more = len(of_kind) - SHOWN
    rest = f'<p class="soft">And {more} more.</p>' if more > 0 else ""
    return (
        f'<h3>{title}</h3><div class="wide"><table class="answers"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{rest}"
    )
