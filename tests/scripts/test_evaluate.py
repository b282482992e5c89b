"""evaluate.py as a user runs it, with the demo model, on a handful of conversations."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_chat.files import cache_dir
from qwen_chat.inference.native.library import native_library
from tests.support.scripts import run_here

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "finetune" / "io_file" / "input_data" / "example_eval_data.jsonl"
ASKED = ("--max_new_tokens", "12", "--calls", "required", "--json")


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run_here("finetune/evaluate.py", *words, QWEN_CHAT_CACHE=str(folder / "cache"))


def report(folder: Path, *words: str) -> Any:
    done = run(folder, *words)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1, "one JSON object and nothing else"
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its cache begins with the native step that is there: compiling takes seconds."""
    native_library()
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "cache").mkdir()
    for made in cache_dir().glob("native-*"):
        (folder / "cache" / made.name).symlink_to(made)
    return folder


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    """Two plain conversations, one that wants a call, one that wants none."""
    lines = DATA.read_text("utf-8").splitlines()
    path = folder / "held_out.jsonl"
    path.write_text("\n".join([lines[0], lines[7], lines[13], lines[15]]) + "\n", "utf-8")
    return path


@pytest.fixture(scope="module")
def first(folder: Path, data: Path, demo_model_path: Path) -> Any:
    return report(folder, "-m", str(demo_model_path), "-d", str(data), *ASKED)


def test_the_report(first: Any) -> None:
    model = first["model"]
    assert (first["conversations"], model["conversations"], model["too_long"]) == (4, 4, 0)
    assert 0 < model["loss"]["low"] <= model["loss"]["value"] <= model["loss"]["high"] < 10
    assert model["tokens"] > 60
    tools = model["tools"]
    assert (tools["turns"], tools["wanted"]) == (3, 1)
    # a required call of 12 tokens is cut: begun everywhere, finished nowhere
    assert tools["unparsed"]["value"] == 1.0
    assert tools["missing"] == {"value": 1.0, "low": pytest.approx(0.20654, abs=1e-5), "high": 1.0, "n": 1}
    assert tools["exact"]["value"] == 0.0
    assert tools["tools"] == {"calculate": {"n": 1, "exact": 0, "name": 0}}
    assert len(model["worst"]) == 3
    assert all(one["written"].startswith("<tool_call>\n{") for one in model["worst"])


def test_what_is_kept_is_not_computed_again(
    first: Any, folder: Path, data: Path, demo_model_path: Path
) -> None:
    (kept,) = (folder / "cache" / "evaluations").glob("*.jsonl")
    lines = kept.read_text("utf-8").splitlines(keepends=True)
    assert len(lines) == 4 + 3
    kept.write_text("".join(lines[:-1]) + lines[-1][:10], "utf-8")  # killed while it wrote the last one
    assert report(folder, "-m", str(demo_model_path), "-d", str(data), *ASKED) == first
    assert sorted(kept.read_text("utf-8").splitlines()) == sorted(line.rstrip("\n") for line in lines)


