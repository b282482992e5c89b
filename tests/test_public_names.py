"""`import qwen_chat`: the names that others may use, found when they are first asked for."""

import subprocess
import sys
from pathlib import Path

import pytest

import qwen_chat

HEAVY = ("torch", "numpy", "pydantic", "transformers", "requests", "jsonschema")


def test_every_public_name_is_found_at_its_home() -> None:
    assert sorted(qwen_chat._HOMES) == qwen_chat.__all__
    for name in qwen_chat.__all__:
        value = getattr(qwen_chat, name)
        assert value.__name__ == name
        assert value.__module__ == f"qwen_chat.{qwen_chat._HOMES[name]}"
    assert set(qwen_chat.__all__) <= set(dir(qwen_chat))


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'qwen_chat' has no attribute 'ChatFromat'"):
        _ = qwen_chat.ChatFromat  # type: ignore[attr-defined]


def test_importing_the_package_loads_nothing() -> None:
    """`docs/measure.py` holds its time; what would cost it is told here."""
    code = (
        "import sys, qwen_chat\n"
        "ours = {name for name in sys.modules if name.startswith('qwen_chat')}\n"
        f"print(sorted(ours | ({set(HEAVY)!r} & sys.modules.keys())))\n"
        "from qwen_chat import Conversation, Message, ToolCall\n"
        f"print(sorted({set(HEAVY)!r} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=True,
    )
    assert done.stdout.splitlines() == ["['qwen_chat']", "[]"]
