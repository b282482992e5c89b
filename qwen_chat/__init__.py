"""Tune a Qwen2-family chat model on your conversations and serve it in exactly the format it was trained in.

The names below are the interface (docs/api.md); the wings behind it are listed in docs/architecture.md. Importing this
package loads nothing: each name is looked up in its module when it is first used (PEP 562).
"""

import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen_chat.chat.format import ChatFormat
    from qwen_chat.conversation import Conversation, Message, ToolCall
    from qwen_chat.dialects.reader import Reply
    from qwen_chat.inference.loading import load_engine
    from qwen_chat.service.app import create_app
    from qwen_chat.tools.loop import run_tools

if (
    sys.platform == "win32"
):  # file locks, signals and forks are POSIX's here; said before anything imports them
    print(
        "error: Windows: expected Linux, macOS or WSL; run `wsl --install` and start it there",
        file=sys.stderr,
    )
    raise SystemExit(2)

__version__ = "0.1.0"

__all__ = [
    "ChatFormat",
    "Conversation",
    "Message",
    "Reply",
    "ToolCall",
    "create_app",
    "load_engine",
    "run_tools",
]
_HOMES = {
    "ChatFormat": "chat.format",
    "Conversation": "conversation",
    "Message": "conversation",
    "Reply": "dialects.reader",
    "ToolCall": "conversation",
    "create_app": "service.app",
    "load_engine": "inference.loading",
    "run_tools": "tools.loop",
}


def __getattr__(name: str) -> object:
    """A public name, imported when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    # The next time it is found without this.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
