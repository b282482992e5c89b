"""How good is a model, or an adapter, on conversations that it has not seen?

    qwen-chat evaluate --adapter output_data/RUN -d held_out.jsonl --compare base

In: held-out conversations. Out: loss, perplexity and token accuracy of the replies; where tools are offered,
how often the model called the right ones rightly, called without need, or did not call; confidence intervals,
a confusion table, the worst cases in full. What has been computed is kept (by the content of model and data),
so a run that was killed goes on, and the same question asked again is answered at once.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qwen_chat import files, hardware, models
from qwen_chat.console import rank_zero
from qwen_chat.data import records
from qwen_chat.errors import DataError, FormatError, OptionError, OutputError
from qwen_chat.evaluation import run as evaluation_run
from qwen_chat.evaluation import scores, statistics
from qwen_chat.evaluation.cases import Case, cases_of
from qwen_chat.flags import parser
from qwen_chat.flags.parser import option
from qwen_chat.flags.run_options import ModelArguments
from qwen_chat.threads import in_own_thread

if TYPE_CHECKING:
    from qwen_chat.chat.format import ChatFormat

# What the owner of a model decides, and who asks a server cannot.
NOT_SERVED = (
    *("adapter", "attn_implementation", "trust_remote_code", "device", "tool_style", "model_max_length"),
    *("empty_think", "fresh", "system"),
)
RECIPE = 1  # raise it when the same model and data would give other replies


@dataclass(frozen=True)
class EvaluateArguments:
    """Evaluation"""

    data_path: tuple[str, ...] = option(
        (), "held-out conversations, as for training", "-d", old="data_paths", appends=True
    )
    adapter: str | None = option(None, "an adapter over the model; without -m over the base that it names")
    compare: str | None = option(
        None, "a second model folder, hub name or adapter folder; 'base': the model without its adapter"
    )
    calls: Literal["free", "strict", "required"] = option(
        "free", "strict: a call that is opened fits its schema; required: every reply is a call"
    )
    max_new_tokens: int = option(256, "longest reply")
    model_max_length: int = option(2048, "longer conversations are left out of the loss, and counted")
    batch_size: int = option(8, "replies written at once")
    limit: int | None = option(None, "only the first so many conversations")
    on_error: Literal["stop", "skip"] = option("stop", "bad lines stop it, or are counted and left out")
    tool_style: Literal["auto", "hermes", "qwen_agent", "xml"] = option(
        "auto", "how tools and calls are written"
    )
    system: str | None = option(
        None,
        "a text, or a file with it: the system message of conversations without one; without it the model's own",
        or_file=True,
    )
    template_kwargs: Mapping[str, Any] | None = option(
        None, "variables of the chat template, as JSON; without it those that the model was saved with"
    )
    empty_think: Literal["learn", "ignore"] | None = option(
        None, "an empty think block counts in the loss, or not; as in training"
    )
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = option(
        "auto", "where it computes; auto: an accelerator where one is"
    )
    url: str | None = option(
        None, "judge a model behind an OpenAI-compatible server (-m: its name there): replies, no losses"
    )
    api_key: str | None = option(None, "the key of --url's server; also API_KEY")
    output: str | None = option(None, "also write the whole report to this JSON file", "-o")
    fresh: bool = option(False, "compute everything again")
    json: bool = option(False, "print one JSON object on standard output")


@dataclass
class Side:
    """One model and what was found about it."""

    name: str
    model: Path | None  # None: it is a server's
    adapter: Path | None
    losses: list[scores.SequenceLoss] = field(default_factory=list)
    judged: list[scores.Judged] = field(default_factory=list)
    dropped: int = 0  # conversations too long for the loss
    unanswered: int = 0  # turns whose prompt fills the context


def main(argv: Sequence[str], about: str = str(__doc__)) -> int:
    values = parser.read(argv, [ModelArguments, EvaluateArguments], about=about)
    chosen, options = values[ModelArguments], values[EvaluateArguments]
    for note in values.notes:
        rank_zero(f"note: {note}")
    if not options.data_path:
        raise OptionError("-d: no data; name at least one file of held-out conversations")
    for name in ("max_new_tokens", "batch_size", "model_max_length", "limit"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise OptionError(f"--{name}: {value}; expected a number above 0")
    if options.output is not None:
        check_output(Path(options.output))
    for name in NOT_SERVED if options.url else ("api_key",):
        if name in values.given:
            where = "with --url: the server decides it" if options.url else "without --url"
            raise OptionError(f"--{name} has no effect {where}; leave it out")
    hardware.choose_device(options.device)  # one that is not there is refused before anything is read
    data = records.open_records(options.data_path, on_error=options.on_error)
    cases = read_cases(data, options)
    if options.url is not None:
        sides = ask_server(options.url, chosen.model, cases, options)
    else:
        sides = [find_side(chosen.model, options.adapter)]
        if options.compare is not None:
            named = options.compare
            sides.append(find_side(chosen.model, None) if named == "base" else other(named))
        for side in sides:
            fill(side, data, cases, chosen, options)
    report = write_report(sides, data, options)
    if options.output is not None:
        try:
            files.write_whole(Path(options.output), json.dumps(report, ensure_ascii=False, indent=1))
        except OSError as error:
            raise OutputError(
                f"-o {options.output}: cannot be written ({error.strerror}); what was computed is kept, so the same"
                " command with another file answers at once"
            ) from None
    print(json.dumps(report, ensure_ascii=False) if options.json else report_text(report))
    return 0


def check_output(file: Path) -> None:
    """OptionError where the report could not be written; an earlier report gives way, nothing else does."""
    if not file.resolve().parent.is_dir():
        raise OptionError(f"-o: {file.parent} is no folder; make it first")
    if not file.exists():
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or not {"skipped_lines", "calls", "model"} <= found.keys():
        raise OptionError(f"-o: {file} holds something else than an evaluation; give another file")


def find_side(model: str | None, adapter: str | None) -> Side:
    """Resolve the names; the base of an adapter is the model given, else the one that it names."""
    folder = None if adapter is None else Path(adapter)
    base = models.adapter_base(folder) if folder is not None else None
    path = models.resolve(model or base)
    return Side(str(adapter or model or path.name), path, folder)


def other(name: str) -> Side:
    """The model of --compare: an adapter's folder, or a model."""
    return find_side(None, name) if (Path(name) / "adapter_config.json").is_file() else find_side(name, None)


