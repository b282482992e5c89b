"""A model that has its modules and none of its weights: they come from its files part by part, and go again.

In: a folder with safetensors. Out: a transformers model on torch's `meta` device; the weights of one of its modules
while somebody reads them. What the files call a weight, and how several become one (experts, a multimodal prefix), is
transformers' own affair: its conversion runs over the tensors of one part, as it else runs over all.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from qwen_chat.errors import ModelError
from qwen_chat.models import float_tensors, on_meta, parameter_names
from qwen_chat.weights import StoredTensor


class NotByParts(Exception):
    """A folder that only transformers as a whole can load; the message says why."""


class Skeleton:
    """`model`: every module, on the meta device; its rotary embedding is real. It stands on `device` while filled."""

    def __init__(
        self, folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu", *, narrow: bool = False
    ) -> None:
        """narrow: the layers' matrices come in bfloat16 where they are stored so, for one who widens them himself.

        Raises NotByParts; ModelError for a file that is damaged.
        """
        from transformers import GenerationConfig
        from transformers.conversion_mapping import get_model_conversion_mapping

        self._folder, self._dtype, self.device = folder, dtype, torch.device(device)
        tensors = self.tensors = float_tensors(folder)
        if not tensors:
            raise NotByParts("its weights are in no safetensors file")
        self.model: Any = on_meta(folder, dtype=dtype)
        if (folder / "generation_config.json").is_file():
            self.model.generation_config = GenerationConfig.from_pretrained(folder)
        self.body = getattr(self.model.model, "language_model", self.model.model)
        self.body.rotary_emb.to(device)
        if narrow and all(tensor.kind == "BF16" for tensor in tensors.values()):
            for module in self.body.layers.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight = torch.nn.Parameter(module.weight.bfloat16(), requires_grad=False)
        self._mapping = get_model_conversion_mapping(self.model)
        # A name of the model -> the tensors that it is made of.
        self._stored: dict[str, dict[str, StoredTensor]] = {}
        for name, target in parameter_names(self.model, tensors).items():
            self._stored.setdefault(target, {})[name] = tensors[name]
        self._tied: Mapping[str, str] = self.model.all_tied_weights_keys
        self._names = {module: name for name, module in self.model.named_modules()}
        if odd := [name for name in self._tied if name in self._stored]:
            raise NotByParts(f"{odd[0]} is tied to another weight and stored all the same")
        parts = (self.body, self.model.lm_head)
        names = [name for part in parts for name, _ in part.named_buffers()]
        if odd := [name for name in names if not name.startswith("rotary_emb.")]:
            raise NotByParts(f"{odd[0]} is computed, not stored")

    def embedding(self) -> torch.Tensor:
        """The rows of the embedding, in the files' type where that is narrower than the model's: widened one by one
        they have the same bits."""
        name = f"{self._names[self.body.embed_tokens]}.weight"
        (stored,) = self._stored[name].values()
        rows = stored.read()
        if rows.shape != self.body.embed_tokens.weight.shape:
            raise ModelError(
                f"{stored.file}: {stored.name} has the shape {tuple(rows.shape)}; fetch the model again"
            )
        exact = self._dtype is torch.float32 and rows.dtype in (torch.bfloat16, torch.float16)
        return rows.to(self.device, rows.dtype if exact else self._dtype)

    @contextmanager
    def filled(self, module: torch.nn.Module, following: torch.nn.Module | None = None) -> Iterator[None]:
        """While it is open, the module's weights are there. `following`: the one that is asked for next, which the
        system reads from the disk meanwhile. Raises ModelError where the files do not hold all of them."""
        empty = [
            (owner, name, parameter)
            for owner in module.modules()
            for name, parameter in owner.named_parameters(recurse=False)
        ]
        self._fill(module)
        for tensors in () if following is None else self._of(following).values():
            for tensor in tensors.values():
                tensor.announce()
        try:
            yield
        finally:
            for owner, name, parameter in empty:
                setattr(owner, name, parameter)
            gc.collect(0)
            _trim()

    def _of(self, module: torch.nn.Module) -> dict[str, dict[str, StoredTensor]]:
        begin = f"{self._names[module]}."
        return {name: stored for name, stored in self._stored.items() if name.startswith(begin)}

    def _fill(self, module: torch.nn.Module) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        mine, empty = self._of(module), dict(module.named_parameters())
        begin = f"{self._names[module]}."
        borrowed = {name: source for name, source in self._tied.items() if name.startswith(begin)}
        options = LoadStateDictConfig(
            dtype=self._dtype,
            dtype_plan=self.model._get_dtype_plan(self._dtype),
            weight_mapping=self._mapping,
            device_map={"": self.device},
        )
        tensors = {name: tensor for stored in mine.values() for name, tensor in stored.items()}
        told, _ = convert_and_load_state_dict_in_model(self.model, tensors, options, None)
        faults = [*told.conversion_errors, *(str(fault[0]) for fault in told.mismatched_keys)]
        for name, source in borrowed.items():
            (stored,) = self._stored[source].values()
            owner = self.model.get_submodule(name.rpartition(".")[0])
            weight = stored.read().to(self.device, self._dtype)
            setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(weight, requires_grad=False))
        faults += [begin + name for name, now in module.named_parameters() if now is empty[name]]
        if faults:
            raise ModelError(
                f"{self._folder}: {faults[0]} is missing or does not fit its config.json ({len(faults)} such); "
                "fetch the model again"
            )


def _trim() -> None:
    """Let the system have what was freed between blocks that stay: glibc keeps it, 17 MiB a layer of a 7B."""
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
