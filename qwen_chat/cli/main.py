"""`qwen-chat NAME ...`: the commands of an installed wheel, each the code that a script of a checkout calls.

In: the words of a command line. Out: the exit status of the command; without one, or with --help, the list of them.
"""

from __future__ import annotations

import difflib
import importlib
import sys

from qwen_chat import errors

# What each does; its module has its name (tune goes through launch.py).
COMMANDS = {
    "tune": "fine-tune a model on conversations (one process; on several GPUs one for each)",
    "serve": "serve a model over HTTP, in OpenAI's protocol",
    "chat": "load a model, and an adapter, and talk to it",
    "call": "ask a running service",
    "page": "a chat page in the browser, for a running service",
    "check": "look at data before it costs a run",
    "plan": "what a run needs: memory, disk, steps",
    "evaluate": "how good is a model on conversations that it has not seen",
    "merge": "merge an adapter into its base",
    "export": "write a model as other programs serve it",
    "report": "a run as a page; several runs beside each other",
    "verify": "hold a server to the format that a model was trained in",
}


def overview() -> str:
    """The commands, a line each."""
    lines = [f"  {name:9}{does}" for name, does in COMMANDS.items()]
    return "\n".join(["qwen-chat NAME [flags]; qwen-chat NAME --help lists the flags", "", *lines])


def main() -> int:
    """The console script: run the command that is named."""
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        cure = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(COMMANDS)}"
        print(f"error: qwen-chat {name}: no such command; {cure}", file=sys.stderr)
        return 2
    module = "launch" if name == "tune" else name
    return errors.run(lambda: importlib.import_module(f"qwen_chat.cli.{module}").main(words))
