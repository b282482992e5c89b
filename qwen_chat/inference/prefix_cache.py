"""What finished prompts left behind, kept for the next that begins alike.

In: rows whose tokens are computed. Out: a `PrefixCache`: blocks of keys and values, and snapshots of states at some
of their ends, bounded by what they weigh, least recently used out first.

A prompt goes on after the last block that is known. Where the model has states that is the last block with a
snapshot: a state cannot be cut as keys can.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qwen_chat.inference.kv_cache import KVRow
from qwen_chat.inference.row_state import Snapshot

BLOCK = 32  # tokens of one cached block; a multiple of row_state.CHUNK: at its end no chunk is open


@dataclass(slots=True)
class _Block:
    keys_values: torch.Tensor
    snapshot: Snapshot | None = None


class PrefixCache:
    """Blocks of keys and values, each under the hash of the adapter and all tokens up to its end.

    Args:
        max_tokens: what it may hold, in tokens' keys and values.
        snapshot_tokens: what a snapshot weighs in them; 0: the model has no states.
    """

    def __init__(self, max_tokens: int, snapshot_tokens: int = 0) -> None:
        self._max_blocks = max_tokens // BLOCK
        self._snapshot_blocks = -(-snapshot_tokens // BLOCK)
        self._blocks: OrderedDict[bytes, _Block] = OrderedDict()
        self._snapshots = 0

    @property
    def tokens(self) -> int:
        """Tokens held now."""
        return len(self._blocks) * BLOCK

    @property
    def is_on(self) -> bool:
        """Whether anything can be held."""
        return self._max_blocks > 0

    def fill(self, row: KVRow, adapter: int, ids: Sequence[int]) -> int:
        """Copy into `row` what is known of the beginning of `ids`; returns how many tokens that is.

        At least one token is left to compute: its logits are needed.
        """
        found: list[bytes] = []
        for key in _keys(adapter, ids[: len(ids) - 1]):
            if key not in self._blocks:
                break
            found.append(key)
        if not found:
            return 0
        row.reserve(len(ids))
        if row.state is not None:
            row.state.branch = len(found) * BLOCK
            while found and self._blocks[found[-1]].snapshot is None:
                found.pop()
            snapshot = self._blocks[found[-1]].snapshot if found else None
            if snapshot is not None:
                row.state.restore(snapshot)
        tensor = row.tensor
        for place, key in enumerate(found):
            tensor[:, :, place * BLOCK : (place + 1) * BLOCK] = self._blocks[key].keys_values
        self._touch(found)
        return len(found) * BLOCK

    def store(self, row: KVRow, adapter: int, ids: Sequence[int]) -> None:
        """Keep the whole blocks of `ids`, whose keys and values `row` holds, and the snapshots that it took."""
        if len(ids) < BLOCK or not self.is_on:
            return
        keys = _keys(adapter, ids)[: self._max_blocks]
        tensor = row.tensor
        for place, key in enumerate(keys):
            if key not in self._blocks:
                self._blocks[key] = _Block(tensor[:, :, place * BLOCK : (place + 1) * BLOCK].clone())
        for position, snapshot in ({} if row.state is None else row.state.kept).items():
            place = position // BLOCK - 1
            if place < len(keys) and self._blocks[keys[place]].snapshot is None:
                self._blocks[keys[place]].snapshot = snapshot
                self._snapshots += 1
        self._touch(keys)
        while len(self._blocks) + self._snapshots * self._snapshot_blocks > self._max_blocks:
            self._snapshots -= self._blocks.popitem(last=False)[1].snapshot is not None

    def clear(self) -> None:
        """Forget everything."""
        self._blocks.clear()
        self._snapshots = 0

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
