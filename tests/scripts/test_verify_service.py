"""verify_service.py against a server on loopback: its statuses, what it prints, what is wrong with the question."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_chat.certificate.lock import LOCK_FILE, FormatLock, Replies
from qwen_chat.chat.format import ChatFormat
from tests.support.faulty_server import Fault, FaultyServer
from tests.support.scripts import Ran, runner

Run = Callable[..., Ran]


@pytest.fixture
def verify(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner("fast_start/verify_service.py", monkeypatch, capsys)


@pytest.fixture(scope="module")
def trained(qwen2_5_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ChatFormat]:
    """The folder of a finished run, as far as its format goes."""
    folder, fmt = tmp_path_factory.mktemp("run"), ChatFormat(qwen2_5_tokenizer)
    fmt.tokenizer.save_pretrained(folder)
    base = {"name": "tiny", "hash": "0" * 32}
    FormatLock.make(fmt, base=base, longest=None, greedy=lambda *_: Replies((), "none")).write(folder)
    return folder, fmt


def test_what_agrees_and_what_differs(trained: tuple[Path, ChatFormat], verify: Run) -> None:
    folder, fmt = trained
    lock = FormatLock.read(folder)
    with FaultyServer(fmt, lock, Fault(typed_is_control=False)) as server:
        status, said, shown = verify("--url", server.url, "--lock", str(folder), "--most", "30")
        assert status == 0 and "prompts: 30 of 30" in shown and f"lock {folder}" in said
        assert "no greedy replies" in shown or "weights" in shown
    other = Fault(template=lambda source: source.replace("You are Qwen", "You are a robot"))
    with FaultyServer(fmt, lock, other, key="secret") as server:
        asked = ("--url", server.url, "--lock", str(folder), "--api_key", "secret", "--most", "30")
        status, _, shown = verify(*asked)
        assert status == 1 and "another default system prompt" in shown
        status, _, shown = verify(*asked, "--json", "True")
        assert status == 1 and "another default system prompt" in json.dumps(json.loads(shown))
        status, said, _ = verify("--url", server.url, "--lock", str(folder))
        assert status == 2 and "--api_key" in said


def test_bad_questions_are_one_line(trained: tuple[Path, ChatFormat], verify: Run, tmp_path: Path) -> None:
    folder, _ = trained
    for words, wanted in (
        (("--lock", str(tmp_path)), str(tmp_path / LOCK_FILE)),
        (("--lock", str(folder), "--most", "0"), "--most 0"),
        (("--lock", str(folder), "--url", "http://127.0.0.1:9"), "http://127.0.0.1:9"),
        (("--lock", str(folder), "--url", "no address"), "no address"),
        (("--lock", str(folder), "--timeout", "nan"), "--timeout nan: expected seconds above 0"),
        (("--lock", str(folder), "--timeout", "inf"), "--timeout inf"),
        (("--lock", str(folder), "--api_key", "钥匙"), "--api_key: a key may hold printable ASCII"),
        (("--lock", "x" * 5000), "xxx: File name too long"),
    ):
        status, said, shown = verify(*words)
        assert (status, shown) == (2, "") and wanted in said and "Traceback" not in said
