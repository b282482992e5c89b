"""finetune/inspect_data.py as a person runs it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen_chat import errors
from qwen_chat.demo_model import qwen_tokenizer_path

ROOT = Path(__file__).resolve().parents[2]
GOOD = [
    {"messages": [{"role": "user", "content": "你好 🙂"}, {"role": "assistant", "content": "Hello!"}]},
    {"instruction": "Say <|im_end|>", "input": "", "output": "No."},
]


def inspect(*words: str | Path, cwd: Path = ROOT, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "finetune" / "inspect_data.py"), *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment})


def write(path: Path, *records: Any) -> Path:
    path.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, qwen2_5_tokenizer: Any) -> Path:
    """A folder that `-m` takes: the real vocabulary beside weights that nobody loads."""
    folder: Path = tmp_path_factory.mktemp("model")
    for file in qwen_tokenizer_path("qwen2_5").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def inspect_here(monkeypatch: pytest.MonkeyPatch, cache: Path, *words: str | Path) -> int:
    """The script's `main` in this process, where transformers is loaded once."""
    spec = importlib.util.spec_from_file_location("inspect_data", ROOT / "finetune" / "inspect_data.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "inspect_data", script)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", ["inspect_data.py", *map(str, words)])
    monkeypatch.setenv("QWEN_CHAT_CACHE", str(cache))
    return errors.run(script.main)


