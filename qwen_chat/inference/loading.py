"""An engine from a folder: the model is found, loaded and made ready to decode; adapters lie beside it or in it.

In: a model's folder or name, adapters' folders. Out: an `Engine`, not yet started.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwen_chat import hardware
from qwen_chat.errors import FormatError, ModelError, OptionError
from qwen_chat.families import check_served
from qwen_chat.inference.decoder import Decoder
from qwen_chat.inference.engine import Engine, end_tokens
from qwen_chat.inference.lora import why_merged
from qwen_chat.inference.native.library import compile_ahead
from qwen_chat.inference.quantize import check_dtype
from qwen_chat.inference.size import check_fits
from qwen_chat.inference.skeleton import NotByParts, Skeleton
from qwen_chat.threads import in_own_thread
from qwen_chat.weights import stored_tensors

SLOW = 5.0  # seconds of loading that are worth a line


@in_own_thread
def load_engine(
    model_path: str | Path | None,
    *,
    adapters: Mapping[str, Path] | None = None,
    dtype: str = "auto",
    device: hardware.AskedDevice = "auto",
    quantize: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> Engine:
    """Load a model (as `models.resolve` finds it) and make an engine of it, not yet started.

    Without a path, the base that a lone adapter names, else the demo model. The base speaks in its own format,
    each adapter in the one that it was saved with (`Engine.format_of`). An adapter that cannot run beside its
    base (DoRA, whole modules, ...) is merged into it, if it is alone: then the base itself is not served.

    Args:
        dtype: "auto" = float32 on a CPU, else bfloat16 where the accelerator has it. device: where it computes; "auto":
            an accelerator where one is. quantize: "int8", "int4" or None. options: any other of Engine's.

    Raises ModelError; OptionError for a dtype or `quantize` that is not computed there, or a device that is not there.
    """
    from qwen_chat import models
    from qwen_chat.chat.format import ChatFormat

    begin, place = time.monotonic(), hardware.choose_device(device)
    kind = _number_kind(dtype, quantize, place)
    folders = {name: Path(folder) for name, folder in (adapters or {}).items()}
    (lone,) = folders.values() if len(folders) == 1 else (None,)
    if model_path is None and lone is not None:
        model_path = models.adapter_base(lone)
    path = models.resolve(None if model_path is None else str(model_path))
    check_served(models.read_config(path), path / "config.json")
    reason = None if lone is None else why_merged(lone)
    tokenizer = models.load_tokenizer(path, trust_remote_code=trust_remote_code)
    with _memory_told(path):
        if lone is None or reason is None:
            model, decoder, decisions = _by_layers(path, dtype, place, quantize, trust_remote_code)
        else:
            _check_merge(path, lone, reason, kind.itemsize, quantize)
            model, decisions = _with_adapter(path, lone, reason, tokenizer, trust_remote_code)
            decoder = Decoder(model.to(place.kind, kind), quantize=quantize)
    try:
        fmt = ChatFormat(tokenizer)
    except FormatError:
        if not folders:
            raise
        fmt = None  # a base model, whose adapters bring their format along
    ends = {*(() if fmt is None else fmt.stop_token_ids), *end_tokens(model, tokenizer)}
    options = {"stop_token_ids": ends, **options, "serves_base": fmt is not None}
    options["adapters"] = None if reason else folders
    if (seconds := time.monotonic() - begin) > SLOW:
        most = hardware.peak_memory() / 2**30
        decisions += (f"loaded in {seconds:.0f} s, {most:.1f} GiB of memory at most",)
    engine = Engine(decoder, tokenizer, fmt=fmt, decisions=(str(place), *decisions), **options)
    for name, folder in folders.items():
        if reason is not None:
            engine.name_merged(name, folder)
        engine.format_of(name)  # FormatError for one that has no format, like its base
    return engine


def _number_kind(dtype: str, quantize: str | None, place: hardware.Device) -> Any:
    """The number type, as torch has it; OptionError for one that is not computed at that place."""
    from qwen_chat import models

    kind = models.choose_dtype(dtype, place)[0]
    if place.kind == "cpu":
        check_dtype(kind)
        compile_ahead()
    elif quantize is not None:
        raise OptionError(
            f"--quantize {quantize}: its kernels are the CPU's, and this is {place}; give --dtype bfloat16,"
            " --engine vllm or --device cpu"
        )
    return kind


def _by_layers(
    path: Path,
    dtype: str,
    place: hardware.Device,
    quantize: str | None,
    trust_remote_code: bool,
) -> tuple[Any, Decoder, tuple[str, ...]]:
    """The model (its weights may be gone), the decoder that was made of it, and what was decided."""
    from qwen_chat import models

    config = models.read_config(path)
    tensors = models.float_tensors(path)
    kind, why = models.choose_dtype(dtype, place)
    if tensors:
        check_fits(path, tensors, kind.itemsize, quantize, device=place.kind)
    try:
        if trust_remote_code and "auto_map" in config:
            raise NotByParts("it brings its own code")
        skeleton = Skeleton(path, kind, place.kind, narrow=quantize is not None)
        decoder = Decoder(skeleton, quantize=quantize)
        return skeleton.model, decoder, (f"dtype {str(kind).removeprefix('torch.')} ({why})",)
    except NotByParts as reason:
        whole = f"loaded whole, not layer by layer: {reason}"
    loaded = models.load_model(path, dtype=dtype, device=place, trust_remote_code=trust_remote_code)
    return loaded.model, Decoder(loaded.model, quantize=quantize), (*loaded.decisions, whole)


def _check_merge(path: Path, adapter: Path, reason: str, width: int, quantize: str | None) -> None:
    """ModelError where a base cannot be merged into, or there is no memory for it. width: bytes a number, served."""
    from qwen_chat import models

    if "quantization_config" in models.read_config(path) or models.is_gguf(path):
        raise ModelError(
            f"{adapter}: has to be merged into its base ({reason.partition('; ')[0]}), and {path} is quantised: give"
            " the base as it was before with -m"
        )
    if tensors := stored_tensors(path):
        check_fits(path, tensors, width, quantize, merged=True)


def _with_adapter(
    path: Path, adapter: Path, reason: str, tokenizer: Any, trust_remote_code: bool
) -> tuple[Any, tuple[str, ...]]:
    """The model with its one adapter in it, in float32 on the CPU (where a merge is exact), and what was decided."""
    from qwen_chat import models

    place = hardware.Device("cpu", "for the merge")
    loaded = models.load_model(path, dtype="float32", device=place, trust_remote_code=trust_remote_code)
    probe = tokenizer.encode("Who are you? 你是谁？", add_special_tokens=False)
    merged, difference = models.merge(models.load_adapter(loaded.model, adapter), probe)
    told = (
        "adapter merged into its base, which is not served itself; "
        f"logits moved by {difference:.0e} of the largest ({reason.partition('; ')[0]})"
    )
    return merged, (*loaded.decisions, told)


@contextmanager
def _memory_told(path: Path) -> Iterator[None]:
    """Memory that runs out is one line."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = str(error).lower()
        if isinstance(error, RuntimeError) and "allocate memory" not in told and "enough memory" not in told:
            raise
        raise ModelError(
            f"{path}: the memory ran out while it was loaded; give --quantize int8 or int4, a smaller model, or end "
            "what else runs here"
        ) from None
