"""What a run must refuse before it writes anything, and what it must tell instead of guessing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from bdu.llm.data import Example, read_examples
from bdu.llm.inductive import read_probes


def jsonl(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def probe(prompt, group="a", role="control"):
    return {"prompt": prompt, "group": group, "role": role, "accept": ["x"]}


# What is read


def test_probes_are_read_as_rows_are(tmp_path):
    file = jsonl(tmp_path / "p.jsonl", probe("one\u2028line"), probe("b", "u", "unseen"))
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_probes(file)[0].prompt == "one\u2028line"
    file.write_bytes(b"{\xe9}")
    with pytest.raises(ValueError, match="line 1: expected UTF-8"):
        read_probes(file)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a \\ud800", "response": "b"}', r"line 2: prompt: .* got '\\ud800' alone"),
        ("[" * 200_000, "line 2: expected a JSON object"),
        (
            '{"messages": [{"role": "user", "content": "a"}, '
            '{"role": "assistant", "content": "b"}], "response": "c"}',
            "line 2: response: expected none beside messages, or the assistant's last, 'b'",
        ),
    ],
)
def test_rows_that_cannot_be_meant_are_named(tmp_path, line, message):
    file = tmp_path / "d.jsonl"
    file.write_text('{"prompt": "a", "response": "b"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_examples(file)


def test_rows_know_their_line_and_are_equal_without_it(tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text('\n{"prompt": "a", "response": "b"}\n')
    (row,) = read_examples(file)
    assert row.where == f"data: {file}, line 2"
    assert row.with_prompt("c").where == row.where
    assert row == Example.of("a", "b")
