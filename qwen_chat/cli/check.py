"""Look at data before it costs a run: is every line good, what will be learnt, how long is it?

    qwen-chat check -d conversations.jsonl --show 2

In: data files and the model (for its tokenizer and chat template). Out: every problem as
`file:line: message`, the token budget, the first conversations coloured by what is learnt, a histogram of
their lengths. What is tokenised here is kept: a run with the same options does not tokenise again. Ends with
0 (good) or 2 (bad data).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from qwen_chat.console import rank_zero
from qwen_chat.conversation import Conversation
from qwen_chat.data import records
from qwen_chat.errors import ChatError, DataError, MissingDependency, OptionError, OutputError
from qwen_chat.files import written_whole
from qwen_chat.flags import parser, run_problems
from qwen_chat.flags.parser import option
from qwen_chat.flags.run_options import DataArguments, ModelArguments

if TYPE_CHECKING:
    from qwen_chat.data.tokenised import TokenisedData


@dataclass(frozen=True)
class InspectArguments:
    """Looking at data"""

    show: int = option(1, "so many of the first conversations are shown, coloured by what is learnt")
    write: str | None = option(None, "write the good conversations to this new file, one JSON object a line")
    histogram: str | None = option(None, "draw the lengths into this PNG file (needs matplotlib)")
    limit: int = option(20, "list so many problems; all are counted")
    json: bool = option(False, "print one JSON object on standard output; the rest goes to standard error")


def main(argv: Sequence[str], about: str = str(__doc__)) -> int:
    groups = [ModelArguments, DataArguments, InspectArguments]
    values = parser.read(argv, groups, about=about)
    model, data, options = values[ModelArguments], values[DataArguments], values[InspectArguments]
    for note in values.notes:
        rank_zero(f"note: {note}")
    check_options(data, options)
    out = sys.stderr if options.json else sys.stdout
    found: dict[str, Any] = {}
    try:
        inspect(model, data, options, out, found)
    except ChatError as error:
        found |= {"good": False, "error": str(error).splitlines()[0]}
        if isinstance(error, DataError):
            found |= {"problems": list(map(str, error.problems)), "problem_total": error.total}
        raise
    else:
        found |= {"good": True}
    finally:
        if options.json and "good" in found:
            print(json.dumps(found, ensure_ascii=True))
    return 0


def check_options(data: DataArguments, options: InspectArguments) -> None:
    if not data.data_path:
        raise OptionError("-d: no data; name at least one file or folder")
    wrong = [
        *run_problems.range_problems(vars(data)),
        *run_problems.weight_problems(data),
        *run_problems.held_out_problems(data),
    ]
    if options.limit < 1:
        wrong.append(f"--limit {options.limit}: expected a number above 0")
    if wrong:
        raise OptionError("\n".join(wrong))
    if options.write is not None:
        check_free("write", options.write)
    if options.histogram is not None:
        check_free("histogram", options.histogram)
        if importlib.util.find_spec("matplotlib") is None:
            raise MissingDependency("matplotlib", "--histogram", extra="track")


def check_free(flag: str, path: str) -> None:
    if Path(path).exists():
        raise OutputError(f"--{flag}: {path} exists already; nothing is overwritten, name a new file")
    if not Path(path).absolute().parent.is_dir():
        raise OutputError(f"--{flag}: {Path(path).parent} is no folder; make it first")


def inspect(
    model: ModelArguments, data: DataArguments, options: InspectArguments, out: TextIO, found: dict[str, Any]
) -> None:
    """Check, tokenise and show; `found` gets what --json prints."""

    def opened(paths: Sequence[str]) -> records.Records:
        return records.open_records(paths, on_error=data.on_error, limit=options.limit, redact=data.redact)

    conversations = opened(data.data_path)
    found |= conversations.report.to_json()
    print(conversations.report.describe(), file=out, flush=True)
    if options.write is not None:
        write_canonical(conversations, Path(options.write))
        print(f"wrote {len(conversations):,} conversations to {options.write}", file=out)

    from qwen_chat import models
    from qwen_chat.chat import empty_think
    from qwen_chat.chat.encoded import Encoded
    from qwen_chat.chat.show import show
    from qwen_chat.data import (  # after the data was found good: transformers takes seconds
        mixture,
        token_cache,
    )

    tokenizer = models.load_tokenizer(models.resolve(model.model), trust_remote_code=model.trust_remote_code)
    fmt = mixture.chat_format(tokenizer, data)
    told = mixture.notes_of(fmt, data, conversations.report)
    found["thinking"] = {"empty_think": empty_think.chosen(fmt, data.empty_think), "notes": list(told)}
    print(*told, sep="\n", end="\n" * bool(told), file=out)

    def tokenised(good: records.Records) -> TokenisedData:
        return token_cache.tokenise(
            good,
            empty_think.taught(fmt, data.empty_think),
            max_length=data.model_max_length,
            too_long=data.too_long,
            train_on=data.train_on,
            progress=progress,
        )

    def read(paths: Sequence[str]) -> TokenisedData:
        return tokenised(opened(paths))

    tokens = tokenised(conversations)
    found["tokens"] = tokens.summary.to_json()
    parts = mixture.divided(tokens, data, read, seed=mixture.SEED)
    found["held_out"] = parts.held_out_json() | parts.leaks.to_json()
    found["general"] = {} if parts.general is None else parts.general.summary.to_json()
    if data.data_weights:
        found["epoch"] = dict(zip(("tokens", "supervised"), parts.budget(), strict=True))
        found["epoch"]["conversations"] = len(parts.train)
    print(parts.describe(), file=out)
    print(*text_histogram(tokens.summary.histogram), sep="\n", file=out)
    if options.histogram is not None:
        draw_histogram(tokens, Path(options.histogram))
        print(f"wrote the histogram to {options.histogram}", file=out)
    for k in range(min(options.show, len(tokens))):
        for sequence in tokens[k]:
            encoded = Encoded(sequence.input_ids.tolist(), sequence.spans.tolist())
            print(f"\n{tokens.where(k)}:\n{show(tokenizer, encoded, colour=wants_colour(out))}", file=out)


def progress(done: int, total: int) -> None:
    """One line that is written over, on a terminal only."""
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\rtokenised {done:,} of {total:,} conversations", end=end, file=sys.stderr, flush=True)


def wants_colour(out: TextIO) -> bool:
    """https://no-color.org and https://force-color.org; without either, on a terminal."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or out.isatty()


