"""The tensors of a model's folder, one at a time.

In: a folder with safetensors. Out: each tensor's name, type, shape and place, from the files' headers alone; its
numbers where they are asked for. They are read into memory of their own: no page of a file is ever mapped, so what is
let go is gone. The format: 8 bytes that count a JSON header, the header, the numbers
(https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_chat.errors import ModelError

if TYPE_CHECKING:
    import torch

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Their names in a header: torch's, and bytes a number.
NUMBER_KINDS = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
_LARGEST_HEADER = 100_000_000  # bytes, as the format allows


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file. kind: as `NUMBER_KINDS` names it; begin: its first byte in the file."""

    file: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    begin: int

    @property
    def numbers(self) -> int:
        """How many it holds."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.numbers * NUMBER_KINDS[self.kind][1]

    @property
    def dtype(self) -> torch.dtype:
        """Its type, as torch has it."""
        import torch

        found: torch.dtype = getattr(torch, NUMBER_KINDS[self.kind][0])
        return found

    def read(self, first: int = 0, last: int | None = None) -> torch.Tensor:
        """The whole, or its rows from `first` to before `last`, in memory of its own. ModelError where the file does
        not give it."""
        import torch

        shape, begin = self.shape, self.begin
        if shape:
            rows = range(shape[0])[first:last]
            begin += first * (self.size // max(1, shape[0]))
            shape = (len(rows), *shape[1:])
        buffer = bytearray(math.prod(shape) * NUMBER_KINDS[self.kind][1])
        left = memoryview(buffer)
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(begin)
                while len(left):
                    got = file.readinto(left)
                    if not got:
                        raise OSError("it ends too early")
                    left = left[got:]
        except OSError as error:
            raise ModelError(
                f"{self.file}: {self.name} cannot be read ({error}); fetch the model again"
            ) from None
        if not buffer:
            return torch.empty(shape, dtype=self.dtype)
        return torch.frombuffer(buffer, dtype=self.dtype).view(shape)

    def __getitem__(self, whole: object) -> torch.Tensor:
        """The whole, as transformers asks for a tensor that it has not read yet: `tensor[...]`."""
        return self.read()

    def announce(self) -> None:
        """Ask the system to read it from the disk now, beside what this process does. Nothing where it cannot."""
        if hasattr(os, "posix_fadvise"):
            with self.file.open("rb") as file:
                os.posix_fadvise(file.fileno(), self.begin, self.size, os.POSIX_FADV_WILLNEED)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder's safetensors by its name; none where it has no such file.

    Raises ModelError, with the file's name, where one is missing or damaged or has not come down whole.
    """
    if (folder / SINGLE).is_file():  # the order in which transformers looks
        return file_tensors([folder / SINGLE])
    if not (folder / INDEX).is_file():
        return {}
    try:
        places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = sorted({folder / str(file) for file in places.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{folder / INDEX}: cannot be read ({error}); fetch the model again") from None
    found = file_tensors(files)
    if absent := sorted(set(places) - set(found)):
        raise ModelError(
            f"{folder / INDEX}: {absent[0]} is in none of its {len(files)} files ({len(absent)} such); "
            "fetch the model again"
        )
    return found


def model_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The same, and ModelError where the folder has no safetensors."""
    found = stored_tensors(folder)
    if not found:
        raise ModelError(f"{folder}: no {SINGLE} in it; save the model anew with save_pretrained")
    return found


def file_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Every tensor of some safetensors files by its name. Raises ModelError as `stored_tensors` does."""
    found: dict[str, StoredTensor] = {}
    for file in files:
        try:
            size = file.stat().st_size
            with file.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
                    raise ValueError("no header")
                header: dict[str, Any] = json.loads(opened.read(length))
            header.pop("__metadata__", None)
            end = 8 + length + max([0, *(int(entry["data_offsets"][1]) for entry in header.values())])
            for name, entry in header.items():
                begin = 8 + length + int(entry["data_offsets"][0])
                if int(entry["data_offsets"][0]) < 0 or not all(
                    type(n) is int and n >= 0 for n in entry["shape"]
                ):
                    raise ValueError(f"{name} lies nowhere in it")
                tensor = StoredTensor(file, name, str(entry["dtype"]), tuple(entry["shape"]), begin)
                if tensor.size != entry["data_offsets"][1] - entry["data_offsets"][0]:
                    raise ValueError(f"{name} has another size than its shape")
                found[name] = tensor
        except FileNotFoundError:
            raise ModelError(f"{file}: missing; fetch the model again") from None
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            IndexError,
            RecursionError,
        ) as error:
            why = f"a kind of number that is not known, {error}" if isinstance(error, KeyError) else error
            raise ModelError(f"{file}: not a whole safetensors file ({why}); fetch it again") from None
        if size != end:
            raise ModelError(
                f"{file}: has {size:,} bytes; its header tells of {end:,}: it has not come down whole; fetch it again"
            )
    return found
