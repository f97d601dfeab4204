"""The outcome of a run in words, and what its rates mean."""

from __future__ import annotations

import html
import math
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


# Points of a rate that count as nothing, as little, and as much.
_NOTHING, _LITTLE, _MUCH = 0.01, 0.05, 0.1

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


def ending(metrics: dict[str, Any]) -> str:
    """What a run warned of, and why it ended, as HTML; else ""."""
    told = [f"<p>Warning: {html.escape(text)}.</p>" for text in metrics.get("warnings") or ()]
    if metrics.get("stopped"):
        told.append(f'<p class="soft">The run {html.escape(str(metrics["stopped"]))}.</p>')
    return "".join(told)


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
    if run.started_in or not run.has_relative_paths:
        return ""
    return " Its paths are those of the folder it was started in: type it there."


def verdict(metrics: dict[str, Any], asked: str = "images") -> str:
    """The outcome in one sentence; `asked`: what the model was given."""
    after, seconds = metrics.get("after"), _number(metrics.get("seconds"))
    took = "" if seconds is None else f" ({seconds:.1f} s)"
    if after is None:
        return f"{metrics.get('method')} ended{took}; no data were given to evaluate it with."
    before = metrics.get("before") or {}
    accuracy = _accuracy(before, after)
    rate, floor = (_number(after.get(key)) for key in ("attack_success_rate", "false_target_rate"))
    reached = _number(before.get("attack_success_rate"))
    where = "" if floor is None else f", where untriggered {asked} give {percent(floor)}"
    if rate is None and reached is None and (told := _planted(metrics)):
        return f"{told}; {accuracy}{took}."
    if rate is None and reached is None:
        return (
            f"No {asked} with a trigger were evaluated, so nothing is known of a backdoor; "
            f"{accuracy}{took}."
        )
    if rate is None:
        return (
            f"ASR was {percent(reached)} before, and could not be measured afterwards; "
            f"{accuracy}{took}."
        )
    if reached is None:
        return f"The trigger has an ASR of {percent(rate)}{where}; {accuracy}{took}."
    above_before = reached - (_number(before.get("false_target_rate")) or 0.0)
    if above_before <= _LITTLE:
        opening = "No backdoor was there that this trigger sets off"
        if rate - (floor or 0.0) > _LITTLE:
            opening = "The trigger has come to work, which it hardly did before"
        return (
            f"{opening}: ASR was {percent(reached)} before and is {percent(rate)} now{where}; "
            f"{accuracy}{took}."
        )
    return (
        f"{_opening(before, after, rate - (floor or 0.0))}: ASR went from {percent(reached)} to "
        f"{percent(rate)}{where}; {accuracy}{took}."
    )


def _planted(metrics: dict[str, Any]) -> str:
    """What became of the defender's own trigger, where no other was evaluated; "" without one."""
    before = (metrics.get("planted") or {}).get("planted_trigger") or {}
    after = metrics.get("planted_trigger_after") or {}
    rates = [_number(one.get("attack_success_rate")) for one in (before, after)]
    robust = _number(after.get("robust_accuracy"))
    if rates[0] is None or rates[1] is None:
        return ""
    right = "" if robust is None else f" (robust accuracy {percent(robust)})"
    return (
        f"The trigger that the defender planted went from an ASR of {percent(rates[0])} to "
        f"{percent(rates[1])}{right}; prompts with another trigger were not evaluated, so nothing "
        "certain is known of those"
    )


def _opening(before: dict[str, Any], after: dict[str, Any], above: float) -> str:
    """Of a backdoor that did work; `above`: ASR less its floor."""
    if above > _LITTLE:
        return "The backdoor still works"
    if above > _NOTHING:
        return "Little is left of the backdoor"
    clean, robust = (_number(after.get(key)) for key in ("clean_accuracy", "robust_accuracy"))
    clean_before = _number(before.get("clean_accuracy"))
    if clean is not None and clean_before is not None and clean < clean_before - _MUCH:
        return "The backdoor no longer works, but clean accuracy was lost with it"
    if clean is not None and robust is not None and robust < clean - _MUCH:
        # Away from the target is not yet back to the truth.
        return (
            "The trigger no longer reaches its target, but still disturbs the model (robust "
            f"accuracy {percent(robust)})"
        )
    return "The backdoor no longer works"


