"""Secrets and personal data: what is found and what is not, and that nothing is shown whole."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from qwen_chat.conversation import Conversation, Message, ToolCall
from qwen_chat.data.privacy import screened
from qwen_chat.data.records import open_records
from qwen_chat.data.token_cache import tokenise
from tests.support.letters import Letters

# None of these is anybody's: test numbers that their makers publish, or made of a published form.
FOUND = [
    ("write to john.doe+x@mail.example.co.uk, please", "write to [EMAIL], please"),
    ("邮箱zhang_san@example.cn。", "邮箱[EMAIL]。"),
    ("13800138000@example.com", "[EMAIL]"),
    ("电话13800138000。", "电话[PHONE]。"),
    ("13800138000 13900139000", "[PHONE] [PHONE]"),
    ("+86 138 0013 8000 / +86-138-0013-8000", "[PHONE] / [PHONE]"),
    ("call +1 555-123-4567 or (415) 555-2671", "call [PHONE] or [PHONE]"),
    ("+44 20 7946 0958, +33 6 12 34 56 78, +4915112345678", "[PHONE], [PHONE], [PHONE]"),
    ("010-62345678", "[PHONE]"),
    ("身份证号11010519491231002X，", "身份证号[ID_NUMBER]，"),
    ("110105194912310021", None),  # a wrong check character
    ("11010519491331002X", None),  # a month that there is not
    ("SSN 078-05-1120", "SSN [ID_NUMBER]"),
    ("4111 1111 1111 1111, 5500-0000-0000-0004, 378282246310005", "[CARD], [CARD], [CARD]"),
    ("6200000000000005", "[CARD]"),
    ("4111 1111 1111 1112", None),  # a wrong check digit
    ("key=sk-proj-a1B2c3D4e5F6g7H8i9J0k1L2 end", "key=[API_KEY] end"),
    ("AKIAIOSFODNN7EXAMPLE", "[API_KEY]"),
    (f"密钥ghp_{'a1B2' * 9}，hf_{'Ab1' * 10}", "密钥[API_KEY]，[API_KEY]"),
    (f"Bearer eyJ{'a1' * 9}.eyJ{'b2' * 9}.{'c-3' * 9}", "Bearer [API_KEY]"),
    (
        "-----BEGIN RSA PRIVATE KEY-----\nMIIE13800138000\n-----END RSA PRIVATE KEY-----\nand",
        "[PRIVATE_KEY]\nand",
    ),
    ("a -----BEGIN PRIVATE KEY-----\nMIIE", "a [PRIVATE_KEY]"),
    ("2024-05-06 12:30:45, 20240506123456, 3.14159265358979, 1,000,000", None),
    ("1234567890 and 550e8400-e29b-41d4-a716-446655440000, v1.2.13800138000", None),
    ("sk-loading-spinner-container-item, task-management-of-everything-1", None),
    ("@app.get and a@b, git-2024-05-06", None),
    # A number that is a value of JSON becomes text: what was JSON stays JSON, also where it stands in text.
    ('{"phone": 13800138000, "to": "a@b.com"}', '{"phone": "[PHONE]", "to": "[EMAIL]"}'),
    ('{"all":[13800138000, 13900139000],"n":1}', '{"all":["[PHONE]", "[PHONE]"],"n":1}'),
    ('{"all": [' + "13800138000, " * 50 + "1]}", '{"all": [' + '"[PHONE]", ' * 50 + "1]}"),
    (r'{"a": "{\"card\": 4111111111111111}"}', r'{"a": "{\"card\": \"[CARD]\"}"}'),
    ('He said "call": 13800138000 or so', 'He said "call": [PHONE] or so'),
    ('{"phone": "13800138000"}', '{"phone": "[PHONE]"}'),
]


@pytest.mark.parametrize(("text", "expected"), FOUND)
def test_what_has_a_form_is_found(text: str, expected: str | None) -> None:
    conversation = Conversation((Message("user", text), Message("assistant", "Yes.")))
    without, found = screened(conversation)
    assert without.messages[0].content == (text if expected is None else expected)
    assert (without is conversation) == (expected is None) == (not found)
    assert all(len(one.shown) <= 3 for one in found)


def test_every_part_that_is_learnt_or_read_is_looked_at() -> None:
    mail = "a.b@example.com"
    arguments = {"to": [mail, 1], "card": 4111111111111111, "yes": True, "说": "Hi"}
    call = ToolCall("send", json.dumps(arguments), "x")
    whole = Conversation(
        (
            Message("system", mail),
            Message("user", "Hi", name=mail),
            Message("assistant", mail, reasoning=f"to {mail}", tool_calls=(call, ToolCall("f", '{"a":1}'))),
            Message("tool", mail, tool_call_id="x"),
        )
    )
    without, found = screened(whole)
    assert mail not in json.dumps(without.to_openai()) and len(found) == 7
    first, second = without.messages[2].tool_calls
    assert json.loads(first.arguments) == {"to": ["[EMAIL]", 1], "card": "[CARD]", "yes": True, "说": "Hi"}
    assert (first.id, second.arguments) == ("x", '{"a":1}')  # what holds nothing keeps its bytes
    assert screened(Conversation((), document=f"x {mail}"))[0].document == "x [EMAIL]"
    names = ToolCall("f", '{"a.b@example.com": 1, "c@example.com": 2, "d": 3}')
    (call,) = screened(Conversation((Message("assistant", tool_calls=(names,)),)))[0].messages[0].tool_calls
    assert json.loads(call.arguments) == {
        "[EMAIL]": 1,
        "[EMAIL] 2": 2,
        "d": 3,
    }  # no key takes another's place


HARD = (
    "1 |1(|+1|sk-|eyJ-|eyJaaaaaaaaaaaa.|a.b@|+1 1 1 1 1 1|xoxb-|-----BEGIN PRIVATE KEY-----|4111 1111 |sk-a"
)


@pytest.mark.parametrize("part", HARD.split("|"))
def test_no_text_takes_long(part: str) -> None:
    """A rule that looked again at what it has seen would take minutes for these."""
    start = time.process_time()
    screened(Conversation((), document=part * 30_000))
    assert time.process_time() - start < 2


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def chat(question: str, reply: str = "Yes.") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]}


@pytest.mark.parametrize("workers", [1, 2])
def test_lines_are_counted_by_kind_and_named(tmp_path: Path, workers: int) -> None:
    lines = [chat(f"Hi {n}") for n in range(300)]
    for n in (3, 150, 151, 299):
        lines[n] = chat(f"mail me{n}@example.com or you@example.com", "13800138000" if n == 299 else "No.")
    path = write(tmp_path / "data.jsonl", lines)
    kept, redacted = (
        tokenise(
            open_records(path, redact=redact), Letters(), max_length=99, cache_dir=tmp_path, workers=workers
        )
        for redact in (False, True)
    )
    assert kept.summary.personal == redacted.summary.personal == {"mail addresses": 4, "phone numbers": 1}
    said = kept.summary.describe()
    where = "data.jsonl:4 (me3...), data.jsonl:151 (me1...), data.jsonl:152 (me1...)"
    assert f"\nmail addresses in 4 conversations: {where}, ...\n" in said
    assert "\nphone numbers in 1 conversation: data.jsonl:300 (138...)\n" in said
    assert said.endswith("  --redact True puts a word such as [EMAIL] in the place of each")
    assert "example.com" not in said and "13800138000" not in said
    assert "example.com" not in (kept.folder / "meta.json").read_text(encoding="utf-8")
    said = redacted.summary.describe()
    assert f"\nmail addresses in 4 conversations, replaced by [EMAIL]: {where}, ...\n" in said
    assert "--redact" not in said
    texts = ["".join(map(chr, data[299][0].input_ids.tolist())) for data in (kept, redacted)]
    assert texts[0] == "\x01mail me299@example.com or you@example.com\x02\x0113800138000\x02"
    assert texts[1] == "\x01mail [EMAIL] or [EMAIL]\x02\x01[PHONE]\x02"
    assert kept.fingerprint != redacted.fingerprint
    lazy = tokenise(open_records(path, redact=True), Letters(), max_length=99, lazy=True)
    assert [one.input_ids.tolist() for one in lazy[299]] == [one.input_ids.tolist() for one in redacted[299]]
    list(lazy)
    assert lazy.summary.personal == redacted.summary.personal
    assert sorted(lazy.summary.personal_at["phone numbers"]) == ["data.jsonl:300 (138...)"]
