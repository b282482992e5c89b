"""The real engine over a model that says what the prompt tells it to: exact answers, no weights, no seconds.

The last user message is the script. `say TEXT` answers TEXT; `slow N TEXT` the same with N milliseconds a
token; `crash` makes the step raise; all else is echoed after the number of its characters. A token is a byte.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qwen_chat.inference.decoder import Decoder
from qwen_chat.inference.engine import Engine
from qwen_chat.inference.kv_cache import KVRow, KVShape
from qwen_chat.inference.step import Segment
from qwen_chat.inference.text import _BYTE_OF

TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
END, START = 256, 257
VOCABULARY = 258
CONTEXT = 4096


def make_tokenizer() -> Any:
    """One token a byte, and the two chat marks."""
    vocabulary = dict(_BYTE_OF)
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


class ScriptedDecoder(Decoder):
    """Stands where the model stands; remembers each row's tokens to know what comes next."""

    ways: tuple[str, ...] = ()
    device = torch.device("cpu")

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.vocabulary, self.context = VOCABULARY, CONTEXT
        self.kv_shape = KVShape(1, 1, 1, torch.float32)
        self.step_seconds = 0.0
        self.seen: dict[KVRow, list[int]] = {}
        self.steps = 0
        self.cancel_probe: list[int] = []  # rows of each step

    def step(self, segments: Sequence[Segment]) -> torch.Tensor:
        self.steps += 1
        self.cancel_probe.append(len(segments))
        wanted, pause = [], self.step_seconds
        self.seen = {row: tokens for row, tokens in self.seen.items() if row.bank is not None}  # not released
        for segment in segments:
            tokens = self.seen.setdefault(segment.row, [])
            del tokens[segment.start :]
            tokens += segment.ids
            if segment.wants_logits:
                for end in range(len(tokens) - segment.drafts, len(tokens) + 1):
                    following, wait = self._next(tokens[:end])
                    wanted.append(following)
                    pause = max(pause, wait)
        if pause:
            time.sleep(pause)
        logits = torch.zeros(len(wanted), VOCABULARY)
        for place, token in enumerate(wanted):
            logits[place, token] = 60.0  # nothing else is ever drawn: at 20 one token in two million was
        return logits

    def _next(self, tokens: list[int]) -> tuple[int, float]:
        raw = b"".join(bytes([t]) if t < 256 else (b"\x00S" if t == START else b"\x00E") for t in tokens)
        turns = raw.split(b"\x00S")
        begun = turns[-1].removeprefix(b"assistant\n")
        asked = [turn for turn in turns if turn.startswith(b"user\n") and b"<tool_response>" not in turn]
        script = asked[-1].removeprefix(b"user\n").partition(b"\x00E")[0] if asked else b"say " + raw[:20]
        answer, wait = self._script(script)
        return (answer[len(begun)] if len(begun) < len(answer) else END), wait

    def _script(self, script: bytes) -> tuple[bytes, float]:
        word, _, rest = script.partition(b" ")
        if word == b"crash":
            raise RuntimeError("a secret path: /home/somebody/model")
        if word == b"say":
            return rest, 0.0
        if word == b"slow":
            milliseconds, _, text = rest.partition(b" ")
            return text, int(milliseconds) / 1000
        return b"%d: " % len(script.decode(errors="replace")) + script, 0.0


def make_engine(*, template: str = TEMPLATE, **options: Any) -> Engine:
    """An engine, not started."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    decoder = ScriptedDecoder(tokenizer)
    options = {"cache_tokens": 0, "kv_tokens": 100_000, "stop_token_ids": [END], **options}
    return Engine(decoder, tokenizer, **options)


class LiveService:
    """A service on a loopback port, in a thread of this process."""

    def __init__(self, app: Any, **options: Any) -> None:
        from qwen_chat.service import server

        self._listener = server.bind("127.0.0.1", 0)
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = server.make_server(app, **options)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._listener]))

    def __enter__(self) -> LiveService:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(20)
