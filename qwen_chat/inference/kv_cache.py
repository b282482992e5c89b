"""Keys and values: one row's, growing as it does, and those of finished prompts, kept for the next that
begins alike.

In: layers, key-value heads, head size. Out: a `KVStore` that hands out `KVRow`s (one a request), and a
`PrefixCache` (bounded by tokens, least recently used out first).

Rows of about one length lie side by side in a bank, so that one attention call serves neighbours; a row that
outgrows its bank moves to one of twice the capacity.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

TILE = 64  # attention covers key-value lengths that are multiples of this: a function of the position alone
BLOCK = 32  # tokens of one cached block
_SMALLEST_BANK = 256  # tokens a row
_BANK_TOKENS = 4096  # tokens a bank, all its rows together; a longer row has a bank to itself


@dataclass(frozen=True, slots=True)
class KVShape:
    """Of one token: `layers` x (keys and values) x `heads` x `head_dim`, in `dtype`."""

    layers: int
    heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values, all layers."""
        return self.layers * 2 * self.heads * self.head_dim * self.dtype.itemsize


class Bank:
    """Rows of one capacity: (layers, rows, 2 x heads, capacity, head_dim); keys are the first `heads`.

    Zeros at first, not whatever memory held: what lies behind a row's end is multiplied by 0, and 0 x NaN
    would be NaN.
    """

    def __init__(self, shape: KVShape, number: int, rows: int, capacity: int) -> None:
        self.number, self.rows, self.capacity = number, rows, capacity
        self.tensor = torch.zeros(
            shape.layers, rows, 2 * shape.heads, capacity, shape.head_dim, dtype=shape.dtype
        )
        self.layers = self.tensor.unbind(
            0
        )  # views made once: selecting them costs a microsecond each, 30 a step
        self.free = list(range(rows))


class KVRow:
    """One request's keys and values: a slot of a bank, or nothing yet."""

    __slots__ = ("_store", "bank", "slot")

    def __init__(self, store: KVStore) -> None:
        self._store = store
        self.bank: Bank | None = None
        self.slot = 0

    @property
    def capacity(self) -> int:
        """Tokens there is room for."""
        return 0 if self.bank is None else self.bank.capacity

    @property
    def tensor(self) -> torch.Tensor:
        """(layers, 2 x heads, capacity, head_dim)"""
        assert self.bank is not None, "nothing was reserved"
        return self.bank.tensor[:, self.slot]

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens`; what was there moves along."""
        if tokens > self.capacity:
            self._store.move(self, tokens)

    def release(self) -> None:
        """Give the slot back."""
        self._store.give_back(self)


class KVStore:
    """All banks. Not thread-safe: the engine's thread alone uses it."""

    def __init__(self, shape: KVShape) -> None:
        self._shape = shape
        self._banks: dict[int, list[Bank]] = {}  # by capacity
        self._made = 0

    @property
    def tokens(self) -> int:
        """Tokens of capacity in all banks."""
        return sum(bank.rows * bank.capacity for banks in self._banks.values() for bank in banks)

    def row(self) -> KVRow:
        """A row without room."""
        return KVRow(self)

    def move(self, row: KVRow, tokens: int) -> None:
        """Put a row where `tokens` fit."""
        capacity = _SMALLEST_BANK
        while capacity < tokens:
            capacity *= 2
        bank = self._bank_with_room(capacity)
        slot = bank.free.pop(0)
        if row.bank is not None:
            bank.tensor[:, slot, :, : row.capacity] = row.tensor
            self.give_back(row)
        row.bank, row.slot = bank, slot

    def give_back(self, row: KVRow) -> None:
        """Free a row's slot; an empty bank goes, unless it is the last of its capacity."""
        bank, row.bank = row.bank, None
        if bank is None:
            return
        bank.free = sorted([*bank.free, row.slot])  # lowest first: rows stay neighbours
        banks = self._banks[bank.capacity]
        if len(bank.free) == bank.rows and (len(banks) > 1 or bank.rows == 1):
            banks.remove(bank)

    def clear(self) -> None:
        """Drop every bank, whoever used it."""
        self._banks.clear()

    def _bank_with_room(self, capacity: int) -> Bank:
        banks = self._banks.setdefault(capacity, [])
        for bank in banks:
            if bank.free:
                return bank
        self._made += 1
        banks.append(Bank(self._shape, self._made, max(1, _BANK_TOKENS // capacity), capacity))
        return banks[-1]


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
            row.reserve(len(ids))
            tensor = row.tensor
            for place, key in enumerate(found):
                tensor[:, :, place * BLOCK : (place + 1) * BLOCK] = self._blocks[key]
        self._touch(found)
        return len(found) * BLOCK

    def store(self, row: KVRow, adapter: int, ids: Sequence[int]) -> None:
        """Keep the whole blocks of `ids`, whose keys and values `row` holds."""
        if len(ids) < BLOCK or not self._max_blocks:
            return
        keys = _keys(adapter, ids)[: self._max_blocks]
        tensor = row.tensor
        for place, key in enumerate(keys):
            if key not in self._blocks:
                self._blocks[key] = tensor[:, :, place * BLOCK : (place + 1) * BLOCK].clone()
        self._touch(keys)
        while len(self._blocks) > self._max_blocks:
            self._blocks.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
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
