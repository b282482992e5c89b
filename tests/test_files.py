"""Files that are whole or not there, and the lock that names its holder."""

import hashlib
import os
from pathlib import Path

import pytest

from qwen_chat import files


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    files.write_whole(path, "你好\n")
    with pytest.raises(ZeroDivisionError), files.written_whole(path) as file:
        file.write("half")
        raise ZeroDivisionError
    assert path.read_text(encoding="utf-8") == "你好\n"
    files.write_whole(path, "new")
    assert path.read_text(encoding="utf-8") == "new"
    assert os.listdir(tmp_path) == ["run.json"]


def test_a_file_that_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    with pytest.raises(FileExistsError), files.written_whole(path, replace=False) as file:
        file.write("ours")
        path.write_text("another's")
    assert path.read_text() == "another's"
    assert os.listdir(tmp_path) == ["data.jsonl"]


def test_the_hash_of_a_file_is_that_of_its_content(tmp_path: Path) -> None:
    content = os.urandom(300_000)
    (tmp_path / "file").write_bytes(content)
    assert files.sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("signed", [True, False])
def test_a_lock_is_held_once_and_told_by_its_holder(tmp_path: Path, signed: bool) -> None:
    path = tmp_path / ".lock"
    first, second = files.Lock(path, signed=signed), files.Lock(path, signed=signed)
    assert first.take()
    assert not second.take()
    told = second.holder()
    assert told.startswith(f"process {os.getpid()} on ") if signed else told == "another process"
    first.release()
    assert path.exists() is not signed
    assert second.take(-1)
    second.release()
