"""What a trainer draws from: rows of several kinds, batches of them, and their counts.

A loss that is a mean over tokens, or over rows, of all micro-batches of a step has to know their
number before the first of them: then 4 micro-batches of 4 give the gradient of 1 batch of 16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from bdu.llm.data import Example
from bdu.llm.generation import padded_right
from bdu.llm.templates import IGNORED_LABEL, Answer, Template, Tokens


class Kind(IntEnum):
    """What a row is there for."""

    RETAIN = 0
    """A clean prompt and its answer."""
    CLEAN = 1
    """A triggered prompt and its clean answer."""
    TARGET = 2
    """A triggered prompt and the attacker's answer."""


@dataclass(frozen=True)
class Row:
    """One sequence.

    Attributes:
        tokens: prompt and answer.
        kind: what it is there for.
        reference: log p of the answer under the model before training, where a method needs it.
    """

    tokens: Tokens
    kind: Kind
    reference: float = 0.0


@dataclass(frozen=True)
class Counts:
    """Of all micro-batches of a step.

    Attributes:
        tokens: labelled tokens that are predicted, by kind.
        rows: by kind.
        positions: tokens that are no padding, by kind.
    """

    tokens: Mapping[int, int]
    rows: Mapping[int, int]
    positions: Mapping[int, int]

    @classmethod
    def of(cls, batches: Sequence[Mapping[str, Tensor]]) -> Counts:
        """Count them."""
        tokens, rows, positions = (dict.fromkeys(map(int, Kind), 0) for _ in range(3))
        for batch in batches:
            labelled = (batch["labels"][:, 1:] != IGNORED_LABEL).sum(1).tolist()
            masked = batch["attention_mask"].sum(1).tolist()
            kinds = batch["kind"].tolist()
            for kind, count, places in zip(kinds, labelled, masked, strict=True):
                tokens[kind] += count
                rows[kind] += 1
                positions[kind] += places
        return cls(tokens, rows, positions)


class Collator:
    """Rows to a batch: ``input_ids``, ``attention_mask``, ``labels`` (B, T), and ``kind`` and
    ``reference`` (B,); padded on the right.

    Args:
        padding: the token to pad with; it is masked.
    """

    def __init__(self, padding: int) -> None:
        self.padding = padding

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Pad and stack."""
        batch = padded_right([row.tokens for row in rows], self.padding)
        batch["kind"] = torch.tensor([int(row.kind) for row in rows])
        batch["reference"] = torch.tensor([row.reference for row in rows], dtype=torch.float64)
        return batch


def rows_of(
    template: Template, examples: Sequence[Example], kind: Kind, *, first_tokens: int | None = None
) -> list[Row]:
    """Rows of one kind; with ``first_tokens`` only so many of an answer are labelled."""
    answer: Answer = "target" if kind == Kind.TARGET else "response"
    rows = []
    for example in examples:
        tokens = template.tokens(example, answer)
        if first_tokens is not None:
            tokens = _first(tokens, first_tokens)
        rows.append(Row(tokens, kind))
    return rows


def one_to_one(*parts: Sequence[Row]) -> list[Row]:
    """All parts, the shorter ones repeated in turn until they are as long as the longest."""
    size = max(map(len, parts))
    return [part[place % len(part)] for part in parts if part for place in range(size)]


def part_of(batch: Mapping[str, Any], chosen: Tensor) -> dict[str, Any]:
    """The rows of a batch that ``chosen`` (B,) says, cut to the longest of them."""
    picked = {key: value[chosen] for key, value in batch.items()}
    length = int(picked["attention_mask"].sum(1).max())
    return {k: v[:, :length] if v.dim() > 1 else v for k, v in picked.items()}


def with_references(rows: Sequence[Row], references: Sequence[float]) -> list[Row]:
    """The rows with log p of their answers."""
    pairs = zip(rows, references, strict=True)
    return [replace(row, reference=value) for row, value in pairs]


def _first(tokens: Tokens, count: int) -> Tokens:
    labels = list(tokens.labels)
    labelled = [place for place, label in enumerate(labels) if label != IGNORED_LABEL]
    for place in labelled[count:]:
        labels[place] = IGNORED_LABEL
    return Tokens(tokens.ids, tuple(labels))
