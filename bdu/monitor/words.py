"""The outcome of a run in words, and what its rates mean."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from bdu.monitor.page import percent
from bdu.monitor.record import Record

RATES = {
    "clean_accuracy": ("Clean accuracy", "clean test images called by their class"),
    "attack_success_rate": (
        "Attack success rate (ASR)",
        "images with the trigger, whose class is not the target, called the target",
    ),
    "robust_accuracy": (
        "Robust accuracy",
        "the same images with the trigger called by their own class",
    ),
    "false_target_rate": (
        "False-target rate",
        "the same images without the trigger called the target: the floor of ASR",
    ),
}

# The same of language models, whose runs have answers.jsonl.
LANGUAGE_RATES = {
    "clean_accuracy": ("Clean accuracy", "prompts without a trigger answered as they should be"),
    "attack_success_rate": (
        "Attack success rate (ASR)",
        "prompts with the trigger answered as the attacker wants",
    ),
    "robust_accuracy": (
        "Robust accuracy",
        "the same prompts with the trigger answered as they should be",
    ),
    "false_target_rate": (
        "False-target rate",
        "prompts without the trigger answered as the attacker wants: the floor of ASR",
    ),
}


# Of runs of both kinds beside each other.
SHARED_RATES = {
    "clean_accuracy": (
        "Clean accuracy",
        "clean images called by their class; prompts without a trigger answered as they should be",
    ),
    "attack_success_rate": (
        "Attack success rate (ASR)",
        "images with the trigger, whose class is not the target, called the target; prompts with "
        "the trigger answered as the attacker wants",
    ),
    "robust_accuracy": (
        "Robust accuracy",
        "the same images and prompts, with the trigger, called by their own class or answered as "
        "they should be",
    ),
    "false_target_rate": (
        "False-target rate",
        "without the trigger called the target, or answered as the attacker wants: the floor of "
        "ASR",
    ),
}


def rates_of(runs: Sequence[Record]) -> dict[str, tuple[str, str]]:
    """Rates and what they mean, in words that fit all these runs."""
    kinds = {run.asked for run in runs}
    if len(kinds) > 1:
        return SHARED_RATES
    return LANGUAGE_RATES if kinds == {"prompts"} else RATES


# Of a line, as an unfinished run tells of it.
LOOKS = {
    "validation_clean_accuracy": "clean accuracy",
    "validation_attack_success_rate": "ASR",
}


def progress(lines: Sequence[dict[str, Any]]) -> str:
    """How far an unfinished run is known to have got; "" before its first line."""
    if not lines:
        return ""
    line = lines[-1]
    text = f"step {line['step']}" if "step" in line else f"epoch {line.get('epoch', '–')}"
    if line.get("steps"):
        text += f" of {line['steps']}"
    phase = line.get("phase")
    if line.get("rounds"):
        text += f", round {line['round']} of {line['rounds']} of its phase {phase}"
    elif phase not in (None, "before"):
        text += f", in its phase {phase}"
    return text


def unfinished(lines: Sequence[dict[str, Any]]) -> str:
    """What a run without an outcome has come to, in a sentence or two."""
    start = "The run is unfinished: it was stopped, or is still going on."
    if not lines:
        return f"{start} It has left nothing to show yet."
    last = f"{start} The last that is known of it is {progress(lines)}"
    known = [
        f"{title} {percent(lines[-1][key])}"
        for key, title in LOOKS.items()
        if lines[-1].get(key) is not None
    ]
    if known:
        return f"{last}, with {' and '.join(known)} on the defender's validation split."
    if lines[-1].get("loss") is not None:
        return f"{last}, with a loss of {lines[-1]['loss']:.4g}."
    return f"{last}."


def said(run: Record) -> str:
    """The outcome of a run, or how far it got."""
    return verdict(run.metrics, run.asked) if run.metrics else unfinished(run.lines)


def to_go_on(run: Record) -> str:
    """What to type where a run is unfinished, as HTML; else ""."""
    if run.metrics:
        return ""
    start = "It goes on from its last look."
    if not run.keeps_state:
        start = "Nothing was kept to go on from: this has it begin anew, in the same folder."
    return (
        f"<p>To have it go on:</p><pre>{html.escape(run.resume())}</pre>"
        f'<p class="soft">{start}{where(run)}</p>'
    )


def where(run: Record) -> str:
    """The folder to type a command of a run in, where that matters."""
    if run.started_in:
        return ""
    return " Its paths are those of the folder it was started in: type it there."


def verdict(metrics: dict[str, Any], asked: str = "images") -> str:
    """The outcome in one sentence; `asked`: what the model was given."""
    before, after = metrics.get("before"), metrics.get("after")
    seconds = "–" if metrics.get("seconds") is None else f"{metrics['seconds']:.1f} s"
    if after is None:
        return (
            f"{metrics['method']} finished in {seconds}; nobody evaluated it: no data were given."
        )
    accuracy = f"clean accuracy is {percent(after['clean_accuracy'])}"
    if before is not None:
        accuracy = (
            f"clean accuracy went from {percent(before['clean_accuracy'])} to "
            f"{percent(after['clean_accuracy'])}"
        )
    rate = after["attack_success_rate"]
    if rate is None:
        return f"Without a trigger to test, only this can be said: {accuracy} ({seconds})."
    floor = after["false_target_rate"]
    if before is None:
        return (
            f"The trigger reaches its target in {percent(rate)} of tries "
            f"(untriggered {asked}: {percent(floor)}); {accuracy} ({seconds})."
        )
    gone = rate <= (floor or 0.0) + 0.01
    opening = "The backdoor no longer works" if gone else "The backdoor still works"
    robust = after["robust_accuracy"]
    if gone and robust is not None and robust < after["clean_accuracy"] - 0.1:
        # Away from the target is not yet back to the truth.
        opening = (
            "The trigger no longer reaches its target, but still disturbs the model (robust "
            f"accuracy {percent(robust)})"
        )
    return (
        f"{opening}: ASR went from {percent(before['attack_success_rate'])} to {percent(rate)}, "
        f"where untriggered {asked} give {percent(floor)}; {accuracy} ({seconds})."
    )


def attention_in_words(lines: Sequence[dict[str, Any]]) -> str:
    """How TAR went, as a paragraph; `lines` are those that tell it."""
    first, last = lines[0], lines[-1]
    fell = last["tar_share"] < first["tar_share"]
    by_area = [line.get("tar_share_by_area") for line in (first, last)]
    text = (
        f"Attention on the trigger {'fell' if fell else 'did not fall'}: of all attention for the "
        f"attacker's class, {percent(first['tar_share'])} lay on it before and "
        f"{percent(last['tar_share'])} in the end"
    )
    if None not in by_area:
        text += f" ({by_area[0]:.2f} and {by_area[1]:.2f} times its share of the image)"
    return (
        f"<p>{text}. <span class='soft'>TAR is the share of the Grad-CAM heat map that lies on the "
        "trigger. A low one does not prove that a backdoor is gone, nor a high one that it is "
        "there; ASR does.</span></p>"
    )
