"""What a model will take in memory while it is served: counted before anything is loaded.

In: the tensors of its folder, by their headers. Out: bytes; or a line that says what would fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qwen_chat import hardware
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


def check_fits(folder: Path, tensors: Mapping[str, StoredTensor], width: int, quantize: str | None) -> None:
    """ModelError where a model would not fit the memory that can be had, with what would."""
    need, free = serving_bytes(tensors, width, quantize), hardware.free_memory()
    if need <= free:
        return
    smaller = [
        f"--quantize {kind} ({size / 2**30:.1f} GiB)"
        for kind in QUANTIZED
        if (size := serving_bytes(tensors, width, kind)) <= free and size < need
    ]
    if not smaller and width > 2 and serving_bytes(tensors, 2, None) <= free:
        smaller = [f"--dtype bfloat16 ({serving_bytes(tensors, 2, None) / 2**30:.1f} GiB)"]
    card = serving_bytes(tensors, 2, None) * 1.2 / 2**30  # in bfloat16, with room for keys and values
    cure = f"give {' or '.join(smaller)}" if smaller else "nothing here makes it fit: a smaller model would"
    raise ModelError(
        f"{folder}: served it takes about {need / 2**30:.1f} GiB of memory and {free / 2**30:.1f} can be had; "
        f"{cure}, or a GPU of {card:.0f} GiB"
    )
