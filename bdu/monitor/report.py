"""``report.html``: one self-contained page about a run.

No scripts, no network, no file beside it: it can be mailed, printed, and opened years later. Every
figure stands in the page with the key it has in ``metrics.json`` (``data-key``).
"""

from __future__ import annotations

import html
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bdu.checkpoint import atomic_write
from bdu.monitor.answers import answers_section
from bdu.monitor.charts import bar_table
from bdu.monitor.curves import chart, measured
from bdu.monitor.page import folded, four_digits, page, percent
from bdu.monitor.panels import data_uri, outlined, overlay
from bdu.monitor.planted import planted_section
from bdu.monitor.record import Record
from bdu.monitor.transfer import transfer_section
from bdu.monitor.words import attention, ending, rates_of, said, to_go_on, where
from bdu.runs import RunDirectory

_TAR_MEANS = (
    '<p class="soft">TAR (trigger attention ratio) is the share of the Grad-CAM heat map for the '
    "attacker's class that lies on the trigger. A low one does not prove that a backdoor is gone, "
    "nor a high one that it is there; ASR does.</p>"
)
# A picture of a few pixels is shown this large, in pixels.
_PICTURE = 96


def write_report(directory: RunDirectory, path: Path | None = None) -> Path:
    """Write the page from what the run has left so far; returns its path.

    A run that was stopped has no ``metrics.json``: the page then says so, shows how far it got, and
    what to type to have it go on.

    Args:
        directory: the run.
        path: None is ``report.html`` in its folder.

    Raises:
        FileNotFoundError: there is no run in the folder.
    """
    run = Record.read(directory)
    metrics, lines = run.metrics, run.lines
    answers = answers_section(directory.path / "answers.jsonl")
    parts = [
        f"<h1>bdu {html.escape(run.command)}</h1>",
        f'<p class="soft">{html.escape(f"{run.name}: {run.subject}")}</p>',
        f'<p class="verdict">{html.escape(said(run))}</p>',
        to_go_on(run),
        _outcome(metrics, rates_of([run])),
        ending(metrics),
        _perplexity(metrics),
        planted_section(metrics),
        answers,
        transfer_section(directory.path / "transfer.json"),
        _curves(run),
        _attention(directory, lines),
        _weight_change(metrics),
        _per_class(metrics),
        _again(run),
        folded("Settings", {"command": run.command, **run.config}),
        folded("Method's settings", metrics.get("settings")),
        folded("Versions", metrics.get("versions")),
    ]
    path = directory.path / "report.html" if path is None else path
    atomic_write(path, page(f"{run.name}: {run.subject} · bdu {run.command}", parts))
    return path


def _perplexity(metrics: dict[str, Any]) -> str:
    values = [(name, rates.get("perplexity")) for name, rates in _columns(metrics)]
    known = [(name, value) for name, value in values if value is not None]
    if not known:
        return ""
    shown = ", ".join(
        f'{name} <span data-key="{name}.perplexity">{four_digits(value)}</span>'
        for name, value in known
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
            f'<td class="number" data-key="{name}.{key}">{percent(rates.get(key))}</td>'
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
            f"{percent(metrics['retuned_attack_success_rate'])}</span>. Compare it with a model "
            "that never had a backdoor, attacked alike: a small network learns a new one fast.</p>"
        )
    return (
        f'<h2>Outcome</h2><div class="wide"><table><thead><tr><th scope="col">Rate</th>{head}'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{notes}"
    )


def _columns(metrics: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, metrics[name]) for name in ("before", "after") if metrics.get(name)]


def _curves(run: Record) -> str:
    drawn = chart(run.lines)
    if not drawn:
        return ""
    text = attention(run.lines, ended=bool(run.metrics))
    told = f"<p>{html.escape(text)}</p>{_TAR_MEANS}" if text else ""
    title = "On the defender's validation split" if measured(run.lines) else "As it trained"
    return f"<h2>{title}</h2>{drawn}{told}"


