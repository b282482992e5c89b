"""What rounding the weights costs: loss and likeliest tokens on held-out replies, and size, for each number type.

    python benchmarks/bench_quantize.py                  # the demo model; minutes on two cores
    python benchmarks/bench_quantize.py -m MODEL --rows 200

In: conversations that the model was not tuned on (the example data; the demo model is as published). Out:
benchmarks/results/quantize.json, a row for each of float32, int8, int4 and int4's alternatives: loss (mean over the
replies' tokens, nats), agreement (share of these tokens at which the likeliest one is float32's), bytes (of all linear
layers), tokens. The engine's own decoder computes it, as it serves: a prompt in one step, all that follows in another.

The demo model was published in 4 bits, in groups of 32 with a zero (Q4_1), which int4 finds again without loss. So it
is measured a second time with its channels in another order: the same model, whose groups are no longer those.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout


import torch

from benchmarks.machine import where, write
from qwen_chat import models
from qwen_chat.chat.encoded import Encoded
from qwen_chat.chat.format import ChatFormat
from qwen_chat.data.formats import read_record
from qwen_chat.hardware import Device
from qwen_chat.inference import int4
from qwen_chat.inference.decoder import Decoder
from qwen_chat.inference.kv_cache import KVStore
from qwen_chat.inference.quantize import linear_bytes
from qwen_chat.inference.step import Segment
from qwen_chat.threads import in_own_thread

RESULT = ROOT / "benchmarks" / "results" / "quantize.json"
DATA = ROOT / "finetune" / "io_file" / "input_data"
GROUP, FITS = int4.GROUP, int4.FITS
# name: the way, int4's group size and fits
CHOSEN: dict[str, tuple[str | None, int, int]] = {
    "float32": (None, GROUP, FITS),
    "int8": ("int8", GROUP, FITS),
    "int4": ("int4", GROUP, FITS),
}
ALTERNATIVES: dict[str, tuple[str | None, int, int]] = {
    "int4, not fitted": ("int4", GROUP, 0),
    "int4, groups of 64": ("int4", 64, FITS),
}


def sequences(fmt: ChatFormat, rows: int) -> list[Encoded]:
    """The first `rows` conversations of the example data, those for evaluation first."""
    lines: list[str] = []
    for name in ("example_eval_data.jsonl", "example_data.jsonl"):
        lines += (DATA / name).read_text(encoding="utf-8").splitlines()
    conversations = [read_record(json.loads(line))[1] for line in lines[:rows]]
    return [one for found in fmt.encode_many(conversations) for one in found]


def replies(decoder: Decoder, asked: Sequence[Encoded]) -> tuple[float, list[int]]:
    """The sum of the losses of all supervised tokens, and the likeliest token at the place of each."""
    total, likeliest = 0.0, []
    for one in asked:
        ids, row = one.input_ids, KVStore(decoder.kv_shape).row()
        row.reserve(len(ids))
        begin = one.spans[0][0] - 1
        if begin:
            decoder.step([Segment(ids[:begin], 0, row, wants_logits=False)])
        wants = [label >= 0 for label in one.labels[begin + 1 :]]
        # A token each, in their order: so each gives its logits, and finds the keys of those before it.
        segments = [
            Segment([token], place, row, wants_logits=wanted)
            for place, token, wanted in zip(range(begin, len(ids) - 1), ids[begin:-1], wants, strict=True)
        ]
        scores = decoder.step(segments).log_softmax(-1)
        targets = torch.tensor([label for label in one.labels[begin + 1 :] if label >= 0])
        total -= scores.gather(1, targets[:, None]).sum().item()
        likeliest += scores.argmax(-1).tolist()
    return total, likeliest


def size(decoder: Decoder, quantize: str | None) -> int:
    """Bytes of the linear layers, the head too."""
    places = [place for layer in decoder.places.layers for place in layer]
    joined = [(sum(part.outputs for part in place.parts), place.parts[0].inputs) for place in places]
    head = linear_bytes(decoder.vocabulary, decoder.places.width, quantize and "int8")
    return head + sum(linear_bytes(*shape, quantize) for shape in joined)


@torch.no_grad()
def reorder(model: Any) -> None:
    """The channels of a llama model without biases in another order: the same numbers, the same answers."""
    drawn, config = torch.Generator().manual_seed(0), model.config
    hidden, inner, head = (
        torch.randperm(size, generator=drawn)
        for size in (config.hidden_size, config.intermediate_size, config.head_dim)
    )
    for name, weight in model.named_parameters():
        kind = name.split(".")[-2]
        if kind in ("o_proj", "down_proj") or weight.dim() == 1:
            weight.copy_(weight[hidden])
        else:
            weight.copy_(weight[:, hidden])
        if kind in ("gate_proj", "up_proj"):
            weight.copy_(weight[inner])
        if kind == "down_proj":
            weight.copy_(weight[:, inner])
        if kind == "v_proj":
            weight.copy_(weight.unflatten(0, (-1, len(head)))[:, head].flatten(0, 1))
        if kind == "o_proj":
            weight.copy_(weight.unflatten(1, (-1, len(head)))[:, :, head].flatten(1, 2))


@in_own_thread
def measure(model_path: str | None, rows: int) -> list[dict[str, Any]]:
    """A row for each number type; of the demo model, for both orders of its channels."""
    loaded = models.load_model(
        models.resolve(model_path), dtype="float32", device=Device("cpu", "the benchmark measures it")
    )
    asked = sequences(ChatFormat(loaded.tokenizer), rows)
    measured = types(loaded.model, asked, "as published", CHOSEN)
    if model_path is None:
        reorder(loaded.model)
        measured += types(loaded.model, asked, "channels in another order", CHOSEN | ALTERNATIVES)
    return measured


def types(
    model: Any, asked: Sequence[Encoded], weights: str, settings: dict[str, tuple[str | None, int, int]]
) -> list[dict[str, Any]]:
    """A row for each of the settings, the first of which is the reference."""
    measured: list[dict[str, Any]] = []
    reference: list[int] = []
    for name, (quantize, group, fits) in settings.items():
        int4.GROUP, int4.FITS = group, fits
        decoder = Decoder(model, quantize=quantize)
        loss, likeliest = replies(decoder, asked)
        reference = reference or likeliest
        same = sum(a == b for a, b in zip(likeliest, reference, strict=True))
        row = {
            "weights": weights,
            "type": name,
            "loss": round(loss / len(likeliest), 4),
            "agreement": round(same / len(likeliest), 4),
            "bytes": size(decoder, quantize),
            "tokens": len(likeliest),
        }
        int4.GROUP, int4.FITS = GROUP, FITS
        print(row, file=sys.stderr, flush=True)
        measured.append(row)
    return measured


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("-m", "--model")
    options.add_argument("--rows", type=int, default=126, help="conversations")
    options.add_argument("--out", type=Path, default=RESULT)
    chosen = options.parse_args()
    rows = measure(chosen.model, chosen.rows)
    write(chosen.out, {**where(["torch", "transformers"]), "model": chosen.model or "demo", "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
