"""A certificate against servers with one planted fault each: every fault is named; a true server raises no alarm."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from qwen_chat.certificate.lock import FormatLock, GreedyReply
from qwen_chat.certificate.replay import Outcome, Replay, compare_reply
from qwen_chat.certificate.server import ChatReply, Server
from qwen_chat.chat.format import ChatFormat
from qwen_chat.conversation import Json
from tests.support.faulty_server import Fault, FaultyServer

DEFAULT = "You are Qwen."


def contents(change: Callable[[str], str]) -> Callable[[Json], Json]:
    def changed(request: Json) -> Json:
        messages = [message | {"content": change(message["content"])} for message in request["messages"]]
        return request | {"messages": messages}

    return changed


def without_calls(request: Json) -> Json:
    kept = [{k: v for k, v in message.items() if k != "tool_calls"} for message in request["messages"]]
    return request | {"messages": kept}


def first_call(request: Json) -> Json:
    for message in request["messages"]:
        message["tool_calls"] = (message.get("tool_calls") or [])[:1]
    return request


def sorted_arguments(request: Json) -> Json:
    for message in request["messages"]:
        for call in message.get("tool_calls") or ():
            value = json.loads(call["function"]["arguments"])
            call["function"]["arguments"] = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return request


def last_turn(request: Json) -> Json:
    messages = request["messages"]
    start = max(k for k, message in enumerate(messages) if message["role"] == "user")
    head = messages[:1] if start and messages[0]["role"] == "system" else []
    return request | {"messages": [*head, *messages[start:]]}


def doubly(text: str, request: Json) -> str:
    """As a template does that is handed arguments as text, and writes them by tojson."""
    for message in request["messages"]:
        for call in message.get("tool_calls") or ():
            plain = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            if plain != "{}" and f'"arguments": {plain}' in text:
                again = json.dumps(plain, ensure_ascii=False)
                text = text.replace(f'"arguments": {plain}', f'"arguments": {again}')
    return text


def wrapped(text: str, request: Json) -> str:
    begin = f"<|im_start|>system\n{DEFAULT}<|im_end|>\n<|im_start|>user\n"
    return f"{begin}{text}<|im_end|>\n<|im_start|>assistant\n"


def escaped(text: str, request: Json) -> str:
    for tool in request.get("tools") or ():
        text = text.replace(json.dumps(tool, ensure_ascii=False), json.dumps(tool))
    for message in request["messages"]:
        for call in message.get("tool_calls") or ():
            value = call["function"]["arguments"]
            text = text.replace(json.dumps(value, ensure_ascii=False), json.dumps(value))
    return text


def silent_calls(request: Json) -> Json:
    messages = [m | {"content": ""} if m.get("tool_calls") else m for m in request["messages"]]
    return request | {"messages": messages}


def normalised(request: Json) -> Json:
    """As a server does that reads tools into a record of its own: its order of keys, a description always."""
    for tool in request.get("tools") or ():
        own = tool["function"]
        parts = {"name": own["name"], "description": own.get("description", "")}
        if "parameters" in own:
            parts["parameters"] = own["parameters"]
        tool["function"] = parts
    return request


def not_thinking(request: Json) -> Json:
    return request | {"chat_template_kwargs": {"enable_thinking": False}}


FAULTS: dict[str, tuple[str, Fault]] = {
    "other default system prompt": (
        "another default system prompt",
        Fault(template=lambda source: source.replace(DEFAULT, "You are a robot made elsewhere.")),
    ),
    "arguments encoded twice": ("arguments encoded twice", Fault(text=doubly)),
    "tools dropped": (
        "tools dropped",
        Fault(request=lambda request: {k: v for k, v in request.items() if k != "tools"}),
    ),
    "earlier calls dropped": ("calls of earlier turns dropped", Fault(request=without_calls)),
    "text beside calls dropped": ("text beside calls dropped", Fault(request=silent_calls)),
    "tools normalised": ("tools normalised", Fault(request=normalised)),
    "first call alone": ("only the first of several calls kept", Fault(request=first_call)),
    "call not read": ("call dropped", Fault(reads_calls=False)),
    "missing stop": ("missing stop", Fault(stops=False)),
    "template twice": ("template applied twice", Fault(text=wrapped)),
    "thinking off": ("thinking switched", Fault(request=not_thinking)),
    "stripped": ("white space stripped", Fault(request=contents(str.strip))),
    "arguments sorted": ("keys of arguments reordered", Fault(request=sorted_arguments)),
    "last turn alone": ("earlier turns dropped", Fault(request=last_turn)),
    "context of 1,024": ("context truncated", Fault(cut=1024)),
    "another quantisation": ("another quantisation or other weights", Fault(shift=0.2)),
    "escaped": ("other characters than ASCII escaped", Fault(text=escaped)),
    "a token before all": (
        "a token before the prompt",
        Fault(ids=lambda ids: [151643, *ids]),
    ),
    "no opening": (
        "no opening of the reply",
        Fault(text=lambda text, _: text.removesuffix("<|im_start|>assistant\n")),
    ),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("template", "usage")]


def replay(server: FaultyServer, lock: FormatLock, fmt: ChatFormat | None) -> Outcome:
    asked = Server(server.url, timeout=20)
    asked.open(lock.entries[0].case)
    assert asked.channel == (server.offers or "usage")
    return Replay(lock, asked, fmt).run()


@pytest.mark.parametrize("offers", ["tokens", *SLOW])
@pytest.mark.parametrize("name", FAULTS)
def test_each_planted_fault_is_named(
    name: str, offers: str, lock: FormatLock, qwen3_format: ChatFormat
) -> None:
    expected, fault = FAULTS[name]
    with FaultyServer(qwen3_format, lock, fault, "" if offers == "usage" else offers) as server:
        verdict = replay(server, lock, qwen3_format)
    found = [finding for finding in verdict.findings if finding.level == "differs"]
    assert verdict.status == 1
    assert [finding.cause.partition(":")[0].partition(", in")[0] for finding in found] == [expected], found
    told = found[0]
    if told.first is not None:
        entry = lock.entries[told.first.number].prompt.encode()
        assert entry[: told.first.byte].decode(errors="ignore").endswith(told.first.before[-10:])
        assert told.first.expected != told.first.found


@pytest.mark.parametrize("offers", ["tokens", "template", ""])
def test_a_true_server_raises_no_alarm(offers: str, whole_lock: FormatLock, qwen3_format: ChatFormat) -> None:
    with FaultyServer(qwen3_format, whole_lock, Fault(typed_is_control=False), offers) as server:
        verdict = replay(server, whole_lock, qwen3_format)
    assert (verdict.status, verdict.findings) == (0, ())
    prompts, *rest = verdict.agrees
    count = len(whole_lock.entries)
    assert prompts.startswith(f"prompts: {count} of {count} (")
    assert any(line.startswith("weights: 12 of 12 greedy replies") for line in rest)
    assert "a forced call comes back with its arguments" in rest
    assert "a reply ends at the end of its turn" in rest


def test_typed_control_tokens_are_a_warning_of_their_own(lock: FormatLock, qwen3_format: ChatFormat) -> None:
    with FaultyServer(qwen3_format, lock, Fault()) as server:
        verdict = replay(server, lock, qwen3_format)
    (warning,) = verdict.findings
    assert verdict.status == 0 and warning.level == "warning"
    assert {lock.entries[k].case.kind for k in warning.numbers} == {"typed"}


def test_two_faults_at_once_are_both_named(lock: FormatLock, qwen3_format: ChatFormat) -> None:
    both = Fault(request=contents(str.strip), text=doubly)
    with FaultyServer(qwen3_format, lock, both) as server:
        verdict = replay(server, lock, qwen3_format)
    names = {finding.cause for finding in verdict.findings}
    assert {"arguments encoded twice", "white space stripped"} <= names


def test_without_a_tokenizer_the_difference_is_told_without_a_cause(
    lock: FormatLock, qwen3_format: ChatFormat
) -> None:
    with FaultyServer(qwen3_format, lock, FAULTS["tools dropped"][1], "template") as server:
        verdict = replay(server, lock, None)
    (finding,) = (one for one in verdict.findings if one.level == "differs")
    assert (verdict.status, finding.cause) == (1, "no known cause")
    assert finding.first is not None and "causes: no tokenizer" in " ".join(verdict.unseen)


def test_parts_of_characters_end_a_comparison() -> None:
    """llama-server tells no probability of them: what follows would be held against another token's."""
    locked = GreedyReply((1, 2, 3), (-0.5, -0.5, -4.0), (-9.0, -9.0, -9.0), ("a", "\ufffd", "b"))
    told = ChatReply({"content": "a"}, "length", ("a", "c"), (-0.5, -1.0), None, None)
    assert compare_reply(locked, told) == ([0.0], None)


def test_a_server_that_tells_nothing_of_prompts_does_not_agree(
    lock: FormatLock, qwen3_format: ChatFormat
) -> None:
    with FaultyServer(qwen3_format, lock, Fault(tells_usage=False), "") as server:
        verdict = replay(server, lock, qwen3_format)
    assert (verdict.status, verdict.seen) == (2, 0)
    assert f"{len(lock.entries)} prompts: it tells no usage.prompt_tokens" in verdict.unseen


def test_calls_of_another_shape_are_no_calls(lock: FormatLock, qwen3_format: ChatFormat) -> None:
    class Odd(FaultyServer):
        def _chat(self, body: Json) -> Json:
            answer = super()._chat(body)
            if body.get("tool_choice") == "required":
                answer["choices"][0]["message"]["tool_calls"] = 7
            return answer

    with Odd(qwen3_format, lock, Fault(typed_is_control=False)) as server:
        verdict = replay(server, lock, qwen3_format)
    assert verdict.status == 0 and any("calls read from replies" in line for line in verdict.unseen)
