"""The outcome of a run in words, and what its rates mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bdu.monitor.page import percent

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


def verdict(
    metrics: dict[str, Any], lines: Sequence[dict[str, Any]] = (), asked: str = "images"
) -> str:
    """The outcome in one sentence; `asked`: what the model was given."""
    if not metrics:
        if not lines:
            return "The run has not finished, and left nothing to show yet."
        last = lines[-1]
        reached = f"step {last['step']}" if "step" in last else f"epoch {last.get('epoch')}"
        return f"The run has not finished: this is how far it got, {reached}."
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
