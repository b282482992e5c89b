"""A certificate replayed against a server: each prompt as far as it is seen, the end of a reply, a call, the weights.

In: a FormatLock, an opened Server, the chat format where it is at hand. Out: a `Outcome`: what agrees, what differs and
why, what cannot be seen there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qwen_chat.certificate.causes import Finding, Suspects
from qwen_chat.certificate.conversations import Example, system, user
from qwen_chat.certificate.lock import TOKENS, FormatLock, GreedyReply
from qwen_chat.certificate.server import ChatReply, Seen, Server
from qwen_chat.chat.format import ChatFormat
from qwen_chat.conversation import Json
from qwen_chat.dialects.known import begins_call
from qwen_chat.errors import printable

# Nats. On the demo model float32 was 0.0000 apart in our service, llama.cpp's Q4_1 0.11 (docs/verify.md). Beyond it the
# weights are others.
DRIFT = 0.1
# Two likeliest tokens as near as this may change places.
NEAR = 0.2
CITY = "杭州"
CALL_TOOL: Json = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": [CITY]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@dataclass(frozen=True)
class Outcome:
    """What a server was found to do. `agrees` and `unseen` are lines for a person."""

    findings: tuple[Finding, ...]
    agrees: tuple[str, ...]
    unseen: tuple[str, ...]
    seen: int  # prompts that were seen

    @property
    def status(self) -> int:
        """0: it agrees; 1: it differs; 2: nothing could be seen."""
        if any(finding.level == "differs" for finding in self.findings):
            return 1
        return 0 if self.seen else 2


class Replay:
    """One lock against one server."""

    def __init__(
        self,
        lock: FormatLock,
        server: Server,
        fmt: ChatFormat | None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._lock, self._server, self._fmt, self._tell = lock, server, fmt, tell
        self._findings: list[Finding] = []
        self._agrees: list[str] = []
        self._unseen: list[str] = []

    def run(self, most: int | None = None) -> Outcome:
        """Ask for the first `most` prompts (all), then for replies. Raises ServerLost."""
        entries = self._lock.entries[:most]
        seen: list[Seen] = []
        for k, entry in enumerate(entries):
            if k % 50 == 0:
                self._tell(f"{k} of {len(entries)} prompts asked for")
            seen.append(self._server.prompt(entry.case))
        suspects = Suspects(entries, seen, self._fmt)
        self._findings += suspects.findings()
        states = [suspects.state(k) for k in range(len(entries))]
        how = {
            "template": "text and tokens, from /apply-template and /tokenize",
            "tokens": "tokens, from /tokenize",
            "usage": "the number of tokens alone, from usage.prompt_tokens",
        }[self._server.channel]
        agreed = sum(state in ("same", "typed") for state in states)
        if agreed:
            self._agrees.append(f"prompts: {agreed} of {len(entries)} ({how})")
        if self._server.channel == "usage":
            self._unseen.append("the prompts' bytes: a change that keeps the number of tokens stays unseen")
        if self._fmt is None:
            self._unseen.append("causes: no tokenizer lies beside the lock, so no fault can be tried")
        refused = [one for one in seen if one.refused is not None]
        if refused:
            self._unseen.append(f"{len(refused)} prompts, which it refuses ({refused[0].refused})")
        if untold := states.count("unseen") - len(refused):
            self._unseen.append(f"{untold} prompts: it tells no usage.prompt_tokens")
        self._fed(states)
        changed = any(state in ("other", "tokens") for state in states[: len(self._lock.greedy.replies)])
        self._stop()
        self._call()
        self._weights(prompts_differ=changed)
        return Outcome(
            tuple(self._findings),
            tuple(self._agrees),
            tuple(self._unseen),
            len(states) - states.count("unseen"),
        )

    def _fed(self, states: Sequence[str]) -> None:
        """Whether chats are given what /tokenize says: the numbers of tokens of a few, the longest included."""
        if self._server.channel == "usage":
            return
        sample = [k for k, entry in enumerate(self._lock.entries[: len(states)]) if entry.case.kind == "long"]
        sample += [k for k in range(0, len(states), 40) if k not in sample]
        counted: dict[int, Seen] = {
            k: self._server.counted(self._lock.entries[k].case) for k in sorted(sample)
        }
        told = {
            k: one for k, one in counted.items() if one.count is not None and states[k] in ("same", "typed")
        }
        entries = [self._lock.entries[k] for k in told]
        suspects = Suspects(entries, list(told.values()), self._fmt)
        findings = [f for f in suspects.findings() if f.level == "differs"]
        numbers = list(told)
        for finding in findings:
            where = tuple(numbers[k] for k in finding.numbers)
            self._findings.append(Finding("differs", f"{finding.cause}, in chats alone", finding.cure, where))
        if told and not findings:
            self._agrees.append(
                f"chats are given these prompts: the numbers of tokens of {len(told)} of them"
            )
        if not told:
            self._unseen.append("whether chats are given these prompts: it tells no usage.prompt_tokens")

    def _stop(self) -> None:
        """The end of turn is forced as the first token: the reply must be over, and empty."""
        end = self._lock.stop_ids[0]
        found = self._server.chat(Example("stop", (user("Hi"),)), max_tokens=4, logit_bias={str(end): 100})
        text = "" if isinstance(found, str) else spoken(found.message)
        bare = text.replace("<|im_end|>", "").strip()
        if isinstance(found, str) or bare or found.finish not in ("stop", "length"):
            self._natural_stop()
        elif found.finish == "stop" and not text.strip():
            self._agrees.append("a reply ends at the end of its turn")
        else:
            self._missing_stop()

    def _missing_stop(self) -> None:
        ids = ", ".join(map(str, self._lock.stop_ids))
        cure = f"add the end of turn to its stop tokens ({ids}; eos_token_id of generation_config.json)"
        self._findings.append(Finding("differs", "missing stop: it writes on past the end of a turn", cure))

    def _natural_stop(self) -> None:
        """Where the end cannot be forced, a greedy reply that ends tells."""
        for entry, locked in zip(self._lock.entries, self._lock.greedy.replies, strict=False):
            if locked.ids[-1] not in self._lock.stop_ids or len(locked.ids) < 2:
                continue
            found = self._server.chat(entry.case, max_tokens=TOKENS * 2)
            expected = "".join(locked.texts[:-1]).strip()
            if isinstance(found, str) or not spoken(found.message).strip().startswith(expected):
                continue
            if found.finish == "stop" and spoken(found.message).strip() == expected:
                self._agrees.append("a reply ends at the end of its turn")
            else:
                self._missing_stop()
            return
        self._unseen.append(
            "the end of a reply: it cannot be forced (logit_bias), and no greedy reply shows it"
        )

    def _call(self) -> None:
        """A call that can be one thing only is forced: it must come back as a call."""
        example = Example(
            "call", (system("Call the tool."), user(f"How is the weather in {CITY}?")), (CALL_TOOL,)
        )
        found = self._server.chat(example, max_tokens=64, tool_choice="required")
        calls = None if isinstance(found, str) else found.message.get("tool_calls")
        calls = calls if isinstance(calls, list) else []
        read = []
        for call in calls:
            try:
                read.append((call["function"]["name"], json.loads(call["function"]["arguments"])))
            except (KeyError, TypeError, ValueError):
                read.append(("?", None))
        # Where several calls are allowed a small model may write the same one again.
        if read and all(one == ("get_weather", {"city": CITY}) for one in read):
            self._agrees.append("a forced call comes back with its arguments")
        elif read:
            got = printable(json.dumps(read, ensure_ascii=False), 200)
            cure = "set the parser of the dialect that the template speaks (docs/function_calling.md)"
            self._findings.append(Finding("differs", f"a forced call comes back as {got}", cure))
        elif not isinstance(found, str) and found.finish != "length" and begins_call(spoken(found.message)):
            cure = "turn on its parser of calls (vLLM: --tool-call-parser; llama-server: --jinja)"
            self._findings.append(Finding("differs", "call dropped: it stays text in the reply", cure))
        else:
            self._unseen.append("calls read from replies: it does not force a whole one (tool_choice)")

    # ------------------------------------------------------------------------------------------------ the weights

    def _weights(self, *, prompts_differ: bool) -> None:
        """The greedy replies, token by token, as far as two likeliest tokens are not near each other."""
        replies = self._lock.greedy.replies
        if not replies:
            self._unseen.append(f"the weights: the lock has no greedy replies ({self._lock.greedy.note})")
            return
        if prompts_differ:
            self._unseen.append("the weights: the prompts of the replies differ already")
            return
        drifts: list[float] = []
        compared, parted = 0, []
        for k, (entry, locked) in enumerate(zip(self._lock.entries, replies, strict=False)):
            found = self._server.chat(entry.case, max_tokens=TOKENS, logprobs=True)
            if isinstance(found, str):
                found = self._server.chat(entry.case, max_tokens=TOKENS)
            if isinstance(found, str):
                continue
            compared += 1
            drift, at = compare_reply(locked, found)
            drifts += drift
            if at is not None:
                parted.append((k, at))
        mean = sum(drifts) / len(drifts) if drifts else None
        told = "" if mean is None else f", log-probabilities {mean:.4f} apart in the mean"
        if not compared:
            self._unseen.append("the weights: it gives no greedy reply")
        elif len(parted) > 1 or (mean is not None and not mean <= DRIFT):
            cure = (
                "another quantisation or number type, or the weights of another model; serve the folder's own"
            )
            text = f"another quantisation or other weights: {len(parted)} of {compared} replies differ{told}"
            self._findings.append(Finding("differs", text, cure, tuple(k for k, _ in parted)))
        else:
            self._agrees.append(f"weights: {compared - len(parted)} of {compared} greedy replies{told}")
        if mean is None and compared:
            self._unseen.append("log-probabilities: it tells none, so the replies' words alone were compared")


def spoken(message: Json) -> str:
    """A message's text, its thought included."""
    thought = message.get("reasoning_content") or message.get("reasoning") or ""
    return f"{thought}{message.get('content') or ''}"


