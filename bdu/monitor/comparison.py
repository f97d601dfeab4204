"""One page with several runs side by side."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from bdu.checkpoint import atomic_write
from bdu.monitor.curves import chart
from bdu.monitor.page import four_digits, page, percent
from bdu.monitor.record import Record
from bdu.monitor.words import LOOKS, ending, progress, rates_of, said, to_go_on
from bdu.runs import RunDirectory

_TITLED = 4  # runs that the title of the page names


def write_comparison(directories: Sequence[RunDirectory], path: Path) -> None:
    """Write one page with several runs side by side; "–" where one has no such thing.

    Raises:
        FileNotFoundError: there is no run in one of the folders.
    """
    runs = [(_name(d, directories), Record.read(d)) for d in directories]
    head = "".join(f'<th class="number" scope="col">{html.escape(name)}</th>' for name, _ in runs)

    def row(title: str, cells: Sequence[str], kind: str = "number") -> str:
        values = "".join(f'<td class="{kind}">{cell}</td>' for cell in cells)
        return f'<tr><th scope="row">{title}</th>{values}</tr>'

    kinds, rates = {run.asked for _, run in runs}, rates_of([run for _, run in runs])
    rows = [row("method", [html.escape(run.method) for _, run in runs])]
    if len(kinds) > 1:
        rows.append(row("what it is given", [run.asked for _, run in runs]))
    if any(not run.metrics for _, run in runs):
        ends = [
            "ended" if run.metrics else f"unfinished: {progress(run.lines).partition(',')[0]}"
            for _, run in runs
        ]
        rows.append(row("how far it got", [html.escape(end) for end in ends], "words"))
    for when in ("before", "after"):
        measured = [run.metrics.get(when) or {} for _, run in runs]
        for key, (title, _) in rates.items():
            rows.append(row(f"{title}, {when}", [percent(one.get(key)) for one in measured]))
        perplexities = [one.get("perplexity") for one in measured]
        if "prompts" in kinds:
            cells = ["–" if p is None else four_digits(p) for p in perplexities]
            rows.append(row(f"Perplexity of clean answers, {when}", cells))
    if any(not run.metrics for _, run in runs):
        for key, title in LOOKS.items():
            cells = [percent(run.lines[-1].get(key)) if run.lines else "–" for _, run in runs]
            rows.append(row(f"Last look at the validation split: {title}", cells))
    if "images" in kinds:
        retuned = [percent(run.metrics.get("retuned_attack_success_rate")) for _, run in runs]
        rows.append(row("ASR after the retune attack", retuned))
        ders = [run.metrics.get("der") for _, run in runs]
        shown = ["–" if der is None else f"{der:.3f}" for der in ders]
        rows.append(row("Defence effectiveness rate", shown))
    seconds = [run.metrics.get("seconds") for _, run in runs]
    rows.append(row("seconds", ["–" if s is None else f"{s:.1f}" for s in seconds]))
    meanings = "".join(f"<dt>{title}</dt><dd>{meaning}</dd>" for title, meaning in rates.values())
    parts = [
        f"<h1>{len(runs)} runs</h1>",
        f'<div class="wide"><table><thead><tr><th scope="col">Rate</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div><dl>{meanings}</dl>",
    ]
    for name, run in runs:
        parts.append(f"<h2>{html.escape(name)}</h2>")
        parts += [f"<p>{html.escape(said(run))}</p>", to_go_on(run), ending(run.metrics)]
        parts.append(chart(run.lines))
    atomic_write(path, page(_title([name for name, _ in runs]), parts))


def _title(names: Sequence[str]) -> str:
    more = len(names) - _TITLED
    shown = ", ".join(names[:_TITLED]) + (f" and {more} more" if more > 0 else "")
    return f"{shown} · bdu report"


def _name(directory: RunDirectory, among: Sequence[RunDirectory]) -> str:
    """The folder's name, or its path where names are not distinct."""
    names = [d.path.resolve().name for d in among]
    own = directory.path.resolve().name
    return own if names.count(own) == 1 else str(directory.path)
