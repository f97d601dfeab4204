"""Charts as SVG and HTML, without scripts: they print, and read well in light and dark."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        title: what it is called, in the legend and in the text for those who cannot see it.
        colour: a CSS colour.
        dashes: SVG's stroke-dasharray; differs from curve to curve, as colour alone says nothing
            to some.
        points: (step, value), ascending.
    """

    title: str
    colour: str
    dashes: str
    points: Sequence[tuple[float, float]]


CHART_STYLE = """
figure { margin: 0; } .plot { position: relative; height: 15rem; margin: 2.6rem 0 2rem 3.4rem; }
.plot svg { position: absolute; width: 100%; height: 100%; overflow: visible; }
.plot line, .plot polyline, .legend line { vector-effect: non-scaling-stroke; }
.plot span { position: absolute; font-size: .8rem; color: var(--soft); white-space: nowrap; }
.plot .tick { right: calc(100% + .4rem); transform: translateY(-50%); }
.plot .phase { bottom: 100%; padding: 0 .3rem; } .plot .step { top: 100%; padding-top: .2rem; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: 0;
  padding: 0; font-size: .9rem; } .legend svg { width: 2rem; height: .6rem; margin-right: .4rem; }
"""
_STROKE = 'stroke-width="2.5" fill="none"'


def line_chart(
    curves: Sequence[Curve],
    phases: Sequence[tuple[float, str]] = (),
    *,
    share: bool = True,
    along: str = "step",
) -> str:
    """A figure of values over steps.

    Lines are SVG that takes any width, and words are HTML beside it, as large on a phone as they
    are on a desk.

    Args:
        curves: those without points are left out.
        phases: steps at which one begins, with its name.
        share: values are shares, shown in percent; else numbers ≥ 0, up to the largest.
        along: what is counted from left to right.
    """
    drawn = [curve for curve in curves if len(curve.points)]
    last = max((curve.points[-1][0] for curve in drawn), default=0) or 1
    top = 1.0 if share else max((y for c in drawn for _, y in c.points), default=0) or 1.0

    def shown(value: float, places: int = 1) -> str:
        return f"{100 * value:.{places}f} %" if share else f"{value:.3g}"

    lines, words = [], []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        height = 100 * (1 - tick)
        lines.append(
            f'<line x1="0" x2="100" y1="{height:g}" y2="{height:g}" stroke="var(--line)"/>'
        )
        words.append(f'<span class="tick" style="top:{height:g}%">{shown(top * tick, 0)}</span>')
    for i, (step, name) in enumerate(phases):
        x = 100 * step / last
        side = f"left:{x:.1f}%" if x <= 50 else f"right:{100 - x:.1f}%"
        above = f";margin-bottom:{1.1 * (i % 2):g}rem" if len(phases) > 2 else ""
        lines.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="-8" y2="100" stroke="var(--soft)" '
            'stroke-dasharray="2 4"/>'
        )
        words.append(f'<span class="phase" style="{side}{above}">{html.escape(name)}</span>')
    for curve in drawn:
        points = " ".join(f"{100 * x / last:.2f},{_height(y / top):.2f}" for x, y in curve.points)
        lines.append(
            f'<polyline points="{points}" stroke="{curve.colour}" '
            f'stroke-dasharray="{curve.dashes}" {_STROKE}/>'
        )
    words.append(f'<span class="step" style="left:0">{along} 0</span>')
    words.append(f'<span class="step" style="right:0">{along} {last:g}</span>')
    said = "; ".join(
        f"{curve.title} from {shown(curve.points[0][1])} to {shown(curve.points[-1][1])}"
        for curve in drawn
    )
    return (
        f'<figure><ul class="legend">{"".join(map(_legend, drawn))}</ul><div class="plot">'
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{html.escape(said)}">{"".join(lines)}</svg>'
        f'<div aria-hidden="true">{"".join(words)}</div></div>'
        f"<figcaption>{html.escape(said)}.</figcaption></figure>"
    )


def _height(value: float) -> float:
    return 100 * (1 - min(1.0, max(0.0, value)))


def _legend(curve: Curve) -> str:
    return (
        '<li><svg viewBox="0 0 32 10" aria-hidden="true"><line x1="0" x2="32" y1="5" y2="5" '
        f'stroke="{curve.colour}" stroke-dasharray="{curve.dashes}" {_STROKE}/></svg>'
        f"{html.escape(curve.title)}</li>"
    )


def bar_table(head: tuple[str, str], rows: Sequence[tuple[str, float]], unit: str = " %") -> str:
    """A table with a bar beside each number, in the order given; the longest bar is the largest."""
    largest = max((value for _, value in rows), default=0) or 1
    body = "".join(
        f'<tr><th scope="row"><code>{html.escape(name)}</code></th>'
        f'<td class="number">{value:.2f}{unit}</td>'
        f'<td class="bar" aria-hidden="true"><span style="width:{100 * value / largest:.1f}%">'
        "</span></td></tr>"
        for name, value in rows
    )
    return (
        f'<div class="wide"><table><thead><tr><th scope="col">{html.escape(head[0])}</th>'
        f'<th class="number" scope="col">{html.escape(head[1])}</th><td></td></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
