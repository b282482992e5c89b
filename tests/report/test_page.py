"""The page of a run: its figures are the log's, it asks the network for nothing, a killed run is shown as it is."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from shutil import which
from typing import Any

import pytest

from qwen_chat.errors import OptionError, OutputError
from qwen_chat.report.chart import MOST_POINTS, Series, curves
from qwen_chat.report.page import page, write_page
from qwen_chat.report.past_run import PastRun
from qwen_chat.report.picture import STROKES, png
from qwen_chat.report.sections import MOST_FUNCTIONS
from tests.support.report_page import assert_is_the_logs, log_of
from tests.support.scripts import runner

CHROMIUM = which("chromium") or which("google-chrome")
LOSSES = (4.5, 2.25, 1.125)
MOVED = {"value": -0.875, "low": -1.25, "high": -0.5, "n": 6}
DATA: dict[str, Any] = {"conversations": 17, "tokens": 812, "supervised": 196, "dropped": 3}
DATA |= {"histogram": {"20": 9, "40": 0, "55": 8}, "calls": {"add": 4, "<half>": 1}}
RUN: dict[str, Any] = {
    "state": "finished",
    "method": "lora",
    "model": "/models/<Tiny>",
    "given": ["data_path", "use_lora", "output_dir"],
    "options": {"data_path": ["my data.jsonl"], "eval_data_path": [], "use_lora": True, "output_dir": "out"},
    "decisions": ["device cpu (no accelerator here)"],
    "warnings": ["conversations of up to 9 tokens for a model of <8> positions"],
    "data": DATA,
    "general": {"conversations": 6, "tokens": 120, "supervised": 64},
    "plan": {"weights": 2**30, "total": 2**31},
    "versions": {"torch": "2.13.0"},
    "tokens": 2393,
    "peak_memory_gib": 1.665,
    "evaluation": {"eval_loss": 0.625},
    "changes": {
        "held_out": {"conversations": 6, "tokens": 64, "before": 1.5, "after": 0.625, "difference": MOVED},
    },
}


def share(value: float) -> dict[str, float]:
    return {"value": value, "low": value / 2, "high": 1.0, "n": 8}


def scored(exact: int) -> dict[str, Any]:
    """One side of evaluate.py's report."""
    tools = {"add": {"n": 8, "exact": exact, "name": 8}, "new": {"n": 1, "exact": 0, "name": 0}}
    return {"tools": {"name": share(1.0), "exact": share(exact / 8), "missing": None, "tools": tools}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "run"
    made.mkdir()
    (made / "run.json").write_text(json.dumps(RUN), encoding="utf-8")
    lines: list[dict[str, Any]] = [
        {"step": k + 1, "loss": loss, "learning_rate": 1e-3 / (k + 1), "grad_norm": 2.0}
        for k, loss in enumerate(LOSSES)
    ]
    lines.insert(2, {"step": 2, "eval_loss": 0.75})
    (made / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return made


def changed(folder: Path, **facts: Any) -> PastRun:
    (folder / "run.json").write_text(json.dumps({**RUN, **facts}), encoding="utf-8")
    return PastRun.read(folder)


def test_its_figures_are_the_logs(folder: Path) -> None:
    shown = write_page(folder).read_text(encoding="utf-8")
    assert shown == page([PastRun.read(folder)])
    assert_is_the_logs(folder)
    for text in (
        "4.5 → 1.125 (3)",
        "1.5 → 0.625",
        "2,393",
        "1.665",
        "&lt;Tiny&gt;",
        "--data_path &#x27;my data.jsonl&#x27;",
        "a model of &lt;8&gt; positions",
        "<title>20: 9</title>",  # a bar of the histogram
        "<td><code>&lt;half&gt;</code></td><td>1</td>",
        "--compare base -d HELD_OUT.jsonl -o",
    ):
        assert text in shown, text
    assert re.search(r"left out: too long</span>.*?</td><td>3</td><td>–</td>", shown)


def test_a_wrong_point_would_be_seen(folder: Path) -> None:
    write_page(folder)
    log = folder / "train_log.jsonl"
    log.write_text(log.read_text().replace("2.25", "2.26"), "utf-8")
    with pytest.raises(AssertionError):
        assert_is_the_logs(folder)


def test_a_killed_run_says_so(folder: Path) -> None:
    with (folder / "train_log.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 4, "lo')
    (folder / "losses.json").write_text('{"general": {"before": [[3.0, 2], [4.0, 2]]}}', "utf-8")
    shown = page([changed(folder, state="running", changes={})])
    assert "did not finish" in shown and "没有结束" in shown and "<polyline" in shown
    assert "<td>1.7500</td><td>–</td><td>–</td><td>2</td>" in shown  # measured before the first step
    assert "0.75</td>" in shown  # the last evaluation
    (folder / "train_log.jsonl").unlink()
    (folder / "losses.json").write_text('{"general": {"be', "utf-8")
    shown = page([PastRun.read(folder)])
    assert "0 steps are in its log" in shown and "Not measured: --eval_share" in shown
    assert write_page(folder).is_file()  # the picture is white


def test_calls_before_and_after_stand_on_the_page(folder: Path) -> None:
    assert "Function calls" not in page([changed(folder, data={"conversations": 17})])
    report = {"model": scored(6), "compared_with": scored(2)}
    (folder / "evaluation.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    shown = page([changed(folder)])
    assert "HELD_OUT.jsonl" not in shown
    assert "<td>25.0% [12.5%, 100.0%]</td><td>75.0% [37.5%, 100.0%]</td>" in shown
    assert "<code>add</code></td><td>4</td><td>2 / 8</td><td>6 / 8</td>" in shown
    assert "<code>&lt;half&gt;</code></td><td>1</td><td>–</td><td>–</td>" in shown
    assert "<code>new</code></td><td>–</td><td>0 / 1</td><td>0 / 1</td>" in shown
    (folder / "evaluation.json").write_text(json.dumps({"model": scored(6)}), encoding="utf-8")
    assert "<td>75.0% [37.5%, 100.0%]</td></tr>" in page([PastRun.read(folder)])


def test_the_largest_page_is_small(folder: Path) -> None:
    log = [{"step": k, "loss": 1 / k, "learning_rate": 1e-3, "grad_norm": 1.5} for k in range(1, 50_001)]
    (folder / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log), "utf-8")
    calls = {f"a_function_with_a_long_name_{k}": 1 for k in range(5000)}
    run = changed(folder, data={**DATA, "calls": calls}, decisions=["x" * 200] * 100)
    shown = page([run])
    assert len(shown) < 1_000_000 and f"and {5000 - MOST_FUNCTIONS:,} more" in shown
    twelve = page([run] * 12)
    assert len(twelve) < 1_000_000
    looks = re.findall(r'<line class="line ([^"]*)" x2="32"', twelve)
    assert len(set(looks)) == 12 and looks[7] == "c1 d1"  # no two curves look the same
    assert set(looks) == set(re.findall(r'<polyline class="line ([^"]*)"', twelve))


def test_two_runs_beside_each_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = folder.parent / "other"
    other.mkdir()
    options = {**RUN["options"], "data_path": ["<b>.jsonl"]}
    (other / "run.json").write_text(json.dumps({**RUN, "options": options}), encoding="utf-8")
    report = runner("finetune/report.py", monkeypatch, capsys)
    file = folder.parent / "both.html"
    status, said, _ = report(str(folder), str(other), "-o", str(file))
    assert status == 0 and str(file) in said
    shown = file.read_text(encoding="utf-8")
    assert "&lt;b&gt;.jsonl" in shown and "my data.jsonl" in shown and "--use_lora" not in shown
    monkeypatch.chdir(folder.parent)
    status, said, _ = report(str(folder), str(other))
    assert status == 0 and "wrote compared.html" in said
    assert Path("compared.html").read_text(encoding="utf-8") == shown
    for words, wanted in (
        ((), "the folder of a run"),
        ((str(folder.parent),), str(folder.parent / "run.json")),
        ((str(folder), "--samples", "2"), "my data.jsonl"),
        ((str(folder), str(other), "--samples", "2"), "for one run at a time"),
    ):
        status, said, _ = report(*words)
        assert status == 2 and wanted in said and "Traceback" not in said


def test_samples_ask_what_is_held_out_from_all_over_it(folder: Path) -> None:
    from qwen_chat.cli.report import sample_prompts

    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}

    def lines(name: str, *asked: str) -> str:
        file = folder / name
        conversations = [
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": "yes"},
                    {"role": "user", "content": "And now?"},
                    {"role": "assistant", "content": "no"},
                ],
                "tools": [tool],
            }
            for question in asked
        ]
        text = "".join(json.dumps(one) + "\n" for one in conversations)
        file.write_text(text + "broken\n", encoding="utf-8")
        return str(file)

    files = {"data_path": [lines("a.jsonl", *"abcd")], "eval_data_path": [lines("b.jsonl", *"efghef")]}
    run = changed(folder, options={**RUN["options"], **files})
    found = sample_prompts(run, 3)
    assert list(found) == ["e", "g", "f"]  # every second, then the others; one twice is asked once
    assert [message["content"] for message in found["g"]["messages"]] == ["Be brief.", "g"]
    assert found["g"]["tools"] == [tool]
    assert list(sample_prompts(run, 6)) == ["e", "f", "g", "h", "a", "c"]
    files["eval_data_path"] = []
    run = changed(folder, options={**RUN["options"], **files, "eval_share": 0.5})
    assert set(sample_prompts(run, 1)) <= set("abcd") and len(sample_prompts(run, 4)) == 4


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"options": {}, "versions": null}', '{"options": {}, "given": "x"}']
)
def test_what_is_no_run_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text, encoding="utf-8")
    with pytest.raises(OptionError, match="not the record of a run"):
        PastRun.read(tmp_path)


