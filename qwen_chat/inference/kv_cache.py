"""What a row keeps between steps: keys and values, growing as it does, and the states of delta-net layers.

In: layers, key-value heads, head size, the shape of a state. Out: a `KVStore` that hands out `KVRow`s (one a
request).

Rows of about one length lie side by side in a bank, so that one attention call serves neighbours; a row that
outgrows its bank moves to one of twice the capacity. A state has one size for ever and lies by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwen_chat.inference.row_state import CHUNK, RowState, StateShape

TILE = 64  # attention covers key-value lengths that are multiples of this: a function of the position alone
_SMALLEST_BANK = 256  # tokens a row
_BANK_TOKENS = 4096  # tokens a bank, all its rows together; a longer row has a bank to itself


@dataclass(frozen=True, slots=True)
class KVShape:
    """Of one token: `layers` (with attention) x (keys and values) x `heads` x `head_dim`, in `dtype` on `device`; and
    the states of a whole row, where the model has any."""

    layers: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    state: StateShape | None = None
    device: torch.device | str = "cpu"

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values, all layers."""
        return self.layers * 2 * self.heads * self.head_dim * self.dtype.itemsize

    @property
    def state_tokens(self) -> int:
        """How many tokens' keys and values weigh as much as the states of one row."""
        return 0 if self.state is None else -(-self.state.row_bytes // max(self.token_bytes, 1))

    @property
    def snapshot_tokens(self) -> int:
        """How many tokens' keys and values weigh as much as one snapshot."""
        return 0 if self.state is None else -(-self.state.snapshot_bytes // max(self.token_bytes, 1))


class Bank:
    """Rows of one capacity: (layers, rows, 2 x heads, capacity, head_dim); keys are the first `heads`.

    Zeros at first, not whatever memory held: what lies behind a row's end is multiplied by 0, and 0 x NaN
    would be NaN.
    """

    def __init__(self, shape: KVShape, number: int, rows: int, capacity: int) -> None:
        self.number, self.rows, self.capacity = number, rows, capacity
        size = (shape.layers, rows, 2 * shape.heads, capacity, shape.head_dim)
        self.tensor = torch.zeros(size, dtype=shape.dtype, device=shape.device)
        self.layers = self.tensor.unbind(
            0
        )  # views made once: selecting them costs a microsecond each, 30 a step
        self.free = list(range(rows))


class KVRow:
    """One request's keys and values (a slot of a bank) and states, or nothing yet."""

    __slots__ = ("_store", "bank", "slot", "state")

    def __init__(self, store: KVStore) -> None:
        self._store = store
        self.bank: Bank | None = None
        self.slot = 0
        self.state: RowState | None = None

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

    def draft_room(self, tokens: int) -> int:
        """How many drafts may follow the first `tokens`: as many as fit without a move; with states, as many as leave
        their chunk open."""
        room = self.capacity - tokens
        return room if self.state is None else min(room, CHUNK - 1 - tokens % CHUNK)

    def take_back(self, drafts: int) -> None:
        """The last tokens of the newest step were drafts that nobody said."""
        if self.state is not None and drafts:
            self.state.take_back(drafts)

    def release(self) -> None:
        """Give the slot back and drop the states."""
        self._store.give_back(self)
        self.state = None


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
        if row.state is None and self._shape.state is not None:
            row.state = RowState(self._shape.state)

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
