"""A chat server on loopback that makes its prompts as it is told to: right, or with one fault.

In: a chat format, the replies of its "model", a fault, what it offers. Out: a real HTTP server. It renders by the
tokenizer's own apply_chat_template, as other servers do.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from qwen_chat.certificate.lock import FormatLock
from qwen_chat.chat.format import ChatFormat
from qwen_chat.conversation import Json

IM_END = "<|im_end|>"


@dataclass(frozen=True)
class Fault:
    """What is wrong: before rendering (request), in the text, in the tokens, in the reply."""

    request: Callable[[Json], Json] = lambda request: request
    text: Callable[[str, Json], str] = lambda text, request: text
    ids: Callable[[list[int]], list[int]] = lambda ids: ids
    typed_is_control: bool = True  # as other servers do
    cut: int | None = None  # tokens that a chat's prompt may have; the middle of a longer one is left out
    stops: bool = True
    reads_calls: bool = True
    shift: float = 0.0  # of each log-probability
    tells_usage: bool = True
    template: Callable[[str], str] = lambda source: source


@dataclass
class FaultyServer:
    """Use as a context: `.url` is where it listens. `offers`: "template", "tokens", or neither."""

    fmt: ChatFormat
    lock: FormatLock
    fault: Fault = field(default_factory=Fault)
    offers: str = "tokens"
    key: str | None = None
    dies_after: int | None = None
    asked: int = 0

    def __enter__(self) -> FaultyServer:
        self._replies = {
            tuple(entry.ids): reply
            for entry, reply in zip(self.lock.entries, self.lock.greedy.replies, strict=False)
        }
        self._seen: dict[str, tuple[str, list[int]]] = {}
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _answer(self, body: Json | None) -> None:
                server.asked += 1
                if server.dies_after is not None and server.asked > server.dies_after:
                    self.connection.close()
                    self.close_connection = True
                    return
                authorised = server.key is None or self.headers.get("Authorization") == f"Bearer {server.key}"
                status, value = server.answer(self.path, body) if authorised else (401, {"error": "no key"})
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        ThreadingHTTPServer.daemon_threads = True
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.RequestHandlerClass.wbufsize = -1  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    # ---------------------------------------------------------------------------------------------- answers

    def answer(self, path: str, body: Json | None) -> tuple[int, Json]:
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "tuned", "object": "model"}]}
        if body is not None and path == "/v1/chat/completions":
            return 200, self._chat(body)
        if body is not None and path == "/tokenize" and self.offers == "tokens":
            return 200, {"tokens": self.prompt(body)[1]}
        if body is not None and path == "/tokenize" and self.offers == "template" and "content" in body:
            return 200, {"tokens": next(ids for text, ids in self._seen.values() if text == body["content"])}
        if body is not None and path == "/apply-template" and self.offers == "template":
            return 200, {"prompt": self.prompt(body)[0]}
        return 404, {"error": {"message": "no such path"}}

    def prompt(self, body: Mapping[str, Any]) -> tuple[str, list[int]]:
        """The text and the tokens that a request's prompt has here."""
        asked = {key: body[key] for key in ("messages", "tools", "chat_template_kwargs") if body.get(key)}
        key = json.dumps(asked)
        if key not in self._seen:
            self._seen[key] = self._rendered(asked)
        return self._seen[key]

    def _rendered(self, asked: Json) -> tuple[str, list[int]]:
        request = self.fault.request(copy.deepcopy(asked))
        messages = request["messages"]
        for message in messages:
            for call in message.get("tool_calls") or ():
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        tools, variables = request.get("tools"), request.get("chat_template_kwargs", {})
        text = self.fmt.tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=self.fault.template(self.fmt.template),
            tokenize=False,
            add_generation_prompt=True,
            **variables,
        )
        text = self.fault.text(text, request)
        typed = any(
            IM_END in str(m["content"]) or "<|im_start|>" in str(m["content"]) for m in asked["messages"]
        )
        typed = typed or any("<|endoftext|>" in str(m["content"]) for m in asked["messages"])
        if typed and not self.fault.typed_is_control:
            ids = self.fmt.prompt_ids(asked["messages"], tools, **variables)
        else:
            ids = self.fmt.tokenizer.encode(text, add_special_tokens=False)
        return text, self.fault.ids(ids)

    def _chat(self, body: Json) -> Json:
        ids, cut = self.prompt(body)[1], self.fault.cut
        ids = ids if cut is None or len(ids) <= cut else ids[:100] + ids[100 - cut :]
        message: Json = {"role": "assistant", "content": "Something."}
        finish, count, logprobs = "length", body.get("max_tokens", 16), None
        if body.get("logit_bias"):
            message["content"] = "" if self.fault.stops else IM_END * count
            finish = "stop" if self.fault.stops else "length"
        elif body.get("tool_choice") == "required":
            call = {"name": "get_weather", "arguments": '{"city": "杭州"}'}
            text = f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"
            message["content"] = "" if self.fault.reads_calls else text
            if self.fault.reads_calls:
                message["tool_calls"] = [{"id": "c", "type": "function", "function": call}]
            finish = "tool_calls"
        elif (reply := self._replies.get(tuple(ids))) is not None:
            shown = [text for text in reply.texts if text != IM_END]
            message["content"], finish = "".join(shown), "stop" if len(shown) < len(reply.texts) else "length"
            told = [lp - self.fault.shift for lp in reply.logprobs[: len(shown)]]
            logprobs = {"content": [{"token": t, "logprob": lp} for t, lp in zip(shown, told, strict=True)]}
        choice = {"index": 0, "message": message, "finish_reason": finish}
        if body.get("logprobs"):
            choice["logprobs"] = logprobs
        usage = {"prompt_tokens": len(ids), "completion_tokens": count}
        return {"choices": [choice]} | ({"usage": usage} if self.fault.tells_usage else {})