def compare_reply(locked: GreedyReply, found: ChatReply) -> tuple[list[float], int | None]:
    """How far the log-probabilities of the tokens are apart until the replies part, and at which token they do for
    another reason than that two tokens were near; None: they do not."""
    near = [first - second <= NEAR for first, second in zip(locked.logprobs, locked.seconds, strict=True)]
    if found.tokens is None or found.logprobs is None:
        whole = "".join(locked.texts).replace("<|im_end|>", "").rstrip("\ufffd").strip()
        said = spoken(found.message).replace("\ufffd", "").strip()
        clean = not any("\ufffd" in text for text in locked.texts) and "<" not in whole
        return [], None if not clean or said.startswith(whole) or whole.startswith(said) or any(near) else 0
    drifts: list[float] = []
    for k, (text, logprob) in enumerate(zip(locked.texts, locked.logprobs, strict=True)):
        if k >= len(found.tokens):  # most servers tell nothing of the end
            return drifts, None if text.startswith("<|") or near[k] else k
        if "\ufffd" in text:  # a part of a character: told as such, or with the next one, or not at all
            return drifts, None
        same = text == found.tokens[k] or text.startswith("<|")
        if not same:
            return drifts, None if near[k] else k
        drifts.append(abs(found.logprobs[k] - logprob))
    return drifts, None
