"""format.lock: read back as it was written, small, refused where it is damaged or another model's."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qwen_chat.certificate import lock as module
from qwen_chat.certificate.conversations import kinds
from qwen_chat.certificate.lock import LOCK_FILE, FormatLock, LockError, Replies, forget_replies
from qwen_chat.chat.format import ChatFormat
from qwen_chat.conversation import Json
from qwen_chat.errors import FormatError


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


def forged(lock: FormatLock, change: Callable[[Json, Any], object]) -> str:
    """The file as somebody makes it who knows how its hashes are made. change: of the head and the content."""
    head, content = json.loads(lock.text), json.loads(json.dumps(lock.content))
    del head["content"]
    change(head, content)
    head["hashes"] = {name: module._hash(part) for name, part in content.items()}
    head["hashes"]["all"] = module._hash(head)
    packed = base64.b64encode(zlib.compress(module.canonical(content))).decode()
    return json.dumps(head | {"content": packed})


def put(value: object, *where: Any) -> Callable[[Json, Any], object]:
    """Put a value into the content."""

    def change(_: Json, content: Any) -> None:
        for key in where[:-1]:
            content = content[key]
        content[where[-1]] = value

    return change


FORGED: dict[str, Callable[[Json, Any], object]] = {
    **{f"no {key}": lambda head, _, key=key: head.pop(key) for key in ("base", "template", "stop_ids")},
    **{
        f"{key} 7": lambda head, _, key=key: head.update({key: 7}) for key in ("base", "template", "stop_ids")
    },
    "no end of a reply": lambda head, _: head.update(stop_ids=[]),
    "an end that is no token": lambda head, _: head.update(stop_ids=[[1]]),
    "a note that is no text": lambda head, _: head.update(greedy_replies=[1]),
    "no list of prompts": put(7, "prompts"),
    "a prompt that is no text": put(7, "prompts", 0, 1),
    "tokens as text": put("12", "prompts", 0, 2),
    "a negative token": put([-1], "prompts", 0, 2),
    "a message of no role": put([{"content": "x"}], "prompts", 0, 0, "messages"),
    "no message": put([], "prompts", 0, 0, "messages"),
    "a content of parts": put([{"type": "text", "text": "x"}], "prompts", 0, 0, "messages", 0, "content"),
    "a tool that is none": put([1], "prompts", 0, 0, "tools"),
    "an answer that is no text": put(None, "answers", 0, 1),
    "a reply without tokens": put([[], [], [], []], "greedy", 0),
    "replies of two lengths": put([[1, 2], [-1.0], [-2.0], ["a"]], "greedy", 0),
    "no number": put([[1], [float("nan")], [-2.0], ["a"]], "greedy", 0),
}


def test_a_lock_with_right_hashes_and_another_shape_is_damaged(lock: FormatLock, tmp_path: Path) -> None:
    small = replace(lock, entries=lock.entries[:3])
    (tmp_path / LOCK_FILE).write_text(forged(small, lambda *_: None), encoding="utf-8")
    assert FormatLock.read(tmp_path) == small
    for name, change in FORGED.items():
        (tmp_path / LOCK_FILE).write_text(forged(small, change), encoding="utf-8")
        with pytest.raises(LockError) as raised:
            FormatLock.read(tmp_path)
        assert str(raised.value).endswith("damaged; copy it again from the run's folder"), name


def test_a_lock_without_prompts_is_told(lock: FormatLock, tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text(forged(lock, put([], "prompts")), encoding="utf-8")
    with pytest.raises(LockError, match="holds no prompt"):
        FormatLock.read(tmp_path)


def test_a_tokenizer_beside_it_that_is_damaged_is_one_line(
    lock: FormatLock, qwen3_format: ChatFormat, tmp_path: Path
) -> None:
    qwen3_format.tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(LockError, match="its tokenizer cannot be loaded"):
        lock.format_beside(tmp_path)


def test_variables_that_the_template_has_not_are_refused(
    lock: FormatLock, qwen3_format: ChatFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer_config.json").touch()
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda _: qwen3_format.tokenizer)
    given = forged(lock, put({"messages": []}, "prompts", 0, 0, "variables"))
    (tmp_path / LOCK_FILE).write_text(given, encoding="utf-8")
    with pytest.raises(FormatError, match=r"conversation 0 of its format\.lock"):
        FormatLock.read(tmp_path).format_beside(tmp_path)


def test_replies_can_be_forgotten(lock: FormatLock, tmp_path: Path) -> None:
    forget_replies(tmp_path, "no file, no word")
    lock.write(tmp_path)
    forget_replies(tmp_path, "none: mixed")
    found = FormatLock.read(tmp_path)
    assert found.greedy == Replies((), "none: mixed") and found.entries == lock.entries
