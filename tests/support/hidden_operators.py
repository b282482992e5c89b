"""A torch without the private operators that the engine is fast with, as a later one may be.

A plugin of pytest: `python -m pytest -p tests.support.hidden_operators ...`. (torch.ops looks an operator up again
after it was deleted, so each is replaced by one that raises what a missing one raises.)
"""

from typing import Any

import torch

NAMES = {
    "quantized": ["linear_prepack", "linear_with_input_q_dq_qweight_dq_output_fp32"],
    "mkldnn": [
        "_reorder_linear_weight",
        "_linear_pointwise",
        "_is_mkldnn_bf16_supported",
        "_is_mkldnn_fp16_supported",
    ],
}
MEMBERS = [
    (torch.cpu, "_is_amx_tile_supported"),
    (torch.cpu, "_is_vnni_supported"),
    (torch._C, "_has_mkldnn"),
]


class _Without:
    """A namespace of torch.ops with some of its operators gone."""

    def __init__(self, namespace: Any, names: list[str]) -> None:
        self._namespace, self._names = namespace, names

    def __getattr__(self, name: str) -> Any:
        if name in self._names:
            raise AttributeError(f"no operator {name}")
        return getattr(self._namespace, name)


def hide() -> None:
    """Take them away for the rest of this process."""
    for space, names in NAMES.items():
        setattr(torch.ops, space, _Without(getattr(torch.ops, space), names))
    for owner, name in MEMBERS:
        if hasattr(owner, name):
            delattr(owner, name)


hide()
