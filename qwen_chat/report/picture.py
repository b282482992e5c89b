"""Curves as a PNG picture, without a library: numpy draws lines, zlib packs them.

In: the series of a chart. Out: the bytes of the file, with the same points in the same frame as the page's SVG.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from qwen_chat.report.chart import HEIGHT, INDENT, RIGHT, WIDTH, Point, Series, drawn

SCALE = 2  # pixels a unit of the chart
INK, GRID = (102, 112, 133), (228, 231, 236)
COLOURS = ((59, 91, 219), (232, 89, 12), (43, 138, 62), (156, 54, 181), (11, 114, 133), (201, 42, 42))
# What an axis says, as strokes over a grid: two digits are a column and a row.
STROKES = {
    "0": "0020240400",
    "1": "011014",
    "2": "002022020424",
    "3": "00202404,0222",
    "4": "000222,2024",
    "5": "200002222404",
    "6": "200004242202",
    "7": "002014",
    "8": "0020240400,0222",
    "9": "220200202404",
    ".": "1414",
    "-": "0222",
    "+": "0222,1113",
    "d": "2024040222",
    "e": "032322020424",
    "h": "0004,022224",
    "l": "1014",
    "o": "0222240402",
    "p": "0502222404",
    "s": "220203232404",
    "t": "101424,0222",
    "u": "02042422",
    " ": "",
}
GLYPH, ADVANCE = 2.0, 7.0  # units between two columns or rows, and from one sign to the next

Pixels = npt.NDArray[np.float64]
Colour = tuple[int, int, int]


def png(series: Sequence[Series]) -> bytes:
    """The curves; white paper where there is nothing to draw."""
    pixels = np.full((HEIGHT * SCALE, WIDTH * SCALE, 3), 255.0)
    kept, frame = drawn(series)
    if frame is not None:
        for tick in frame.y_ticks:
            y = frame.place(frame.x_ticks[0], tick)[1]
            _stroke(pixels, [(INDENT, y), (WIDTH - RIGHT, y)], GRID, 1.0)
            _label(pixels, f"{tick:g}", (INDENT - 8, y), align=1.0)
        bottom = frame.place(frame.x_ticks[0], frame.y_ticks[0])[1]
        for tick in frame.x_ticks:
            _label(pixels, f"{tick:g}", (frame.place(tick, frame.y_ticks[0])[0], bottom + 13), align=0.5)
        _label(pixels, "step", ((INDENT + WIDTH) / 2, HEIGHT - 11), align=0.5)
    for number, (one, points) in enumerate(zip(series, kept, strict=True)):
        if frame is None or not points:
            continue
        colour = COLOURS[one.colour % len(COLOURS)]
        places = [frame.place(*point) for point in points]
        if one.marked or len(places) == 1:
            for place in places:
                _stroke(pixels, [place, place], colour, 7.0)
        else:
            _stroke(pixels, places, colour, 1.6)
        _label(pixels, "held out" if one.marked else "loss", (WIDTH - RIGHT, 16 + 13 * number), 1.0, colour)
    return _png_file(np.rint(pixels).astype(np.uint8))


def _stroke(pixels: Pixels, points: Sequence[Point], colour: Colour, width: float) -> None:
    """A line through all points, with round ends; its edge covers a pixel in part."""
    half = width * SCALE / 2
    ends = [np.array(point) * SCALE for point in points]
    for start, stop in pairwise(ends):
        low = np.maximum(np.floor(np.minimum(start, stop) - half - 1).astype(int), 0)
        high = np.ceil(np.maximum(start, stop) + half + 1).astype(int)
        part = pixels[low[1] : high[1], low[0] : high[0]]
        y, x = np.mgrid[low[1] : low[1] + part.shape[0], low[0] : low[0] + part.shape[1]] + 0.5
        way = stop - start
        along = ((x - start[0]) * way[0] + (y - start[1]) * way[1]) / max(float(way @ way), 1e-9)
        along = along.clip(0, 1)
        apart = np.hypot(x - start[0] - along * way[0], y - start[1] - along * way[1])
        part += (half + 0.5 - apart).clip(0, 1)[..., None] * (np.array(colour) - part)


def _label(pixels: Pixels, text: str, at: Point, align: float, colour: Colour = INK) -> None:
    """A line of text whose middle is as high as `at`; align: what share of it lies left of `at`."""
    left = at[0] - align * ADVANCE * len(text)
    for number, sign in enumerate(text):
        for stroke in filter(None, STROKES[sign].split(",")):
            grid = zip(map(int, stroke[::2]), map(int, stroke[1::2]), strict=True)
            places = [(left + ADVANCE * number + GLYPH * x, at[1] + GLYPH * (y - 2)) for x, y in grid]
            _stroke(pixels, places, colour, 1.0)


def _png_file(pixels: npt.NDArray[np.uint8]) -> bytes:
    """[height, width, 3] as a PNG file: https://www.w3.org/TR/png-3/"""
    height, width, _ = pixels.shape
    lines = np.zeros((height, 1 + 3 * width), np.uint8)  # each begins with its filter: none
    lines[:, 1:] = pixels.reshape(height, -1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits of red, green and blue
    body = zlib.compress(lines.tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