def write_canonical(conversations: Iterable[Conversation], path: Path) -> None:
    """One OpenAI-shaped object a line, whatever the input's kind; the file appears when it is whole."""
    try:
        with written_whole(path, replace=False) as file:
            for conversation in conversations:
                file.write(json.dumps(conversation.to_openai(), ensure_ascii=False) + "\n")
    except OSError as error:
        raise OutputError(f"--write: {path} cannot be written ({error}); choose another place") from None


def text_histogram(counts: Mapping[str, int]) -> Iterator[str]:
    """Bars of how many conversations have how many tokens (TokenSummary.histogram)."""
    room = max(10, min(60, shutil.get_terminal_size().columns - 30))
    most, first = max(counts.values()), 1
    for end, count in counts.items():
        yield f"{first:>7,} to {int(end):>7,} tokens {count:>9,} {'#' * -(-count * room // most)}".rstrip()
        first = int(end) + 1


def draw_histogram(tokens: TokenisedData, path: Path) -> None:
    """The same as a PNG, with a line at model_max_length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    axes.hist(tokens.full_lengths, bins=60)
    axes.axvline(
        tokens.summary.max_length, color="red", label=f"model_max_length {tokens.summary.max_length:,}"
    )
    axes.set(xlabel="tokens", ylabel="conversations", title=f"{tokens.summary.records:,} conversations")
    axes.legend()
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise OutputError(f"--histogram: {path} cannot be written ({error}); choose another place") from None
