"""Where a step is while it is computed: its row, the layer of the model, forward or backward.

In: the model, which calls its layers. Out: calls of `tell` with a StepPlace, one a layer and way. On a CPU a row of a
large model takes minutes, and whoever started the run should see that it lives.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

FORWARD = (
    1 / 3
)  # of a row's time; the way back does twice as much where a base is frozen and layers are computed again


@dataclass(frozen=True, slots=True)
class StepPlace:
    """Numbers from 1. share: how much of the step is done, from 0 to 1, about."""

    row: int
    rows: int
    layer: int
    layers: int
    back: bool
    part: int = 1  # of the passes over the row
    parts: int = 1

    @property
    def share(self) -> float:
        done = (self.layers - self.layer + 1 if self.back else self.layer) / self.layers
        done = FORWARD + (1 - FORWARD) * done if self.back else FORWARD * done
        return (self.row - 1 + (self.part - 1 + done) / self.parts) / self.rows

    def __str__(self) -> str:
        way = "backward" if self.back else "forward"
        row = f"row {self.row} of {self.rows}"
        row += f", pass {self.part} of {self.parts}" if self.parts > 1 else ""
        return f"{row}, {way}, layer {self.layer} of {self.layers}"


class Pulse:
    """Hooks on the layers of a model's decoder; none where they cannot be told."""

    def __init__(self, model: Any, rows: int, tell: Callable[[StepPlace], None]) -> None:
        layers = getattr(model.get_decoder(), "layers", ()) if hasattr(model, "get_decoder") else ()
        self.rows, self.layers, self.tell = rows, len(layers), tell
        self.row = 0
        self.begin_pass(1, 1)
        for number, layer in enumerate(layers, 1):
            layer.register_forward_hook(
                lambda module, inputs, output, number=number: self._left(number, output)
            )

    def begin_row(self) -> None:
        """A row of the step begins; after the last of them the first of the next step."""
        self.row = self.row % self.rows + 1
        self.begin_pass(1, 1)

    def begin_pass(self, part: int, parts: int) -> None:
        """A pass over the row begins."""
        self.part, self.parts, self.back = part, parts, False

    def _left(self, layer: int, output: Any) -> None:
        """A layer has given its output. In the way back it is computed again, which is not told."""
        hidden = output[0] if isinstance(output, tuple) else output
        if self.row == 0 or self.back or not torch.is_grad_enabled():
            return
        self._tell(layer)
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: self._back_at(layer))

    def _back_at(self, layer: int) -> None:
        self.back = True
        self._tell(layer)

    def _tell(self, layer: int) -> None:
        self.tell(StepPlace(self.row, self.rows, layer, self.layers, self.back, self.part, self.parts))
