"""What rounding the weights costs: loss and likeliest tokens on held-out replies, and size, for each number type.

    python benchmarks/bench_quantize.py                  # the demo model; minutes on two cores
    python benchmarks/bench_quantize.py -m MODEL --rows 200

In: conversations that the model was not tuned on (the example data; the demo model is as published). Out:
benchmarks/results/quantize.json, a row for each of float32, int8, int4: loss (mean over the replies' tokens, nats),
agreement (share of these tokens at which the likeliest one is float32's), bytes (of all linear layers), tokens.
The engine's own decoder computes it, a token of each of 16 conversations in each step.
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


from benchmarks.machine import where
from qwen_chat import hardware, models
from qwen_chat.chat.encoded import Encoded
from qwen_chat.chat.format import ChatFormat
from qwen_chat.data.formats import read_record
from qwen_chat.inference.decoder import Decoder
from qwen_chat.inference.kv_cache import KVStore
from qwen_chat.inference.quantize import linear_bytes
from qwen_chat.inference.step import Segment
from qwen_chat.threads import in_own_thread

RESULT = ROOT / "benchmarks" / "results" / "quantize.json"
DATA = ROOT / "finetune" / "io_file" / "input_data"
TOGETHER = 16


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
    for begin in range(0, len(asked), TOGETHER):
        batch = asked[begin : begin + TOGETHER]
        store = KVStore(decoder.kv_shape)
        rows = [store.row() for _ in batch]
        found: list[list[int]] = [[] for _ in batch]
        targets = [one.labels[1:] for one in batch]
        # All before the first supervised token is read in one piece.
        begins = [one.spans[0][0] - 1 for one in batch]
        for turn in range(max(len(own) - first for own, first in zip(targets, begins, strict=True))):
            segments, wanted = [], []
            for k, (one, row) in enumerate(zip(batch, rows, strict=True)):
                place = begins[k] + turn
                if place >= len(targets[k]):
                    continue
                row.reserve(place + 1)
                start = place if turn else 0
                wants = targets[k][place] >= 0
                segments.append(Segment(one.input_ids[start : place + 1], start, row, wants_logits=wants))
                wanted += [(k, targets[k][place])] if wants else []
            scores = decoder.step(segments).log_softmax(-1)
            for (k, target), line in zip(wanted, scores, strict=True):
                total -= line[target].item()
                found[k].append(int(line.argmax()))
        likeliest += [token for tokens in found for token in tokens]
    return total, likeliest


def size(decoder: Decoder, quantize: str | None) -> int:
    """Bytes of the linear layers, the head too."""
    places = [place for layer in decoder.places.layers for place in layer]
    joined = [(sum(part.outputs for part in place.parts), place.parts[0].inputs) for place in places]
    head = linear_bytes(decoder.vocabulary, decoder.places.width, quantize and "int8")
    return head + sum(linear_bytes(*shape, quantize) for shape in joined)


@in_own_thread
def measure(model_path: str | None, rows: int) -> list[dict[str, Any]]:
    """A row for each number type."""
    loaded = models.load_model(
        models.resolve(model_path), dtype="float32", device=hardware.choose_device("cpu")
    )
    asked = sequences(ChatFormat(loaded.tokenizer), rows)
    measured: list[dict[str, Any]] = []
    reference: list[int] = []
    for quantize in (None, "int8", "int4"):
        decoder = Decoder(loaded.model, quantize=quantize)
        loss, likeliest = replies(decoder, asked)
        reference = reference or likeliest
        same = sum(a == b for a, b in zip(likeliest, reference, strict=True))
        row = {
            "type": quantize or "float32",
            "loss": round(loss / len(likeliest), 4),
            "agreement": round(same / len(likeliest), 4),
            "bytes": size(decoder, quantize),
            "tokens": len(likeliest),
        }
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
    record = {**where(["torch", "transformers"]), "model": chosen.model or "demo", "rows": rows}
    chosen.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
