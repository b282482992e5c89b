"""What a model will take in memory while it is served: counted before anything is loaded.

In: the tensors of its folder, by their headers. Out: bytes; or a line that says what would fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qwen_chat import hardware, place
from qwen_chat.errors import ModelError
from qwen_chat.inference.quantize import linear_bytes
from qwen_chat.weights import NUMBER_KINDS, StoredTensor

# Python, torch, the tokenizer and the chat format; keys and values of the fewest tokens that the engine keeps.
PROGRAM = int(0.7 * 2**30)
QUANTIZED = ("int8", "int4")


def serving_bytes(tensors: Mapping[str, StoredTensor], width: int, quantize: str | None) -> int:
    """The peak while a model is loaded by parts and served. width: bytes a number of its own type.

    The embedding stays as it is stored where that is narrower, the head is a matrix in int8 at most; beside what is
    ready one layer lies as it is stored, in the model's type and joined.
    """
    total, largest = float(PROGRAM), 0
    parts: dict[str, int] = {}
    embedding = [tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight")]
    tied = not any(name.endswith("lm_head.weight") for name in tensors)
    for name, tensor in tensors.items():
        if ".visual." in name or name.startswith(("visual.", "mtp.")):
            continue  # no text goes through
        if tensor in embedding:
            total += tensor.numbers * min(width, NUMBER_KINDS[tensor.kind][1])
        head = name.endswith("lm_head.weight") or (tied and tensor in embedding)
        if head or tensor not in embedding:
            kind = "int8" if head and quantize else quantize
            if kind is not None and len(tensor.shape) > 1:
                rows, columns = tensor.numbers // tensor.shape[-1], tensor.shape[-1]
                total += linear_bytes(rows, columns, kind)
            else:
                total += tensor.numbers * width
            part = ".".join(name.partition("layers.")[2].split(".")[:1]) or name
            parts[part] = parts.get(part, 0) + tensor.numbers
            largest = max(largest, parts[part]) if part.isdecimal() else largest
    return int(total) + largest * (width + width // 2)


def check_fits(
    folder: Path,
    tensors: Mapping[str, StoredTensor],
    width: int,
    quantize: str | None,
    *,
    device: str = "cpu",
    merged: bool = False,
) -> None:
    """ModelError where a model would not fit the memory that can be had, with what would.

    device: where it computes, as torch names the kind. merged: an adapter goes into it first, which takes the whole
    model in float32 beside what is served. Fewer tokens of context would not help: the engine takes as many as fit.
    """
    need, free = serving_bytes(tensors, width, quantize), hardware.device_free(device)
    if merged:
        need += 4 * sum(tensor.numbers for tensor in tensors.values())
    if need <= free:
        return
    card = serving_bytes(tensors, 2, None) * 1.2 / 2**30  # in bfloat16, with room for keys and values
    where = "of memory" if device == "cpu" else f"on the {device} device"
    cure = fitting_instead(tensors, width, need, device, merged)
    raise ModelError(
        f"{folder}: {'merged and ' if merged else ''}served it takes about {need / 2**30:.1f} GiB {where} and"
        f" {free / 2**30:.1f} can be had; {cure}, or a GPU of {card:.0f} GiB"
    )


def fitting_instead(
    tensors: Mapping[str, StoredTensor], width: int, need: int, device: str, merged: bool
) -> str:
    """What fits main memory."""
    if merged:
        return f"merge it with `{place.invocation('merge')}`, a layer at a time, and serve what that writes"
    ways = {f"--quantize {kind}": (width, kind) for kind in QUANTIZED} | {"--dtype bfloat16": (2, None)}
    flags = "" if device == "cpu" else "--device cpu "
    fitting = {
        f"{flags}{way}": size
        for way, (wide, kind) in ways.items()
        if (size := serving_bytes(tensors, wide, kind)) <= hardware.free_memory() and (size < need or flags)
    }
    told = [f"{way} ({size / 2**30:.1f} GiB)" for way, size in list(fitting.items())[:2]]
    return f"give {' or '.join(told)}" if told else "nothing here makes it fit: a smaller model would"
