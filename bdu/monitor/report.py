"""``report.html``: one self-contained page about a run, without scripts or network."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import yaml

from bdu.checkpoint import atomic_write
from bdu.runs import RunDirectory

_RATES = {
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

# Two colours that stay apart for colour-blind readers (Okabe and Ito 2008); the lines also differ
# in dashes and carry their names.
_CURVES = (
    ("validation_clean_accuracy", "clean accuracy", "var(--blue)", ""),
    ("validation_attack_success_rate", "ASR", "var(--orange)", "6 4"),
)

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --soft: #5d6068; --paper: #ffffff;
  --line: #d9dbe0; --blue: #0072b2; --orange: #b34a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf1; --soft: #a4a8b3;
  --paper: #16171b; --line: #34363d; --blue: #56b4e9; --orange: #f0a03c; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .25rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.verdict { font-size: 1.15rem; } .soft, dd, figcaption { color: var(--soft); }
.meaning { font-weight: normal; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .4rem .6rem; border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { overflow-x: auto; border: 1px solid var(--line); padding: .75rem; font-size: .85rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 12px; }
figure { margin: 0; } @media print { body { margin: 0; max-width: none; } }
"""


def write_report(directory: RunDirectory) -> None:
    """Write ``report.html`` from the run's ``metrics.json``, ``metrics.jsonl`` and ``config.yaml``.

    Raises:
        FileNotFoundError: the run has no ``metrics.json`` yet.
    """
    metrics = directory.read_metrics()
    config = yaml.safe_load((directory.path / "config.yaml").read_text())
    command = str(config.pop("command", metrics["method"]))
    parts = [
        f"<h1>bdu {html.escape(command)}</h1>",
        f'<p class="verdict">{html.escape(verdict(metrics))}</p>',
        _table(metrics),
        _curves(directory.read_lines()),
        _per_class(metrics),
        _pre("Settings", {"command": command, **config}),
        _pre("Method's settings", metrics.get("settings")),
        _pre("Versions", metrics["versions"]),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>bdu {html.escape(command)}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(part for part in parts if part)}</body></html>\n"
    )
    atomic_write(directory.path / "report.html", page)


def verdict(metrics: dict[str, Any]) -> str:
    """The outcome in one sentence."""
    before, after = metrics.get("before"), metrics.get("after")
    seconds = f"{metrics['seconds']:.1f} s"
    if after is None:
        return (
            f"{metrics['method']} finished in {seconds}; nobody evaluated it: no data were given."
        )
    accuracy = f"clean accuracy is {_percent(after['clean_accuracy'])}"
    if before is not None:
        accuracy = (
            f"clean accuracy went from {_percent(before['clean_accuracy'])} to "
            f"{_percent(after['clean_accuracy'])}"
        )
    rate = after["attack_success_rate"]
    if rate is None:
        return f"Without a trigger to test, only this can be said: {accuracy} ({seconds})."
    floor = after["false_target_rate"]
    if before is None:
        return (
            f"The trigger reaches its target in {_percent(rate)} of tries "
            f"(untriggered images: {_percent(floor)}); {accuracy} ({seconds})."
        )
    gone = rate <= floor + 0.01
    opening = "The backdoor no longer works" if gone else "The backdoor still works"
    robust = after["robust_accuracy"]
    if gone and robust is not None and robust < after["clean_accuracy"] - 0.1:
        # Away from the target is not yet back to the truth.
        opening = (
            "The trigger no longer reaches its target, but still disturbs the model (robust "
            f"accuracy {_percent(robust)})"
        )
    return (
        f"{opening}: ASR went from {_percent(before['attack_success_rate'])} to {_percent(rate)}, "
        f"where untriggered images give {_percent(floor)}; {accuracy} ({seconds})."
    )