def read_cases(data: records.Records, options: EvaluateArguments) -> list[Case]:
    """The turns to be written, with the answers that the file accepts besides its own."""
    accepted = [accepted_answers(path) for path in data.paths]
    cases = []
    for i in range(count(data, options)):
        where = data.where(i)
        line = int(where.rpartition(":")[2])
        try:
            cases += cases_of(data[i], where, accepted[data.file_of(i)].get(line))
        except FormatError as error:
            raise DataError(str(error)) from None
    return cases


def count(data: records.Records, options: EvaluateArguments) -> int:
    return min(len(data), options.limit or len(data))


def accepted_answers(path: Path) -> dict[int, dict[int, Any]]:
    """Line -> message -> its "accepted" list, from a .jsonl or .jsonl.gz file. Raises DataError for marks in
    another kind of file: they would be forgotten."""
    lined = path.name.endswith((".jsonl", ".jsonl.gz"))
    found: dict[int, dict[int, Any]] = {}
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if '"accepted"' not in line:
                continue
            if not lined:
                raise DataError(
                    f'{path}: "accepted" is read from .jsonl files; write one conversation a line'
                )
            try:
                record = json.loads(line)
            except ValueError:  # a bad line that --on_error skip leaves out
                continue
            messages = record.get("messages") if isinstance(record, dict) else None
            listed = messages if isinstance(messages, list) else []
            marked = {
                k: m["accepted"] for k, m in enumerate(listed) if isinstance(m, dict) and "accepted" in m
            }
            if marked:
                found[number] = marked
    return found


def fill(
    side: Side,
    data: records.Records,
    cases: list[Case],
    chosen: ModelArguments,
    options: EvaluateArguments,
) -> None:
    """Fill in what is known of a model; what is not kept from an earlier run is computed."""
    from tqdm import tqdm

    from qwen_chat.inference.engine import Engine

    kept = open_kept(side, data, options)
    model, fmt = in_own_thread(load_and_score)(side, data, kept, chosen, options)
    if not cases:
        return
    with Engine(model, fmt.tokenizer, max_batch=options.batch_size) as engine:
        answered = evaluation_run.fitting(cases, fmt, min(engine.context_length, engine.kv_tokens))
        side.unanswered = len(cases) - len(answered)
        with tqdm(total=len(answered), desc=f"{side.name}: calls", file=sys.stderr) as bar:
            texts = evaluation_run.write_replies(
                engine,
                fmt,
                answered,
                kept,
                calls=options.calls,
                max_tokens=options.max_new_tokens,
                batch=options.batch_size,
                tick=lambda done: move(bar, done),
            )
    side.judged = evaluation_run.judge(answered, texts, fmt)


