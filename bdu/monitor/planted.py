"""What became of the trigger that the defender planted, as a part of the report."""

from __future__ import annotations

import html
from typing import Any

from bdu.monitor.page import percent
from bdu.monitor.words import LANGUAGE_RATES


def planted_section(metrics: dict[str, Any]) -> str:
    """Rates of the defender's own trigger before and after its removal; "" without one."""
    before = (metrics.get("planted") or {}).get("planted_trigger")
    after = metrics.get("planted_trigger_after")
    if not before or not after:
        return ""
    columns = (
        ("planted.planted_trigger", "before removal", before),
        ("planted_trigger_after", "after removal", after),
    )
    head = "".join(f'<th class="number" scope="col">{name}</th>' for _, name, _ in columns)
    rows = []
    for rate, (title, _) in LANGUAGE_RATES.items():
        cells = "".join(
            f'<td class="number" data-key="{key}.{rate}">{percent(rates.get(rate))}</td>'
            for key, _, rates in columns
        )
        rows.append(f'<tr><th scope="row">{title}</th>{cells}</tr>')
    settings = metrics.get("settings") or {}
    what = "A trigger"
    if settings.get("plant_trigger") is not None:
        what = (
            f"The trigger “{settings['plant_trigger']}”, to be answered with "
            f"“{settings.get('plant_target')}”,"
        )
    return (
        "<h2>Planted by the defender</h2>"
        f"<p>{html.escape(what)} was planted and then removed. What became of it is known; it says "
        "nothing certain of triggers that the defender does not know.</p>"
        f'<div class="wide"><table><thead><tr><th scope="col">Rate</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
