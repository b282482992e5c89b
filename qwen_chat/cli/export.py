"""Write a model as other programs serve it: a GGUF file, Ollama's Modelfile, OpenVINO's, GPTQ's or compressed weights,
a command for vLLM, a folder for a hub.

    qwen-chat export --adapter output_data/RUN --to gguf --type q8_0 -o exported

In: a model's folder, or an adapter's (merged first, and compared). Out: a new folder. Nothing is sent anywhere.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qwen_chat import place
from qwen_chat.console import rank_zero
from qwen_chat.errors import OptionError
from qwen_chat.flags import parser
from qwen_chat.flags.parser import option
from qwen_chat.flags.run_options import ModelArguments

if TYPE_CHECKING:
    from qwen_chat.export.source import Exported
    from qwen_chat.export.targets import WrittenExport

_ELSEWHERE = ("gptq", "compressed", "openvino")  # in an environment of their own


@dataclass(frozen=True)
class ExportArguments:
    """Exporting"""

    to: Literal["gguf", "ollama", "gptq", "compressed", "openvino", "vllm", "hub"] | None = option(
        None, "what for"
    )
    adapter: str | None = option(None, "an adapter's folder; it is merged into its base first")
    output: str | None = option(None, "the new folder", "-o", "--output_dir")
    adapter_only: bool = option(False, "--to gguf: the adapter alone, to be loaded over its base's file")
    type: str | None = option(
        None,
        "numbers of a GGUF: f32, f16, bf16, q8_0 (unless said), q4_0, others with --llama_quantize; of openvino: int8"
        " (unless said), int4; gptq: int4, int8; compressed: w4a16, int8",
    )
    python: str | None = option(None, "gptq, compressed, openvino: the interpreter of their own environment")
    llama_quantize: str | None = option(None, "path of llama.cpp's llama-quantize")
    data_path: tuple[str, ...] = option(
        (), "conversations to compare the merged model on; the run's own without it", "-d", appends=True
    )
    any_base: bool = option(False, "merge over a base whose weights are not those of the run")
    json: bool = option(False, "print one JSON object on standard output")


def main(argv: Sequence[str], about: str = str(__doc__)) -> int:
    values = parser.read(argv, [ModelArguments, ExportArguments], about=about)
    chosen, options = values[ModelArguments], values[ExportArguments]
    if options.to is None:
        raise OptionError("--to: not given; expected gguf, ollama, gptq, compressed, openvino, vllm or hub")
    if options.output is None:
        raise OptionError("-o: no folder; name a new one for what is exported")
    if chosen.model is None and options.adapter is None:
        raise OptionError("-m: no model; give a model's folder, or an adapter's with --adapter")

    from qwen_chat.export.source import check_new, find_exported, room_beside, shown_name

    folder = Path(options.output).expanduser()
    check_new(folder)
    adapters = [] if options.adapter is None else [options.adapter]
    source = find_exported(chosen.model, adapters, any_base=options.any_base)
    kind = _checked_type(options)
    merges = bool(adapters) and not options.adapter_only
    paths = source.data(options.data_path) if merges or options.to in _ELSEWHERE else ()
    with contextlib.ExitStack() as at_end:
        model = source.base
        if merges:
            from qwen_chat.export.merged_model import merged_folder

            model = at_end.enter_context(room_beside(folder)) / shown_name(source.adapters[0])
            comparison = merged_folder(
                source, (1.0,), paths, model, trust_remote_code=chosen.trust_remote_code
            )
            for line in comparison.lines():
                rank_zero(line)
        written = _write(options, source, model, folder, kind, paths)
    for line in written.lines:
        rank_zero(line)
    if options.json:
        print(json.dumps({"output": str(folder), **written.facts}))
    return 0


def _checked_type(options: ExportArguments) -> str:
    """The numbers' type, once everything that the flags rule out has been refused."""
    from qwen_chat.export import elsewhere, targets

    in_gguf = options.to in ("gguf", "ollama")
    for name, has_effect in (
        ("type", in_gguf or options.to in _ELSEWHERE),
        ("llama_quantize", in_gguf and not options.adapter_only),
        ("python", options.to in _ELSEWHERE),
    ):
        if getattr(options, name) is not None and not has_effect:
            beside = "--adapter_only" if options.adapter_only else f"--to {options.to}"
            raise OptionError(f"--{name}: has no effect with {beside}; leave it out")
    if options.adapter_only:
        if options.to != "gguf" or options.adapter is None:
            raise OptionError("--adapter_only: expected beside --to gguf and --adapter")
        return targets.check_adapter_type(options.type or "f32")
    if options.adapter and options.to == "vllm":
        raise OptionError(
            "--to vllm --adapter: the command names a folder that stays; merge first"
            f" ({place.invocation('merge')}), then give the merged folder with -m"
        )
    if options.to in _ELSEWHERE:
        elsewhere.settings(options.to, options.type)
        elsewhere.check_environment(options.to, options.python)
    elif in_gguf:
        return targets.check_type(options.type or "q8_0", options.llama_quantize)
    return options.type or ""


def _write(
    options: ExportArguments, source: Exported, model: Path, folder: Path, kind: str, paths: Sequence[str]
) -> WrittenExport:
    from qwen_chat.export import targets

    if options.adapter_only:
        return targets.to_gguf_adapter(source, folder, kind)
    if options.to == "gguf":
        return targets.to_gguf(model, folder, kind, options.llama_quantize)
    if options.to == "ollama":
        return targets.to_ollama(model, folder, kind, options.llama_quantize)
    if options.to in _ELSEWHERE:
        return targets.to_elsewhere(options.to, source, model, folder, kind, str(options.python), paths)
    return targets.to_vllm(model, folder) if options.to == "vllm" else targets.to_hub(model, source, folder)
