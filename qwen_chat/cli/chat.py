"""Load a model, and an adapter, and talk to it.

    qwen-chat chat --prompt "Who are you?"
    qwen-chat chat --adapter output_data/RUN      # no prompt: a chat

In: a question, or a chat typed in the terminal (/new begins again, /exit ends). Out: the answer alone on
standard output, as it is written; everything else, a thought too, goes to standard error.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qwen_chat import families, hardware, models
from qwen_chat.chat import system_text
from qwen_chat.dialects.reader import Delta, fold
from qwen_chat.errors import OptionError, ServiceError
from qwen_chat.flags import parser
from qwen_chat.flags.parser import option

if TYPE_CHECKING:
    from qwen_chat.inference.engine import Engine


@dataclass(frozen=True)
class TryArguments:
    """Talk"""

    model: str | None = option(
        None, "local folder or hub name; without it the adapter's base, else the demo model", "-m"
    )
    adapter: str | None = option(None, "an adapter's folder")
    prompt: str | None = option(None, "what to ask; without it a chat in the terminal", "-p")
    system: str | None = option(
        None,
        "a system prompt, or a file with it; without it the one that the model was tuned or made with",
        or_file=True,
    )
    template_kwargs: Mapping[str, Any] | None = option(
        None, "variables of the chat template, as JSON: '{\"enable_thinking\": false}'"
    )
    max_new_tokens: int = option(512, "longest answer in tokens")
    temperature: float = option(0.0, "0: always the likeliest word; 1: as varied as the model is")
    seed: int | None = option(None, "with a temperature: the same seed gives the same answer")
    quantize: Literal["int8", "int4"] | None = option(
        None, "weights on a CPU: int8 is smaller and faster, int4 smallest; each a little less exact"
    )
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = option(
        "auto", "where it computes; auto: an accelerator where one is"
    )
    trust_remote_code: bool = option(False, "run Python code that comes with the model")


def main(argv: Sequence[str], about: str = str(__doc__)) -> int:
    chosen = parser.read(argv, [TryArguments], about=about)[TryArguments]
    if chosen.max_new_tokens < 1:
        raise OptionError(f"--max_new_tokens {chosen.max_new_tokens}: expected 1 or more")
    if not 0 <= chosen.temperature < math.inf:
        raise OptionError(f"--temperature {chosen.temperature}: expected 0 or more")
    if chosen.adapter == "":
        raise OptionError("--adapter: an empty value; give its folder, or leave the flag out")
    hardware.choose_device(chosen.device)  # one that is not there is refused before anything is loaded
    base = chosen.model
    if base is None and chosen.adapter:
        base = models.adapter_base(Path(chosen.adapter))
    if base is not None:
        folder = models.resolve(base)
        families.check_served(models.read_config(folder), folder / "config.json")
    from qwen_chat.inference.loading import load_engine  # torch comes in here: --help is answered at once

    adapters = {"adapter": Path(chosen.adapter)} if chosen.adapter else {}
    engine = load_engine(
        chosen.model,
        adapters=adapters,
        quantize=chosen.quantize,
        device=chosen.device,
        trust_remote_code=chosen.trust_remote_code,
    )
    for decision in engine.decisions:
        print(decision, file=sys.stderr)
    tuned = engine.format_of("adapter" if chosen.adapter else None).system
    if chosen.system is None and (told := system_text.told(tuned)):
        print(told, file=sys.stderr)
    system: list[dict[str, Any]] = [{"role": "system", "content": chosen.system}] if chosen.system else []
    with engine:
        if chosen.prompt is not None:
            answer(engine, [*system, {"role": "user", "content": chosen.prompt}], chosen)
        else:
            chat(engine, system, chosen)
    return 0


def chat(engine: Engine, system: list[dict[str, Any]], chosen: TryArguments) -> None:
    """Question and answer until the end of input; Ctrl-C cuts an answer short, on an empty line it ends."""
    print("/new begins again, /exit ends", file=sys.stderr)
    messages = list(system)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        question = line.strip()
        if not line or question == "/exit":
            return
        if question == "/new":
            messages = list(system)
        elif question:
            messages.append({"role": "user", "content": question})
            messages.append(answer(engine, messages, chosen))


def answer(engine: Engine, messages: list[dict[str, Any]], chosen: TryArguments) -> dict[str, Any]:
    """Stream one answer to standard output; returns it as a message, its thought apart."""
    from qwen_chat.inference.sampling import GenerationRequest

    adapter = "adapter" if chosen.adapter else None
    fmt = engine.format_of(adapter)
    fmt.check_variables(chosen.template_kwargs or {}, "--template_kwargs")
    prompt = fmt.render(messages, **(chosen.template_kwargs or {}))
    request = GenerationRequest(
        prompt.ids,
        max_tokens=chosen.max_new_tokens,
        temperature=chosen.temperature,
        seed=chosen.seed,
        adapter=adapter,
    )
    generation = engine.submit(request)
    reader = fmt.stream_parser(in_reasoning=prompt.in_reasoning, calls="none")
    deltas: list[Delta] = []
    try:
        for event in generation:
            deltas += print_parts(reader.feed(event.text))
            if event.error:
                raise ServiceError(f"the answer failed: {event.error}")
    except KeyboardInterrupt:
        generation.cancel()
        if chosen.prompt is not None:
            raise
    reply = fold([*deltas, *print_parts(reader.finish())])
    print(flush=True)
    thought = {"reasoning_content": reply.reasoning} if reply.reasoning else {}
    return {"role": "assistant", "content": reply.content, **thought}


def print_parts(deltas: list[Delta]) -> list[Delta]:
    """The answer goes to standard output, a thought to standard error."""
    for delta in deltas:
        print(delta.reasoning or "", end="", file=sys.stderr, flush=True)
        print(delta.content or "", end="", flush=True)
    return deltas
