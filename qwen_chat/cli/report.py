"""A run as a page: what it learnt from, how it went, what came of it; several runs beside each other.

In: folders of runs, finished or not. Out: one HTML file that needs no network: `report.html` in the run's folder, or
where -o says. Training writes it by itself, without samples: they take a model's time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_chat import place
from qwen_chat.errors import OptionError
from qwen_chat.files import write_whole
from qwen_chat.flags import parser
from qwen_chat.flags.parser import option
from qwen_chat.report.page import page
from qwen_chat.report.past_run import SAMPLES_FILE, PastRun, Sample
from qwen_chat.training.run_folder import PAGE_FILE

if TYPE_CHECKING:
    from qwen_chat.inference.engine import Engine


@dataclass(frozen=True)
class ReportArguments:
    """Report"""

    run: tuple[str, ...] = option((), "folders of runs; also without the flag", appends=True)
    output: str | None = option(None, "the page's file; report.html in the run's folder without it", "-o")
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
    if wanted.samples and len(folders) > 1:
        raise OptionError(f"--samples {wanted.samples}: for one run at a time")
    if wanted.output is None and len(folders) > 1:
        raise OptionError("several runs: give the page's file with -o")
    runs = [PastRun.read(Path(folder).expanduser()) for folder in folders]
    if wanted.samples:
        answered = samples(runs[0], wanted.samples, wanted.max_new_tokens)
        lines = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in answered)
        write_whole(runs[0].folder / SAMPLES_FILE, lines)
        runs = [PastRun.read(runs[0].folder)]
    file = Path(wanted.output).expanduser() if wanted.output else runs[0].folder / PAGE_FILE
    write_whole(file, page(runs))
    print(f"wrote {file}", file=sys.stderr)
    return 0


def samples(run: PastRun, count: int, max_tokens: int) -> list[Sample]:
    """The first questions of the held-out data, or of the training data, answered greedily by base and result."""
    from qwen_chat.inference.loading import load_engine
    from qwen_chat.inference.sampling import GenerationRequest

    if not run.is_finished:
        raise OptionError(f"{run.folder}: the run did not finish, so nothing of it can be asked")
    questions, base = first_questions(run, count), run.facts["model"]

    def answered(engine: Engine, adapter: str | None) -> list[str]:
        fmt = engine.format_of(adapter)
        prompts = [fmt.prompt_ids([{"role": "user", "content": question}]) for question in questions]
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
    return [Sample(*one) for one in zip(questions, before, after, strict=True)]


def first_questions(run: PastRun, count: int) -> list[str]:
    """What a user says first, each once."""
    from qwen_chat.data.records import open_records

    options = run.facts["options"]
    found: dict[str, None] = {}
    paths = [*options["eval_data_path"], *options["data_path"]]
    for conversation in open_records(paths, on_error="skip", redact=options.get("redact", False)):
        first = next((m.content for m in conversation.messages if m.role == "user"), "")
        if first:
            found[first] = None
        if len(found) == count:
            break
    return list(found)