def _maps(file: Path) -> tuple[np.ndarray, ...]:
    names = ("images", "mask", "steps", "heat")
    try:
        with np.load(file, allow_pickle=False) as kept:
            images, mask, steps, heat = (kept[name] for name in names)
            unknown = np.full(heat.shape[:2], np.nan)  # of an earlier version
            strength = kept.get("strength", unknown)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file}: expected {', '.join(names)}, got {error}") from error
    if steps.dtype.kind not in "iu" or not 0 < len(steps) == len(heat):
        raise ValueError(f"{file}: expected a heat map for every step, got {steps.shape} steps")
    if mask.shape not in (images.shape[:3], images.shape[1:3]):
        raise ValueError(f"{file}: expected a mask of the images, got {mask.shape}")
    if strength.shape != heat.shape[:2]:
        raise ValueError(f"{file}: expected a strength for every map, got {strength.shape}")
    return images, np.broadcast_to(mask, images.shape[:3]), steps, heat, strength


def _attention(directory: RunDirectory, lines: Sequence[dict[str, Any]]) -> str:
    if not directory.attention.exists():
        return ""
    images, mask, steps, heat, strength = _maps(directory.attention)
    chosen = sorted({0, len(steps) // 2, len(steps) - 1})
    factor = max(1, round(_PICTURE / images.shape[1]))
    outline = " The dashed line is the trigger's outline." if mask.any() else ""
    told = ""
    if np.isfinite(strength).all():
        told = (
            " Below it, how much all of it adds up to, in percent of what it did before: a weak "
            "map is as bright as a strong one."
        )
    head = '<th scope="col">image</th>' + "".join(
        f'<th scope="col">{"before" if steps[i] == 0 else f"step {steps[i]}"}</th>' for i in chosen
    )
    rows = []
    for n, image in enumerate(images):
        pictures = [(outlined(image, mask[n], factor), f"triggered image {n + 1}", "")]
        for i in chosen:
            laid = overlay(image[None], heat[i, n : n + 1].astype(np.float64))[0]
            on = _share_on(heat[i, n], mask[n])
            said = f"heat map of image {n + 1} at step {steps[i]}{on}"
            below = "" if i == 0 else _strength_left(strength[0, n], strength[i, n])
            pictures.append((outlined(laid, mask[n], factor), said, below))
        cells = "".join(
            f'<td class="picture"><img src="{data_uri(pixels)}" alt="{html.escape(said)}">{below}'
            "</td>"
            for pixels, said, below in pictures
        )
        rows.append(f"<tr>{cells}</tr>")
    return (
        "<h2>Where the attacker's class is seen</h2>"
        '<div class="wide"><table class="pictures">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="soft">Grad-CAM for the class that the attacker wants, from dark blue (nothing) '
        f"to yellow (most), each map by itself.{told}{outline}</p>"
    )


def _strength_left(before: float, now: float) -> str:
    if not np.isfinite([before, now]).all() or before == 0:
        return ""
    return f'<small class="soft">{100 * now / before:.0f} %</small>'


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
    if not columns or not columns[0][1].get("per_class_accuracy"):
        return ""
    head = "".join(f'<th class="number" scope="col">{name}</th>' for name, _ in columns)
    count = len(columns[0][1]["per_class_accuracy"])
    rows = "".join(
        f'<tr><th scope="row">{i}</th>'
        + "".join(
            f'<td class="number" data-key="{name}.per_class_accuracy.{i}">'
            f"{percent(rates['per_class_accuracy'][i])}</td>"
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


def _again(run: Record) -> str:
    return (
        f"<h2>Again</h2><pre>{html.escape(run.again())}</pre>"
        '<p class="soft">With the config.yaml beside this page: the settings below, seed '
        f"{html.escape(str(run.config.get('seed', '–')))}.{where(run)}</p>"
    )
