"""Hold a server to the format that a model was trained in.

    qwen-chat verify --url http://127.0.0.1:8000 --lock output_data/RUN

In: a chat service (ours, vLLM, llama-server, transformers serve, Ollama, LM Studio, SGLang), and the folder of the
model that it serves, with its format.lock. Out: what agrees, what differs from the first byte on and why, what cannot
be seen there. Status 0: it agrees; 1: it differs; 2: it could not be asked.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_chat import errors, place
from qwen_chat.console import rank_zero
from qwen_chat.flags import parser
from qwen_chat.flags.parser import option

MOST_SECONDS = 86_400  # seconds that one answer may take at most


@dataclass(frozen=True)
class VerifyArguments:
    """Verify"""

    url: str = option("http://127.0.0.1:8000", "where the server listens")
    lock: str | None = option(None, "the folder with format.lock; the newest finished run here without it")
    model: str | None = option(None, "the model's name there; the first that it lists without it", "-m")
    api_key: str | None = option(None, "the server's key; also API_KEY")
    most: int | None = option(None, "ask for the first N prompts alone; all without it")
    timeout: float = option(300.0, "seconds that one answer may take")
    json: bool = option(False, "one JSON object on standard output")


def main(argv: Sequence[str], about: str = str(__doc__)) -> int:
    wanted = parser.read(argv, [VerifyArguments], about=about)[VerifyArguments]

    from qwen_chat.certificate import report
    from qwen_chat.certificate.lock import FormatLock
    from qwen_chat.certificate.replay import Replay
    from qwen_chat.certificate.server import Server

    if wanted.most is not None and wanted.most < 1:
        raise errors.OptionError(f"--most {wanted.most}: expected 1 or more")
    if not 0 < wanted.timeout <= MOST_SECONDS:
        raise errors.OptionError(
            f"--timeout {wanted.timeout:g}: expected seconds above 0, at most {MOST_SECONDS:,}"
        )
    folder = find_lock(wanted.lock)
    lock = FormatLock.read(folder)
    key = wanted.api_key or os.environ.get("API_KEY")
    server = Server(wanted.url, model=wanted.model, key=key, timeout=wanted.timeout)
    server.open(lock.entries[0].case)
    fmt = lock.format_beside(folder)
    rank_zero(f"{server.url}: {server.software}, model {errors.printable(server.model)}")
    told = f"base {lock.base.get('name')}; greedy replies: {lock.greedy.note}"
    rank_zero(f"lock {folder}: {len(lock.entries)} prompts; {errors.printable(told)}")
    verdict = Replay(lock, server, fmt, rank_zero if sys.stderr.isatty() else lambda _: None).run(wanted.most)
    if wanted.json:
        facts = {name: str(getattr(server, name)) for name in ("url", "model", "software", "channel")}
        print(json.dumps(report.to_json(verdict, **facts), ensure_ascii=False))
    else:
        print("\n".join(report.lines(verdict, lock, colour=sys.stdout.isatty())))
    return verdict.status


def find_lock(given: str | None) -> Path:
    """The folder as given, or the newest one of place.OUTPUTS that has a lock."""
    if given is not None:
        return Path(given).expanduser()
    found = sorted(place.OUTPUTS.glob("*/format.lock"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise errors.OptionError(
            f"--lock: no run in {place.OUTPUTS} has a format.lock; give the folder of the model"
        )
    rank_zero(f"--lock was not given: the newest run, {found[-1].parent}")
    return found[-1].parent
