"""What every page of a report is made of: its style, its frame, numbers in percent."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import yaml

from bdu.monitor.charts import CHART_STYLE

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --soft: #5d6068; --paper: #ffffff;
  --line: #d9dbe0; --blue: #0072b2; --orange: #b34a00; --green: #00795a; --pink: #a8467b; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf1; --soft: #a4a8b3;
  --paper: #16171b; --line: #34363d; --blue: #56b4e9; --orange: #f0a03c; --green: #2fc49b;
  --pink: #e28fbd; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 54rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h1 + p { margin-top: 0; overflow-wrap: anywhere; }
 h2 { font-size: 1.1rem; margin-top: 2rem; }
.verdict { font-size: 1.15rem; } .soft, dd, figcaption { color: var(--soft); }
.meaning { font-weight: normal; } h3 { font-size: 1rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .4rem .6rem; border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
td.words { text-align: right; }
.wide th[scope="row"] { position: sticky; left: 0; background: var(--paper); }
td.bar { width: 40%; min-width: 6rem; } td.bar span { display: block; height: .7rem;
  background: var(--blue); }
td.said { white-space: pre-wrap; overflow-wrap: anywhere; vertical-align: top;
  font: .85rem/1.4 ui-monospace, monospace; min-width: 9rem; }
td.cell { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap;
  background: color-mix(in srgb, var(--blue) calc(45% * var(--share)), var(--paper)); }
th.of { text-align: right; }
td.own { outline: 2px solid var(--ink); outline-offset: -2px; font-weight: bold; }
td.picture { padding: .3rem; border: 0; vertical-align: top; }
td.picture small { display: block; text-align: center; line-height: 1.2; }
td.picture img { display: block; width: min(96px, 19vw); image-rendering: pixelated; }
table.pictures { width: auto; } table.pictures th { border: 0; font-weight: normal;
  font-size: .85rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line);
  padding: .75rem; font-size: .85rem; }
summary h2 { display: inline; } details { margin-top: 2rem; }
@media (max-width: 40rem) { th, td { padding: .35rem .3rem; } td.picture { padding: .1rem; }
  td.bar { min-width: 2rem; } th code { overflow-wrap: anywhere; } }
@media print { body { margin: 0; max-width: none; } table.pictures, figure, tr {
  break-inside: avoid; } }
"""
STYLE += CHART_STYLE


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page; empty parts are left out."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
        f"<body>{''.join(part for part in parts if part)}</body></html>\n"
    )


def folded(title: str, values: dict[str, Any] | None) -> str:
    """Values as YAML, to be opened; "" without any."""
    if not values:
        return ""
    text = html.escape(yaml.safe_dump(values, sort_keys=False))
    return f"<details><summary><h2>{html.escape(title)}</h2></summary><pre>{text}</pre></details>"


def four_digits(value: float) -> str:
    """A perplexity as it is shown: 1.000 is not 1."""
    return f"{value:#.4g}" if abs(value) < 1000 else f"{value:.4g}"


def percent(rate: float | None) -> str:
    """A share as the pages show it."""
    return "–" if rate is None or not math.isfinite(rate) else f"{100 * rate:.2f} %"
