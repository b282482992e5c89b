"""An engine from a folder: the model is found, loaded and made ready to decode; adapters lie beside it or in it.

In: a model's folder or name, adapters' folders. Out: an `Engine`, not yet started.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_chat import hardware
from qwen_chat.errors import FormatError, OptionError
from qwen_chat.families import check_served
from qwen_chat.inference.engine import Engine, end_tokens
from qwen_chat.inference.lora import why_merged
from qwen_chat.inference.quantize import check_dtype
from qwen_chat.threads import in_own_thread


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
            an accelerator where one is. quantize: "int8" or None. options: any other of Engine's.

    Raises ModelError, and OptionError for a dtype that this CPU does not multiply, for a device that is not there,
    for `quantize` on an accelerator.
    """
    from qwen_chat import models
    from qwen_chat.chat.format import ChatFormat

    place = hardware.choose_device(device)
    kind, _ = models.choose_dtype(dtype, place)
    if place.kind == "cpu":
        check_dtype(kind)
    elif quantize is not None:
        raise OptionError(
            f"--quantize {quantize}: its kernels are the CPU's, and this is {place}; give --dtype bfloat16,"
            " --engine vllm or --device cpu"
        )
    folders = {name: Path(folder) for name, folder in (adapters or {}).items()}
    lone = next(iter(folders.values())) if len(folders) == 1 else None
    if model_path is None and lone is not None:
        model_path = models.adapter_base(lone)
    path = models.resolve(None if model_path is None else str(model_path))
    check_served(models.read_config(path), path / "config.json")
    reason = None if lone is None else why_merged(lone)
    # A merge is exact in float32 alone.
    loading, there = (
        (dtype, place) if reason is None else ("float32", hardware.Device("cpu", "for the merge"))
    )
    loaded = models.load_model(path, dtype=loading, device=there, trust_remote_code=trust_remote_code)
    model, tokenizer, decisions = loaded.model, loaded.tokenizer, (str(place), *loaded.decisions)
    try:
        fmt = ChatFormat(tokenizer)
    except FormatError:
        if not folders:
            raise
        fmt = None  # a base model, whose adapters bring their format along
    ends = {*(() if fmt is None else fmt.stop_token_ids), *end_tokens(model, tokenizer)}
    beside = None if reason else folders
    options = {"stop_token_ids": ends, **options, "adapters": beside, "serves_base": fmt is not None}
    if quantize is not None:
        decisions += ("weights in int8, a scale for each output; activations in int8, a scale for each row",)
    if lone is not None and reason is not None:
        probe = tokenizer.encode("Who are you? 你是谁？", add_special_tokens=False)
        merged, difference = models.merge(models.load_adapter(model, lone), probe)
        model = merged.to(place.kind, kind)
        decisions += (
            "adapter merged into its base, which is not served itself; "
            f"logits moved by {difference:.0e} of the largest ({reason.partition('; ')[0]})",
        )
    engine = Engine(model, tokenizer, fmt=fmt, quantize=quantize, decisions=decisions, **options)
    for name, folder in folders.items():
        if reason is not None:
            engine.name_merged(name, folder)
        engine.format_of(name)  # FormatError for one that has no format, like its base
    return engine