def test_an_adapter_that_changes_nothing_beside_its_base(
    first: Any, folder: Path, data: Path, demo_model_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo_model_path, dtype="float32")
    adapter = folder / "adapter"
    get_peft_model(model, LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
        adapter
    )
    out = folder / "report.json"
    words = ("--adapter", str(adapter), "--compare", "base", "-d", str(data), "-o", str(out))
    found = report(folder, *words, *ASKED)
    assert json.loads(out.read_text("utf-8")) == found
    assert found["compared_with"]["name"] == demo_model_path.name
    for name, figure in found["model"].items():
        if name not in ("name", "worst"):
            assert figure == found["compared_with"][name] == first["model"][name], name
    none = {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    assert found["comparison"] == {
        "loss": {**none, "n": 4},
        "exact": {**none, "n": 1},
        "false_calls": {**none, "n": 2},
    }


def test_lines_left_out_are_told(folder: Path, data: Path, demo_model_path: Path, first: Any) -> None:
    more = folder / "more.jsonl"
    more.write_text(data.read_text("utf-8").splitlines()[0] + "\n{oops\n[1]\n", "utf-8")
    done = run(folder, "-m", str(demo_model_path), "-d", str(more), "--on_error", "skip")
    assert done.returncode == 0, done.stderr
    assert "bad lines left out by --on_error skip: 2" in done.stdout


def test_the_table_for_people(folder: Path, data: Path, demo_model_path: Path, first: Any) -> None:
    """As a process of its own."""
    command = [sys.executable, str(ROOT / "finetune" / "evaluate.py")]
    done = subprocess.run(
        [*command, "-m", str(demo_model_path), "-d", str(data), *ASKED[:-1]],
        capture_output=True,
        text=True,
        env={**os.environ, "QWEN_CHAT_CACHE": str(folder / "cache")},
    )
    assert done.returncode == 0, done.stderr
    for part in (
        "perplexity",
        "3 turns with tools, 1 of them want calls (required)",
        "calculate -> (no call)",
    ):
        assert part in done.stdout
    assert f"{first['model']['loss']['value']:.4f}" in done.stdout


def test_bad_input_is_one_line_and_status_2(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{oops\n", "utf-8")
    record = json.loads(DATA.read_text("utf-8").splitlines()[13])
    record["messages"][1]["accepted"] = []
    marked = tmp_path / "marked.jsonl"
    marked.write_text(json.dumps(record) + "\n", "utf-8")
    whole = tmp_path / "whole.json"
    whole.write_text(json.dumps([record]), "utf-8")
    for words, told in (
        ((), "-d: no data"),
        (("-d", str(whole)), 'whole.json: "accepted" is read from .jsonl files'),
        (("-d", str(tmp_path / "absent.jsonl")), "absent.jsonl"),
        (("-d", str(bad)), "bad.jsonl:1"),
        (("-d", str(marked)), "marked.jsonl:1: message 1: accepted; expected a list with one entry"),
        (("-d", str(DATA), "--limit", "0"), "--limit: 0; expected a number above 0"),
        (("-d", str(DATA), "--adapter", str(tmp_path)), "no adapter_config.json"),
        (("-d", str(DATA), "-m", str(tmp_path)), "no config.json"),
        (("-d", str(DATA), "-o", str(tmp_path / "no" / "r.json")), "is no folder"),
        (("-d", str(DATA), "-o", str(whole)), "holds something else than an evaluation; give another file"),
        (
            ("-d", str(DATA), "-o", str(tmp_path)),
            "holds something else than an evaluation; give another file",
        ),
        (("-d", str(DATA), "--call", "strict"), "did you mean --calls?"),
    ):
        done = run(tmp_path, *words)
        assert done.returncode == 2, words
        assert told in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""


# -------------------------------------------------------------------------------------------- a server's model


@pytest.fixture(scope="module")
def served(demo_model_path: Path) -> Iterator[str]:
    """Our own service over the demo model, on loopback, with a key."""
    from qwen_chat.inference.loading import load_engine
    from qwen_chat.service.app import create_app
    from qwen_chat.service.settings import ServiceSettings
    from tests.support.scripted import LiveService

    engine = load_engine(demo_model_path)
    settings = ServiceSettings(model_name="demo")
    with engine, LiveService(create_app(engine, settings=settings, api_keys=["secret"])) as live:
        yield live.url


def test_a_server_s_model_gets_the_figures_that_it_gets_here(
    served: str, first: Any, folder: Path, data: Path, demo_model_path: Path
) -> None:
    """Required calls, cut alike: what a reply is judged by is the same; losses are not there, and it is said."""
    words = ("--url", served, "--api_key", "secret", "-d", str(data), "--max_new_tokens", "12")
    out = folder / "served.json"
    done = run(folder, *words, "--calls", "required", "-o", str(out))
    assert f"judged by its replies at {served}; losses are not computed there" in done.stdout
    found = json.loads(out.read_text("utf-8"))
    assert (found["url"], found["model"]["name"]) == (served, "demo")
    assert found["model"]["loss"] is None and found["model"]["conversations"] == 0
    for name in ("turns", "wanted", "exact", "missing", "languages"):
        assert found["model"]["tools"][name] == first["model"]["tools"][name], name
    over_http = report(folder, *words, "--compare", "demo", "--json")
    here = report(folder, "-m", str(demo_model_path), "-d", str(data), "--max_new_tokens", "12", "--json")
    assert over_http["model"]["tools"] == here["model"]["tools"] == over_http["compared_with"]["tools"]


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (
            ["--url", "http://127.0.0.1:9"],
            1,
            "http://127.0.0.1:9/v1/models cannot be reached (ConnectionError)",
        ),
        (["--url", "SERVED"], 1, "/v1/models answered 401: "),
        (["--url", "SERVED", "--api_key", "secret", "-m", "other"], 2, "has no such model; it lists demo"),
        (["--url", "SERVED", "--fresh"], 2, "--fresh has no effect with --url: the server decides it"),
        (
            ["--url", "SERVED", "--device", "cpu"],
            2,
            "--device has no effect with --url: the server decides it",
        ),
        (["--api_key", "secret"], 2, "--api_key has no effect without --url; leave it out"),
    ],
)
def test_a_server_that_cannot_be_asked_is_told_in_one_line(
    words: list[str], status: int, said: str, served: str, folder: Path, data: Path
) -> None:
    done = run(folder, *(served if word == "SERVED" else word for word in words), "-d", str(data))
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.splitlines()[-1].startswith("error: ") and said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
