"""The tensors of a model's safetensors files: read one at a time, and written one at a time, in any order.

In: a folder. Out: tensors by name, in memory of their own; a folder's files of the same layout. Nothing is mapped into
memory, so that what was read can be given back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from qwen_chat.errors import ModelError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SHARD_INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies, or is to lie: its file, first byte there, type and shape."""

    file: str
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


class TensorFiles:
    """The tensors of a folder (`model.safetensors`, or shards with their index), or of one file.

    Raises ModelError for files that are missing, cut off or of another kind.
    """

    def __init__(self, path: Path) -> None:
        self.folder = path if path.is_dir() else path.parent
        if path.is_dir():
            index = path / SHARD_INDEX
            names = _shards(index) if index.is_file() else sorted(f.name for f in path.glob("*.safetensors"))
        else:
            names = [path.name]
        if not names:
            raise ModelError(f"{path}: no .safetensors in it; save the model anew with save_pretrained")
        self.tensors: dict[str, Stored] = {}
        for name in names:
            self._read_header(name)

    def _read_header(self, name: str) -> None:
        path = self.folder / name
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header: Mapping[str, Any] = json.loads(file.read(length))
            whole = path.stat().st_size
            for key, entry in header.items():
                if key == "__metadata__":
                    continue
                start, end = entry["data_offsets"]
                stored = Stored(name, 8 + length + start, DTYPES[entry["dtype"]], tuple(entry["shape"]))
                if stored.size != end - start or 8 + length + end > whole:
                    raise ValueError(f"{key} is cut off")
                self.tensors[key] = stored
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ModelError(
                f"{path}: cannot be read ({type(error).__name__}: {error}); fetch or save it again"
            ) from None

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in memory of its own."""
        stored = self.tensors[name]
        flat = np.fromfile(self.folder / stored.file, np.uint8, stored.size, offset=stored.start)
        return torch.from_numpy(flat).view(stored.dtype).reshape(stored.shape)


class TensorWriter:
    """New safetensors files for tensors whose types and shapes are known; each is put where it belongs.

    Raises OSError where the disk is full; ValueError for a tensor that does not fit its place.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self._kinds = {dtype: name for name, dtype in DTYPES.items()}
        shards: list[dict[str, Stored]] = [{}]
        filled = 0
        for name, (dtype, shape) in tensors.items():
            stored = Stored("", filled, dtype, shape)
            if shards[-1] and filled + stored.size > SHARD_BYTES:
                shards.append({})
                filled, stored = 0, Stored("", 0, dtype, shape)
            shards[-1][name] = stored
            filled += stored.size
        self._files: list[BufferedRandom] = []
        self._places: dict[str, tuple[BufferedRandom, Stored]] = {}
        files = {}
        for number, shard in enumerate(shards, 1):
            many = f"model-{number:05}-of-{len(shards):05}.safetensors"
            files[many if len(shards) > 1 else "model.safetensors"] = shard
        for file, shard in files.items():
            self._begin(folder / file, shard)
        if len(files) > 1:
            places = {name: file for file, shard in files.items() for name in shard}
            size = sum(stored.size for shard in shards for stored in shard.values())
            index = {"metadata": {"total_size": size}, "weight_map": places}
            (folder / SHARD_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _begin(self, path: Path, shard: Mapping[str, Stored]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name, stored in shard.items():
            header[name] = {
                "dtype": self._kinds[stored.dtype],
                "shape": list(stored.shape),
                "data_offsets": [stored.start, stored.start + stored.size],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file = path.open("w+b")
        self._files.append(file)
        file.write(len(text).to_bytes(8, "little") + text)
        for name, stored in shard.items():
            at = Stored(path.name, 8 + len(text) + stored.start, stored.dtype, stored.shape)
            self._places[name] = file, at

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Once for each tensor."""
        file, stored = self._places.pop(name)
        if (tensor.dtype, tuple(tensor.shape)) != (stored.dtype, stored.shape):
            raise ValueError(
                f"{name}: {tensor.dtype} {tuple(tensor.shape)} for {stored.dtype} {stored.shape}"
            )
        file.seek(stored.start)
        tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tofile(file)

    @property
    def missing(self) -> Sequence[str]:
        """What has not been written yet."""
        return tuple(self._places)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()


def _shards(index: Path) -> list[str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({str(name) for name in found})
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{index}: cannot be read ({error}); fetch the model again") from None
