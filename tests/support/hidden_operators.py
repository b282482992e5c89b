"""A torch without the private operators that the engine is fast with, as a later one may be.

A plugin of pytest: `python -m pytest -p tests.support.hidden_operators ...`. (torch.ops looks an operator up again
after it was deleted, so each is replaced by one that raises what a missing one raises.) The native step, which would
compute in their place, is off.
"""

import os
from typing import Any

import torch

from qwen_chat.inference.native.library import NATIVE_SWITCH

NAMES = {
    "aten": ["_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu"],
    "quantized": ["linear_prepack", "linear_with_input_q_dq_qweight_dq_output_fp32"],
    "mkldnn": [
        "_reorder_linear_weight",
        "_linear_pointwise",
        "_is_mkldnn_bf16_supported",
        "_is_mkldnn_fp16_supported",
    ],
}
MEMBERS = [(torch.cpu, "_is_vnni_supported")]


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
    os.environ[NATIVE_SWITCH] = "0"
    for space, names in NAMES.items():
        setattr(torch.ops, space, _Without(getattr(torch.ops, space), names))
    for owner, name in MEMBERS:
        if hasattr(owner, name):
            delattr(owner, name)


hide()
