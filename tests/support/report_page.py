"""A run's page read back: what its curves say, held against the lines of the run's log.

In: a run's folder. Out: nothing, or an AssertionError.
"""

import json
import re
from pathlib import Path
from typing import Any

MOST_BYTES = 1_000_000
CURVES = {"loss": "loss", "learning rate": "learning_rate", "gradient norm": "grad_norm"}


def log_of(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The log's lines of steps, and those of evaluations."""
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text("utf-8").splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "eval_loss" in line]


def scale(ticks: list[tuple[str, str]]) -> tuple[float, float]:
    """(slope, offset) that turn a place in the picture into a value, by the first and the last tick."""
    (a, first), (b, last) = [(float(place), float(value)) for place, value in (ticks[0], ticks[-1])]
    slope = (last - first) / (b - a)
    return slope, first - slope * a


def drawn(page: str, label: str) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """The points of a chart's line and its dots, in the units of its axes."""
    (svg,) = re.findall(rf'<svg [^>]*aria-label="{label}">(.*?)</svg>', page)
    across, x0 = scale(re.findall(r'<text class="tick" x="([^"]+)" y="214\.0">([^<]+)<', svg))
    lines = re.findall(r'<line class="grid" [^>]*y1="([^"]+)"', svg)
    up, y0 = scale(list(zip(lines, re.findall(r'<text class="tick end" [^>]*>([^<]+)<', svg), strict=True)))
    (line,) = re.findall(r'<polyline [^>]*points="([^"]+)"', svg)
    dots = re.findall(r'<circle cx="([^"]+)" cy="([^"]+)"', svg)
    places = [tuple(point.split(",")) for point in line.split()]
    found = [[(float(x) * across + x0, float(y) * up + y0) for x, y in some] for some in (places, dots)]
    return found[0], found[1]


def assert_is_the_logs(folder: Path) -> None:
    """Each point is a line of the log, each figure the run's own; nothing is fetched, and the file is small."""
    page = (folder / "report.html").read_text(encoding="utf-8")
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    steps, evaluations = log_of(folder)
    for label, key in CURVES.items():
        line, dots = drawn(page, label)
        values = [entry[key] for entry in steps]
        close = (max(values) - min(0, *values)) / 1500  # a tenth of a unit of a picture of 182
        assert [round(x) for x, _ in line] == [entry["step"] for entry in steps]
        assert max(abs(y - value) for (_, y), value in zip(line, values, strict=True)) < close, label
        wanted = [(entry["step"], entry["eval_loss"]) for entry in evaluations] if key == "loss" else []
        assert [round(x) for x, _ in dots] == [step for step, _ in wanted]
        assert all(abs(y - value) < close for (_, y), (_, value) in zip(dots, wanted, strict=True))
    figures = [f"{steps[0]['loss']:,.4g} → {steps[-1]['loss']:,.4g} ({len(steps)})", f"{run['tokens']:,}"]
    figures += [f"{run['peak_memory_gib']:,.4g}", f"{run['data']['supervised']:,}"]
    for change in run["changes"].values():
        moved = change["difference"]
        figures += [f"<td>{change['before']:.4f}</td><td>{change['after']:.4f}</td>"]
        figures += [f"{moved['value']:+.4f} [{moved['low']:+.4f}, {moved['high']:+.4f}]"]
    for text in (*figures, *run["versions"].values()):
        assert text in page, text
    assert not re.search(r'(?:src|href)="(?!data:)', page) and len(page.encode()) < MOST_BYTES
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
