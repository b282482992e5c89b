"""Curves and bars as SVG, without a library: a page needs no network and no script for them.

In: series of points, or heights of bars; what lies across, in English and Chinese. Out: one `<svg>` element; what it is
stands in its caption. It is as wide as its place; colours and the language that is shown are CSS classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 240
INDENT, RIGHT, TOP, BOTTOM = 62, 22, 14, 44  # room for the figures beside the axes
MOST_POINTS = 2000  # of a curve; a longer one is thinned out, its extremes stay
COLOURED = 6  # curves that a colour alone tells apart
MOST_TOGETHER = 12_000  # of all curves of one picture
LARGEST = 1e300  # what is larger, or no number, is left out: a frame around it would be no number either

Name = tuple[str, str]  # in English, in Chinese
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A curve. `points`: (x, y) with x ascending; what is not a number is left out. `marked`: points, not a line."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    marked: bool = False


@dataclass(frozen=True)
class Frame:
    """A pair of axes with round numbers, which ends at the last point across; from 0 where nothing is below."""

    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    last: float

    @classmethod
    def around(cls, points: Sequence[Point]) -> Frame:
        x, y = [x for x, _ in points], [y for _, y in points]
        across = _ticks(min(x), max(x))
        last = max(x) if max(x) > min(x) else across[-1]
        return cls([tick for tick in across if tick <= last], _ticks(min(0.0, *y), max(y)), last)

    def place(self, x: float, y: float) -> Point:
        """Where a point lies in the picture, in units of WIDTH and HEIGHT, from its upper left corner."""
        across = (x - self.x_ticks[0]) / (self.last - self.x_ticks[0])
        up = (y - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        return INDENT + across * (WIDTH - INDENT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def drawn(series: Sequence[Series]) -> tuple[list[list[Point]], Frame | None]:
    """Of each series the points that are drawn, and the frame around all of them; None where there is nothing."""
    most = min(MOST_POINTS, MOST_TOGETHER // max(1, len(series)))
    kept = [
        _thinned([(x, y) for x, y in one.points if abs(x) < LARGEST and abs(y) < LARGEST], most)
        for one in series
    ]
    every = [point for points in kept for point in points]
    return kept, Frame.around(every) if every else None


def look(number: int) -> str:
    """The CSS classes of a curve: six colours, then the same dashed, then dotted."""
    return f"c{number % COLOURED}" + (f" d{number // COLOURED}" if number >= COLOURED else "")


def curves(series: Sequence[Series], *, x_name: Name, label: str) -> str:
    """All series over one pair of axes; nothing to draw gives an empty text."""
    kept, frame = drawn(series)
    if frame is None:
        return ""
    parts = _axes(frame, x_name)
    for one, points in zip(series, kept, strict=True):
        places = [frame.place(*point) for point in points]
        title = f"<title>{escape(one.name)}</title>"
        if one.marked or len(places) == 1:
            dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in places)
            parts.append(f'<g class="dots {look(one.colour)}">{title}{dots}</g>')
        elif places:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline class="line {look(one.colour)}" points="{path}">{title}</polyline>')
    return _svg(parts, label)


def bars(heights: Sequence[tuple[str, float]], *, x_name: Name, label: str) -> str:
    """One bar for each (name, height); the name stands at its right edge, as the upper end of what it counts."""
    if not heights:
        return ""
    frame = Frame([0], _ticks(0.0, max(height for _, height in heights)), len(heights))
    parts = _axes(frame, x_name, counted=False)
    for number, (name, height) in enumerate(heights):
        (left, y), (right, bottom) = frame.place(number + 0.1, height), frame.place(number + 0.9, 0)
        parts.append(
            f'<rect class="bar" x="{left:.1f}" y="{y:.1f}" width="{right - left:.1f}"'
            f' height="{bottom - y:.1f}"><title>{escape(name)}: {height:g}</title></rect>'
        )
        if (len(heights) - 1 - number) % max(1, len(heights) // 6) == 0:
            parts.append(_tick(escape(name), right, HEIGHT - BOTTOM + 18, "end"))
    return _svg(parts, label)


def _svg(parts: Iterable[str], label: str) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label, quote=True)}">'
    return f"{head}{''.join(parts)}</svg>"


def _tick(text: str, x: float, y: float, more: str = "") -> str:
    return f'<text class="{f"tick {more}".strip()}" x="{x:.1f}" y="{y:.1f}">{text}</text>'


def _axes(frame: Frame, x_name: Name, *, counted: bool = True) -> list[str]:
    """The ticks of a frame; counted: across too."""
    parts = []
    for tick in frame.y_ticks:
        y = frame.place(0, tick)[1]
        parts.append(f'<line class="grid" x1="{INDENT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_tick(f"{tick:g}", INDENT - 6, y + 4, "end"))
    ticks = frame.x_ticks if counted else ()
    parts += [_tick(f"{tick:g}", frame.place(tick, 0)[0], HEIGHT - BOTTOM + 18) for tick in ticks]
    for language, name in zip(("en", "zh"), x_name, strict=True):
        parts.append(_tick(escape(name), (INDENT + WIDTH) / 2, HEIGHT - 6, language))
    return parts


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers from at most `low` to at least `high`."""
    if high - low < 1 / LARGEST:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / 5
    scale = 10.0 ** math.floor(math.log10(raw))
    step = scale * next(factor for factor in (1, 2, 5, 10) if factor * scale >= raw)
    first = math.floor(low / step)
    return [float(f"{k * step:.12g}") for k in range(first, math.ceil(high / step) + 1)]


def _thinned(points: list[Point], most: int) -> list[Point]:
    """At most `most`: of each stretch its lowest and its highest."""
    if len(points) <= most:
        return points
    stretch = math.ceil(2 * len(points) / most)
    kept = []
    for begin in range(0, len(points), stretch):
        part = points[begin : begin + stretch]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept
