"""What the delta-net layers of a model remember of one row, and copies of it at block ends.

In: the sizes of a state. Out: a `RowState` for each row: the states after its last whole chunk, the inputs of the
chunk that is open, the last inputs of the convolutions; and `Snapshot`s, from which another row can go on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Tokens that the delta rule takes in one go, at positions that are multiples of it. One token alone costs what they
# all do: with 32 it took twice the time.
CHUNK = 16


@dataclass(frozen=True, slots=True)
class StateShape:
    """Of one row, float32: `layers` states (heads, key_dim, value_dim), and `history` inputs of a convolution over
    `channels`; all on `device`."""

    layers: int
    heads: int
    key_dim: int
    value_dim: int
    channels: int
    history: int
    device: torch.device | str = "cpu"

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of one snapshot, all layers."""
        state = self.heads * self.key_dim * self.value_dim + self.history * self.channels
        return 4 * self.layers * state

    @property
    def row_bytes(self) -> int:
        """Bytes of a row: its states, a snapshot, the open chunk, all layers."""
        open_chunk = self.heads * CHUNK * (2 * self.key_dim + self.value_dim + 2)
        return 2 * self.snapshot_bytes + 4 * self.layers * open_chunk


class Snapshot:
    """The states at a position where no chunk is open: recurrent (layers, heads, key_dim, value_dim), history
    (layers, inputs, channels)."""

    __slots__ = ("history", "recurrent")

    def __init__(self, shape: StateShape) -> None:
        states = (shape.layers, shape.heads, shape.key_dim, shape.value_dim)
        self.recurrent = torch.zeros(states, device=shape.device)
        self.history = torch.zeros(shape.layers, shape.history, shape.channels, device=shape.device)


class RowState(Snapshot):
    """The states after the last whole chunk, and of the open chunk: keys, then queries (layers, heads, 2 CHUNK,
    key_dim), values (layers, heads, CHUNK, value_dim), decay and strength (layers, 2, heads, CHUNK). The history is
    that of the newest token. `inputs`: of the convolutions in the newest step with drafts, for each layer (history +
    tokens, channels).

    `kept`: snapshots by position, until the next ones are taken. `branch`: where another prompt went on otherwise;
    a snapshot there will be of use (0: nowhere).
    """

    __slots__ = ("_shape", "branch", "gates", "inputs", "kept", "keys_queries", "values")

    def __init__(self, shape: StateShape) -> None:
        super().__init__(shape)
        self._shape = shape
        layers, heads, device = shape.layers, shape.heads, shape.device
        self.keys_queries = torch.zeros(layers, heads, 2 * CHUNK, shape.key_dim, device=device)
        self.values = torch.zeros(layers, heads, CHUNK, shape.value_dim, device=device)
        self.gates = torch.zeros(layers, 2, heads, CHUNK, device=device)
        self.inputs: dict[int, torch.Tensor] = {}
        self.kept: dict[int, Snapshot] = {}
        self.branch = 0

    def keep(self, position: int, layer: int, history: torch.Tensor) -> None:
        """Copy a layer's state at `position`; history (inputs, channels): of the tokens before it."""
        if position not in self.kept:
            self.kept[position] = Snapshot(self._shape)
        snapshot = self.kept[position]
        snapshot.recurrent[layer] = self.recurrent[layer]
        snapshot.history[layer] = history

    def take_back(self, drafts: int) -> None:
        """Forget the newest tokens, drafts of the newest step, none of which ended its chunk."""
        for layer, inputs in self.inputs.items():
            end = len(inputs) - drafts
            self.history[layer] = inputs[end - self.history.shape[1] : end]

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot, which stays as it is."""
        self.recurrent.copy_(snapshot.recurrent)
        self.history.copy_(snapshot.history)
