"""Models that cannot be trained right, or served: one line, status 2, and nothing of the user's is touched."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen_chat import families
from tests.support.scripts import Finetune

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "finetune" / "io_file" / "input_data" / "example_data.jsonl"


def program(*words: str) -> str:
    """A script as a command; says at the end whether torch came in."""
    return (
        "import runpy, sys\n"
        f"sys.argv = {list(words)!r}\n"
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


@pytest.mark.parametrize(
    ("script", "config", "said"),
    [
        (
            "finetune/finetune.py",
            {"model_type": "qwen4_exp", "text_config": {"layer_types": ["linear_attention"]}},
            "a model of type 'qwen4_exp' cannot be trained here: layer_types has linear_attention: ",
        ),
        (
            "finetune/finetune.py",
            {"model_type": "mixtral", "output_router_logits": True},
            "a model of type 'mixtral' cannot be trained here: output_router_logits is true: ",
        ),
        (
            "finetune/plan.py",
            {"model_type": "lfm2", "conv_L_cache": 3},
            "a model of type 'lfm2' cannot be trained here: it has conv_L_cache: ",
        ),
        (
            "fast_start/simple_try_0.py",
            {"model_type": "qwen4_exp"},
            "a model of type 'qwen4_exp' is not served by the engine; ",
        ),
        (
            "fast_start/simple_try_create_service.py",
            {"model_type": "phi3"},
            "a model of type 'phi3' is not served by the engine; ",
        ),
    ],
)
def test_what_a_config_tells_is_refused_before_torch(
    script: str, config: dict[str, object], said: str, folder: Path, tmp_path: Path
) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").touch()
    more = {
        "finetune/finetune.py": ["-d", str(DATA), "-o", str(tmp_path / "out")],
        "fast_start/simple_try_create_service.py": ["--port", "0", "--log_file", str(tmp_path / "log")],
    }
    begun = time.process_time() + sum(_children())
    status, torch_loaded, found = run(script, "-m", str(folder), *more.get(script, []))
    took = time.process_time() + sum(_children()) - begun
    last = found.splitlines()[-1]
    where = folder if script == "finetune/plan.py" else folder / "config.json"
    assert (status, torch_loaded) == (2, "False")
    assert last.startswith(f"error: {where}: {said}") and ", ".join(families.ENGINE_SERVES) in last
    assert took < 2  # seconds of processor: others use this machine too
    assert not (tmp_path / "out").exists()


def _children() -> tuple[float, float]:
    """Seconds of processor that ended child processes took."""
    times = os.times()
    return times.children_user, times.children_system


def test_a_leak_that_no_config_tells_is_refused_before_the_first_step(
    finetune: Finetune, folder: Path, tmp_path: Path
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

    status, said = finetune(
        "-m", str(folder), "-d", str(tmp_path / "short.jsonl"), "-o", str(out), "--use_lora"
    )
    last = said.splitlines()[-1]
    assert status == 2
    assert last.startswith(
        "error: model type 'stablelm' cannot be trained in rows of several conversations ("
    )
    assert "hidden states of one conversation move by" in last and "model types that work: qwen2, " in last
    assert not {"run.json", "train_log.jsonl", "adapter_config.json"} & {path.name for path in out.iterdir()}