def test_good_data(tmp_path: Path, model: Path) -> None:
    data = write(tmp_path / "data file.jsonl", *GOOD)
    options = ["-m", model, "-d", data, "--show", "2", "--json", "--histogram", tmp_path / "lengths.png"]
    done = inspect(*options, "--write", tmp_path / "canonical.jsonl", QWEN_CHAT_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert found["good"] is True
    assert found["kinds"] == {"openai": 1, "alpaca": 1}
    assert (found["conversations"], found["control_tokens"], found["problem_total"]) == (2, 1, 0)
    tokens = found["tokens"]
    assert (tokens["conversations"], tokens["dropped"], tokens["truncated"]) == (2, 0, 0)
    assert tokens["supervised"] == 3 + 3  # "Hello", "!", "<|im_end|>" and "No", ".", "<|im_end|>"
    assert tokens["lossless_max_length"] == tokens["quantiles"]["max"]
    assert "data file.jsonl:1:" in done.stderr
    assert "⟦Hello!<|im_end|>⟧" in done.stderr
    assert "⟦No.<|im_end|>⟧" in done.stderr
    assert (tmp_path / "lengths.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [json.loads(line) for line in (tmp_path / "canonical.jsonl").read_text("utf-8").splitlines()] == [
        GOOD[0],
        {
            "messages": [
                {"role": "user", "content": "Say <|im_end|>"},
                {"role": "assistant", "content": "No."},
            ]
        },
    ]


def test_bad_data_is_listed_before_anything_is_loaded(tmp_path: Path) -> None:
    data = write(tmp_path / "bad.jsonl", GOOD[0], {"messages": []}, 7)
    done = inspect("-m", tmp_path / "no model", "-d", data, "--json")
    assert done.returncode == 2
    expected = [
        "bad.jsonl:2: messages: empty; expected a list with at least one message",
        "bad.jsonl:3: 7; expected one JSON object, a conversation",
    ]
    assert json.loads(done.stdout) == {
        "good": False,
        "error": "2 problems in 2 of 3 lines; correct them, or leave these lines out with --on_error skip",
        "problems": expected,
        "problem_total": 2,
    }
    assert done.stderr.splitlines()[-2:] == [f"  {line}" for line in expected]


def test_skip_and_length_policy(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"messages": [{"role": "user", "content": "x " * 500}, {"role": "assistant", "content": "y"}]}
    data = write(tmp_path / "data.jsonl", GOOD[0], {"messages": []}, long)
    options = ["-m", model, "-d", data, "--on_error", "skip", "--model_max_length", "100"]
    assert inspect_here(monkeypatch, tmp_path, *options, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["skipped"], found["problem_total"], found["tokens"]["dropped"]) == (1, 1, 1)
    assert inspect_here(monkeypatch, tmp_path, *options, "--too_long", "error") == 2
    assert "error: conversations longer than --model_max_length 100: 1 of 2; " in capsys.readouterr().err


def test_colour_on_request(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data.jsonl", *GOOD)
    for force, coloured in (("1", True), ("", False)):
        monkeypatch.setenv("FORCE_COLOR", force)
        assert inspect_here(monkeypatch, tmp_path, "-m", model, "-d", data) == 0
        shown = capsys.readouterr().out
        assert "2 conversations in data.jsonl (1 openai, 1 alpaca)" in shown
        assert ("\x1b[" in shown) is coloured
        assert ("⟦Hello!<|im_end|>⟧" in shown) is not coloured


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "-d: no data; name at least one file or folder"),
        (["-d", "none.jsonl"], "none.jsonl: no such data file"),
        (["-d", "data.jsonl", "--limit", "0"], "--limit 0: expected a number above 0"),
        (
            ["-d", "data.jsonl", "--eval_share", "1"],
            "--eval_share 1.0: expected a share between 0 and 1, such as 0.05",
        ),
        (
            ["-d", "data.jsonl", "--eval_share", "0.1", "--eval_data_path", "x"],
            "--eval_share and --eval_data_path: give one of them",
        ),
        (
            ["-d", "data.jsonl", "--write", "data.jsonl"],
            "--write: data.jsonl exists already; nothing is overwritten, name a new file",
        ),
        (["-d", "data.jsonl", "--write", "a/b.jsonl"], "--write: a is no folder; make it first"),
        (["-d", "data.jsonl", "--shov", "1"], "--shov: unknown flag; did you mean --show?"),
    ],
)
def test_what_cannot_work(tmp_path: Path, words: list[str], message: str) -> None:
    write(tmp_path / "data.jsonl", *GOOD)
    done = inspect(*words, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {message}\n")


def test_thinking_is_told_and_chosen(
    tmp_path: Path,
    chat_templates: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "thinking"
    folder.mkdir()
    for file in qwen_tokenizer_path("qwen3").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "chat_template.jinja").write_text(chat_templates["qwen3_5_nothink"], encoding="utf-8")
    question, thought = (
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "reasoning": "why"},
    )
    on = {"enable_thinking": True}
    plain = {"messages": [question, {"role": "assistant", "content": "a"}]}
    good = {"messages": [question, thought], "chat_template_kwargs": on}
    unknown = {**plain, "chat_template_kwargs": {"think": 1}}
    data = write(tmp_path / "data.jsonl", plain, good, {"messages": [question, thought]}, unknown)

    def inspected(*words: str) -> tuple[int, Any, str]:
        status = inspect_here(monkeypatch, tmp_path, "-m", folder, "-d", data, "--json", *words)
        printed = capsys.readouterr()
        return status, json.loads(printed.out), printed.err

    status, found, said = inspected()
    assert (status, found["problem_total"]) == (2, 2)
    assert found["problems"] == [
        "data.jsonl:3: message 1 has a thought, but its prompt ends with an empty one: this chat template does not "
        'think here; set chat_template_kwargs {"enable_thinking": true} in the record, --template_kwargs '
        "'{\"enable_thinking\": true}' for all of them, or remove the thought",
        "data.jsonl:4: chat_template_kwargs: this chat template has no variable 'think'; it reads enable_thinking",
    ]
    assert "with reasoning: 2 (50.0%)" in said.splitlines()
    write(data, plain, good, {"messages": [question, thought]})
    status, found, said = inspected("--template_kwargs", json.dumps(on), "--show", "1")
    assert (status, found["tokens"]["supervised"], found["thinking"]["empty_think"]) == (
        0,
        2 + 6 + 6,
        "ignore",
    )
    assert "warning: this chat template thinks by default, but 1 of 3 conversations have no reasoning" in said
    assert "<think>↵\n↵\n</think>↵\n↵\n⟦a<|im_end|>⟧" in said
    status, found, said = inspected(
        "--template_kwargs", json.dumps(on), "--show", "1", "--empty_think", "learn"
    )
    assert (status, found["tokens"]["supervised"], found["thinking"]["empty_think"]) == (
        0,
        2 + 3 + 6 + 6,
        "learn",
    )
    assert "<think>↵\n⟦↵\n</think>↵\n↵\na<|im_end|>⟧" in said
    status, found, said = inspected("--template_kwargs", '{"think": true}')
    assert status == 2
    assert (
        "error: --template_kwargs: this chat template has no variable 'think'; it reads enable_thinking"
        in said
    )
    with_text = inspect("-m", folder, "-d", data, "--template_kwargs", "yes")
    assert (with_text.returncode, with_text.stderr) == (
        2,
        "error: --template_kwargs: 'yes'; expected a JSON object or None\n",
    )


