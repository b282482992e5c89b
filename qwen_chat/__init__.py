"""Tune a Qwen2-family chat model on your conversations and serve it in exactly the format it was trained in.

Modules, in the order data flows through them, are listed in docs/architecture.md. Importing this package loads nothing:
each module says what it needs.
"""

import sys

if (
    sys.platform == "win32"
):  # file locks, signals and forks are POSIX's here; said before anything imports them
    print(
        "error: Windows: expected Linux, macOS or WSL; run `wsl --install` and start it there",
        file=sys.stderr,
    )
    raise SystemExit(2)

__version__ = "0.1.0"
