"""Write a model as other programs serve it: one GGUF file, a command for vLLM, a folder for a hub.

    qwen-chat export --adapter output_data/RUN --to gguf --type q8_0 -o exported

In: a model's folder, or an adapter's (merged first, and compared). Out: a new folder. Nothing is sent anywhere.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwen_chat import place
from qwen_chat.console import rank_zero
from qwen_chat.errors import OptionError
from qwen_chat.flags import parser
from qwen_chat.flags.parser import option
from qwen_chat.flags.run_options import ModelArguments


@dataclass(frozen=True)
class ExportArguments:
    """Exporting"""

    to: Literal["gguf", "vllm", "hub"] | None = option(None, "what for")
    adapter: str | None = option(None, "an adapter's folder; it is merged into its base first")
    output: str | None = option(None, "the new folder", "-o", "--output_dir")
    type: str = option("q8_0", "numbers of a GGUF: f32, f16, bf16, q8_0, q4_0; others with --llama_quantize")
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
        raise OptionError("--to: not given; expected gguf, vllm or hub")
    if options.output is None:
        raise OptionError("-o: no folder; name a new one for what is exported")
    if chosen.model is None and options.adapter is None:
        raise OptionError("-m: no model; give a model's folder, or an adapter's with --adapter")

    from qwen_chat.export import targets
    from qwen_chat.export.source import check_new, find_exported

    folder = Path(options.output).expanduser()
    check_new(folder)
    adapters = [] if options.adapter is None else [options.adapter]
    source = find_exported(chosen.model, adapters, any_base=options.any_base)
    model = source.base
    if adapters and options.to == "vllm":
        raise OptionError(
            f"--to vllm --adapter: the command names a folder that stays; merge first ({place.invocation('merge')}),"
            " then give the merged folder with -m"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".merged-", dir=folder.parent) as room:
        if adapters:
            from qwen_chat.export.merged_model import merged_folder

            model = Path(room) / Path(adapters[0]).resolve().name
            comparison = merged_folder(
                source,
                (1.0,),
                source.data(options.data_path),
                model,
                trust_remote_code=chosen.trust_remote_code,
            )
            for line in comparison.lines():
                rank_zero(line)
        if options.to == "gguf":
            written = targets.to_gguf(model, folder, options.type, options.llama_quantize)
        elif options.to == "vllm":
            written = targets.to_vllm(model, folder)
        else:
            written = targets.to_hub(model, source, folder)
    for line in written.lines:
        rank_zero(line)
    if options.json:
        print(json.dumps({"output": str(folder), **written.facts}))
    return 0
