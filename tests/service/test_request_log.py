"""The service log: one safe JSON line a request, bounded on disk; the console: rank 0 alone."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from qwen_chat.console import rank_zero
from qwen_chat.errors import OutputError
from qwen_chat.service.app import create_app
from qwen_chat.service.request_log import RequestLog, json_line
from qwen_chat.service.settings import ServiceSettings
from tests.support.chats import CHAT, ask
from tests.support.scripted import make_engine


def test_one_line_each(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "new" / "folder" / "log")
    log.write({"id": "a", "prompt": "你好\n<b>"})
    log.write({"id": "b"})
    log.close()
    assert log.path.read_text(encoding="utf-8") == '{"id": "a", "prompt": "你好\\n<b>"}\n{"id": "b"}\n'


@settings(deadline=None)
@given(st.text() | st.text(alphabet="\x00\x07\x1b\x7f\x85\x9b\u2028\u2029\u202e\u200b\ufeff\ud800a你"))
def test_no_character_acts_on_a_terminal(text: str) -> None:
    line = json_line({"value": text, "\x1b[2J": 1})
    assert line.isprintable()
    assert json.loads(line) == {"value": text, "\x1b[2J": 1}


def test_bounded_on_disk(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "log", max_bytes=1000, kept_files=2)
    for number in range(500):
        log.write({"number": number, "text": "x" * 50})
    log.close()
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["log", "log.1", "log.2"]
    assert all(file.stat().st_size <= 1000 for file in files)
    lines = [json.loads(line)["number"] for file in reversed(files) for line in file.read_text().splitlines()]
    assert lines == list(range(500 - len(lines), 500))  # the newest, none twice, none torn


def test_long_texts_are_cut() -> None:
    line = json.loads(json_line({"prompt": "x" * 100_000}))
    assert line["prompt"] == "x" * 64_000 + "... (100000 characters)"


def test_many_threads(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "log")
    threads = [
        threading.Thread(target=lambda k=k: [log.write({"thread": k, "n": n}) for n in range(100)])  # type: ignore[misc]
        for k in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    found = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert sorted((line["thread"], line["n"]) for line in found) == [
        (k, n) for k in range(8) for n in range(100)
    ]


def test_not_allowed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "log", tmp_path):
        with pytest.raises(OutputError, match=r"cannot write the service log .*--log_file"):
            RequestLog(path)


def test_full_disk_loses_lines_not_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RequestLog(tmp_path / "log")

    def full(_: str) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log._handler.stream, "write", full)
    log.write({"id": "a"})
    log.write({"id": "b"})
    assert log.lost == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("rank", "printed"), [(None, "loss 0.5\n"), ("0", "loss 0.5\n"), ("1", "")])
def test_rank_zero(
    rank: str | None, printed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    rank_zero("loss", 0.5)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", printed)


def test_only_the_owner_reads_it(tmp_path: Path) -> None:
    (tmp_path / "log").touch(mode=0o644)
    log = RequestLog(tmp_path / "log", max_bytes=1000, kept_files=2)
    for _ in range(50):
        log.write({"prompt": "x" * 50})
    log.close()
    assert [file.stat().st_mode & 0o777 for file in tmp_path.iterdir()] == [0o600] * 3


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "log", max_bytes=1000)
    for _ in range(2):
        with pytest.raises(OutputError, match=r"log: another service is writing it; .*--log_file$"):
            RequestLog(tmp_path / "log")
        for number in range(50):  # it rotates: the new file is locked too
            log.write({"number": number, "text": "x" * 50})
    assert log.lost == 0
    log.close()
    RequestLog(tmp_path / "log").close()


def test_devices_are_let_be() -> None:
    mode = Path("/dev/null").stat().st_mode
    logs = [RequestLog(Path("/dev/null")) for _ in range(2)]
    for log in logs:
        log.write({"id": "a"})
        log.close()
    assert [log.lost for log in logs] == [0, 0]
    assert Path("/dev/null").stat().st_mode == mode


def test_strangers_cannot_push_the_others_out(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "log", max_bytes=10_000, kept_files=2)
    log.write({"id": "ours"})
    for number in range(5000):
        log.write({"number": number}, stranger=True)
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert lines[0] == {"id": "ours"}
    assert [line["number"] for line in lines[1:]] == list(range(len(lines) - 1))
    assert log.withheld == 5000 - len(lines) + 1
    assert 900 < sum(len(json.dumps(line)) + 1 for line in lines[1:]) <= 1000  # a tenth of a file
    for _ in range(300):  # the file is full of others' lines: the next one has room for strangers again
        log.write({"text": "x" * 50})
    log.write({"id": "late"}, stranger=True)
    log.close()
    assert json.loads(log.path.read_text().splitlines()[-1]) == {"id": "late"}


def test_log(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "log")
    with TestClient(create_app(make_engine(), log=log, settings=ServiceSettings(model_name="m"))) as client:
        client.post(CHAT, json=ask("say secret words", user="some\x1b[31mbody\n{}"))
        client.post(CHAT, json=ask("say hi", stream=True, stream_options={"include_usage": True}))
        client.post(CHAT, json=ask("hi", temperature=9))
        client.get("/v1/%1b[2Jnothing%0a")
        client.get("/health")
    raw = (tmp_path / "log").read_bytes()
    assert b"secret" not in raw
    assert not any(byte < 0x20 and byte != 0x0A for byte in raw)
    plain, streamed, bad, unknown = [json.loads(line) for line in raw.splitlines()]
    assert set(plain) == {
        "time", "id", "path", "status", "model", "stream", "prompt_tokens", "cached_tokens", "completion_tokens",
        "first_token_ms", "ms", "finish_reason", "user",
    }  # fmt: skip
    assert (plain["status"], plain["model"], plain["finish_reason"]) == (200, "m", "stop")
    assert plain["completion_tokens"] == len("secret words") + 1
    assert 0 <= plain["first_token_ms"] <= plain["ms"]
    assert (streamed["stream"], streamed["status"], streamed["completion_tokens"]) == (True, 200, 3)
    assert (bad["status"], bad["error"]) == (400, "decimal_above_max_value")
    assert (unknown["status"], unknown["error"]) == (404, "unknown_url")


def test_log_with_prompts(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "log")
    with TestClient(create_app(make_engine(), log=log, settings=ServiceSettings(log_prompts=True))) as client:
        client.post(CHAT, json=ask("say 秘密"))
    line = json.loads((tmp_path / "log").read_text(encoding="utf-8"))
    assert line["prompt"] == [{"role": "user", "content": "say 秘密"}]
    assert line["reply"] == "秘密"
