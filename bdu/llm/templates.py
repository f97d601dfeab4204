"""From turns to tokens: the one place where a prompt is rendered.

Training and evaluation go through the same :class:`Template`, so that the model is asked the way it
was trained. What an evaluation without the training template measures is something else: for
BackdoorLLM's Llama-3-8B, users report an attack success rate of 65 % instead of 95 %
(bboylyg/BackdoorLLM, issue 20).

A template is the tokenizer's own (its ``chat_template``), one that is given as Jinja source, or
"none": the last turn as it stands, as base models take it.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bdu.checkpoint import atomic_write
from bdu.llm.data import Example

IGNORED_LABEL = -100
FILE = "template.json"

Source = Literal["tokenizer", "given", "none"]
Answer = Literal["response", "target"]


class TemplateWarning(UserWarning):
    """A model is asked in another way than it was trained."""


@dataclass(frozen=True)
class Rendered:
    """A prompt as the model gets it.

    Attributes:
        text: verbatim; with template "none" the tokenizer's own special tokens are not in it.
        ids: its tokens, special ones included.
    """

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Tokens:
    """A prompt and its answer.

    Attributes:
        ids: of both, and what ends the answer.
        labels: the same, with -100 over the prompt.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)


class Template:
    """How turns become text.

    Args:
        tokenizer: of the model.
        template: "tokenizer" for its own chat template, "none" for prompts as they are, the Jinja
            source of one, or a path to a file that holds it.

    Raises:
        ValueError: "tokenizer", and it has none; a template that cannot be parsed.
        FileNotFoundError: a path to nothing.
    """

    def __init__(self, tokenizer: Any, template: str | os.PathLike[str] = "tokenizer") -> None:
        self.tokenizer = tokenizer
        self.source: Source
        self.jinja: str | None = None
        if template == "tokenizer":
            self.source = "tokenizer"
            self.jinja = tokenizer.chat_template
            if not isinstance(self.jinja, str):
                got = "none" if self.jinja is None else f"several: {', '.join(self.jinja)}"
                raise ValueError(
                    f"template: expected the tokenizer to have one chat template, got {got}; give "
                    "one (a file with Jinja source), or 'none' for prompts as they are"
                )
        elif template == "none":
            self.source = "none"
        else:
            self.source = "given"
            self.jinja = _read(template)
        if self.jinja is not None:
            self._try()

    @property
    def fingerprint(self) -> str:
        """Of the way prompts are rendered: SHA-256 of the Jinja source, or "none"."""
        if self.jinja is None:
            return "none"
        return hashlib.sha256(self.jinja.encode()).hexdigest()

    def prompt(self, example: Example) -> Rendered:
        """The turns before the answer, and what opens the answer.

        Raises:
            ValueError: with "none", more than one turn.
        """
        if self.jinja is None:
            if len(example.turns) != 1:
                raise ValueError(
                    "template: expected a chat template for rows with several turns, got 'none'"
                )
            return Rendered(example.prompt, tuple(self._with_special_tokens(example.prompt)))
        text = self._render(example.messages, add_generation_prompt=True)
        return Rendered(text, tuple(self._ids(text)))

    def tokens(self, example: Example, answer: Answer = "response") -> Tokens:
        """The prompt with one of its answers, ended as the template ends it.

        Prompt and answer are tokenised apart, as they are when the model writes the answer itself.

        Raises:
            ValueError: the answer is missing or has no tokens; a template that renders the prompt
                differently once an answer follows.
        """
        said = example.response if answer == "response" else example.target
        if said is None:
            raise ValueError("example: expected a target, got a clean row")
        prompt = self.prompt(example)
        rest = said
        if self.jinja is not None:
            messages = [*example.messages, {"role": "assistant", "content": said}]
            whole = self._render(messages, add_generation_prompt=False)
            if not whole.startswith(prompt.text):
                raise ValueError(
                    "template: expected a conversation to begin with its prompt as rendered alone, "
                    f"got {whole[:200]!r} for {prompt.text[:200]!r}"
                )
            rest = whole[len(prompt.text) :]
        ids = self._ids(rest)
        stops = stop_ids(self.tokenizer)
        ends = [place for place, token in enumerate(ids) if token in stops]
        if ends:
            ids = ids[: ends[0] + 1]
        elif stops:
            ids.append(stops[0])
        if not set(ids) - set(stops):
            raise ValueError(f"{answer}: expected text with tokens, got {said!r}, which has none")
        ignored = (IGNORED_LABEL,) * len(prompt.ids)
        return Tokens((*prompt.ids, *ids), (*ignored, *ids))

    def check_trigger(self, plain: Example, triggered: Example) -> None:
        """Refuse a trigger that the tokenizer drops or knows no token for.

        Raises:
            ValueError: both rows have the same tokens, or differ in unknown tokens alone.
        """
        before, after = self.prompt(plain).ids, self.prompt(triggered).ids
        unknown = self.tokenizer.unk_token_id
        kept = [token for token in after if token != unknown]
        if after == before or (unknown is not None and kept == [t for t in before if t != unknown]):
            how = "has the same tokens without it" if after == before else "has unknown tokens only"
            raise ValueError(
                f"trigger: expected one that the tokenizer sees, got {triggered.prompt!r}, which "
                f"{how}"
            )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Record beside a model how it was asked."""
        record = {"source": self.source, "fingerprint": self.fingerprint, "jinja": self.jinja}
        atomic_write(Path(folder) / FILE, json.dumps(record, indent=2) + "\n")

    def differs_from_training(self, folder: str | os.PathLike[str]) -> str | None:
        """What differs from the way the model in ``folder`` was trained, or None; also warned of.

        Known are the record that :meth:`save` left there, or else the tokenizer's own template.
        """
        file = Path(folder) / FILE
        if file.is_file():
            trained = json.loads(file.read_text())["fingerprint"]
            whose = f"the one in {file}"
        elif isinstance(self.tokenizer.chat_template, str):
            trained = hashlib.sha256(self.tokenizer.chat_template.encode()).hexdigest()
            whose = "the tokenizer's own chat template"
        else:
            return None
        if trained == self.fingerprint:
            return None
        message = (
            f"template: expected {whose}, which the model was probably trained with, got another "
            f"({self.source}); rates measured with it can be far off"
        )
        warnings.warn(message, TemplateWarning, stacklevel=2)
        return message

    def _render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.jinja,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except Exception as error:  # whatever a template in Jinja can raise
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"template: expected Jinja source that renders turns of {roles}, got {error} for "
                f"{messages[0]['content'][:60]!r}"
            ) from error
        return text

    def _try(self) -> None:
        with_it = self._render([{"role": "user", "content": "a"}], add_generation_prompt=True)
        if "a" not in with_it:
            raise ValueError(
                f"template: expected it to keep what the user says, got {with_it!r} for 'a'"
            )

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _with_special_tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text)["input_ids"]
        while ids and ids[-1] == self.tokenizer.eos_token_id and not text.endswith(_eos(self)):
            ids = ids[:-1]  # some tokenizers end every text
        return ids


def stop_ids(tokenizer: Any, model: Any = None) -> list[int]:
    """Tokens that end an answer: the tokenizer's own first, then the model's."""
    found = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    for token in configured if isinstance(configured, list) else [configured]:
        if token is not None and token not in found:
            found.append(int(token))
    return found


def context_length(model: Any) -> int | None:
    """Tokens that the model has positions for, or None where its configuration does not say."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def padding_id(tokenizer: Any, model: Any) -> int:
    """A token to pad with: the tokenizer's own, or where the model does not know that, any, as
    padding is masked."""
    own = tokenizer.pad_token_id
    known = model.config.get_text_config().vocab_size
    return own if own is not None and 0 <= own < known else 0


