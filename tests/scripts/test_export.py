"""export.py as a user runs it."""

import json
import shutil
import subprocess
import sys
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


def test_flags_without_effect_and_places_that_cannot_be(
    export: Any, tiny_model_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    given = ["-m", str(tiny_model_path), "-o", str(tmp_path / "out")]
    for more, wanted in (
        (["--to", "vllm", "--type", "q8_0"], "--type: has no effect with --to vllm"),
        (["--to", "hub", "--python", "python"], "--python: has no effect with --to hub"),
        (["--to", "openvino", "--llama_quantize", "x"], "--llama_quantize: has no effect with --to openvino"),
        (["--to", "gguf", "--type", "a/b", "--llama_quantize", "/bin/true"], "--type a/b: no name of a type"),
        (["--to", "gguf", "--type", "q4_k_m", "--llama_quantize", "/bin/true"], "ended without a file"),
        (["--to", "hub", "-o", str(tmp_path / "file" / "out")], "cannot be written"),
        (["--to", "hub", "-o", "x" * 5000], "name too long"),
        (["--to", "hub", "-m", "x" * 5000], "too long for a name"),
    ):
        status, said, _ = export(*given, *more)
        assert status == 2 and wanted in said, said
        assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_a_hubs_folder_tells_nothing_of_this_machine_and_writes_no_markup(
    export: Any, tiny_model_path: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model_path, tmp_path / "a\n# b <b>|_c_"))
    run = {
        "options": {"model": "x/y", "data_path": ["/home/me"]},
        "method": "full |\n<script>",
        "losses": [1],
    }
    (model / "run.json").write_text(json.dumps(run))
    (model / "merge.json").write_text("{}")
    folder = tmp_path / "out"
    status, said, _ = export("-m", str(model), "--to", "hub", "-o", str(folder))
    assert status == 0, said
    assert not {"run.json", "merge.json"} & {path.name for path in folder.iterdir()}
    head, _, body = (folder / "README.md").read_text().partition("---\n\n")
    assert head.endswith("base_model: x/y\n")
    assert body.startswith("# a \\# b \\<b\\>\\|\\_c\\_\n\nTuned from y.\n")
    assert "| method | full \\| \\<script\\> |" in body


def test_a_hubs_folder_without_weights_is_none(export: Any, tiny_model_path: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model_path, tmp_path / "model"))
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    status, said, _ = export("-m", str(model), "--to", "hub", "-o", str(tmp_path / "out"))
    assert status == 2 and "save the model anew with save_pretrained" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["-x", "--chat-template", "a 'b\" $(id)\nc", "模型"])
def test_a_command_for_vllm_says_any_name(
    name: str, export: Any, tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script is run, with a vllm that shows its words."""
    (tmp_path / name).mkdir()
    for file in tiny_model_path.iterdir():
        (tmp_path / name / file.name).symlink_to(file)
    (tmp_path / "vllm").write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    (tmp_path / "vllm").chmod(0o755)
    monkeypatch.chdir(tmp_path / name)
    status, said, _ = export("-m", ".", "--to", "vllm", f"-o={tmp_path / 'out'}")
    assert status == 0, said
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    done = subprocess.run(
        ["sh", str(tmp_path / "out" / "serve.sh"), "--more"], capture_output=True, text=True
    )
    words = json.loads(done.stdout)
    assert words[:3] == ["serve", str(tmp_path / name), f"--served-model-name={name}"]
    assert words[-1] == "--more"
    assert words[words.index("--chat-template") + 1] == str(tmp_path / "out" / "chat_template.jinja")


def test_a_template_that_closes_the_thought_is_served_so_by_vllm(
    export: Any, tiny_model_path: Path, tmp_path: Path, chat_templates: dict[str, str]
) -> None:
    model = Path(shutil.copytree(tiny_model_path, tmp_path / "model"))
    (model / "chat_template.jinja").write_text(chat_templates["qwen3_5_nothink"], encoding="utf-8")
    status, said, _ = export("-m", str(model), "--to", "vllm", "-o", str(tmp_path / "out"))
    assert status == 0, said
    script = (tmp_path / "out" / "serve.sh").read_text()
    assert """--default-chat-template-kwargs '{"enable_thinking": false}'""" in script
    assert "--exclude-tools-when-tool-choice-none" in script
