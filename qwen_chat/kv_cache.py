"""Keys and values: one row's, growing as it does, and those of finished prompts, kept for the next that begins alike.

In: layers, key-value heads, head size. Out: `KVRow` (one request) and `PrefixCache` (bounded by tokens, least recently used out first).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

TILE = 64  # attention works on key-value lengths that are multiples of this: a position's result then depends on nothing but its own row
BLOCK = 32  # tokens of one cached block


@dataclass(frozen=True, slots=True)
class KVShape:
    """Of one token: `layers` x (keys and values) x `heads` x `head_dim`, in `dtype`."""

    layers: int
    heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        return self.layers * 2 * self.heads * self.head_dim * self.dtype.itemsize


class KVRow:
    """One request's keys and values: (layers, 2 x heads, capacity, head_dim); keys are the first `heads`."""

    __slots__ = ("layers", "shape", "tensor")

    def __init__(self, shape: KVShape) -> None:
        self.shape = shape
        self._replace(torch.empty(shape.layers, 2 * shape.heads, 0, shape.head_dim, dtype=shape.dtype))

    @property
    def capacity(self) -> int:
        return self.tensor.shape[2]

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens`; at least half as much again as there was, so that growing copies little."""
        if tokens <= self.capacity:
            return
        wanted = max(tokens, self.capacity * 3 // 2)
        # Zeros, not empty memory: what lies behind the end is multiplied by weight 0, and 0 x NaN would be NaN.
        grown = self.tensor.new_zeros(
            self.shape.layers, 2 * self.shape.heads, -(-wanted // TILE) * TILE, self.shape.head_dim
        )
        grown[:, :, : self.capacity] = self.tensor
        self._replace(grown)

    def _replace(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.layers = tensor.unbind(
            0
        )  # a view a layer, made once: 30 selections a step and row would cost more


class PrefixCache:
    """Blocks of keys and values, each under the hash of the adapter and all tokens up to its end."""

    def __init__(self, max_tokens: int) -> None:
        self._max_blocks = max_tokens // BLOCK
        self._blocks: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    @property
    def tokens(self) -> int:
        """Tokens held now."""
        return len(self._blocks) * BLOCK

    def fill(self, row: KVRow, adapter: int, ids: Sequence[int]) -> int:
        """Copy into `row` what is known of the beginning of `ids`; returns how many tokens that is.

        At least one token is left to compute: its logits are needed.
        """
        found: list[bytes] = []
        for key in _keys(adapter, ids[: len(ids) - 1]):
            if key not in self._blocks:
                break
            found.append(key)
        if found:
            row.reserve(len(found) * BLOCK)
            for place, key in enumerate(found):
                row.tensor[:, :, place * BLOCK : (place + 1) * BLOCK] = self._blocks[key]
        self._touch(found)
        return len(found) * BLOCK

    def store(self, row: KVRow, adapter: int, ids: Sequence[int]) -> None:
        """Keep the whole blocks of `ids`, whose keys and values `row` holds."""
        if not self._max_blocks:
            return
        keys = list(_keys(adapter, ids))[: self._max_blocks]
        for place, key in enumerate(keys):
            if key not in self._blocks:
                self._blocks[key] = row.tensor[:, :, place * BLOCK : (place + 1) * BLOCK].clone()
        self._touch(keys)
        while len(self._blocks) > self._max_blocks:
            self._blocks.popitem(last=False)

    def clear(self) -> None:
        self._blocks.clear()

    def _touch(self, keys: list[bytes]) -> None:
        """Last block first: a prefix must outlive what continues it, or the rest could not be found."""
        for key in reversed(keys):
            self._blocks.move_to_end(key)


def _keys(adapter: int, ids: Sequence[int]) -> list[bytes]:
    """One key a whole block: each hashes the key before it, so equal keys mean equal beginnings."""
    keys, key = [], adapter.to_bytes(8, "little")
    numbers = array("q", ids)
    for end in range(BLOCK, len(ids) + 1, BLOCK):
        key = hashlib.blake2b(key + numbers[end - BLOCK : end].tobytes(), digest_size=16).digest()
        keys.append(key)
    return keys
