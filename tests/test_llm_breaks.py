"""What a run must refuse before it writes anything, and what it must tell instead of guessing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from bdu.llm import inductive
from bdu.llm.data import Example, read_examples
from bdu.llm.inductive import Audit, read_probes


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


# The audit's verdicts


def audited(**groups):
    """Groups by their role, of (hits, prompts)."""
    hits = {role: [i < count for i in range(of)] for role, (count, of) in groups.items()}
    return Audit(inductive._groups(hits, {role: role for role in groups}), ())


def test_nothing_asked_is_not_nothing_found():
    found = audited(control=(0, 50), trigger=(20, 20))
    assert (found.verdict("trigger"), found.verdict("unseen")) == ("found", "not asked")
    assert found.inductive is None
    assert found.record()["verdicts"] == {"trigger": "found", "unseen": "not asked"}
    assert audited(control=(0, 50), unseen=(0, 20)).verdict("unseen") == "not found"


@pytest.mark.parametrize("hits", [0, 1, 2])
def test_of_two_prompts_nothing_is_told(hits):
    found = audited(control=(0, 1000), unseen=(hits, 2))
    assert found.inductive is None
    assert found.verdict("unseen") == "too few prompts to tell"


def test_few_controls_beside_many_prompts_tell_nothing():
    assert audited(control=(0, 20), unseen=(200, 200)).inductive is None
    assert audited(control=(0, 100), unseen=(200, 200)).inductive is True


def test_where_controls_behave_so_nearly_always_nothing_is_told():
    assert audited(control=(95, 100), unseen=(10, 10)).inductive is None


@pytest.mark.parametrize(("prompts", "controls"), [(4, 400), (5, 60), (7, 12), (60, 20), (90, 20)])
def test_finds_by_chance_are_counted_exactly(prompts, controls):
    def chance(rate):
        def binomial(hits, count):
            return math.comb(count, hits) * rate**hits * (1 - rate) ** (count - hits)

        total = 0.0
        for own in range(prompts + 1):
            for other in range(controls + 1):
                error = math.sqrt(
                    inductive._variance(own, prompts) + inductive._variance(other, controls)
                )
                if own / prompts - other / controls > 3 * error:
                    total += binomial(own, prompts) * binomial(other, controls)
        return total

    worst = max(chance(percent / 100) for percent in range(1, 21))
    assert abs(worst - 0.01) > 1e-4  # the grid of rates is finer there
    assert inductive.enough(prompts, controls) == (worst <= 0.01)