def _accuracy(before: dict[str, Any], after: dict[str, Any]) -> str:
    first, last = (_number(rates.get("clean_accuracy")) for rates in (before, after))
    if last is None:
        return "clean accuracy was not measured"
    if first is None:
        return f"clean accuracy is {percent(last)}"
    return f"clean accuracy went from {percent(first)} to {percent(last)}"


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def attention(lines: Sequence[dict[str, Any]], *, ended: bool = True) -> str:
    """How TAR went, and what to make of it beside ASR; "" where no line tells it.

    Args:
        lines: of the run.
        ended: whether the last is its end.
    """
    looks = [line for line in lines if "tar_share" in line]
    known = [line for line in looks if line["tar_share"] is not None]
    if not known:
        return ""
    first, last = known[0], looks[-1]
    until = "in the end" if ended else "at the last look"
    if last["tar_share"] is None:
        return (
            f"TAR was {percent(first['tar_share'])}; {until} nothing in any of these images speaks "
            "for the attacker's class: their heat maps are empty, and have no TAR."
        )
    if len(looks) == 1:
        return f"TAR is {percent(first['tar_share'])}: there was one look at it."
    went = f"from {percent(first['tar_share'])} to {percent(last['tar_share'])} {until}"
    by_area = [_number(line.get("tar_share_by_area")) for line in (first, last)]
    if by_area[0] is not None and by_area[1] is not None:
        went += (
            f" ({by_area[0]:.2f} and {by_area[1]:.2f} times the trigger's share of the image; 1 is "
            "no more than anywhere else)"
        )
    fell = last["tar_share"] < (1 - _MUCH) * first["tar_share"]
    stayed = "rose" if last["tar_share"] > (1 + _MUCH) * first["tar_share"] else "stayed as it was"
    rates = [_number(line.get("validation_attack_success_rate")) for line in (first, last)]
    if rates[0] is None or rates[1] is None:
        return f"TAR {'fell' if fell else stayed}: it went {went}."
    gone = rates[1] <= _LITTLE or rates[1] <= _MUCH * rates[0]
    attack = f"ASR on the validation split went from {percent(rates[0])} to {percent(rates[1])}"
    if rates[0] <= _LITTLE:
        return f"TAR went {went}; there was no attack to leave ({attack})."
    if gone and fell:
        return f"Attention left the trigger as the attack went: TAR fell {went}; {attack}."
    if gone:
        return f"TAR {stayed}, though the attack is gone: it went {went}; {attack}. " + _left(
            [_number(line.get("attention_strength")) for line in (first, last)]
        )
    if fell:
        return (
            f"TAR fell {went}, but the attack works still: {attack}. The model needs less of its "
            "attention for the trigger, and obeys it nevertheless."
        )
    return f"TAR {stayed}, and the attack works still: TAR went {went}; {attack}."


def _left(strengths: Sequence[float | None]) -> str:
    """What a TAR that stayed means where the attack is gone."""
    before, now = strengths
    if before is None or now is None or before == 0:
        return (
            "That need not be bad: TAR is a share of all that speaks for the attacker's class, "
            "however little that has become, and this run did not keep how much it was. ASR and "
            "robust accuracy decide, and the ASR after a retune attack."
        )
    share = f"{100 * now / before:.0f} %"
    if now <= 0.5 * before:
        return (
            "That is not bad here: TAR is a share of all that speaks for the attacker's class, and "
            f"that fell to {share} of what it was. How the rest is spread decides nothing."
        )
    return (
        "That deserves a closer look: what speaks for the attacker's class is still "
        f"{share} of what it was, and only outweighed. See the ASR after a retune attack, which "
        "shows whether the backdoor comes back."
    )
