"""What is exported, found and refused; and a new folder that one process makes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_chat import files, gguf_model
from qwen_chat.errors import ModelError, OptionError, OutputError
from qwen_chat.export.source import build_new, check_new, find_exported, shown_name
from qwen_chat.training.checkpoints import model_fingerprint


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., Path]:
    """(name, config, run.json) -> the folder of an adapter, as far as it is looked at before anything is loaded."""

    def make(name: str, config: object, run: object = None) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "adapter_model.safetensors").touch()
        (folder / "run.json").write_text(json.dumps(run))
        return folder

    return make


def test_a_base_that_is_given_need_not_be_named(adapter: Callable[..., Path], tiny_model_path: Path) -> None:
    nameless = adapter("a", {"base_model_name_or_path": None})
    assert find_exported(str(tiny_model_path), [str(nameless)]).base == tiny_model_path
    with pytest.raises(ModelError, match="names no base model; give it with -m"):
        find_exported(None, [str(nameless)])
    gone = adapter("b", {"base_model_name_or_path": "/gone/base"})
    with pytest.raises(ModelError, match=r"b: its base is not at hand; give it with -m \(/gone/base: "):
        find_exported(None, [str(gone)])


def test_every_adapter_is_held_to_its_base(adapter: Callable[..., Path], tiny_model_path: Path) -> None:
    named = {"base_model_name_or_path": str(tiny_model_path)}
    first = adapter("a", named, {"shaped_by": {"model": model_fingerprint(tiny_model_path)}})
    second = adapter("b", named, {"shaped_by": {"model": "0" * 32}})
    with pytest.raises(ModelError, match=r"not the weights that .*b was trained over"):
        find_exported(None, [str(first), str(second)])
    assert len(find_exported(None, [str(first), str(second)], any_base=True).adapters) == 2


def test_run_json_of_another_shape_tells_nothing(adapter: Callable[..., Path], tiny_model_path: Path) -> None:
    odd = {"shaped_by": [1], "options": {"data_path": "text"}, "losses": 3}
    source = find_exported(str(tiny_model_path), [str(adapter("a", {}, odd))])
    assert (source.part("losses"), source.data(["given"])) == ({}, ("given",))
    with pytest.raises(OptionError, match=r"-d: no run\.json tells which data"):
        source.data(())


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert shown_name(Path(".")) == shown_name(Path("../mine")) == shown_name(tmp_path / "mine") == "mine"
    assert shown_name(Path("/c/models--Qwen--Qwen2-7B/snapshots/0a1b")) == "Qwen2-7B"


def test_a_place_that_cannot_be_is_told_before_anything_begins(tmp_path: Path) -> None:
    for name in (".", "..", "new/..", "x" * 300):
        with pytest.raises(OutputError, match="with -o"):
            check_new(tmp_path / name)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="with -o"):
        build_new(tmp_path / "file" / "out", lambda _: None)
    assert os.listdir(tmp_path) == ["file"]


def test_one_process_makes_a_folder(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom qwen_chat.export.source import build_new\n"
        "build_new(Path(sys.argv[1]), lambda aside: (print(aside, flush=True), sys.stdin.read()))"
    )
    words = [sys.executable, "-c", program, str(tmp_path / "out")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None and other.stdout is not None
        aside = Path(other.stdout.readline().strip())
        with pytest.raises(OutputError, match=rf"another process is making it \(process {other.pid} on "):
            build_new(tmp_path / "out", lambda _: None)
        assert aside.is_dir(), "it is left alone"
        other.stdin.close()
        assert other.wait(20) == 0
    assert os.listdir(tmp_path) == ["out"]
    with pytest.raises(OutputError, match="there is something already"):
        build_new(tmp_path / "out", lambda _: None)


def test_a_name_with_signs_of_patterns_clears_its_own_leftovers_alone(tmp_path: Path) -> None:
    (tmp_path / ".other.partial-1").mkdir()
    (tmp_path / ".*.partial-1").mkdir()
    build_new(tmp_path / "*", lambda _: None)
    assert set(os.listdir(tmp_path)) == {"*", ".other.partial-1"}
    files.build_aside(tmp_path / "[ab]", lambda _: None)
    assert (tmp_path / ".other.partial-1").is_dir()


def test_names_that_are_no_utf_8_are_written(tmp_path: Path) -> None:
    from qwen_chat.export.source import write_json

    write_json(tmp_path / "merge.json", {"base": os.fsdecode(b"/m/\xff"), "你": "好"})
    assert json.loads((tmp_path / "merge.json").read_text()) == {"base": "/m/\udcff", "你": "好"}


def test_a_gguf_file_is_not_exported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / gguf_model.LINK).symlink_to("config.json")  # as a file is described in the cache
    with pytest.raises(ModelError, match="a GGUF file, which is served as it is"):
        find_exported(str(tmp_path), [])