def test_lines_of_the_log_that_are_no_steps_are_left_out(folder: Path) -> None:
    """A number that is none, one that a picture cannot hold, lines that an editor broke, and rates near to nothing."""
    step = {"step": 1, "loss": 1.0, "learning_rate": 1e-13, "grad_norm": 1.0}
    lines = [step, {**step, "step": 2, "loss": float("nan"), "grad_norm": 5e-324}]
    lines += [{**step, "step": 3, "loss": 1e308}, {**step, "step": 4, "learning_rate": 3e-13}]
    lines += [{**step, "loss": None}, {**step, "step": "5"}, {"loss": 1.0, "learning_rate": 1.0}, [1]]
    (folder / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    shown = write_page(folder).read_text(encoding="utf-8")
    assert "1 → 1 (4)" in shown
    for label, points in (("loss", 2), ("learning rate", 4), ("gradient norm", 4)):
        (chart,) = re.findall(rf'aria-label="{label}">(.*?)</svg>', shown)
        (line,) = re.findall(r'points="([^"]+)"', chart)
        assert len(line.split()) == points and "nan" not in line and "inf" not in line
    (rates,) = re.findall(r'aria-label="learning rate">(.*?)</svg>', shown)
    assert {"0", "1e-13", "3e-13"} <= set(re.findall(r'<text class="tick end"[^>]*>([^<]+)<', rates))
    assert len(set(re.findall(r'points="([^"]+)"', rates)[0].split())) == 4
    (folder / "samples.json").write_text('{"question": "Why\u2028?"}\n', "utf-8")
    assert "Why\u2028?" in page([PastRun.read(folder)])


def test_runs_of_one_name_are_told_apart_and_so_is_what_a_preset_chose(folder: Path) -> None:
    other = folder.parent / "again" / "run"
    other.mkdir(parents=True)
    changed(folder, options={**RUN["options"], "save_steps": 500})
    options = {**RUN["options"], "lora_r": 32, "save_steps": 500.0}
    data = {**DATA, "fingerprint": "abcdef0123456789"}
    (other / "run.json").write_text(json.dumps({**RUN, "options": options, "data": data}), encoding="utf-8")
    shutil.copy(folder / "train_log.jsonl", other)
    shown = page([PastRun.read(folder), PastRun.read(other)])
    assert f"<th>{folder}</th><th>{other}</th>" in shown and f"<title>{other}</title>" in shown
    assert "--save_steps" not in shown  # 500 is 500.0
    assert "<td><code>--lora_r</code></td><td>None</td><td>32</td>" in shown  # nobody gave it
    assert "<td>–</td><td>abcdef01</td>" in shown  # the data behind the same name


def test_a_page_goes_nowhere_but_over_a_page(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = runner("finetune/report.py", monkeypatch, capsys)
    file = folder.parent / "page.html"
    for _ in range(2):
        assert report(str(folder), "-o", str(file))[0] == 0
    record = folder / "run.json"
    before = record.read_bytes()
    for words, wanted in (
        (
            ("-o", str(record)),
            f"{record}: holds something else than a page of runs; give another file with -o",
        ),
        (("-o", str(folder)), f"{folder}: cannot be written (Is a directory); give another file with -o"),
        (("-o", str(folder / "no" / "x")), "cannot be written (No such file or directory)"),
        (("-o", ""), "-o: an empty value; give the page's file, or leave the flag out"),
        (("--samples", "-1"), "--samples -1: expected 0 or more"),
        (("--samples", "1", "--max_new_tokens", "0"), "--max_new_tokens 0: expected a number above 0"),
    ):
        status, said, _ = report(str(folder), *words)
        assert status == 2 and wanted in said and "Traceback" not in said
    assert record.read_bytes() == before

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qwen_chat.report.page.write_whole", full)
    with pytest.raises(
        OutputError, match=r"the page cannot be written \(No space left on device\); give its file"
    ):
        write_page(folder)


def test_nothing_that_a_run_says_becomes_part_of_the_page(folder: Path) -> None:
    evil = "</script></title><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\u202e"
    (folder / "samples.json").write_text(
        json.dumps(dict.fromkeys(("question", "before", "after"), evil)), "utf-8"
    )
    tools = {"model": {"tools": {"tools": {evil: {"n": 1, "exact": 1}}}}}
    (folder / "evaluation.json").write_text(json.dumps(tools), "utf-8")
    facts: dict[str, Any] = {"model": evil, "method": evil}
    facts |= {"given": [evil], "decisions": [evil], "warnings": [evil]}
    options = {**RUN["options"], "system": evil, evil: evil}
    data = {**DATA, "calls": {evil: 1}, "histogram": {evil: 1}, "fingerprint": evil}
    run = changed(folder, **facts, options=options, data=data, versions={evil: evil}, state="running")
    twin = folder.parent / '<b>"run'
    shutil.copytree(folder, twin)
    (twin / "run.json").write_text(json.dumps(RUN), "utf-8")
    for shown in (page([run]), page([run, PastRun.read(twin)])):
        assert shown.count("<script") == 1 and "<img" not in shown
        assert shown.count("</title>") == shown.count("<title>")


def test_a_long_curve_keeps_its_extremes() -> None:
    points = [(float(k), 1.0) for k in range(50_000)]
    points[31_111] = (31_111.0, 9.0)
    points[40_000] = (40_000.0, float("nan"))
    drawn = curves([Series("a", points)], x_name=("x", "x"), label="y")
    assert drawn.count(",") <= MOST_POINTS + 10
    tops = [float(pair.split(",")[1]) for pair in re.findall(r'points="([^"]*)"', drawn)[0].split()]
    assert sum(top < min(tops) + 1 for top in tops) == 1


def test_the_picture_shows_the_points() -> None:
    import io

    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    line = Series("a", [(0.0, 0.0), (5.0, 5.0), (10.0, 0.0)])
    dot = Series("b", [(10.0, 5.0)], colour=1, marked=True)
    shown = image.open(io.BytesIO(png([line, dot])))
    assert (shown.size, shown.mode, shown.format) == ((1280, 480), "RGB", "PNG")
    # The frame goes from 0 to 10 and from 0 to 5, in a picture of 640 x 240 units of two pixels.
    left, right, top, bottom = 2 * 62, 2 * (640 - 22), 2 * 14, 2 * (240 - 44)
    middle, quarter = (left + right) // 2, (3 * left + right) // 4
    assert shown.getpixel((quarter, (top + bottom) // 2)) == (59, 91, 219)  # on the way up
    assert shown.getpixel((middle, (top + bottom) // 2)) == (255, 255, 255)  # below the top
    assert shown.getpixel((right - 1, top)) == (232, 89, 12)
    shown.load()
    assert image.open(io.BytesIO(png([]))).getcolors() == [(1280 * 480, (255, 255, 255))]
    assert {sign for value in (1e-9, 123456.789, 1e20, -0.5) for sign in f"{value:g}"} <= STROKES.keys()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)")
def test_a_browser_shows_it_in_both_languages(folder: Path, request: pytest.FixtureRequest) -> None:
    """Screenshots are kept in pytest's cache: .pytest_cache/d/report."""
    driver = pytest.importorskip("playwright.sync_api")
    assert request.config.cache is not None
    pictures = request.config.cache.mkdir("report")
    report = {"model": scored(6), "compared_with": scored(2)}
    (folder / "evaluation.json").write_text(json.dumps(report), encoding="utf-8")
    sample = {"question": "你是谁？", "before": "I am a <b>model</b>.\n" * 5, "after": "我叫小柳。"}
    (folder / "samples.json").write_text(json.dumps(sample) + "\n", encoding="utf-8")
    faults: list[str] = []
    with driver.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        shown = browser.new_page(locale="en-GB")
        shown.on("console", lambda message: faults.append(message.text))
        shown.on("pageerror", lambda error: faults.append(str(error)))
        shown.on("request", lambda asked: faults.extend([asked.url] * asked.url.startswith("http")))
        shown.goto(write_page(folder).as_uri())
        assert shown.get_by_role("heading", name="Curves").is_visible()
        assert shown.locator("svg").count() == 4
        points = shown.locator("polyline").evaluate_all("all => all.map(line => line.points.numberOfItems)")
        steps, evaluations = log_of(folder)
        assert points == [len(steps)] * 3 and shown.locator("circle").count() == len(evaluations)
        for name, width in (("wide", 1280), ("narrow", 390)):
            shown.set_viewport_size({"width": width, "height": 800})
            for language, heading in (("en", "Curves"), ("zh", "曲线")):
                assert shown.get_by_role("heading", name=heading).is_visible()
                assert shown.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out
                picture = shown.screenshot(path=pictures / f"{name}-{language}.png", full_page=True)
                assert len(picture) > 10_000
                shown.get_by_role("button").click()
            assert not shown.get_by_role("heading", name="曲线").is_visible()
        browser.close()
    assert not faults
