"""A run as a page: what it learnt from, how it went, what came of it; several runs beside each other.

In: folders of runs, finished or not. Out: one HTML file that needs no network: `report.html` in the run's folder with
the loss as `loss.png` beside it, `compared.html` here for several, or where -o says. Training writes it by itself,
without samples: they take a model's time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_chat import place
from qwen_chat.conversation import Conversation, Json
from qwen_chat.errors import OptionError, OutputError
from qwen_chat.files import write_whole
from qwen_chat.flags import parser
from qwen_chat.flags.parser import option
from qwen_chat.report.page import write_page, write_page_as
from qwen_chat.report.past_run import SAMPLES_FILE, PastRun, Sample

if TYPE_CHECKING:
    from qwen_chat.inference.engine import Engine


COMPARED_FILE = "compared.html"


@dataclass(frozen=True)
class ReportArguments:
    """Report"""

    run: tuple[str, ...] = option((), "folders of runs; also without the flag", appends=True)
    output: str | None = option(
        None,
        "the page's file; report.html in the run's folder without it, compared.html here for several",
        "-o",
    )
    samples: int = option(0, "questions of its data that base and result answer, for one run")
    max_new_tokens: int = option(96, "longest answer of a sample in tokens")


def main(words: Sequence[str], about: str = __doc__ or "") -> int:
    """Write the page that is asked for."""
    first = next((k for k, word in enumerate(words) if word.startswith("-")), len(words))
    folders = list(words[:first])
    wanted = parser.read(words[first:], [ReportArguments], about=about)[ReportArguments]
    folders += wanted.run
    if not folders:
        raise OptionError(f"expected the folder of a run: {place.invocation('report')} DIR")
    if wanted.output == "":
        raise OptionError("-o: an empty value; give the page's file, or leave the flag out")
    if wanted.samples and len(folders) > 1:
        raise OptionError(f"--samples {wanted.samples}: for one run at a time")
    if wanted.samples < 0:
        raise OptionError(f"--samples {wanted.samples}: expected 0 or more")
    if wanted.max_new_tokens < 1:
        raise OptionError(f"--max_new_tokens {wanted.max_new_tokens}: expected a number above 0")
    runs = [PastRun.read(Path(folder).expanduser()) for folder in folders]
    if wanted.samples:
        answered = samples(runs[0], wanted.samples, wanted.max_new_tokens)
        lines = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in answered)
        try:
            write_whole(runs[0].folder / SAMPLES_FILE, lines)
        except OSError as error:
            raise OutputError(f"{runs[0].folder}: cannot be written ({error.strerror})") from None
        runs = [PastRun.read(runs[0].folder)]
    if wanted.output is None and len(runs) == 1:
        file = write_page(runs[0].folder)
    else:
        file = Path(wanted.output or COMPARED_FILE).expanduser()
        write_page_as(file, runs)
    print(f"wrote {file}", file=sys.stderr)
    return 0


def samples(run: PastRun, count: int, max_tokens: int) -> list[Sample]:
    """Questions of the held-out data, or of the training data, answered greedily by base and result."""
    from qwen_chat.inference.loading import load_engine
    from qwen_chat.inference.sampling import GenerationRequest

    if not run.is_finished:
        raise OptionError(f"{run.folder}: the run did not finish, so nothing of it can be asked")
    asked, base = sample_prompts(run, count), run.facts["model"]

    def answered(engine: Engine, adapter: str | None) -> list[str]:
        fmt = engine.format_of(adapter)
        prompts = [
            fmt.prompt_ids(one["messages"], one.get("tools"), **one.get("chat_template_kwargs", {}))
            for one in asked.values()
        ]
        return [
            done.text
            for done in engine.generate(
                [
                    GenerationRequest(ids, max_tokens=max_tokens, temperature=0, adapter=adapter)
                    for ids in prompts
                ]
            )
        ]

    before = None
    if (run.folder / "adapter_config.json").is_file():
        with load_engine(base, adapters={"tuned": run.folder}) as engine:
            after = answered(engine, "tuned")
            before = answered(engine, None) if engine.serves_base else None
    else:
        with load_engine(run.folder) as engine:
            after = answered(engine, None)
    if before is None:
        with load_engine(base) as engine:
            before = answered(engine, None)
    return [Sample(*one) for one in zip(asked, before, after, strict=True)]


def sample_prompts(run: PastRun, count: int) -> dict[str, Json]:
    """What a user says first and the whole prompt behind it, each once, from all over the held-out data; where there
    are too few, from the training data too."""
    from qwen_chat.data.held_out import Wordings, parted
    from qwen_chat.data.records import open_records

    options = run.facts["options"]
    found: dict[str, Json] = {}
    read = partial(open_records, on_error="skip", redact=options.get("redact", False))
    learnt = read(options["data_path"])
    sources: list[Sequence[Conversation]] = [learnt]
    if options["eval_data_path"]:
        sources.insert(0, read(options["eval_data_path"]))
    elif share := options.get("eval_share"):
        sources.insert(0, [learnt[int(i)] for i in parted(Wordings(learnt), share)[1]])
    for source in sources:
        stride = max(1, len(source) // max(1, count - len(found)))
        for number in (i for first in range(stride) for i in range(first, len(source), stride)):
            if len(found) == count:
                return found
            if source[number].document is not None:
                continue
            asked = source[number].to_openai()
            replies = (k for k, message in enumerate(asked["messages"]) if message["role"] == "assistant")
            asked["messages"] = asked["messages"][: next(replies, 0)]
            if asked["messages"]:
                found.setdefault(str(asked["messages"][-1]["content"]), asked)
    return found
