"""``report.html``: one self-contained page about a run, or several beside each other.

No scripts, no network, no file beside it: it can be mailed, printed, and opened years later. Every
figure stands in the page with the key it has in ``metrics.json`` (``data-key``).
"""

from __future__ import annotations

import html
import shlex
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bdu.checkpoint import atomic_write
from bdu.monitor.answers import answers_section
from bdu.monitor.charts import Curve, bar_table, line_chart
from bdu.monitor.panels import data_uri, outlined, overlay
from bdu.runs import STARTED_IN, RunDirectory

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

# The same of language models, whose runs have answers.jsonl.
_LANGUAGE_RATES = {
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

# Four colours that stay apart for colour-blind readers (Okabe and Ito 2008); the lines also differ
# in dashes and carry their names.
_CURVES = (
    ("validation_clean_accuracy", "clean accuracy", "var(--blue)", ""),
    ("validation_attack_success_rate", "ASR", "var(--orange)", "7 4"),
    ("validation_robust_accuracy", "robust acc.", "var(--green)", "2 3"),
    ("tar_share", "TAR (share)", "var(--pink)", "9 3 2 3"),
)
_PHASES = {"unlearn": "unlearning", "recovery": "recovery"}
# A picture of a few pixels is shown this large, in pixels.
_PICTURE = 96

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --soft: #5d6068; --paper: #ffffff;
  --line: #d9dbe0; --blue: #0072b2; --orange: #b34a00; --green: #00795a; --pink: #a8467b; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf1; --soft: #a4a8b3;
  --paper: #16171b; --line: #34363d; --blue: #56b4e9; --orange: #f0a03c; --green: #2fc49b;
  --pink: #e28fbd; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 54rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .25rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.verdict { font-size: 1.15rem; } .soft, dd, figcaption { color: var(--soft); }
.meaning { font-weight: normal; } h3 { font-size: 1rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .4rem .6rem; border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
td.bar { width: 40%; min-width: 6rem; } td.bar span { display: block; height: .7rem;
  background: var(--blue); }
td.said { white-space: pre-wrap; overflow-wrap: anywhere; vertical-align: top;
  font: .85rem/1.4 ui-monospace, monospace; min-width: 9rem; }
td.picture { padding: .3rem; border: 0; } td.picture img { display: block; width: 96px;
  height: 96px; image-rendering: pixelated; }
table.pictures { width: auto; } table.pictures th { border: 0; font-weight: normal; }
pre { overflow-x: auto; border: 1px solid var(--line); padding: .75rem; font-size: .85rem; }
summary h2 { display: inline; } details { margin-top: 2rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 12px; }
figure { margin: 0; overflow-x: auto; } svg { min-width: 34rem; }
@media (max-width: 40rem) { th, td { padding: .35rem .4rem; } }
@media print { body { margin: 0; max-width: none; } table.pictures, figure, tr {
  break-inside: avoid; } }
"""


def write_report(directory: RunDirectory, path: Path | None = None) -> Path:
    """Write the page from what the run has left so far; returns its path.

    A run that was stopped has no ``metrics.json``: the page then says so and shows how far it got.

    Args:
        directory: the run.
        path: None is ``report.html`` in its folder.

    Raises:
        FileNotFoundError: there is no run in the folder.
    """
    metrics, config = _read(directory)
    command = str(config.pop("command", metrics.get("method", "run")))
    folder = str(config.pop(STARTED_IN, ""))
    lines = directory.read_lines()
    answers = answers_section(directory.path / "answers.jsonl")
    asked = "prompts" if answers else "images"
    parts = [
        f"<h1>bdu {html.escape(command)}</h1>",
        f'<p class="verdict">{html.escape(verdict(metrics, lines, asked))}</p>',
        _outcome(metrics, _LANGUAGE_RATES if answers else _RATES),
        _perplexity(metrics),
        answers,
        _curves(lines),
        _attention(directory, lines),
        _weight_change(metrics),
        _per_class(metrics),
        _command(directory, command, config, folder),
        _pre("Settings", {"command": command, **config}),
        _pre("Method's settings", metrics.get("settings")),
        _pre("Versions", metrics.get("versions")),
    ]
    path = directory.path / "report.html" if path is None else path
    atomic_write(path, _page(f"bdu {command}", parts))
    return path


def write_comparison(directories: Sequence[RunDirectory], path: Path) -> None:
    """Write one page with several runs side by side.

    Raises:
        FileNotFoundError: there is no run in one of the folders.
    """
    runs = [(_name(d, directories), *_read(d), d.read_lines()) for d in directories]
    head = "".join(f'<th class="number" scope="col">{html.escape(name)}</th>' for name, *_ in runs)

    def row(title: str, cells: Sequence[str]) -> str:
        values = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        return f'<tr><th scope="row">{title}</th>{values}</tr>'

    rows = [row("method", [html.escape(str(m.get("method", "–"))) for _, m, *_ in runs])]
    for when in ("before", "after"):
        for key, (title, _) in _RATES.items():
            cells = [_percent((m.get(when) or {}).get(key)) for _, m, *_ in runs]
            rows.append(row(f"{title}, {when}", cells))
    retuned = [_percent(m.get("retuned_attack_success_rate")) for _, m, *_ in runs]
    rows.append(row("ASR after the retune attack", retuned))
    seconds = [m.get("seconds") for _, m, *_ in runs]
    rows.append(row("seconds", ["–" if s is None else f"{s:.1f}" for s in seconds]))
    meanings = "".join(f"<dt>{title}</dt><dd>{meaning}</dd>" for title, meaning in _RATES.values())
    parts = [
        f"<h1>{len(runs)} runs</h1>",
        f'<div class="wide"><table><thead><tr><th scope="col">Rate</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div><dl>{meanings}</dl>",
    ]
    for name, metrics, _, lines in runs:
        parts.append(f"<h2>{html.escape(name)}</h2>")
        parts.append(f"<p>{html.escape(verdict(metrics, lines))}</p>")
        parts.append(_chart(lines))
    atomic_write(path, _page(f"{len(runs)} runs", parts))


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
            f"(untriggered {asked}: {_percent(floor)}); {accuracy} ({seconds})."
        )
    gone = rate <= (floor or 0.0) + 0.01
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
        f"where untriggered {asked} give {_percent(floor)}; {accuracy} ({seconds})."
    )


def _read(directory: RunDirectory) -> tuple[dict[str, Any], dict[str, Any]]:
    file = directory.path / "config.yaml"
    if not file.exists():
        raise FileNotFoundError(f"{directory.path}: expected a run with config.yaml, got none")
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: expected YAML, got {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file}: expected settings by name, got {type(config).__name__}")
    finished = (directory.path / "metrics.json").exists()
    return (directory.read_metrics() if finished else {}), config


def _name(directory: RunDirectory, among: Sequence[RunDirectory]) -> str:
    """The folder's name, or its path where names are not distinct."""
    names = [d.path.resolve().name for d in among]
    own = directory.path.resolve().name
    return own if names.count(own) == 1 else str(directory.path)


def _page(title: str, parts: Sequence[str]) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(part for part in parts if part)}</body></html>\n"
    )


