"""A model with an adapter, of which one part at a time is in memory: an embedding, a layer, a norm, a head.

In: a base's folder, adapters, a place for the merged tensors. Out: each part's weights merged by peft's own layers and
written as the base has them; hidden states of both models, carried side by side from part to part.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from qwen_chat import models
from qwen_chat.errors import MissingDependency, ModelError, first_line
from qwen_chat.export.tensor_writer import TensorWriter
from qwen_chat.weights import model_tensors

_ROWS_AT_ONCE = 8192  # rows of a weight that are copied at a time
# Where peft puts a layer's own weights below itself.
_WRAPPED = re.compile(r"\.(base_layer|original_module|token_adapter)(?=\.)")
# Initialisations that take their part out of the base's weights, the same part every time.
_TAKEN_OUT = ("pissa", "olora")
# Those that change the base by data or at random, or by what another base would not give.
_LOST = ("loftq", "corda", "lora_ga")


class LayerwiseModel:
    """The parts of a decoder by their names. Raises ModelError where an adapter does not fit or cannot be merged."""

    def __init__(
        self,
        base: Path,
        adapters: Sequence[Path],
        weights: Sequence[float],
        *,
        trust_remote_code: bool = False,
    ) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        models.check_unquantised(base)
        self.base, self.stored = base, model_tensors(base)
        self._plain = models.on_meta(base, trust_remote_code=trust_remote_code)
        inner = models.on_meta(base, trust_remote_code=trust_remote_code)
        starts = [_start(adapter) for adapter in adapters]
        for adapter, start in zip(adapters, starts, strict=True):
            if start.startswith(_LOST):
                raise ModelError(
                    f"{adapter}: trained from init_lora_weights {start}, which changed its base; over the base as"
                    " it was the adapter is another one: merge it where it was trained"
                )
        self.start = starts[0]
        self.peft = models.load_adapter(inner, adapters[0], on_meta=True).eval()
        self.core = self.peft.get_base_model()
        if len(adapters) > 1 or tuple(weights) != (1.0,):
            self._mix(adapters, weights)
        self._mapping = get_model_conversion_mapping(self._plain)
        self._own = {name for name, p in self.core.named_parameters() if not p.is_meta}
        self.decoder = self.core.get_decoder()
        self._check_shape(base)
        self.tied = bool(models.text_config(self.core).tie_word_embeddings) and "weight" in dict(
            self._plain.get_output_embeddings().named_parameters()
        )
        names = {id(module): name for name, module in self.core.named_modules()}
        ends = self.core.get_input_embeddings(), self.core.get_output_embeddings()
        self.rows, self.head = (names[id(module)] for module in ends)
        self.norm = names[id(self.decoder.norm)]
        self.layers = tuple(names[id(layer)] for layer in self.decoder.layers)
        self.parted = self.tied and len({self._kind(self.rows), self._kind(self.head)}) > 1
        self._raw = self._grouped()

    def _check_shape(self, base: Path) -> None:
        if not all(hasattr(self.decoder, name) for name in ("layers", "norm", "embed_tokens")):
            raise ModelError(
                f"{base}: {type(self.core).__name__} is not built of embed_tokens, layers and norm; this model cannot"
                " be merged a layer at a time"
            )

    def _mix(self, adapters: Sequence[Path], weights: Sequence[float]) -> None:
        """Several adapters, or one at another strength: plain LoRAs alone add up."""
        for adapter in adapters:
            config = models.read_adapter_config(adapter)
            odd = [
                key for key in ("use_dora", "modules_to_save", "trainable_token_indices") if config.get(key)
            ]
            odd += ["bias"] if config.get("bias", "none") != "none" else []
            odd += ["init_lora_weights"] if _start(adapter).startswith(_TAKEN_OUT) else []
            if odd:
                raise ModelError(
                    f"{adapter}: {', '.join(odd)} in its config; only plain LoRA adapters add up by weights"
                )
        names = ["default"]
        for number, adapter in enumerate(adapters[1:], 2):
            names.append(f"adapter_{number}")
            models.add_adapter(self.peft, adapter, names[-1])
        self.peft.base_model.set_adapter(names)
        for module in self.core.modules():
            scaling = getattr(module, "scaling", None)
            for name, weight in zip(names, weights, strict=True):
                if isinstance(scaling, dict) and name in scaling:
                    scaling[name] *= weight

    def _kind(self, name: str) -> str:
        """What peft made of one end of the model; trained rows reach both ends of a tied one."""
        kind = type(self.core.get_submodule(name))
        return kind.__name__ if kind.__module__.startswith("peft.") else ""

    def _grouped(self) -> dict[str, dict[str, str]]:
        """Part -> {tensor in the files: parameter in the model}; "" holds what no part has."""
        known = self._plain.state_dict()
        parts = (self.rows, *self.layers, self.norm, self.head)
        grouped: dict[str, dict[str, str]] = {part: {} for part in ("", *parts)}
        for raw, name in models.parameter_names(self._plain, self.stored).items():
            part = next((part for part in parts if name.startswith(f"{part}.") and name in known), "")
            grouped[part][raw] = name
        if self.tied:
            for raw in grouped[self.head]:  # some files store the shared weight twice
                del self.stored[raw]
            grouped[self.head] = {}
        missing = [part for part in parts if not grouped[part] and not (self.tied and part == self.head)]
        if missing:
            raise ModelError(f"{self.base}: no weights of {missing[0]} in its files; fetch the model again")
        return grouped

    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The tensors of the merged model, in the base's types: its own, and a head where it no longer shares one."""
        found = {
            raw: (self.stored[raw].dtype, self.stored[raw].shape)
            for part in self._raw.values()
            for raw in part
        }
        if self.parted:
            (rows,) = self._raw[self.rows]
            found[f"{self.head}.weight"] = found[rows]
        return found

    # ------------------------------------------------------------------------------------- one part at a time

    def fill(self, part: str) -> None:
        """Put the base's weights into a part, in float32."""
        loaded = self._load(part)
        self._dtypes = {name: dtype for name, (_, dtype) in loaded.items()}
        for name, parameter in list(self.core.named_parameters(remove_duplicate=False)):
            found = loaded.get(_WRAPPED.sub("", name))
            if found is not None and parameter.is_meta and name not in self._own:
                _set(self.core, name, found[0])
        if empty := [name for name, p in self.core.get_submodule(part).named_parameters() if p.is_meta]:
            raise ModelError(
                f"{self.base}: {part}.{empty[0]} is neither in its files nor in the adapter's; fetch both again"
            )
        if self.start.startswith(_TAKEN_OUT):
            self._take_out(part)

    def _load(self, part: str) -> dict[str, tuple[torch.Tensor, torch.dtype]]:
        """A part's parameters, converted as transformers does it, with the types in which they are stored."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        source = self.rows if part == self.head and self.tied else part
        raw = {name: self.stored[name].read().float() for name in self._raw[source]}
        options = LoadStateDictConfig(dtype=torch.float32, weight_mapping=copy.deepcopy(self._mapping))
        info, _ = convert_and_load_state_dict_in_model(self._plain, raw, options)
        if info.mismatched_keys or info.conversion_errors:
            odd = next(iter([*info.mismatched_keys, *info.conversion_errors]))
            raise ModelError(f"{self.base}: {odd} has not the shape that config.json gives; fetch it again")
        stored = {name: self.stored[key].dtype for key, name in self._raw[source].items()}
        found = {}
        for name, parameter in list(self._plain.named_parameters(remove_duplicate=False)):
            if name.startswith(f"{source}.") and not parameter.is_meta:
                target = f"{part}{name.removeprefix(source)}"
                found[target] = parameter.data, stored.get(name, next(iter(stored.values())))
                _set(self._plain, name, parameter.data.to("meta"))
        return found

    def _take_out(self, part: str) -> None:
        """PiSSA and OLoRA as peft saves them train what they first took out of the base: it is taken out again."""
        for module in self.core.get_submodule(part).modules():
            if "default" in getattr(module, "lora_A", {}):
                a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
                trained = a.data, b.data
                if self.start == "olora":
                    module.olora_init("default")
                else:
                    module.pissa_init("default", self.start)
                a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
                a.data, b.data = trained

    def merge(self, part: str) -> None:
        """Add the adapter into a part's weights and round them to the types in which they are stored."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        inside: list[str] = []
        for name, module in list(self.core.named_modules()):
            if not f"{name}.".startswith(f"{part}.") or any(name.startswith(f"{outer}.") for outer in inside):
                continue
            try:
                if hasattr(module, "unload_and_optionally_merge_module"):
                    new = module.unload_and_optionally_merge_module(
                        merge=True, safe_merge=False, adapter_names=None
                    )
                elif isinstance(module, BaseTunerLayer):
                    module.merge(safe_merge=False)
                    new = module.get_base_layer()
                else:
                    continue
            except Exception as error:  # each kind of adapter has its own
                raise ModelError(f"{name}: cannot be merged into its base ({first_line(error)})") from None
            inside.append(name)
            self.core.set_submodule(name, new)
        for name, parameter in self.core.get_submodule(part).named_parameters():
            if not all(bool(rows.isfinite().all()) for rows in parameter.data.split(_ROWS_AT_ONCE)):
                raise ModelError(
                    f"{part}.{name}: not finite after merging; the adapter or its base is damaged: copy it again"
                )
            stored = self._dtypes.get(f"{part}.{name}", torch.float32)
            for rows in parameter.data.split(_ROWS_AT_ONCE):  # in place: a large embedding is in memory once
                rows.copy_(rows.to(stored))

    def write(self, part: str, writer: TensorWriter) -> None:
        """Write a merged part under the names and in the types of the base's files."""
        from transformers.core_model_loading import revert_weight_conversion

        if part == self.head and self.tied:
            if self.parted:
                name = f"{part}.weight"
                writer.write(name, self.core.get_parameter(name).data.to(self._dtypes[name]))
            return
        module = self.core.get_submodule(part)
        tensors = {f"{part}.{name}": p.data for name, p in module.named_parameters()}
        reverted = revert_weight_conversion(self._plain, tensors)
        wanted = self._raw[part]
        if len(wanted) == len(tensors) and set(reverted) != set(
            wanted
        ):  # a prefix that the class alone writes
            names = {name: raw for raw, name in wanted.items()}
            reverted = {names[name]: tensor for name, tensor in tensors.items() if name in names}
        if set(reverted) != set(wanted):
            odd = sorted(set(reverted) ^ set(wanted))[0]
            raise ModelError(f"{part}: {odd} cannot be written back as the base's files have it")
        for raw, tensor in reverted.items():
            writer.write(raw, tensor.to(self.stored[raw].dtype))

    def empty(self, part: str) -> None:
        """Give a part's memory back."""
        for name, parameter in list(self.core.get_submodule(part).named_parameters()):
            _set(self.core, f"{part}.{name}", parameter.data.to("meta"))

    def copy_rest(self, writer: TensorWriter) -> None:
        """What no part holds (the parts that see, layers for several tokens at once) stays bit for bit."""
        for raw in self._raw[""]:
            writer.write(raw, self.stored[raw].read())

    @contextlib.contextmanager
    def four_bits(self, part: str) -> Iterator[None]:
        """The part's linear layers as Q-LoRA trained over them: rounded to NF4. Their weights come back at the end."""
        try:
            from bitsandbytes import functional
        except ImportError:
            raise MissingDependency("bitsandbytes", "a model in 4 bits", extra="qlora") from None
        kept = []
        for name, module in self.core.get_submodule(part).named_modules():
            if isinstance(module, torch.nn.Linear) and "lora_" not in name:
                kept.append((module, module.weight.data))
                packed, state = functional.quantize_4bit(
                    module.weight.data, quant_type="nf4", compress_statistics=True
                )
                module.weight.data = functional.dequantize_4bit(packed, state).float()
        try:
            yield
        finally:
            for module, weight in kept:
                module.weight.data = weight

    @contextlib.contextmanager
    def around_layers(self, run: Callable[[str, Callable[..., Any], Any], Any]) -> Iterator[None]:
        """In this context `run(part, forward, hidden)` answers for every layer; forward takes hidden states alone."""
        layers = [self.core.get_submodule(part) for part in self.layers]

        def answering(part: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            def answer(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                def alone(states: torch.Tensor) -> torch.Tensor:
                    found = forward(states, *args, **kwargs)
                    first: torch.Tensor = found[0] if isinstance(found, tuple) else found
                    return first

                return run(part, alone, hidden)

            return answer

        for part, layer in zip(self.layers, layers, strict=True):
            layer.forward = answering(part, layer.forward)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward


def _start(adapter: Path) -> str:
    """What its first values were, as its config says it."""
    return str(models.read_adapter_config(adapter).get("init_lora_weights")).lower()


def _set(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    where, _, leaf = name.rpartition(".")
    model.get_submodule(where)._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)