def ask_server(url: str, model: str | None, cases: list[Case], options: EvaluateArguments) -> list[Side]:
    """The models that a server calls by these names (none: its first), judged by their replies."""
    from tqdm import tqdm

    from qwen_chat.evaluation.served import ServedModel
    from qwen_chat.tools.client import HttpClient

    if not cases:
        raise OptionError(
            f"--url {url}: no conversation of the data offers tools, and losses need the model itself; give -m without"
            " --url"
        )
    client = HttpClient(url, api_key=options.api_key or os.environ.get("API_KEY"))
    listed = client.models()
    names = [model or listed[0], *([] if options.compare is None else [options.compare])]
    sides = []
    for name in names:
        if name not in listed:
            raise OptionError(f"{name}: {url} has no such model; it lists {', '.join(listed)}")
        side = Side(name, None, None)
        served = ServedModel(client, name, options.calls, options.max_new_tokens, options.template_kwargs)
        with tqdm(total=len(cases), desc=f"{name}: calls", file=sys.stderr) as bar:
            side.judged = served.judge(cases, options.batch_size, partial(move, bar))
        side.unanswered = len(cases) - len(side.judged)
        sides.append(side)
    return sides


def load_and_score(
    side: Side,
    data: records.Records,
    kept: evaluation_run.Kept,
    chosen: ModelArguments,
    options: EvaluateArguments,
) -> tuple[Any, ChatFormat]:
    """The model and its chat format, when its losses on the data are known."""
    import torch  # noqa: F401  its word counts for the device
    from tqdm import tqdm

    from qwen_chat.chat.empty_think import taught
    from qwen_chat.chat.format import ChatFormat
    from qwen_chat.data import token_cache

    device = hardware.choose_device(options.device)
    assert side.model is not None
    loaded = models.load_model(
        side.model,
        adapter=side.adapter,
        attention=chosen.attn_implementation,
        device=device,
        trust_remote_code=chosen.trust_remote_code,
    )
    rank_zero(f"{side.name}: {'; '.join((str(device), *loaded.decisions))}")
    model = loaded.model
    if side.adapter is not None:  # merged, an adapter costs nothing while decoding
        model, _ = models.merge(
            model, loaded.tokenizer.encode("Who are you? 你是谁？", add_special_tokens=False)
        )
    fmt = ChatFormat(
        loaded.tokenizer,
        tool_style=options.tool_style,
        template_kwargs=options.template_kwargs,
        system=options.system,
    )
    learnt = taught(fmt, options.empty_think)
    tokens = token_cache.tokenise(data, learnt, max_length=options.model_max_length, too_long="drop")
    wanted = count(data, options)
    chosen_ones = [i for i in range(len(tokens)) if tokens.record_of(i) < wanted]
    side.dropped = wanted - len(set(map(tokens.record_of, chosen_ones)))
    with tqdm(total=len(chosen_ones), desc=f"{side.name}: loss", file=sys.stderr) as bar:
        side.losses = evaluation_run.sequence_losses(
            model, tokens, chosen_ones, kept, lambda done: move(bar, done)
        )
    return model, fmt


def move(bar: Any, done: int) -> None:
    bar.update(done - bar.n)


def open_kept(side: Side, data: records.Records, options: EvaluateArguments) -> evaluation_run.Kept:
    """The results kept for exactly this model, data and way of asking."""
    asked = [RECIPE, data.fingerprint, options.calls, options.max_new_tokens, options.tool_style]
    asked += [options.template_kwargs, options.empty_think]
    if options.system is not None:
        asked.append(options.system)
    if (device := hardware.choose_device(options.device)).kind != "cpu":
        asked.append(device.kind)
    assert side.model is not None
    identity = [
        *asked,
        identify(side.model),
        side.adapter and identify(side.adapter),
        options.model_max_length,
    ]
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
    path = files.cache_dir() / "evaluations" / f"{name}.jsonl"
    if options.fresh:
        path.unlink(missing_ok=True)
    return evaluation_run.Kept(path)