def _perplexity(metrics: dict[str, Any]) -> str:
    values = [(name, rates.get("perplexity")) for name, rates in _columns(metrics)]
    known = [(name, value) for name, value in values if value is not None]
    if not known:
        return ""
    shown = ", ".join(
        f'{name} <span data-key="{name}.perplexity">{value:.4g}</span>' for name, value in known
    )
    return f"<p>Perplexity of the clean answers: {shown}.</p>"


def _outcome(metrics: dict[str, Any], rates_of: Mapping[str, tuple[str, str]]) -> str:
    columns = _columns(metrics)
    if not columns:
        return ""
    head = "".join(f'<th class="number" scope="col">{name}</th>' for name, _ in columns)
    rows = []
    for key, (title, meaning) in rates_of.items():
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
    if metrics.get("stopped"):
        notes += f'<p class="soft">The run {html.escape(str(metrics["stopped"]))}.</p>'
    return (
        f'<h2>Outcome</h2><div class="wide"><table><thead><tr><th scope="col">Rate</th>{head}'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{notes}"
    )


def _columns(metrics: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, metrics[name]) for name in ("before", "after") if metrics.get(name)]


def _chart(lines: Sequence[dict[str, Any]]) -> str:
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


def _curves(lines: Sequence[dict[str, Any]]) -> str:
    chart = _chart(lines)
    if not chart:
        return ""
    told = ""
    watched = [line for line in lines if line.get("tar_share") is not None]
    if watched:
        told = _attention_in_words(watched)
    return f"<h2>On the defender's validation split</h2>{chart}{told}"


def _attention_in_words(lines: Sequence[dict[str, Any]]) -> str:
    first, last = lines[0], lines[-1]
    fell = last["tar_share"] < first["tar_share"]
    by_area = [line.get("tar_share_by_area") for line in (first, last)]
    text = (
        f"Attention on the trigger {'fell' if fell else 'did not fall'}: of all attention for the "
        f"attacker's class, {_percent(first['tar_share'])} lay on it before and "
        f"{_percent(last['tar_share'])} in the end"
    )
    if None not in by_area:
        text += f" ({by_area[0]:.2f} and {by_area[1]:.2f} times its share of the image)"
    return (
        f"<p>{text}. <span class='soft'>TAR is the share of the Grad-CAM heat map that lies on the "
        "trigger. A low one does not prove that a backdoor is gone, nor a high one that it is "
        "there; ASR does.</span></p>"
    )


