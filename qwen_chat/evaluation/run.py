"""A model on held-out conversations: its loss, and the calls that it writes.

In: a model or an engine, and cases. Out: losses (`sequence_losses`: teacher-forced, as training computes them) and
replies (`write_replies`: greedy, batched) with their scores (`judge`). What is computed is kept as it comes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from qwen_chat.chat.format import ChatFormat, Prompt
from qwen_chat.conversation import write_message
from qwen_chat.errors import ServiceError
from qwen_chat.evaluation.cases import Case
from qwen_chat.evaluation.scores import Judged, Same, SequenceLoss, same_json, score


class Kept(dict[str, Any]):
    """Results by key that are kept on disk as they come, one JSON line each; a run that was killed goes on behind them.

    path None: in memory only. A last line that was cut off is left out (and computed again).
    """

    def __init__(self, path: Path | None) -> None:
        self._file: IO[str] | None = None
        if path is None:
            return
        whole = path.read_bytes() if path.is_file() else b""
        whole = whole[: whole.rfind(b"\n") + 1]
        for line in whole.splitlines():
            entry = json.loads(line)
            self[entry["key"]] = entry["value"]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._file.truncate(len(whole))

    def add(self, key: str, value: Any) -> None:
        self[key] = value
        if self._file is not None:
            self._file.write(json.dumps({"key": key, "value": value}, ensure_ascii=False) + "\n")
            self._file.flush()


def sequence_losses(
    model: Any,
    data: Any,
    chosen: Sequence[int],
    kept: Kept,
    tick: Callable[[int], None] = lambda done: None,
) -> list[SequenceLoss]:
    """Teacher-forced loss of the chosen conversations of `data` (token_cache.TokenisedData), as in training.

    The model is left as it was found. tick: called with the number of conversations done.
    """
    import torch

    from qwen_chat.training import attention, batches, loss

    before = model.config._attn_implementation
    model.set_attn_implementation(attention.register())
    longest = max((len(encoded.input_ids) for i in chosen for encoded in data[i]), default=1)
    rows = batches.WindowSampler(data, batch_size=1, max_length=longest, shuffle=False)
    items, collate = batches.RowDataset(data), batches.Collator()
    model_loss = loss.ModelLoss(model)
    device = next(model.parameters()).device
    losses = []
    try:
        for done, i in enumerate(chosen, 1):
            key = f"loss {data.where(i)}"
            if key not in kept:
                (row,) = rows.plan([i])
                batch = {name: value.to(device) for name, value in collate([items[row]]).items()}
                with torch.inference_mode():
                    found = model_loss(model, batch)
                kept.add(key, [float(found.loss_sum), int(found.tokens), int(found.correct)])
            total, tokens, right = kept[key]
            losses.append(SequenceLoss(data.where(i), total, tokens, right))
            tick(done)
    finally:
        model_loss.remove()
        model.set_attn_implementation(before)
    return losses


def write_replies(
    engine: Any,
    fmt: ChatFormat,
    cases: Sequence[Case],
    kept: Kept,
    *,
    calls: Literal["free", "strict", "required"] = "free",
    max_tokens: int = 256,
    adapter: str | None = None,
    batch: int = 8,
    tick: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """The greedy reply of every case, through the engine in batches.

    calls: free, as the model likes; strict, a call that it opens is decoded under its tool's schema;
    required, every reply is such a call (several where the case allows them), whatever the reference does.
    """
    waiting = [case for case in cases if f"reply {case.key}" not in kept]
    done = len(cases) - len(waiting)
    for start in range(0, len(waiting), 4 * batch):
        some = waiting[start : start + 4 * batch]
        requests = [_request(fmt, case, calls, max_tokens, adapter) for case in some]
        for case, completion in zip(some, engine.generate(requests), strict=True):
            if completion.finish_reason not in ("stop", "length") and completion.fault != "request":
                raise ServiceError(
                    f"{case.key}: no reply ({completion.error or completion.finish_reason}); "
                    "what was written before is kept: run the same command again"
                )
            kept.add(f"reply {case.key}", completion.text)
        done += len(some)
        tick(done)
    return [kept[f"reply {case.key}"] for case in cases]


def fitting(cases: Sequence[Case], fmt: ChatFormat, room: int) -> list[Case]:
    """The cases whose prompt leaves a place for a reply in `room` tokens."""
    return [case for case in cases if len(_prompt(fmt, case).ids) < room]


def _prompt(fmt: ChatFormat, case: Case) -> Prompt:
    before = [write_message(message) for message in case.before]
    return fmt.render(before, list(case.tools), **case.template_kwargs)


def _request(fmt: ChatFormat, case: Case, calls: str, max_tokens: int, adapter: str | None) -> Any:
    from qwen_chat.inference.sampling import GenerationRequest

    grammar, prompt = None, _prompt(fmt, case)
    if calls == "required":
        grammar = fmt.call_grammar(list(case.tools), parallel=case.parallel_tool_calls)
        grammar = grammar.after_thought() if prompt.in_reasoning else grammar
    elif calls == "strict":
        # As if the tools' owner had asked for valid arguments: in the grammar, not in the prompt.
        strict = [{**tool, "function": {**tool["function"], "strict": True}} for tool in case.tools]
        grammar = fmt.text_grammar(strict)
    return GenerationRequest(
        prompt_ids=prompt.ids,
        max_tokens=max_tokens,
        temperature=0.0,
        stop=tuple(fmt.stop_strings),
        stop_token_ids=tuple(fmt.stop_token_ids),
        grammar=grammar,
        adapter=adapter,
    )


def judge(
    cases: Sequence[Case], texts: Sequence[str], fmt: ChatFormat | None = None, *, same: Same = same_json
) -> list[Judged]:
    """Score replies. fmt (a ChatFormat): to know where a prompt ended inside a thinking block."""
    judged = []
    for case, text in zip(cases, texts, strict=True):
        inside = False
        if fmt is not None:
            inside = _prompt(fmt, case).in_reasoning
        judged.append(Judged(case, text, score(case, text, in_reasoning=inside, same=same)))
    return judged
