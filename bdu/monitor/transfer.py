"""What unlearning one backdoor of a language model does to its others, as a part of the report."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bdu.monitor.page import percent


def transfer_section(file: Path) -> str:
    """A table of every trigger's ASR after each was unlearned, and what is to compare it with.

    Args:
        file: ``transfer.json`` of :func:`bdu.llm.casd.transfer_record`: ``names`` (k), ``before``
            and ``control`` (k), ``rates`` (k, k), rows the backdoor that was unlearned. "" without
            a file.

    Raises:
        ValueError: the file holds something else.
    """
    if not file.exists():
        return ""
    names, before, control, rates = _read(file)
    head = "".join(f'<th class="of" scope="col">{html.escape(name)}</th>' for name in names)
    rows = [
        _row("before", before, "before"),
        _row("clean training alone", control, "control"),
        *(_row(f"{name} unlearned", rates[i], f"rates.{i}", i) for i, name in enumerate(names)),
    ]
    return (
        "<h2>What unlearning one backdoor does to the others</h2>"
        '<div class="wide"><table><thead><tr><th scope="col">ASR of</th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="soft">A column is a trigger, a row what was done to the model; the stronger the '
        "blue, the higher the ASR. Outlined: the trigger that was unlearned. Unlearning one "
        "transfers to another where its ASR is lower than after clean training of equal cost.</p>"
    )


def _row(title: str, values: Sequence[float], key: str, own: int | None = None) -> str:
    cells = "".join(
        f'<td class="cell{" own" if j == own else ""}" style="--share:{value:.3f}" '
        f'data-key="transfer.{key}.{j}">{percent(value)}</td>'
        for j, value in enumerate(values)
    )
    return f'<tr><th scope="row">{html.escape(title)}</th>{cells}</tr>'


def _read(file: Path) -> tuple[list[str], list[float], list[float], list[list[float]]]:
    try:
        kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        names = [str(name) for name in kept["names"]]
        before, control = ([float(v) for v in kept[key]] for key in ("before", "control"))
        rates = [[float(v) for v in row] for row in kept["rates"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: expected names, before, control and rates, {error!r}") from error
    if len(rates) != len(names) or any(len(v) != len(names) for v in (before, control, *rates)):
        raise ValueError(f"{file}: expected {len(names)} values in every row, got others")
    return names, before, control, rates
