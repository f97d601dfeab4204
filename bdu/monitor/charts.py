"""Charts as SVG and HTML, without scripts: they print, and read well in light and dark."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        title: what it is called, at its end and in the text for those who cannot see it.
        colour: a CSS colour.
        dashes: SVG's stroke-dasharray; differs from curve to curve, as colour alone says nothing
            to some.
        points: (step, value in [0, 1]), ascending.
    """

    title: str
    colour: str
    dashes: str
    points: Sequence[tuple[float, float]]


_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 296, 48, 130, 30, 34
_LINE = 15  # between two titles


def line_chart(curves: Sequence[Curve], phases: Sequence[tuple[float, str]] = ()) -> str:
    """A figure of shares over steps; `phases` are steps at which one begins, with its name."""
    drawn = [curve for curve in curves if len(curve.points)]
    last = max((curve.points[-1][0] for curve in drawn), default=0) or 1

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / last

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - min(1.0, max(0.0, value)))

    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(
            f'<line x1="{_LEFT}" x2="{x(last):.1f}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" '
            'stroke="var(--line)"/>'
            f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">'
            f"{100 * tick:.0f} %</text>"
        )
    for step, name in phases:
        parts.append(
            f'<line x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{_TOP - 22}" '
            f'y2="{_HEIGHT - _BOTTOM}" stroke="var(--soft)" stroke-dasharray="2 4"/>'
            f'<text x="{x(step) + 4:.1f}" y="{_TOP - 12}">{html.escape(name)}</text>'
        )
    titles = _apart([y(curve.points[-1][1]) for curve in drawn])
    for curve, height in zip(drawn, titles, strict=True):
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in curve.points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{curve.colour}" stroke-width="2.5" '
            f'stroke-dasharray="{curve.dashes}"/>'
            f'<line x1="{x(last) + 5:.1f}" x2="{x(last) + 25:.1f}" y1="{height:.1f}" '
            f'y2="{height:.1f}" stroke="{curve.colour}" stroke-width="2.5" '
            f'stroke-dasharray="{curve.dashes}"/>'
            f'<text x="{x(last) + 29:.1f}" y="{height + 4:.1f}">{html.escape(curve.title)}</text>'
        )
    parts.append(
        f'<text x="{_LEFT}" y="{_HEIGHT - 8}">step 0</text>'
        f'<text x="{x(last):.1f}" y="{_HEIGHT - 8}" text-anchor="end">step {last:g}</text>'
    )
    said = "; ".join(
        f"{curve.title} from {100 * curve.points[0][1]:.1f} % to {100 * curve.points[-1][1]:.1f} %"
        for curve in drawn
    )
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{html.escape(said)}">{"".join(parts)}</svg>'
        f"<figcaption>{html.escape(said)}.</figcaption></figure>"
    )


def _apart(heights: Sequence[float]) -> list[float]:
    """Heights of titles, moved apart until none covers another, from the highest on."""
    placed = [0.0] * len(heights)
    above = float("-inf")
    for i in sorted(range(len(heights)), key=lambda i: heights[i]):
        placed[i] = above = max(heights[i], above + _LINE)
    below = float(_HEIGHT - _BOTTOM)
    for i in sorted(range(len(heights)), key=lambda i: -placed[i]):
        placed[i] = below = min(placed[i], below)
        below -= _LINE
    return placed


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
