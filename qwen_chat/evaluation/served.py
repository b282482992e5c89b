"""What a model behind an OpenAI-compatible server writes, over HTTP: the server's own template and parser are judged.

In: a client, cases. Out: a judged reply for each. Losses need the model itself. Nothing is kept: a server may hold
another model tomorrow under the same name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from qwen_chat.conversation import Json, ToolCall, write_message
from qwen_chat.dialects.reader import Reply
from qwen_chat.errors import ServiceError
from qwen_chat.evaluation.cases import Case
from qwen_chat.evaluation.scores import Judged, score
from qwen_chat.tools.client import HttpClient


@dataclass(frozen=True)
class ServedModel:
    """A served model and how it is asked: greedy, the tools passed on, `calls` as for `run.write_replies`."""

    client: HttpClient
    model: str
    calls: Literal["free", "strict", "required"] = "free"
    max_tokens: int = 256
    template_kwargs: Mapping[str, Any] | None = None

    def judge(
        self, cases: Sequence[Case], batch: int = 8, tick: Callable[[int], None] = lambda done: None
    ) -> list[Judged]:
        """Ask for `batch` replies at once; a case whose prompt is too long for the server has none.

        Raises ServiceError, which names the case, where the server does not answer.
        """
        judged = []
        with ThreadPoolExecutor(batch) as pool:
            try:
                for done, one in enumerate(pool.map(self._one, cases), 1):
                    judged += [] if one is None else [one]
                    tick(done)
            finally:
                pool.shutdown(cancel_futures=True)
        return judged

    def _one(self, case: Case) -> Judged | None:
        tools = list(case.tools)
        if self.calls == "strict":
            tools = [{**tool, "function": {**tool["function"], "strict": True}} for tool in tools]
        variables = {**(self.template_kwargs or {}), **case.template_kwargs}
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [write_message(message) for message in case.before],
            "tools": tools,
            "tool_choice": "required" if self.calls == "required" else "auto",
            "parallel_tool_calls": case.parallel_tool_calls,
            "temperature": 0,
            "max_tokens": self.max_tokens,
            **({"chat_template_kwargs": variables} if variables else {}),
        }
        try:
            answer = self.client.create(**body)
            assert isinstance(answer, dict)
            reply = _reply(answer)
        except ServiceError as error:
            if "answered 400: " in str(error) and "context" in str(error):
                return None
            raise ServiceError(f"{case.key}: {error}") from None
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ServiceError(f"{case.key}: the answer has not the shape of a chat completion") from None
        calls = [{"name": call.name, "arguments": call.arguments} for call in reply.tool_calls]
        told = reply.content + "".join("\n" + json.dumps(call, ensure_ascii=False) for call in calls)
        return Judged(case, told.lstrip("\n"), score(case, reply))


def _reply(answer: Json) -> Reply:
    message = answer["choices"][0]["message"]
    calls = [
        ToolCall(str(call["function"]["name"]), str(call["function"]["arguments"]))
        for call in message.get("tool_calls") or []
    ]
    thought = message.get("reasoning_content") or message.get("reasoning") or ""
    return Reply(message.get("content") or "", thought, calls)