def _maps(file: Path) -> tuple[np.ndarray, ...]:
    names = ("images", "mask", "steps", "heat")
    try:
        with np.load(file, allow_pickle=False) as kept:
            images, mask, steps, heat = (kept[name] for name in names)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file}: expected {', '.join(names)}, got {error}") from error
    if steps.dtype.kind not in "iu" or not 0 < len(steps) == len(heat):
        raise ValueError(f"{file}: expected a heat map for every step, got {steps.shape} steps")
    return images, mask, steps, heat


def _attention(directory: RunDirectory, lines: Sequence[dict[str, Any]]) -> str:
    if not directory.attention.exists():
        return ""
    images, mask, steps, heat = _maps(directory.attention)
    chosen = sorted({0, len(steps) // 2, len(steps) - 1})
    factor = max(1, round(_PICTURE / images.shape[1]))
    outline = " The dashed line is the trigger's outline." if mask.any() else ""
    head = '<th scope="col">triggered image</th>' + "".join(
        f'<th scope="col">{"before" if steps[i] == 0 else f"step {steps[i]}"}</th>' for i in chosen
    )
    rows = []
    for n, image in enumerate(images):
        pictures = [(outlined(image, mask, factor), f"triggered image {n + 1}")]
        for i in chosen:
            laid = overlay(image[None], heat[i, n : n + 1].astype(np.float64))[0]
            on = _share_on(heat[i, n], mask)
            said = f"heat map of image {n + 1} at step {steps[i]}{on}"
            pictures.append((outlined(laid, mask, factor), said))
        cells = "".join(
            f'<td class="picture"><img src="{data_uri(pixels)}" alt="{html.escape(said)}"></td>'
            for pixels, said in pictures
        )
        rows.append(f"<tr>{cells}</tr>")
    return (
        "<h2>Where the attacker's class is seen</h2>"
        '<div class="wide"><table class="pictures">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="soft">Grad-CAM for the class that the attacker wants, from dark blue (nothing) '
        f"to yellow (most), each map by itself.{outline}</p>"
    )


def _share_on(heat: Any, mask: Any) -> str:
    wide = heat.astype(np.float64)
    if not mask.any() or wide.sum() == 0:
        return ""
    return f", {100 * wide[mask].sum() / wide.sum():.0f} % of it on the trigger"


def _weight_change(metrics: dict[str, Any]) -> str:
    change: dict[str, float] = metrics.get("weight_change") or {}
    if not change:
        return ""
    rows = [(name, 100 * value) for name, value in change.items()]
    return (
        "<details><summary><h2>How far each layer moved</h2></summary>"
        '<p class="soft">‖θ − θ before‖ / ‖θ before‖ of every weight, in the model\'s order.</p>'
        f"{bar_table(('Layer', 'change'), rows)}</details>"
    )


def _per_class(metrics: dict[str, Any]) -> str:
    columns = _columns(metrics)
    if not columns or not columns[0][1]["per_class_accuracy"]:
        return ""
    head = "".join(f'<th class="number" scope="col">{name}</th>' for name, _ in columns)
    count = len(columns[0][1]["per_class_accuracy"])
    rows = "".join(
        f'<tr><th scope="row">{i}</th>'
        + "".join(
            f'<td class="number" data-key="{name}.per_class_accuracy.{i}">'
            f"{_percent(rates['per_class_accuracy'][i])}</td>"
            for name, rates in columns
        )
        + "</tr>"
        for i in range(count)
    )
    return (
        "<details><summary><h2>Accuracy by class</h2></summary>"
        f'<div class="wide"><table><thead><tr><th scope="col">Class</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details>"
    )


def _command(directory: RunDirectory, command: str, config: dict[str, Any], folder: str) -> str:
    """What to type to have the run again, with its settings from its own config.yaml."""
    file = str(directory.path.absolute() / "config.yaml")
    line = shlex.join(["bdu", command, "--config", file, "--out", "AGAIN"])
    needs = ""
    if not folder:
        needs = " Its paths are those of the folder it was started in: type it there."
    elif ":" in str(config.get("model")):  # a factory, which is looked for there
        line = f"cd {shlex.quote(folder)} && {line}"
    return (
        f"<h2>Again</h2><pre>{html.escape(line)}</pre>"
        '<p class="soft">With the config.yaml beside this page: the settings below, seed '
        f"{html.escape(str(config.get('seed', '–')))}.{needs}</p>"
    )


def _pre(title: str, values: dict[str, Any] | None) -> str:
    if not values:
        return ""
    text = html.escape(yaml.safe_dump(values, sort_keys=False))
    return f"<details><summary><h2>{html.escape(title)}</h2></summary><pre>{text}</pre></details>"


def _percent(rate: float | None) -> str:
    return "–" if rate is None else f"{100 * rate:.2f} %"
