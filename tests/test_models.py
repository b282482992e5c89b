"""Loading: what is found, what is refused in one line, what was decided and why."""

import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

from qwen_chat import hardware, models
from qwen_chat.errors import MissingDependency, ModelError


def refused(name: str) -> str:
    with pytest.raises(ModelError) as caught:
        models.resolve(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_a_name_it_is_the_demo_model_and_says_so(
    demo_model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert models.resolve(None) == demo_model_path
    assert capsys.readouterr().err == "model SmolLM2-135M-Instruct (the demo model: -m was not given)\n"


def test_a_local_folder_is_taken_as_it_is(tiny_model_path: Path) -> None:
    assert models.resolve(str(tiny_model_path)) == tiny_model_path
    assert models.name_of(str(tiny_model_path), tiny_model_path) == str(tiny_model_path)
    assert models.name_of("Qwen/Qwen2-7B-Instruct", Path("/cache/x")) == "Qwen/Qwen2-7B-Instruct"


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "../missing", "a/b/c", "my model"])
def test_a_folder_that_is_missing(name: str) -> None:
    cure = "give a model's folder or a hub name such as Qwen/Qwen2-7B-Instruct"
    assert refused(name) == f"{name}: no such folder; {cure}"


def test_an_empty_name_is_not_the_current_folder() -> None:
    assert refused("") == "-m: an empty value; give a model's folder or hub name, or leave the flag out"


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    assert refused(str(tmp_path)) == (
        f"{tmp_path}: no config.json in it; expected a model as save_pretrained writes it"
    )
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "an adapter, not a model; give its base with -m and this with --adapter" in refused(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert refused(str(tmp_path)).startswith(f"{tmp_path / 'config.json'}: cannot be read (")
    (tmp_path / "config.json").write_text("[]")
    assert "no JSON object" in refused(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert "no model_type" in refused(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    assert refused(str(tmp_path)) == f"{tmp_path}: no weights in it; expected model.safetensors"
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1.safetensors").touch()
    assert "model-2.safetensors missing (2 weight files expected)" in refused(str(tmp_path))
    for places in (["a"], {"a": 1}, {"a": ["b"]}, None):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        assert "its weight_map does not name a file for each tensor" in refused(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "a file; expected a model's folder" in refused(str(tmp_path / "config.json"))


def test_a_hub_name_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = refused("Qwen/No-Such-Model")
    assert text.startswith("Qwen/No-Such-Model: no such folder here, and the hub does not give it (")
    assert text.endswith("check the name and the network, or set USE_MODELSCOPE=1")


def test_modelscope(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_MODELSCOPE", "1")
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(MissingDependency, match="USE_MODELSCOPE=1 needs the package 'modelscope'"):
        models.resolve("Qwen/Qwen2-7B-Instruct")
    asked: list[str] = []
    hub = types.ModuleType("modelscope")
    hub.snapshot_download = lambda name: asked.append(name) or str(tiny_model_path)  # type: ignore[attr-defined, func-returns-value]
    monkeypatch.setitem(sys.modules, "modelscope", hub)
    assert models.resolve("Qwen/Qwen2-7B-Instruct") == tiny_model_path
    assert asked == ["Qwen/Qwen2-7B-Instruct"]


def test_a_tokenizer_without_padding_gets_one(tiny_model_path: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model_path / name, tmp_path / name)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert models.load_tokenizer(tmp_path).pad_token == "<|endoftext|>"
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded"):
        models.load_tokenizer(empty)


@pytest.mark.parametrize(
    ("able", "reason"),
    [
        (False, "this CPU has no bfloat16 instructions"),
        (True, "a CPU run is exact; bfloat16 would lose updates below 1/256 of a weight"),
    ],
)
def test_float32_on_a_cpu_and_why(able: bool, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cpu_has_bf16", lambda: able)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert models.choose_dtype("auto") == (torch.float32, reason)
    assert models.choose_dtype("bfloat16") == (torch.bfloat16, "as asked")
    with pytest.raises(ModelError, match="dtype float9: unknown"):
        models.choose_dtype("float9")


def test_a_loaded_model_says_what_was_decided(tiny_model_path: Path) -> None:
    loaded = models.load_model(tiny_model_path)
    assert loaded.decisions[0].startswith("dtype float32 (")
    assert (loaded.model.dtype, loaded.model.training) == (torch.float32, False)
    four = models.load_model(tiny_model_path, quantize="nf4", for_training=True)
    assert four.decisions[1] == "weights in 4 bits (NF4, double quantisation)"
    assert type(four.model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"


def test_code_of_a_model_does_not_run_unless_asked(tiny_model_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "foreign"
    shutil.copytree(tiny_model_path, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "foreign",
        "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError, match="cannot be loaded"):
        models.load_model(folder)
    assert not (tmp_path / "ran").exists()
