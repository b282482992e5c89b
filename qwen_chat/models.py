"""Load a tokenizer, a model, an adapter; say what was decided and why.

In: a local folder, a hub name, or nothing (the demo model). Out: a folder on this machine, and what was
loaded from it. Every failure is a ModelError of one line. Code that comes with a model runs only where the
caller says so.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qwen_chat import demo_model, gguf_model, hardware
from qwen_chat.console import rank_zero
from qwen_chat.errors import MissingDependency, ModelError, first_line
from qwen_chat.families import check_trainable
from qwen_chat.hardware import Device
from qwen_chat.packed_weights import unpacked
from qwen_chat.weights import StoredTensor, file_tensors, stored_tensors

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

# It warns about a kernel for CPUs that it would fetch from the hub; it works without.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# peft and accelerate import DeepSpeed where it is installed; asked for a CPU it does not warn on standard output.
if not hardware.has_accelerator():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py"]
PROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer, and each decision as one line: "dtype float32 (this CPU has ...)"."""

    model: Any
    tokenizer: Any
    decisions: tuple[str, ...]


def resolve(name: str | None, *, for_training: bool = False) -> Path:
    """The folder of a model: local, from the hub (`USE_MODELSCOPE=1`: ModelScope), or the demo model; of a GGUF file
    the one that describes it.

    for_training: a model that cannot be trained here is a ModelError.
    """
    if name is None:
        folder = demo_model.ensure()
        rank_zero(f"model {folder.name} (the demo model: -m was not given)")
        return folder
    if not name:  # to Path it is the current folder
        raise ModelError("-m: an empty value; give a model's folder or hub name, or leave the flag out")
    local = Path(name).expanduser()
    if (file := gguf_model.file_of(local)) is not None:
        if for_training:
            raise ModelError(
                f"{file}: a GGUF file is served, not trained; tune the model that it was made of"
            )
        return gguf_model.described(file)
    if local.is_dir():
        check_folder(local, for_training=for_training)
        return local
    if local.exists():
        raise ModelError(
            f"{name}: a file; expected a model's folder, a GGUF file or a hub name such as Qwen/Qwen2-7B-Instruct"
        )
    if not HUB_NAME.fullmatch(name) or name.startswith("."):
        raise ModelError(
            f"{name}: no such folder; give a model's folder or a hub name such as Qwen/Qwen2-7B-Instruct"
        )
    folder = _from_modelscope(name) if os.environ.get("USE_MODELSCOPE") == "1" else _from_hub(name)
    check_folder(folder, for_training=for_training)
    return folder


def name_of(given: str | None, folder: Path) -> str:
    """What an adapter calls its base: the hub name that was typed, else the folder's full path."""
    return given if given is not None and not Path(given).expanduser().is_dir() else str(folder.absolute())


def check_folder(folder: Path, *, for_training: bool = False) -> None:
    """Raise ModelError unless the folder holds a readable config.json and all of its weights.

    for_training: nor where config.json tells that rows of several conversations would be learnt wrong.
    """
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(
                f"{folder}: an adapter, not a model; give its base with -m and this with --adapter"
            )
        raise ModelError(f"{folder}: no config.json in it; expected a model as save_pretrained writes it")
    config = read_config(folder)
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{folder / 'config.json'}: no model_type; expected a transformers model")
    if for_training:
        check_trainable(config, folder / "config.json")
    index = folder / "model.safetensors.index.json"
    places = _read_json(index).get("weight_map") if index.is_file() else {}
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ModelError(
            f"{index}: its weight_map does not name a file for each tensor; fetch the model again"
        )
    wanted = set(places.values())
    missing = sorted(file for file in wanted if not (folder / file).is_file())
    if missing:
        raise ModelError(
            f"{folder}: {', '.join(missing)} missing ({len(wanted)} weight files expected); fetch it again"
        )
    if not any(any(folder.glob(kind)) for kind in ("*.safetensors", "*.bin", gguf_model.LINK)):
        raise ModelError(f"{folder}: no weights in it; expected model.safetensors")


