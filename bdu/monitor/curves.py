"""What a run measured as it went, as a chart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bdu.monitor.charts import Curve, line_chart

# Four colours that stay apart for colour-blind readers (Okabe and Ito 2008); the lines also differ
# in dashes and carry their names.
_CURVES = (
    ("validation_clean_accuracy", "clean accuracy", "var(--blue)", ""),
    ("validation_attack_success_rate", "ASR", "var(--orange)", "7 4"),
    ("validation_robust_accuracy", "robust acc.", "var(--green)", "2 3"),
    ("tar_share", "TAR (share)", "var(--pink)", "9 3 2 3"),
    ("accuracy", "training accuracy", "var(--blue)", ""),
)
_LOSS = ("loss", "loss", "var(--orange)", "7 4")
_PHASES = {"unlearn": "unlearning", "plant": "planting"}

Line = dict[str, Any]


def measured(lines: Sequence[Line]) -> bool:
    """Whether the lines hold shares of the validation split."""
    return any(line.get("validation_clean_accuracy") is not None for line in lines)


def chart(lines: Sequence[Line]) -> str:
    """Figures of the shares, and where nothing was looked at of the loss; "" for a single line."""
    if measured(lines):
        return _figure(lines, _CURVES[:-1])
    return _figure(lines, _CURVES[-1:]) + _figure(lines, (_LOSS,), share=False)


def _figure(
    lines: Sequence[Line], kinds: Sequence[tuple[str, str, str, str]], share: bool = True
) -> str:
    steps, along = _along(lines), "step"
    if not any(steps):  # of method auto, which counts none
        steps, along = [float(number) for number in range(len(lines))], "look"
    keys = [key for key, *_ in kinds]
    known = [
        (step, line)
        for step, line in zip(steps, lines, strict=True)
        if any(line.get(key) is not None for key in keys)
    ]
    if len(known) < 2:
        return ""
    curves = [
        Curve(
            title,
            colour,
            dashes,
            [(step, line[key]) for step, line in known if line.get(key) is not None],
        )
        for key, title, colour, dashes in kinds
    ]
    return line_chart(curves, _phases(steps, lines), share=share, along=along)


def _along(lines: Sequence[Line]) -> list[float]:
    """Steps since the start: where a phase counts its own, those before it are added."""
    steps: list[float] = []
    begun, before = 0.0, 0.0
    for number, line in enumerate(lines):
        own = float(line.get("step", number))  # lines of earlier versions have none
        if own < before:
            begun = steps[-1]
        steps.append(begun + own)
        before = own
    return steps


def _phases(steps: Sequence[float], lines: Sequence[Line]) -> list[tuple[float, str]]:
    """Where each began: after the look before its first."""
    found: list[tuple[float, str]] = []
    phase = None
    for i, line in enumerate(lines):
        if line.get("phase") not in (phase, None, "before"):
            name = str(line["phase"])
            found.append((steps[i - 1] if i else 0.0, _PHASES.get(name, name)))
        phase = line.get("phase")
    return found
