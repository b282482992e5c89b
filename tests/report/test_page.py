"""The page of a run: its figures are the log's, it asks the network for nothing, a killed run is shown as it is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from shutil import which

import pytest

from qwen_chat.errors import OptionError
from qwen_chat.report.chart import MOST_POINTS, Series, curves
from qwen_chat.report.page import page, write_page
from qwen_chat.report.past_run import PastRun
from tests.support.scripts import runner

CHROMIUM = which("chromium") or which("google-chrome")
LOSSES = (4.5, 2.25, 1.125)
RUN = {
    "state": "finished",
    "method": "lora",
    "model": "/models/<Tiny>",
    "given": ["data_path", "use_lora", "output_dir"],
    "options": {"data_path": ["my data.jsonl"], "eval_data_path": [], "use_lora": True, "output_dir": "out"},
    "decisions": ["device cpu (no accelerator here)"],
    "data": {"conversations": 17, "tokens": 812, "supervised": 196, "quantiles": {"min": 42, "max": 55}},
    "plan": {"weights": 2**30, "total": 2**31},
    "versions": {"torch": "2.13.0"},
    "tokens": 2393,
    "peak_memory_gib": 1.665,
    "evaluation": {"eval_loss": 0.625},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "run"
    made.mkdir()
    (made / "run.json").write_text(json.dumps(RUN), encoding="utf-8")
    lines = [
        {"step": k + 1, "loss": loss, "learning_rate": 1e-3 / (k + 1), "grad_norm": 2.0}
        for k, loss in enumerate(LOSSES)
    ]
    lines.insert(2, {"step": 2, "eval_loss": 0.75})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (made / "train_log.jsonl").write_text(text + '{"step": 4, "lo', encoding="utf-8")
    return made


def test_its_figures_are_the_logs(folder: Path) -> None:
    shown = write_page(folder).read_text(encoding="utf-8")
    assert shown == page([PastRun.read(folder)])
    lines = re.findall(r'<polyline class="line c0" points="([^"]*)"><title>run</title>', shown)
    assert [len(points.split()) for points in lines] == [3, 3, 3]  # loss, rate, gradient
    heights = [float(point.split(",")[1]) for point in lines[0].split()]
    assert heights == sorted(heights)  # down on the page, as the loss goes down
    assert (heights[1] - heights[0]) / (heights[2] - heights[1]) == pytest.approx(2, abs=0.02)
    assert shown.count("<circle") == 1
    for text in (
        "4.5 → 1.125 (3)",
        "0.625",
        "2,393",
        "1.665",
        "&lt;Tiny&gt;",
        "--data_path &#x27;my data.jsonl&#x27;",
    ):
        assert text in shown
    assert not re.search(r'(?:src|href)="(?!data:)', shown) and len(shown) < 1_000_000


def test_a_killed_run_says_so(folder: Path) -> None:
    (folder / "run.json").write_text(json.dumps({**RUN, "state": "running"}), encoding="utf-8")
    shown = page([PastRun.read(folder)])
    assert "did not finish" in shown and "<polyline" in shown
    (folder / "train_log.jsonl").unlink()
    assert "0 steps are in its log" in page([PastRun.read(folder)])


def test_two_runs_beside_each_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = folder.parent / "other"
    other.mkdir()
    options = {**RUN["options"], "data_path": ["<b>.jsonl"]}  # type: ignore[dict-item]
    (other / "run.json").write_text(json.dumps({**RUN, "options": options}), encoding="utf-8")
    report = runner("finetune/report.py", monkeypatch, capsys)
    file = folder.parent / "both.html"
    status, said, _ = report(str(folder), str(other), "-o", str(file))
    assert status == 0 and str(file) in said
    shown = file.read_text(encoding="utf-8")
    assert "&lt;b&gt;.jsonl" in shown and "my data.jsonl" in shown and "--use_lora" not in shown
    for words, wanted in (
        ((), "the folder of a run"),
        ((str(folder.parent),), str(folder.parent / "run.json")),
        ((str(folder), str(other)), "-o"),
        ((str(folder), "--samples", "2"), "my data.jsonl"),
    ):
        status, said, _ = report(*words)
        assert status == 2 and wanted in said and "Traceback" not in said


def test_what_is_no_run_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("[]", encoding="utf-8")
    with pytest.raises(OptionError, match="not the record of a run"):
        PastRun.read(tmp_path)


def test_a_long_curve_keeps_its_extremes() -> None:
    points = [(float(k), 1.0) for k in range(50_000)]
    points[31_111] = (31_111.0, 9.0)
    points[40_000] = (40_000.0, float("nan"))
    drawn = curves([Series("a", points)], x_name="x", y_name="y")
    assert drawn.count(",") <= MOST_POINTS + 10
    tops = [float(pair.split(",")[1]) for pair in re.findall(r'points="([^"]*)"', drawn)[0].split()]
    assert sum(top < min(tops) + 1 for top in tops) == 1


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)")
def test_a_browser_shows_it_in_both_languages(folder: Path) -> None:
    driver = pytest.importorskip("playwright.sync_api")
    faults: list[str] = []
    with driver.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        shown = browser.new_page(locale="en-GB")
        shown.on("console", lambda message: faults.append(message.text))
        shown.on("request", lambda asked: faults.extend([asked.url] * asked.url.startswith("http")))
        shown.goto(write_page(folder).as_uri())
        assert shown.get_by_role("heading", name="Curves").is_visible()
        shown.get_by_role("button").click()
        assert shown.get_by_role("heading", name="曲线").is_visible()
        assert not shown.get_by_role("heading", name="Curves").is_visible()
        assert shown.locator("svg").count() == 4
        browser.close()
    assert not faults
