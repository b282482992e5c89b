"""format.lock: read back as it was written, small, refused where it is damaged or another model's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_chat.certificate.conversations import kinds
from qwen_chat.certificate.lock import LOCK_FILE, FormatLock, LockError
from qwen_chat.chat.format import ChatFormat


def test_a_lock_is_read_as_it_was_written(whole_lock: FormatLock, tmp_path: Path) -> None:
    whole_lock.write(tmp_path)
    assert FormatLock.read(tmp_path) == whole_lock
    assert (tmp_path / LOCK_FILE).stat().st_size < 300_000
    assert FormatLock.read(tmp_path).text == whole_lock.text


def test_it_covers_what_a_template_does(whole_lock: FormatLock, qwen3_format: ChatFormat) -> None:
    found = kinds([entry.case for entry in whole_lock.entries])
    assert 290 <= len(whole_lock.entries) <= 330
    expected = "question text system turns space tools call parallel arguments thought thinking typed long"
    assert set(found) == set(expected.split())
    for entry in whole_lock.entries:
        tools = list(entry.case.tools) or None
        assert qwen3_format.prompt(entry.case.messages, tools, **entry.case.variables) == entry.prompt
    for answer in whole_lock.answers:
        assert answer.calls and json.loads(answer.calls[0][1]) is not None


@pytest.mark.parametrize("damage", ["cut", "another hash", "no json", "another version", "a changed token"])
def test_a_damaged_lock_is_one_line(damage: str, whole_lock: FormatLock, tmp_path: Path) -> None:
    text = whole_lock.text
    changed = {
        "cut": text[: len(text) // 2],
        "another hash": text.replace('"prompts": "', '"prompts": "0'),
        "no json": "x",
        "another version": text.replace('"version": 1', '"version": 9'),
        "a changed token": text.replace('"tool_style": "hermes"', '"tool_style": "xml"'),
    }[damage]
    assert changed != text
    (tmp_path / LOCK_FILE).write_text(changed, encoding="utf-8")
    with pytest.raises(LockError) as raised:
        FormatLock.read(tmp_path)
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


def test_a_lock_of_another_model_is_told(
    whole_lock: FormatLock, demo_model_path: Path, tmp_path: Path
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).symlink_to(demo_model_path / name)
    whole_lock.write(tmp_path)
    with pytest.raises(LockError, match="of another model"):
        whole_lock.format_beside(tmp_path)
