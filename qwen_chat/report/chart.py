"""Curves and bars as SVG, without a library: a page needs no network and no script for them.

In: series of points, or heights of bars. Out: one `<svg>` element. It is as wide as its place; colours are CSS classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 240
INDENT, RIGHT, TOP, BOTTOM = 62, 12, 12, 34  # room for the figures beside the axes
MOST_POINTS = 2000  # of a curve; a longer one is thinned out, its extremes stay


@dataclass(frozen=True)
class Series:
    """A curve. `points`: (x, y) with x ascending; what is not a number is left out. `marked`: points, not a line."""

    name: str
    points: Sequence[tuple[float, float]]
    marked: bool = False


def curves(series: Sequence[Series], *, x_name: str, y_name: str) -> str:
    """All series over one pair of axes; nothing to draw gives an empty text."""
    kept = [(one, [(x, y) for x, y in one.points if math.isfinite(x) and math.isfinite(y)]) for one in series]
    points = [point for _, found in kept for point in found]
    if not points:
        return ""
    x_ticks = _ticks(min(x for x, _ in points), max(x for x, _ in points))
    y_ticks = _ticks(min(0.0, *(y for _, y in points)), max(y for _, y in points))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return INDENT + across * (WIDTH - INDENT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = _axes(place, x_ticks, y_ticks, x_name, y_name)
    for number, (one, found) in enumerate(kept):
        drawn = [place(*point) for point in _thinned(found)]
        title = f"<title>{escape(one.name)}</title>"
        if one.marked or len(drawn) == 1:
            dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in drawn)
            parts.append(f'<g class="dots c{number % 6}">{title}{dots}</g>')
        elif drawn:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
            parts.append(f'<polyline class="line c{number % 6}" points="{path}">{title}</polyline>')
    return _svg(parts, f"{y_name} / {x_name}")


def bars(heights: Sequence[tuple[str, float]], *, x_name: str, y_name: str) -> str:
    """One bar for each (name, height)."""
    if not heights:
        return ""
    y_ticks = _ticks(0.0, max(height for _, height in heights))
    wide = (WIDTH - INDENT - RIGHT) / len(heights)

    def place(x: float, y: float) -> tuple[float, float]:
        return INDENT + x * wide, HEIGHT - BOTTOM - y / y_ticks[-1] * (HEIGHT - TOP - BOTTOM)

    parts = _axes(place, [], y_ticks, x_name, y_name)
    for number, (name, height) in enumerate(heights):
        x, y = place(number + 0.1, height)
        tall = HEIGHT - BOTTOM - y
        parts.append(
            f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" width="{0.8 * wide:.1f}" height="{tall:.1f}">'
            f"<title>{escape(name)}: {height:g}</title></rect>"
        )
        if number % max(1, len(heights) // 8) == 0:
            middle = place(number + 0.5, 0)[0]
            parts.append(
                f'<text class="tick" x="{middle:.1f}" y="{HEIGHT - BOTTOM + 14}">{escape(name)}</text>'
            )
    return _svg(parts, f"{y_name} / {x_name}")


def _svg(parts: Sequence[str], label: str) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label, quote=True)}">'
    return f"{head}{''.join(parts)}</svg>"


def _axes(
    place: Callable[[float, float], tuple[float, float]],
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_name: str,
    y_name: str,
) -> list[str]:
    parts = []
    for tick in y_ticks:
        y = place(x_ticks[0] if x_ticks else 0, tick)[1]
        parts.append(f'<line class="grid" x1="{INDENT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{INDENT - 6}" y="{y + 4:.1f}">{tick:g}</text>')
    for tick in x_ticks:
        x = place(tick, y_ticks[0])[0]
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}">{tick:g}</text>')
    parts.append(
        f'<text class="tick" x="{(INDENT + WIDTH) / 2:.0f}" y="{HEIGHT - 4}">{escape(x_name)}</text>'
    )
    middle = (HEIGHT - BOTTOM + TOP) / 2
    parts.append(
        f'<text class="tick" transform="translate(12 {middle:.0f}) rotate(-90)">{escape(y_name)}</text>'
    )
    return parts


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers from at most `low` to at least `high`."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / 5
    scale = 10.0 ** math.floor(math.log10(raw))
    step = scale * next(factor for factor in (1, 2, 5, 10) if factor * scale >= raw)
    first = math.floor(low / step)
    return [round(k * step, 12) for k in range(first, math.ceil(high / step) + 1)]


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """At most MOST_POINTS: of each stretch its lowest and its highest."""
    if len(points) <= MOST_POINTS:
        return points
    stretch = math.ceil(2 * len(points) / MOST_POINTS)
    kept = []
    for begin in range(0, len(points), stretch):
        part = points[begin : begin + stretch]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept
