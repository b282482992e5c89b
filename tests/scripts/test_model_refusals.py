"""finetune.py and models that it cannot train right: one line, status 2, and nothing of the user's is touched."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_chat import errors
from qwen_chat.training import matmul

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "finetune" / "io_file" / "input_data" / "example_data.jsonl"


def program(*words: str) -> str:
    """finetune.py as a command; says at the end whether torch came in."""
    return (
        "import runpy, sys\n"
        f"sys.argv = {['finetune/finetune.py', *words]!r}\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n    print('torch' in sys.modules)\n"
    )


def run(*words: str) -> tuple[int, str, str]:
    command = [sys.executable, "-c", program(*words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    return done.returncode, done.stdout.strip(), done.stderr


@pytest.fixture
def folder(tiny_model_path: Path, tmp_path: Path) -> Path:
    """The tiny model's tokenizer, without a model."""
    model = tmp_path / "model"
    ignored = shutil.ignore_patterns("*.safetensors", "config.json", "generation_config.json")
    shutil.copytree(tiny_model_path, model, ignore=ignored)
    return model


def test_a_hybrid_is_refused_by_its_config_before_torch(folder: Path, tmp_path: Path) -> None:
    config = {"model_type": "olmo_hybrid", "layer_types": ["linear_attention"] * 3 + ["full_attention"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").touch()
    status, torch_loaded, said = run("-m", str(folder), "-d", str(DATA), "-o", str(tmp_path / "out"))
    last = said.splitlines()[-1]
    assert (status, torch_loaded) == (2, "False")
    assert last.startswith(
        f"error: {folder}/config.json: a model of type 'olmo_hybrid' cannot be trained here: "
    )
    assert not (tmp_path / "out").exists()


def test_a_leak_that_no_config_tells_is_refused_before_the_first_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """StableLM's decoder layer does not hand the row's layout on to its attention."""
    import torch
    from transformers import StableLmConfig, StableLmForCausalLM

    torch.manual_seed(1)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = StableLmConfig(vocab_size=49152, num_key_value_heads=4, tie_word_embeddings=True, **shape)
    StableLmForCausalLM(config).save_pretrained(folder)
    out = tmp_path / "out"
    out.mkdir()
    lines = DATA.read_text(encoding="utf-8").splitlines()
    (tmp_path / "short.jsonl").write_text("\n".join(lines[:4]) + "\n", encoding="utf-8")

    torch.set_num_threads(1)  # in this process: torch is imported once
    monkeypatch.setattr(matmul, "fastest", lambda *_: matmul.Route("torch", "not measured in a test"))
    words = ["-m", str(folder), "-d", str(tmp_path / "short.jsonl"), "-o", str(out), "--use_lora"]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *words])
    status = errors.run(runpy.run_path(str(ROOT / "finetune" / "finetune.py"))["main"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert status == 2
    assert last.startswith(
        "error: model type 'stablelm' cannot be trained in rows of several conversations ("
    )
    assert "hidden states of one conversation move by" in last and "model types that work: qwen2, " in last
    assert not {"run.json", "train_log.jsonl", "adapter_config.json"} & {path.name for path in out.iterdir()}