def _table(metrics: dict[str, Any]) -> str:
    columns = [(name, metrics[name]) for name in ("before", "after") if metrics.get(name)]
    if not columns:
        return ""
    head = "".join(f'<th class="number" scope="col">{name}</th>' for name, _ in columns)
    rows = []
    for key, (title, meaning) in _RATES.items():
        cells = "".join(
            f'<td class="number" data-key="{name}.{key}">{_percent(rates[key])}</td>'
            for name, rates in columns
        )
        rows.append(
            f'<tr><th scope="row">{title}<br>'
            f'<small class="soft meaning">{meaning}</small></th>{cells}</tr>'
        )
    notes = ""
    if metrics.get("der") is not None:
        notes += (
            "<p>Defence effectiveness rate (1 is best, 0.5 no change): "
            f'<span data-key="der">{metrics["der"]:.3f}</span></p>'
        )
    if metrics.get("retuned_attack_success_rate") is not None:
        notes += (
            "<p>ASR after the retune attack (5 poisoned samples): "
            '<span data-key="retuned_attack_success_rate">'
            f"{_percent(metrics['retuned_attack_success_rate'])}</span>. Compare it with a model "
            "that never had a backdoor, attacked alike: a small network learns a new one fast.</p>"
        )
    return (
        f'<h2>Outcome</h2><div class="wide"><table><thead><tr><th scope="col">Rate</th>{head}'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{notes}"
    )


def _curves(lines: Sequence[dict[str, Any]]) -> str:
    known = [line for line in lines if any(line.get(key) is not None for key, *_ in _CURVES)]
    if len(known) < 2:
        return ""
    width, height, left, bottom, top = 720, 260, 44, 34, 12
    last = known[-1]["step"] or 1

    def x(step: float) -> float:
        return left + (width - left - 110) * step / last

    def y(rate: float) -> float:
        return top + (height - top - bottom) * (1 - rate)

    drawn = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        drawn.append(
            f'<line x1="{left}" x2="{x(last):.1f}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" '
            'stroke="var(--line)"/>'
            f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">'
            f"{100 * tick:.0f} %</text>"
        )
    recovery = next((line["step"] for line in known if line.get("phase") == "recovery"), None)
    if recovery is not None:
        drawn.append(
            f'<line x1="{x(recovery):.1f}" x2="{x(recovery):.1f}" y1="{top}" '
            f'y2="{height - bottom}" stroke="var(--soft)" stroke-dasharray="2 4"/>'
            f'<text x="{x(recovery) + 4:.1f}" y="{height - bottom - 6}">recovery</text>'
        )
    for key, title, colour, dashes in _CURVES:
        points = [(line["step"], line[key]) for line in known if line.get(key) is not None]
        if not points:
            continue
        path = " ".join(f"{x(step):.1f},{y(rate):.1f}" for step, rate in points)
        drawn.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" '
            f'stroke-dasharray="{dashes}"/>'
            f'<text x="{x(last) + 6:.1f}" y="{y(points[-1][1]) + 4:.1f}">{title}</text>'
        )
    drawn.append(
        f'<text x="{left}" y="{height - 8}">step 0</text>'
        f'<text x="{x(last):.1f}" y="{height - 8}" text-anchor="end">step {last}</text>'
    )
    first, final = known[0], known[-1]
    alt = "; ".join(
        f"{title} from {_percent(first.get(key))} to {_percent(final.get(key))}"
        for key, title, *_ in _CURVES
    )
    return (
        "<h2>On the defender's validation split</h2><figure>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{alt}">{"".join(drawn)}</svg>'
        f"<figcaption>{alt}.</figcaption></figure>"
    )


def _per_class(metrics: dict[str, Any]) -> str:
    columns = [(name, metrics[name]) for name in ("before", "after") if metrics.get(name)]
    if not columns:
        return ""
    head = "".join(f'<th class="number" scope="col">{name}</th>' for name, _ in columns)
    count = len(columns[0][1]["per_class_accuracy"])
    rows = "".join(
        f'<tr><th scope="row">{i}</th>'
        + "".join(
            f'<td class="number">{_percent(rates["per_class_accuracy"][i])}</td>'
            for _, rates in columns
        )
        + "</tr>"
        for i in range(count)
    )
    return (
        "<details><summary><h2 style='display:inline'>Accuracy by class</h2></summary>"
        f'<div class="wide"><table><thead><tr><th scope="col">Class</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details>"
    )


def _pre(title: str, values: dict[str, Any] | None) -> str:
    if not values:
        return ""
    text = html.escape(yaml.safe_dump(values, sort_keys=False))
    return f"<h2>{html.escape(title)}</h2><pre>{text}</pre>"


def _percent(rate: float | None) -> str:
    return "–" if rate is None else f"{100 * rate:.2f} %"
