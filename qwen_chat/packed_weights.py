"""Weights that a folder's safetensors hold in few bits, given back as floats, one at a time.

In: the tensors of a folder as they are stored, its `quantization_config`. Out: the tensors of the model that was
quantised, under its names and in its shapes. bitsandbytes' 4 bits (its functional.py: a code, a scale a block, the
scales quantised too), and GPTQ's groups (AutoGPTQ's layout: whole numbers of 2, 4 or 8 bits side by side in int32).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_chat.errors import MissingDependency, ModelError
from qwen_chat.weights import NUMBER_KINDS, StoredTensor

if TYPE_CHECKING:
    import torch

_QUANT_STATE = ".quant_state.bitsandbytes__"  # what the file says of a weight in 4 bits, as JSON in bytes
_GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True, slots=True)
class _Packed(StoredTensor):
    """A weight that is made of several stored tensors: it has its own name, type and shape, and no one place."""

    parts: Mapping[str, StoredTensor]

    def read(self, first: int = 0, last: int | None = None) -> torch.Tensor:
        """The same as of a tensor that is stored as it is; all of it is unpacked on the way."""
        return self._unpacked({name: part.read() for name, part in self.parts.items()})[first:last]

    def announce(self) -> None:
        for part in self.parts.values():
            part.announce()

    def _unpacked(self, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class _FourBits(_Packed):
    """bitsandbytes' NF4 or FP4. parts: "packed", and its state by the names of bitsandbytes."""

    def _unpacked(self, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        import torch
        from bitsandbytes.functional import QuantState, dequantize_4bit

        packed = parts.pop("packed")
        state = QuantState.from_dict(parts, torch.device("cpu"))
        found: torch.Tensor = dequantize_4bit(packed, state)
        return found


@dataclass(frozen=True, slots=True)
class _Groups(_Packed):
    """GPTQ's. parts: `_GPTQ_PARTS`; bits: of a number; above: what is stored of a zero point is this much less."""

    bits: int
    above: int

    def _unpacked(self, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        import torch

        shifts, most = torch.arange(0, 32, self.bits, dtype=torch.int32), 2**self.bits - 1
        rows, columns = self.shape
        whole = (parts["qweight"][:, None, :] >> shifts[None, :, None]) & most  # in, out
        zeros = (parts["qzeros"][:, :, None] >> shifts) & most
        zeros = zeros.reshape(-1, rows) + self.above
        group = parts["g_idx"].long()
        found: torch.Tensor = (whole.reshape(columns, rows) - zeros[group]) * parts["scales"][group].float()
        return found.T.contiguous()


def unpacked(
    tensors: Mapping[str, StoredTensor], config: Mapping[str, Any], where: Path
) -> dict[str, StoredTensor]:
    """The tensors as floats; those of a folder that is not quantised are what they were.

    Raises ModelError for a way of quantising that is not unpacked here; MissingDependency.
    """
    way = config.get("quantization_config")
    if way is None:
        return dict(tensors)
    kind = str(way.get("quant_method", "some way"))
    if kind == "bitsandbytes" and way.get("load_in_4bit"):
        return _by_bitsandbytes(tensors)
    if kind == "gptq" and way.get("bits") in (2, 4, 8):
        return _by_gptq(
            tensors, int(way["bits"]), above=0 if way.get("checkpoint_format") == "gptq_v2" else 1
        )
    raise ModelError(
        f"{where}: weights quantised by {kind}, which are not unpacked here (bitsandbytes in 4 bits and GPTQ in 2, 4"
        " or 8 are); give the model as it was before, with --quantize int8 or int4, or --engine vllm"
    )


def _by_bitsandbytes(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    try:
        import bitsandbytes  # noqa: F401  only to tell a missing package from a damaged file
    except ImportError:
        raise MissingDependency("bitsandbytes", "a folder in 4 bits") from None
    kinds = {long: short for short, (long, _) in NUMBER_KINDS.items()}
    found, taken = dict[str, StoredTensor](), set[str]()
    for name, state in tensors.items():
        owner, mark, _ = name.partition(_QUANT_STATE)
        if not mark:
            continue
        try:
            said: dict[str, Any] = json.loads(bytes(state.read().tolist()))
            dtype, shape = kinds[said["dtype"]], tuple(said["shape"])
        except (ValueError, TypeError, KeyError) as error:
            raise ModelError(
                f"{state.file}: {state.name} cannot be read ({error}); fetch the model again"
            ) from None
        names = [other for other in tensors if other.startswith(f"{owner}.")]
        parts = {other.removeprefix(f"{owner}."): tensors[other] for other in names}
        found[owner] = _FourBits(state.file, owner, dtype, shape, 0, {"packed": tensors[owner], **parts})
        taken |= {owner, *names}
    return {name: tensor for name, tensor in tensors.items() if name not in taken} | found


def _by_gptq(tensors: Mapping[str, StoredTensor], bits: int, above: int) -> dict[str, StoredTensor]:
    found, taken = dict[str, StoredTensor](), set[str]()
    for name, packed in tensors.items():
        owner, _, last = name.rpartition(".")
        if last != "qweight":
            continue
        parts = {part: tensors[f"{owner}.{part}"] for part in _GPTQ_PARTS if f"{owner}.{part}" in tensors}
        if absent := sorted(set(_GPTQ_PARTS) - parts.keys()):
            raise ModelError(f"{packed.file}: {owner}.{absent[0]} is missing; fetch the model again")
        shape = (packed.shape[1], packed.shape[0] * 32 // bits)
        weight = f"{owner}.weight"
        found[weight] = _Groups(packed.file, weight, "F32", shape, 0, parts, bits, above)
        taken |= {f"{owner}.{part}" for part in parts}
    return {name: tensor for name, tensor in tensors.items() if name not in taken} | found
