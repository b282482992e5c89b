"""The tensors of a model's safetensors files written one at a time, in any order.

In: what is to be written (types, shapes), then the tensors. Out: a folder's files; nothing is mapped into memory, so
that what was written can be given back. `qwen_chat.weights` reads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import BufferedRandom
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from qwen_chat.weights import INDEX, NUMBER_KINDS, SINGLE, StoredTensor

SHARD_BYTES = 5 * 10**9


class TensorWriter:
    """New safetensors files for tensors whose types and shapes are known; each is put where it belongs.

    Raises OSError where the disk is full; ValueError for a tensor that does not fit its place.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        kinds = {getattr(torch, dtype): kind for kind, (dtype, _) in NUMBER_KINDS.items()}
        shards: list[dict[str, StoredTensor]] = [{}]
        filled = 0
        for name, (dtype, shape) in tensors.items():
            stored = StoredTensor(folder, name, kinds[dtype], shape, filled)
            if shards[-1] and filled + stored.size > SHARD_BYTES:
                shards.append({})
                filled, stored = 0, replace(stored, begin=0)
            shards[-1][name] = stored
            filled += stored.size
        self._files: list[BufferedRandom] = []
        self._places: dict[str, tuple[BufferedRandom, StoredTensor]] = {}
        files = {}
        for number, shard in enumerate(shards, 1):
            many = f"model-{number:05}-of-{len(shards):05}.safetensors"
            files[many if len(shards) > 1 else SINGLE] = shard
        for file, shard in files.items():
            self._begin(folder / file, shard)
        if len(files) > 1:
            places = {name: file for file, shard in files.items() for name in shard}
            size = sum(stored.size for shard in shards for stored in shard.values())
            index = {"metadata": {"total_size": size}, "weight_map": places}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _begin(self, path: Path, shard: Mapping[str, StoredTensor]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name, stored in shard.items():
            header[name] = {
                "dtype": stored.kind,
                "shape": list(stored.shape),
                "data_offsets": [stored.begin, stored.begin + stored.size],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file = path.open("w+b")
        self._files.append(file)
        file.write(len(text).to_bytes(8, "little") + text)
        for name, stored in shard.items():
            self._places[name] = file, replace(stored, file=path, begin=8 + len(text) + stored.begin)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Once for each tensor."""
        file, stored = self._places.pop(name)
        if (tensor.dtype, tuple(tensor.shape)) != (stored.dtype, stored.shape):
            raise ValueError(
                f"{name}: {tensor.dtype} {tuple(tensor.shape)} for {stored.dtype} {stored.shape}"
            )
        file.seek(stored.begin)
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
