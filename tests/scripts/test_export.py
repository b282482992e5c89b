"""export.py as a user runs it."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from tests.support.scripts import runner


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return runner("finetune/export.py", monkeypatch, capsys)


def test_a_gguf(export: Any, tiny_model_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    status, said, printed = export("-m", str(tiny_model_path), "--to", "gguf", "-o", str(folder), "--json")
    assert status == 0, said
    assert json.loads(printed)["tensors"] == 26
    assert {path.name for path in folder.iterdir()} == {"model-q8_0.gguf"}
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.slow
def test_a_k_quant(export: Any, demo_model_path: Path, llama_programs: Path, tmp_path: Path) -> None:
    """By llama.cpp's llama-quantize; what it costs: tests/export/test_llama_server.py."""
    given = [
        "-m",
        str(demo_model_path),
        "--to",
        "gguf",
        "--llama_quantize",
        str(llama_programs / "llama-quantize"),
    ]
    status, said, printed = export(*given, "--type", "q4_k_m", "-o", str(tmp_path / "out"), "--json")
    assert status == 0, said
    assert json.loads(printed)["type"] == "q4_k_m"
    (file,) = (tmp_path / "out").iterdir()
    reader = gguf.GGUFReader(file)
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_K_M
    assert {tensor.tensor_type.name for tensor in reader.tensors} & {"Q4_K", "Q6_K"}
    assert "<tool_call>" in reader.fields["tokenizer.chat_template"].contents()
    status, said, _ = export(*given, "--type", "q9_x", "-o", str(tmp_path / "none"))
    assert status == 2 and "llama-quantize refuses" in said
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_ollamas_modelfile(export: Any, tiny_model_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    status, said, _ = export("-m", str(tiny_model_path), "--to", "ollama", "--type", "f16", "-o", str(folder))
    assert status == 0, said
    assert {path.name for path in folder.iterdir()} == {"model-f16.gguf", "Modelfile"}
    text = (folder / "Modelfile").read_text()
    assert text.startswith("FROM ./model-f16.gguf\n") and 'PARAMETER stop "<|im_end|>"' in text
    assert f"ollama create {tiny_model_path.name} -f {folder / 'Modelfile'}" in said


def test_a_command_for_vllm(export: Any, tiny_model_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    status, said, _ = export("-m", str(tiny_model_path), "--to", "vllm", "-o", str(folder))
    assert status == 0, said
    script = (folder / "serve.sh").read_text()
    assert f"vllm serve {tiny_model_path} " in script and "--tool-call-parser hermes" in script
    assert "<tool_call>" in (folder / "chat_template.jinja").read_text(), "tools are in it"


def test_a_folder_for_a_hub(export: Any, tiny_model_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    status, said, _ = export("-m", str(tiny_model_path), "--to", "hub", "-o", str(folder))
    assert status == 0, said
    assert (folder / "model.safetensors").read_bytes() == (tiny_model_path / "model.safetensors").read_bytes()
    assert (folder / "README.md").read_text().startswith("---\nlibrary_name: transformers\n")
    assert "hf upload USER/NAME" in said


def test_what_stands_in_the_way_is_one_line(export: Any, tiny_model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    given = ["-m", str(tiny_model_path), "--to", "gguf", "-o", str(tmp_path / "out")]
    for more, wanted in (
        (["--type", "q4_k_m"], "any other is made by llama.cpp's llama-quantize"),
        (["--type", "q4_k_m", "--llama_quantize", "/no/such"], "no program there"),
        (["-o", str(tmp_path / "there")], "there is something already"),
    ):
        status, said, _ = export(*given, *more)
        assert status == 2 and wanted in said
        assert {path.name for path in tmp_path.iterdir()} == {"there"}
