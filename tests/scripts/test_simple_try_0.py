"""simple_try_0.py: only the answer on standard output; an adapter alone finds its base; without a prompt a chat."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.scripts import run_here

ROOT = Path(__file__).resolve().parents[2]


def talk(*words: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    return run_here("fast_start/simple_try_0.py", *words, typed=typed)


def test_the_demo_model_answers_and_stops_by_itself(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "fast_start" / "simple_try_0.py")]
    command += ["--prompt", "What is the capital of France?"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout and done.stdout.endswith("\n") and "<|im" not in done.stdout
    assert len(done.stdout.splitlines()) < 10  # the answer alone, and not 512 tokens of it
    assert "(the demo model: -m was not given)" in done.stderr and "dtype float32" in done.stderr


def test_a_chat_remembers_until_it_begins_again() -> None:
    typed = "My name is Zorbulon.\nWhat is my name?\n/new\n\n/exit\nnever asked\n"
    done = talk("--max_new_tokens", "40", typed=typed)
    assert done.returncode == 0, done.stderr
    assert "Zorbulon" in done.stdout and "never" not in done.stdout
    assert done.stderr.splitlines()[-1].count("> ") == 5


def test_an_adapter_alone_takes_the_base_that_it_names(tiny_model_path: Path, tmp_path: Path) -> None:
    from qwen_chat import models
    from qwen_chat.flags.run_options import LoraArguments
    from qwen_chat.training import adapters

    loaded = models.load_model(tiny_model_path, for_training=True)
    wrapped = adapters.wrap(loaded.model, LoraArguments(use_lora=True, lora_r=4), loaded.tokenizer)
    adapters.save_adapter(wrapped.model, tmp_path / "a", base=str(tiny_model_path))
    done = talk("--adapter", str(tmp_path / "a"), "--prompt", "hi", "--max_new_tokens", "3")
    assert done.returncode == 0, done.stderr
    same = talk("-m", str(tiny_model_path), "--prompt", "hi", "--max_new_tokens", "3")  # untrained: no change
    assert (same.returncode, same.stdout) == (0, done.stdout)

    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "/gone"})
    )
    gone = talk("--adapter", str(tmp_path / "a"), "--prompt", "hi")
    assert (gone.returncode, gone.stdout) == (2, "")
    assert gone.stderr.splitlines()[-1].startswith("error: /gone: no such folder; ")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["-m", "/no/model"],
            "error: /no/model: no such folder; give a model's folder or a hub name such as",
        ),
        (
            ["--adapter", "/no/adapter"],
            "error: /no/adapter: no adapter_config.json in it; expected an adapter's",
        ),
        (["--promt", "x"], "error: --promt: unknown flag; did you mean --prompt?"),
        (["--max_new_tokens", "0"], "error: --max_new_tokens 0: expected 1 or more"),
        (["--temperature", "nan"], "error: --temperature nan: expected 0 or more"),
        (["--adapter", ""], "error: --adapter: an empty value; give its folder, or leave the flag out"),
        (
            ["--system", "none.txt"],
            "error: --system: none.txt: no such file; a text of one word must not look like a file's name",
        ),
    ],
)
def test_bad_input_is_one_line(words: list[str], line: str) -> None:
    done = talk(*words, *(() if "--promt" in words else ("--prompt", "hi")))
    assert (done.returncode, done.stdout) == (2, "")
    said = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert len(said) == 1 and said[0].startswith(line), done.stderr


def test_an_adapter_is_asked_in_the_format_that_it_was_saved_with(
    capsys: pytest.CaptureFixture[str], qwen2_tokenizer: Any, qwen3_tokenizer: Any
) -> None:
    """And its thoughts go to standard error."""
    from types import SimpleNamespace

    from qwen_chat.chat.format import ChatFormat
    from qwen_chat.cli import chat

    formats = {None: ChatFormat(qwen2_tokenizer), "adapter": ChatFormat(qwen3_tokenizer)}
    asked: list[tuple[list[int], str | None]] = []

    class Engine:
        def format_of(self, adapter: str | None) -> ChatFormat:
            return formats[adapter]

        def submit(self, request: Any) -> list[Any]:
            asked.append((request.prompt_ids, request.adapter))
            pieces = ["<thi", "nk>\nhm\n</think>\n\nY", "es."]
            return [SimpleNamespace(text=text, error=None) for text in pieces]

    messages = [{"role": "user", "content": "x"}]
    for words in ({}, {"adapter": "somewhere"}):
        reply = chat.answer(Engine(), messages, chat.TryArguments(prompt="x", **words))
        assert reply == {"role": "assistant", "content": "Yes.", "reasoning_content": "hm"}
    assert asked == [(fmt.prompt_ids(messages), adapter) for adapter, fmt in formats.items()]
    said = capsys.readouterr()
    assert (said.out, said.err) == ("Yes.\nYes.\n", "hmhm")