def is_gguf(folder: Path) -> bool:
    """Whether a folder only describes a GGUF file."""
    return (folder / gguf_model.LINK).is_symlink()


def float_tensors(folder: Path) -> dict[str, StoredTensor]:
    """A folder's tensors by transformers' names, as floats: stored so, in few bits, or in the GGUF file that it
    describes; none where transformers alone can read them. Raises ModelError for damaged files and other ways of
    quantising."""
    if is_gguf(folder):
        return gguf_model.gguf_tensors(folder)
    return unpacked(stored_tensors(folder), read_config(folder), folder / "config.json")


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's config.json (or the file itself); ModelError where it cannot be read."""
    return _read_json(folder if folder.is_file() else folder / "config.json")


def check_unquantised(folder: Path) -> None:
    """ModelError where a folder's weights are stored in few bits, so that they cannot be computed with as they are."""
    config = read_config(folder)
    parts = [config, config.get("text_config")]
    if any(isinstance(part, dict) and part.get("quantization_config") for part in parts):
        raise ModelError(f"{folder}: its weights are quantised; give the model as it was before")


def adapter_base(adapter: Path) -> str:
    """The base that an adapter names; raises ModelError where there is no adapter, or where it names none."""
    base = read_adapter_config(adapter).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(f"{adapter / 'adapter_config.json'}: names no base model; give it with -m")
    return base


def trains_rows(adapter: Path) -> bool:
    """Whether an adapter holds embedding rows of single tokens."""
    return bool(_read_json(adapter / "adapter_config.json").get("trainable_token_indices"))


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a folder, with a padding token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises no more than that, transformers a dozen kinds
        raise ModelError(
            f"{path}: its tokenizer cannot be loaded ({first_line(error)}); fetch its files again"
        ) from None
    if tokenizer.pad_token_id is None:
        known = tokenizer.get_vocab()
        tokenizer.pad_token = "<|endoftext|>" if "<|endoftext|>" in known else tokenizer.eos_token
    return tokenizer


