"""What crosses between the host and the device that computes.

In: whole numbers of a step for the device; what a step chose for the host. Out: the same, on the other side.

On an accelerator a transfer to the host waits until everything before it is computed, so a step makes one, at its end.
All of them go through `to_host`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def to_device(parts: Sequence[Sequence[int]], device: torch.device) -> list[torch.Tensor]:
    """Lists of whole numbers, as views of one tensor that goes over at once."""
    packed = torch.tensor([number for part in parts for number in part], dtype=torch.long, device=device)
    return list(torch.split(packed, [len(part) for part in parts]))


def to_host(found: torch.Tensor) -> torch.Tensor:
    """The same tensor in main memory."""
    return found.cpu()
