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
)
_PHASES = {"unlearn": "unlearning", "recovery": "recovery"}


def chart(lines: Sequence[dict[str, Any]]) -> str:
    """A figure, "" where there are no two looks."""
    known = [line for line in lines if any(line.get(key) is not None for key, *_ in _CURVES)]
    if len(known) < 2:
        return ""
    curves = [
        Curve(
            title,
            colour,
            dashes,
            [(line["step"], line[key]) for line in known if line.get(key) is not None],
        )
        for key, title, colour, dashes in _CURVES
    ]
    phases = []
    for phase, name in _PHASES.items():
        steps = [line["step"] for line in known if line.get("phase") == phase]
        if steps:
            # it began after the look before its first
            earlier = [line["step"] for line in known if line["step"] < steps[0]]
            phases.append((max(earlier, default=0), name))
    return line_chart(curves, phases)