def identify(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of every file that makes the model what it is."""
    weights = sorted(
        f for f in folder.iterdir() if f.suffix in (".json", ".safetensors", ".bin", ".jinja", ".txt")
    )
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in weights]


def write_report(sides: list[Side], data: records.Records, options: EvaluateArguments) -> dict[str, Any]:
    """Everything as plain values: `model`, `compared_with` and `comparison` where there are two."""
    report: dict[str, Any] = {"data": list(options.data_path), "conversations": count(data, options)}
    report["skipped_lines"], report["calls"] = data.report.skipped, options.calls
    if options.url is not None:
        report["url"] = options.url
    for key, side in zip(("model", "compared_with"), sides, strict=False):
        report[key] = {
            "name": side.name,
            **scores.loss_figures(side.losses),
            "too_long": side.dropped,
            "prompt_too_long": side.unanswered,
            "tools": scores.summary(side.judged) if side.judged else None,
            "worst": scores.worst(side.judged),
        }
    if len(sides) == 2:
        report["comparison"] = compare_sides(sides[1], sides[0])
    return report


def compare_sides(base: Side, side: Side) -> dict[str, Any]:
    """How much `side` is above `base`, on the conversations and turns that both have."""
    before = {one.where: one.loss / max(one.tokens, 1) for one in base.losses}
    both = [one for one in side.losses if one.where in before]
    judged = {one.case.key: one for one in base.judged}
    turns = [(judged[one.case.key], one) for one in side.judged if one.case.key in judged]
    wanted = [(a.score, b.score) for a, b in turns if b.case.wanted]
    others = [(a.score, b.score) for a, b in turns if not b.case.wanted]
    pairs = {
        "loss": ([before[o.where] for o in both], [o.loss / max(o.tokens, 1) for o in both]),
        "exact": ([float(a.exact) for a, _ in wanted], [float(b.exact) for _, b in wanted]),
        "false_calls": ([float(a.false_call) for a, _ in others], [float(b.false_call) for _, b in others]),
    }
    found = {name: statistics.paired(a, b) for name, (a, b) in pairs.items()}
    return {name: None if value is None else asdict(value) for name, value in found.items()}


def report_text(report: dict[str, Any]) -> str:
    """The report for a person."""
    sides = [report[key] for key in ("model", "compared_with") if key in report]
    lines = [f"{report['conversations']} conversations from {', '.join(report['data'])}"]
    if report["skipped_lines"]:
        lines.append(f"bad lines left out by --on_error skip: {report['skipped_lines']}")
    if "url" in report:
        lines.append(f"judged by its replies at {report['url']}; losses are not computed there")
    else:
        lines += [table(sides, ("loss", "perplexity", "token_accuracy"), lambda side: side)]
    for side in sides:
        if side["too_long"]:
            lines.append(f"{side['name']}: {side['too_long']} conversations were too long and are left out")
    if sides[0]["tools"]:
        names = ("exact", "name", "arguments", "parallel", "missing", "false_calls", "valid", "unparsed")
        turns, wanted = sides[0]["tools"]["turns"], sides[0]["tools"]["wanted"]
        lines.append(f"\n{turns} turns with tools, {wanted} of them want calls ({report['calls']})")
        lines.append(table(sides, names, lambda side: side["tools"]))
        lines += [groups(sides[0]["tools"]), confusion(sides[0]["tools"]), worst_cases(sides[0]["worst"])]
    for name, found in (report.get("comparison") or {}).items():
        if found is not None:
            lines.append(
                f"{name}: {found['difference']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}] against "
                f"{sides[1]['name']}, p = {found['p']:.3g} (paired, n = {found['n']})"
            )
    return "\n".join(line for line in lines if line)


def table(sides: list[dict[str, Any]], names: tuple[str, ...], inside: Any) -> str:
    rows = [["", *(side["name"] for side in sides)]]
    rows += [[name, *(figure_text(inside(side)[name]) for side in sides)] for name in names]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(r, widths, strict=True)).rstrip() for r in rows
    )


def figure_text(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "-"
    return f"{figure['value']:.4f} [{figure['low']:.4f}, {figure['high']:.4f}] n={figure['n']}"


def groups(tools: dict[str, Any]) -> str:
    lines = ["\nby language"]
    for language, figures in tools["languages"].items():
        lines.append(
            f"  {language}: exact {figure_text(figures['exact'])}, false calls {figure_text(figures['false_calls'])}"
        )
    lines.append("by tool (turns that want it)")
    lines += [
        f"  {name}: exact {f['exact']} of {f['n']}, name {f['name']}" for name, f in tools["tools"].items()
    ]
    return "\n".join(lines)


def confusion(tools: dict[str, Any]) -> str:
    rows = [f"  {c['count']:5} {c['wanted']} -> {c['written']}" for c in tools["confusion"][:20]]
    more = len(tools["confusion"]) - len(rows)
    return "\n".join(["\nwanted -> written", *rows, *([f"  ... and {more} more pairs"] if more > 0 else [])])


def worst_cases(worst: list[dict[str, Any]]) -> str:
    lines = [f"\nthe {len(worst)} worst replies"] if worst else []
    for one in worst:
        lines.append(f"\n{one['where']}: {'; '.join(one['problems'])}")
        lines += [f"  {json.dumps(message, ensure_ascii=False)}" for message in one["messages"]]
        lines.append(f"  reference: {json.dumps(one['reference'], ensure_ascii=False)}")
        lines.append(f"  written:   {json.dumps(one['written'], ensure_ascii=False)}")
    return "\n".join(lines)
