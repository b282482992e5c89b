"""Merge an adapter into its base, a layer at a time, and compare the two before the new folder is there.

    qwen-chat merge --adapter output_data/RUN -o merged

In: an adapter's folder (several with --weights), its base, some of the run's data. Out: a folder that every program
loads as it loads the base. The base stays unquantised, for Q-LoRA too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_chat import place
from qwen_chat.console import rank_zero
from qwen_chat.errors import OptionError
from qwen_chat.flags import parser
from qwen_chat.flags.parser import option
from qwen_chat.flags.run_options import ModelArguments


@dataclass(frozen=True)
class MergeArguments:
    """Merging"""

    adapter: tuple[str, ...] = option((), "an adapter's folder; several: they add up", appends=True)
    weights: tuple[float, ...] = option((), "how much of each adapter, in their order (1 each)")
    output: str | None = option(None, "the new folder", "-o", "--output_dir")
    data_path: tuple[str, ...] = option(
        (), "conversations to compare on; the run's own without it", "-d", appends=True
    )
    compare_tokens: int = option(1024, "so many tokens of them")
    any_base: bool = option(False, "merge over a base whose weights are not those of the run")
    json: bool = option(False, "print one JSON object on standard output")


def main(argv: Sequence[str], about: str = str(__doc__)) -> int:
    values = parser.read(argv, [ModelArguments, MergeArguments], about=about)
    chosen, options = values[ModelArguments], values[MergeArguments]
    weights = options.weights or (1.0,) * len(options.adapter)
    if not options.adapter:
        raise OptionError("--adapter: no adapter; give its folder")
    if options.output is None:
        raise OptionError("-o: no folder; name a new one for the merged model")
    if len(weights) != len(options.adapter):
        raise OptionError(
            f"--weights: {len(weights)} numbers for {len(options.adapter)} adapters; give one each, in their order"
        )
    if odd := [weight for weight in weights if not math.isfinite(weight)]:
        raise OptionError(f"--weights: {odd[0]}; expected finite numbers")
    if options.compare_tokens < 16:
        raise OptionError(f"--compare_tokens: {options.compare_tokens}; expected at least 16")

    from qwen_chat.export.source import check_new, find_exported, shown_path

    folder = Path(options.output).expanduser()
    check_new(folder)
    source = find_exported(chosen.model, options.adapter, any_base=options.any_base)
    paths = source.data(options.data_path)
    if source.in_four_bits:
        rank_zero(
            "a Q-LoRA run: its adapter was trained over the base in 4 bits and is merged over the unquantised base,"
            " so the merged model is not quite the one that was trained; both losses follow"
        )

    from qwen_chat.export.merged_model import merged_folder

    comparison = merged_folder(
        source,
        weights,
        paths,
        folder,
        tokens=options.compare_tokens,
        trust_remote_code=chosen.trust_remote_code,
    )
    for line in comparison.lines():
        rank_zero(line)
    rank_zero(f"merged into {folder}; now talk to it:")
    rank_zero(f"  {place.invocation('chat')} -m {shown_path(folder)}")
    if options.json:
        print(json.dumps({"output": str(folder), **comparison.to_json()}))
    return 0