def test_what_is_held_out_and_what_gives_it_away(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def asking(*questions: str) -> list[dict[str, Any]]:
        reply = {"role": "assistant", "content": "Yes."}
        return [{"messages": [{"role": "user", "content": text}, reply]} for text in questions]

    def look(*words: str | Path) -> tuple[int, dict[str, Any], str]:
        status = inspect_here(monkeypatch, tmp_path, "-m", model, "-d", data, "--show", "0", "--json", *words)
        said = capsys.readouterr()
        return status, json.loads(said.out), said.err

    towns = [f"How far away from here is the town with number {n}?" for n in range(40)]
    data = write(tmp_path / "data.jsonl", *asking(*towns))
    status, found, said = look("--eval_share", "0.25")
    assert status == 0
    held_out = found["held_out"]
    assert 3 <= held_out["conversations"] <= 17 and held_out["supervised"] == 3 * held_out["conversations"]
    assert f"held out: {held_out['conversations']} of these 40 conversations, by the hash" in said
    status, found, said = look("--eval_share", "0.000001")
    assert (status, found["good"]) == (2, False)
    assert found["error"].startswith("--eval_share 1e-06: holds out none of 40 conversations; a share of 0.0")
    others = write(tmp_path / "others.jsonl", *asking("Is it cold?", towns[7].upper()))
    status, found, said = look("--eval_data_path", others)
    assert (status, found["held_out"]["conversations"], found["held_out"]["given_away"]) == (0, 2, 1)
    assert found["held_out"]["given_away_by"] == [
        "data.jsonl:8: has the prompt of the held-out others.jsonl:2"
    ]
    assert "note: 1 training lines give away what is held out" in said
    status, found, said = look("--general_data", others)
    assert (status, found["general"]["conversations"]) == (0, 2) and "general: conversations 2 of 2" in said


def test_a_folder_of_forms_mixed_redacted_and_under_a_system_text(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.csv").write_text('prompt,response\n"Mail?\nQuick","me@example.com"\nHi,Ho\n', "utf-8")
    write(folder / "b.jsonl", {"text": "word " * 30}, GOOD[0])
    general = write(tmp_path / "general.jsonl", *[GOOD[0] | {"n": n} for n in range(4)])
    words = ["-m", model, "-d", folder, "-d", general, "--data_weights", "2", "0.5", "--system", "Be brief."]
    words += ["--redact", "True", "--write", tmp_path / "out.jsonl", "--show", "3", "--json"]
    words += ["--model_max_length", "29"]
    assert inspect_here(monkeypatch, tmp_path, *words) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert (
        "8 conversations in a.csv, b.jsonl, general.jsonl (2 prompt_completion, 1 text, 5 openai)" in said.err
    )
    assert found["tokens"]["personal"] == {"mail addresses": 1} and found["tokens"]["redacted"]
    assert "mail addresses in 1 conversation, replaced by [EMAIL]: a.csv:2 (me@...)" in said.err
    assert "documents longer than 29 tokens, in 2 pieces: 1" in said.err
    assert "without a system message a conversation gets: 'Be brief.'" in said.err
    assert found["epoch"]["conversations"] == 2 * (2 + 2 + 1) + 2
    assert f"an epoch, by --data_weights: 12 conversations, tokens {found['epoch']['tokens']:,}" in said.err
    assert "<|im_start|>system↵\nBe brief.<|im_end|>" in said.err
    assert "b.jsonl:1:\n⟦word word" in said.err
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    assert written[0]["messages"][1]["content"] == "[EMAIL]" and written[2] == {"text": "word " * 30}
    status = inspect_here(monkeypatch, tmp_path, "-m", model, "-d", folder, "--data_weights", "1", "2")
    assert (status, capsys.readouterr().err) == (
        2,
        "error: --data_weights has 2 numbers for 1 data files; give one for each -d, in the same order\n",
    )