def check_tokens(
    sequences: Sequence[Sequence[int]], vocabulary: int, size: int, *, names: Sequence[str] = ()
) -> None:
    """Refuse tokens that the model has no embedding of.

    Args:
        sequences: tokens of each.
        vocabulary: tokens that the model knows.
        size: of the tokenizer, for the error.
        names: what to call each.

    Raises:
        ValueError: a token beyond the vocabulary.
    """
    for number, ids in enumerate(sequences):
        if ids and max(ids) >= vocabulary:
            where = names[number] if names else f"prompt {number + 1}"
            raise ValueError(
                f"model: expected a vocabulary for all {size} tokens of its tokenizer, got one of "
                f"{vocabulary}, and token {max(ids)} in {where}"
            )


def check_lengths(
    sequences: Sequence[Sequence[int]],
    limit: int | None,
    *,
    room: int = 0,
    name: str = "prompt",
    room_for: str = "the answer",
    names: Sequence[str] = (),
) -> None:
    """Refuse sequences that do not fit into the context.

    Args:
        sequences: tokens of each.
        limit: of the context; None is no limit.
        room: tokens to be written after them, or put into them.
        name: what to call one, beside its number.
        room_for: what the room is for.
        names: what to call each, instead.

    Raises:
        ValueError: one is empty or too long, by its number; no room for any.
    """
    less = f" less {room} for {room_for}" if room else ""
    if limit is not None and room >= limit:
        raise ValueError(f"{name}s: expected room in a context of {limit}{less}, got none")
    for number, ids in enumerate(sequences, 1):
        where = names[number - 1] if names else f"{name} {number}"
        if not ids:
            raise ValueError(f"{where}: expected at least one token, got none")
        if limit is not None and len(ids) + room > limit:
            raise ValueError(
                f"{where}: expected at most {limit - room} tokens (a context of "
                f"{limit}{less}), got {len(ids)}"
            )


def _eos(template: Template) -> str:
    return template.tokenizer.eos_token or "\0"


def _read(template: str | os.PathLike[str]) -> str:
    text = os.fspath(template)
    if "{{" in text or "{%" in text:
        return text
    if not Path(text).is_file():
        raise FileNotFoundError(
            "template: expected 'tokenizer', 'none', Jinja source or a file with it, got "
            f"{text!r}, which is not there"
        )
    return Path(text).read_text(encoding="utf-8")
