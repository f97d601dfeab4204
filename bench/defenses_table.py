"""The table and the plot of bench/defenses.py, from the rows of its cells."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bdu.checkpoint import atomic_write

COLUMNS = (
    ("clean accuracy", lambda row: row["after"]["clean_accuracy"]),
    ("ASR", lambda row: row["after"]["attack_success_rate"]),
    ("false-target rate", lambda row: row["after"]["false_target_rate"]),
    ("robust accuracy", lambda row: row["after"]["robust_accuracy"]),
    ("DER", lambda row: row.get("der")),
    ("ASR retuned", lambda row: row.get("retuned")),
    ("ASR reactivated", lambda row: row.get("reactivated")),
    ("ASR half-way", lambda row: row["path"][2] if "path" in row else None),
)


def cell_text(values: Iterable[float | None]) -> str:
    """Mean, and spread where there are several."""
    known = [value for value in values if value is not None]
    spread = f" ± {100 * statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return known_text(known, statistics.mean) + spread


def summary_of(rows: list[dict[str, Any]], attacked: Sequence[str], innocent: Sequence[str]) -> str:
    """A line of Markdown a defence, over seed 0 of the cases `attacked` and of those `innocent`.

    Defences that were run on one of the attacked cases at least are there, with how many.
    """
    above_control = retuned_above_control(rows)
    lines = [
        f"Of each defence over {len(attacked)} attacked models (seed 0 of all that are of "
        "CIFAR-10, but for those of 1 %), in percent and points: how many were run, ASR on "
        "average and at worst, clean accuracy lost, ASR retuned less that of a never-backdoored "
        "model; and clean accuracy lost where there was no backdoor.",
        "",
        "| defence | models | ASR | worst | lost | worst | retuned, above | worst | "
        + " | ".join(f"lost on {case}" for case in innocent)
        + " |",
        "|---|---:|" + "---:|" * (6 + len(innocent)),
    ]
    first = [row for row in rows if row["case_seed"] == 0]
    for defense in dict.fromkeys(name(row) for row in first):
        own = [row for row in first if name(row) == defense]
        group = [row for row in own if row["case"] in attacked]
        if not group:
            continue
        rates = [row["after"]["attack_success_rate"] for row in group]
        cells = [rates, [lost(row) for row in group], [above_control(row) for row in group]]
        clean = [[lost(row) for row in own if row["case"] == case] for case in innocent]
        texts = [known_text(values, of) for values in cells for of in (statistics.mean, max)]
        texts += [known_text(values, statistics.mean) for values in clean]
        lines.append(f"| {defense} | {len(group)} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def known_text(values: Iterable[float | None], summarise: Callable[[list[float]], float]) -> str:
    """`summarise` of those that are known, in percent."""
    known = [100 * value for value in values if value is not None]
    return f"{round(summarise(known), 1) + 0.0:.1f}" if known else "–"  # + 0.0: no "-0.0"


def retuned_above_control(
    rows: list[dict[str, Any]],
) -> Callable[[dict[str, Any]], float | None]:
    """What gives a row's ASR after the retune attack less a never-backdoored model's."""
    controls = {
        (row["case"], row["case_seed"]): row["control_retuned"]
        for row in rows
        if "control_retuned" in row
    }

    def above_control(row: dict[str, Any]) -> float | None:
        control = controls.get((row["case"], row["case_seed"]))
        return None if control is None or "retuned" not in row else row["retuned"] - control

    return above_control


def lost(row: dict[str, Any]) -> float:
    """Clean accuracy, of 1."""
    before, after = (float(row[when]["clean_accuracy"]) for when in ("before", "after"))
    return before - after


def text_of(rows: list[dict[str, Any]], missing: int, setting: str) -> str:
    """The table as Markdown; `setting` says what it was measured on."""
    lines = [
        f"Percent; mean ± standard deviation over the seeds counted; {setting}. Columns: see "
        "bench/defenses.py.",
        "",
        "| case | defence | seeds | " + " | ".join(name for name, _ in COLUMNS) + " | seconds |",
        "|---|---|---:|" + "---:|" * (len(COLUMNS) + 1),
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["case"], name(row)), []).append(row)
    for (case, defense), group in groups.items():
        cells = [cell_text(column(row) for row in group) for _, column in COLUMNS]
        seconds = statistics.median(row["seconds"] for row in group)
        lines.append(
            f"| {case} | {defense} | {len(group)} | " + " | ".join(cells) + f" | {seconds:.0f} |"
        )
        controls = [row["control_retuned"] for row in group if "control_retuned" in row]
        if controls:
            lines.append(
                f"| {case} | never backdoored | {len(controls)} | – | – | – | – | – | "
                f"{cell_text(controls)} | – | – | – |"
            )
    if missing:
        cells = f"{missing} of {missing + len(rows)} cells"
        lines += ["", f"Not run: {cells}, all that are not above."]
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], file: Path, defenses: Sequence[str]) -> None:
    """A row for each of the defences, a mark for each attacked model, a line at the mean."""
    from matplotlib import pyplot

    panels: tuple[tuple[str, Callable[[dict[str, Any]], float | None], float], ...] = (
        ("ASR, %", lambda row: row["after"]["attack_success_rate"], 5.0),
        ("clean accuracy lost, points", lost, 2.0),
        (
            "ASR retuned above a\nnever-backdoored model's, points",
            retuned_above_control(rows),
            10.0,
        ),
    )
    names = [name(row) for row in rows]
    seen = {
        (defenses.index(row["defense"]), name(row))
        for row in rows
        if row["defense"] != "none" and row["before"]["attack_success_rate"] is not None
    }
    order = [own for _, own in sorted(seen)][::-1]
    figure, axes = pyplot.subplots(
        1, 3, figsize=(11, 1.8 + 0.4 * len(order)), sharey=True, layout="constrained"
    )
    for axis, (title, value, asked) in zip(axes, panels, strict=True):
        for place, wanted in enumerate(order):
            found = [
                (row, 100 * x)
                for row, own in zip(rows, names, strict=True)
                if own == wanted and row["before"]["attack_success_rate"] is not None
                for x in [value(row)]
                if x is not None
            ]
            for data, marker, colour in (("cifar10", "o", "#0072b2"), ("gtsrb", "^", "#b34a00")):
                points = [x for row, x in found if row["case"].startswith(data)]
                axis.scatter(
                    points,
                    [place] * len(points),
                    marker=marker,
                    facecolors="none",
                    edgecolors=colour,
                    label=data if place == 0 else None,
                )
            if found:
                axis.plot(
                    [statistics.mean(x for _, x in found)] * 2, [place - 0.3, place + 0.3], "k"
                )
        axis.axvline(asked, linestyle=":", color="grey")
        axis.axvline(0, color="lightgrey", linewidth=0.8, zorder=0)
        axis.set(xlabel=title, yticks=range(len(order)), yticklabels=order)
    marks = axes[0].get_legend_handles_labels()
    figure.legend(*marks, loc="outside upper right", ncols=2, title="dotted: asked for")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    atomic_write(file, picture.getvalue())
    pyplot.close(figure)


def name(row: dict[str, Any]) -> str:
    """Of a row's defence."""
    return str(row["defense"]) + (" + anchored" if row["anchored"] else "")
