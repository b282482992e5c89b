"""The service log: one safe JSON line a request, bounded on disk; the console: rank 0 alone."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_chat.errors import OutputError
from qwen_chat.logs import RequestLog, json_line, rank_zero, request_log


def test_one_line_each(tmp_path: Path) -> None:
    log = request_log(tmp_path / "new" / "folder" / "log")
    log.write({"id": "a", "prompt": "你好\n<b>"})
    log.write({"id": "b"})
    log.close()
    assert log.path.read_text(encoding="utf-8") == '{"id": "a", "prompt": "你好\\n<b>"}\n{"id": "b"}\n'


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
            request_log(path)


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