def load_model(
    path: Path,
    *,
    dtype: str | torch.dtype = "auto",
    attention: str | None = None,
    quantize: Literal["nf4"] | None = None,
    adapter: Path | None = None,
    for_training: bool = False,
    device: Device | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load what a folder holds, and an adapter over it. For use (not training) it goes to the device (None:
    `hardware.choose_device`'s). A model that sees too is loaded whole, under its own names; training leaves its sight
    as it is.
    """
    import torch  # noqa: F401  from here on its word counts for the device
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils.logging import disable_progress_bar

    check_folder(path, for_training=for_training)
    disable_progress_bar()  # seconds of shards being read and written, across the bar of the training itself
    device = hardware.choose_device() if device is None else device
    kind, reason = choose_dtype(dtype, device)
    decisions = [f"dtype {str(kind).removeprefix('torch.')} ({reason})"]
    options: dict[str, Any] = {"dtype": kind, "trust_remote_code": trust_remote_code}
    if attention is not None:
        options["attn_implementation"] = attention
    if quantize is not None:
        options["quantization_config"] = _four_bits(kind)
        decisions.append("weights in 4 bits (NF4, double quantisation)")
    loader = AutoModelForImageTextToText if sees(read_config(path)) else AutoModelForCausalLM
    try:
        model = loader.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(f"{path}: cannot be loaded ({first_line(error)})") from None
    if quantize is not None:
        _keep_exact(model)
    if for_training and (parts := beside_text(model)):
        frozen = [p for part in parts for p in model.get_submodule(part).requires_grad_(False).parameters()]
        size = sum(getattr(p, "ds_numel", p.numel()) for p in frozen)
        decisions.append(f"text alone is trained: {', '.join(parts)} ({size:,} parameters) stays as it is")
    # An adapter's folder holds the template that it was trained under.
    own_tokenizer = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    tokenizer_path = adapter if adapter is not None and own_tokenizer else path
    tokenizer = load_tokenizer(tokenizer_path, trust_remote_code=trust_remote_code)
    if adapter is not None:
        model = load_adapter(model, adapter, trainable=for_training)
        decisions += _base_note(path, adapter)
    if not for_training:
        model.eval()
        if device.kind != "cpu" and quantize is None:
            model.to(device.kind)
    return Loaded(model, tokenizer, tuple(decisions))


def sees(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a model for pictures and text (Qwen3.5's own checkpoints are)."""
    classes = config.get("architectures")
    first = classes[0] if isinstance(classes, list) and classes else ""
    return str(first).endswith("ForConditionalGeneration") and "vision_config" in config


def beside_text(model: PreTrainedModel) -> tuple[str, ...]:
    """The parts that no text goes through, by name ("model.visual"); none in a model of text alone."""
    if not hasattr(model.config, "vision_config"):
        return ()
    text = {id(p) for part in (model.get_decoder(), model.get_output_embeddings()) for p in part.parameters()}
    names = [name for name, p in model.named_parameters() if id(p) not in text]
    return tuple(dict.fromkeys(".".join(name.split(".")[:2]) for name in names))


def on_meta(
    path: Path, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A folder's model without its weights: they are on torch's meta device, as `dtype` (None: float32); what its
    decoder computes from config.json alone is there."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils.logging import disable_progress_bar

    check_folder(path)
    disable_progress_bar()  # one for each part that is filled
    loader = AutoModelForImageTextToText if sees(read_config(path)) else AutoModelForCausalLM
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = loader.from_config(
                config,
                dtype=dtype or torch.float32,
                attn_implementation="sdpa",
                trust_remote_code=trust_remote_code,
            )
    except Exception as error:  # a config may say anything, and its class has errors of its own
        raise ModelError(f"{path}: cannot be loaded ({first_line(error)}); fetch the model again") from None
    for module in model.get_decoder().modules():
        empty = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        for name in empty:
            module._buffers[name] = torch.zeros_like(module._buffers[name], device="cpu")
        if empty:
            model._init_weights(module)
    return model.eval()


def parameter_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """What the model calls each tensor of its files, as transformers finds it; several may be parts of one."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known, prefix = model.state_dict(), model.base_model_prefix
    names = {}
    for name in stored:
        found, _ = rename_source_key(name, renamings, converters, prefix, known)
        names[name] = name if found not in known and name in known else found
    return names


def text_config(model: PreTrainedModel) -> Any:
    """The part of a model's config that holds for its text."""
    return model.config.get_text_config()


def read_adapter_config(adapter: Path) -> dict[str, Any]:
    """An adapter's adapter_config.json; raises ModelError where there is none that can be read."""
    file = adapter / "adapter_config.json"
    if not file.is_file():
        raise ModelError(f"{adapter}: no adapter_config.json in it; expected an adapter's folder")
    return _read_json(file)


def load_adapter(
    model: PreTrainedModel, adapter: Path, *, trainable: bool = False, on_meta: bool = False
) -> PeftModel:
    """The model with an adapter over it, all of it: ModelError where the adapter belongs to another base, or where
    peft would pass over a part of it. on_meta: the model has no weights, so what the adapter's first values took out
    of them is still in them."""
    from peft import PeftConfig, PeftModel

    named = read_adapter_config(adapter)
    start = str(named.get("init_lora_weights"))
    if start.startswith("pissa_niter"):
        raise ModelError(
            f"{adapter}: a checkpoint of a run with --lora_init {start}, whose base a random decomposition changed:"
            " over another one it is another model; give the finished run's folder, or go on with finetune.py"
        )
    saved = _saved_names(adapter)
    try:
        config = PeftConfig.from_pretrained(adapter)
        if on_meta and hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True
        loaded = PeftModel.from_pretrained(
            model, adapter, is_trainable=trainable, config=config, low_cpu_mem_usage=on_meta
        )
        if on_meta:
            load_adapter_weights(loaded, adapter)
    except Exception as error:  # peft, safetensors and what an initialisation needs: a dozen kinds
        raise ModelError(
            f"{adapter}: does not fit this model ({first_line(error)}); its base is"
            f" {named.get('base_model_name_or_path')}: give that with -m, or copy the adapter again"
        ) from None
    _check_tensors(loaded, adapter, saved)
    return loaded


def add_adapter(model: PeftModel, adapter: Path, name: str) -> None:
    """A further adapter beside those of a model without weights, all of it; ModelError as of `load_adapter`."""
    from peft import PeftConfig

    saved = _saved_names(adapter)
    try:
        config = PeftConfig.from_pretrained(adapter)
        config.inference_mode = True
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True
        model.add_adapter(name, config, low_cpu_mem_usage=True)
        load_adapter_weights(model, adapter, name)
    except Exception as error:  # as for the first one
        raise ModelError(
            f"{adapter}: does not fit beside the other adapters ({first_line(error)}); expected adapters of one base"
        ) from None
    _check_tensors(model, adapter, saved, name)


def load_adapter_weights(model: PeftModel, adapter: Path, name: str = "default") -> None:
    """Put an adapter's weights into main memory, over a base that is on torch's meta device; peft would put them
    there too."""
    from peft import load_peft_weights, set_peft_model_state_dict

    layers = [
        module for module in model.modules() if hasattr(module, "_move_adapter_to_device_of_base_layer")
    ]
    for layer in layers:
        object.__setattr__(layer, "_move_adapter_to_device_of_base_layer", lambda *_, **__: None)
    try:
        tensors = load_peft_weights(str(adapter), device="cpu")
        set_peft_model_state_dict(model, tensors, name, low_cpu_mem_usage=True)
    finally:
        for layer in layers:
            object.__delattr__(layer, "_move_adapter_to_device_of_base_layer")


def _saved_names(adapter: Path) -> set[str]:
    """The names of an adapter's tensors; none where they lie in no safetensors file. peft passes over keys of a config
    that it does not know: ModelError where one of them is in use, and where the weights are not whole."""
    from dataclasses import fields

    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    file = adapter / "adapter_config.json"
    config = _read_json(file)
    kind = {str(name.value): kind for name, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items()}.get(
        str(config.get("peft_type"))
    )
    if kind is None:
        raise ModelError(f"{file}: peft_type {config.get('peft_type')!r} is unknown; expected LORA")
    known = {field.name for field in fields(kind)} | {"runtime_config"}
    used = [key for key, value in config.items() if key not in known and value not in (None, False, {}, [])]
    if used:
        raise ModelError(
            f"{file}: peft here does not know {', '.join(used)}; expected an adapter that it can load; "
            "a newer peft saved it: install that one"
        )
    weights = adapter / "adapter_model.safetensors"
    return set(file_tensors([weights])) if weights.is_file() else set()


def _check_tensors(loaded: PeftModel, adapter: Path, saved: set[str], name: str = "default") -> None:
    """peft passes over tensors that have no place, and leaves places without one as they began: ModelError. saved: what
    the adapter's safetensors file holds; nothing is checked where there is no such file."""
    from peft import get_peft_model_state_dict

    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        return
    own = set(get_peft_model_state_dict(loaded, adapter_name=name, save_embedding_layers=False))
    odd = sorted(own - saved) or sorted(saved - own - set(loaded.state_dict()))
    if odd:
        what = "is missing" if odd[0] in own else "has no place in this model"
        raise ModelError(f"{file}: {odd[0]} {what} ({len(odd)} such); the adapter belongs to another model")


def merge(
    model: PeftModel, probe: Sequence[int], *, tolerance: float = 1e-4
) -> tuple[PreTrainedModel, float]:
    """The base with the adapter added into its weights, and how far its logits moved.

    `probe`: token ids. The largest difference of a logit, divided by the largest logit, must stay below
    `tolerance` (float32); ModelError otherwise, and where the adapter cannot be merged.
    """
    import torch

    ids = torch.tensor([list(probe)], device=model.device)
    model.eval()
    layers = model.get_input_embeddings(), model.get_output_embeddings()
    rows, head = (getattr(layer, "base_layer", layer) for layer in layers)
    parts = (rows, head) != layers and rows.weight is head.weight  # over one of two that share a weight
    with torch.no_grad():
        before = model(input_ids=ids).logits.float()
        if parts:
            head.weight = torch.nn.Parameter(rows.weight.clone())
            model.config.tie_word_embeddings = False
        try:
            merged = model.merge_and_unload(safe_merge=True)
        except Exception as error:  # each kind of adapter has its own
            raise ModelError(f"the adapter cannot be merged into its base ({first_line(error)})") from None
        after = merged(input_ids=ids).logits.float()
    difference = float((after - before).abs().max() / before.abs().max().clamp_min(1e-12))
    if not difference <= tolerance:
        raise ModelError(
            f"the merged model's logits differ by {difference:.2e} of the largest; expected at most "
            f"{tolerance:.0e}: merge over the base in float32"
        )
    return merged, difference


def choose_dtype(dtype: str | torch.dtype = "auto", device: Device | None = None) -> tuple[torch.dtype, str]:
    """The number type and why. `auto`: bfloat16 where an accelerator is used and has it, float32 on a CPU.
    device: as for `load_model`."""
    import torch

    if isinstance(dtype, torch.dtype):
        return dtype, "as asked"
    if dtype != "auto":
        kind = getattr(torch, dtype, None)
        if not isinstance(kind, torch.dtype):
            raise ModelError(f"dtype {dtype}: unknown; expected auto, float32, bfloat16 or float16")
        return kind, "as asked"
    device = hardware.choose_device() if device is None else device
    if device.kind != "cpu":
        if hardware.gpu_has_bf16():
            return torch.bfloat16, "this accelerator has it, at half the memory"
        return torch.float16, "this accelerator has no bfloat16"
    if hardware.cpu_has_bf16():
        return torch.float32, "a CPU run is exact; bfloat16 would lose updates below 1/256 of a weight"
    return torch.float32, "this CPU has no bfloat16 instructions"


def _four_bits(compute: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401  only to tell a missing package from a failed load
    except ImportError:
        raise MissingDependency("bitsandbytes", "a model in 4 bits", extra="qlora") from None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def _keep_exact(model: PreTrainedModel) -> None:
    """One arithmetic for training, evaluation and use.

    On a CPU with bfloat16 instructions bitsandbytes packs a layer anew in its first evaluation: other rounding, and
    the weights stay so when training goes on.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _base_note(path: Path, adapter: Path) -> list[str]:
    base = read_adapter_config(adapter).get("base_model_name_or_path")
    if Path(str(base)).name == path.name:
        return []
    return [f"base {path} (the adapter names {base}; its shapes fit)"]


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=[*HUB_FILES, "*.safetensors"]))
        if not any(
            folder.glob("*.safetensors")
        ):  # an older model: only then its pickled weights are worth fetching
            folder = Path(snapshot_download(name, allow_patterns=[*HUB_FILES, "*.bin"]))
    except Exception as error:  # every kind of network, hub and disk failure ends in the same cure
        raise ModelError(
            f"{name}: no such folder here, and the hub does not give it ({first_line(error)}); "
            "check the name and the network, or set USE_MODELSCOPE=1"
        ) from None
    return folder


def _from_modelscope(name: str) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise MissingDependency("modelscope", "USE_MODELSCOPE=1") from None
    try:
        return Path(snapshot_download(name))
    except Exception as error:  # as above
        raise ModelError(
            f"{name}: ModelScope does not give it ({first_line(error)}); check the name"
        ) from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: cannot be read ({first_line(error)}); fetch the model again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file}: no JSON object; fetch the model again")
    return value
