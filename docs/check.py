"""Do the documents tell the truth? Links, paths, commands and flags are held against the checkout; lines end in time.

In: README*.md, CHANGELOG.md, docs/*.md. Out: one line a fault; exit 0 when there is none, 1 otherwise.

    python docs/check.py
    python docs/check.py --write     # the tables that are made from the code, made anew
"""

import ast
import importlib
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tomllib
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout

from docs.measure import FLOORS, PACKAGE
from qwen_chat import families
from qwen_chat.errors import OptionError
from qwen_chat.flags import config_file, parser, run_problems, training_fields
from qwen_chat.place import SCRIPTS

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(r"(?<![\w/.~{}-])(?:qwen_chat|finetune|fast_start|benchmarks|tests|docs)/[\w./*-]+")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
# Those that compute in the same arithmetic stand together.
SERVERS = ("ours", "llama-server-f32", "openvino-f32", "vllm", "transformers")
SERVERS += ("ours-int8", "llama-server-q8", "openvino-int8")
LONGEST_LINE = 120  # characters; tables, whose rows cannot be wrapped, excepted
MADE_BY_A_RUN = ("finetune/io_file/output_data/", "fast_start/fast_api_svc.log")
ROOMS = [room for floor in FLOORS for room in floor]
HOP = re.compile(r"`([a-z_]+(?:\.\w+)+)(?<!\.py)`")
COMMENT = re.compile(r"(?:^|\s+)#.*")
INLINE = re.compile(r"`((?:[A-Z_]+=\S+ )*(?:python|bash|make|qwen-chat) [^`\n]+)`")
OTHERS = {"llama-server", "ray", "serve", "kubectl", "python3", "git", "cd", "source", "curl"}  # not ours
CHINESE = ".zh-CN.md"
FOR_CONTRIBUTORS = ("architecture.md", "decisions.md")  # in English alone
DEFINITION = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Fault = str


def documents() -> list[Path]:
    """Every Markdown page that speaks to a reader."""
    return sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def commands(page: Path, under: str = "") -> list[str]:
    """The shell commands of a page's bash blocks, one a line: continuations joined, comments dropped. `under`: those
    of one section alone, by its heading of the second level."""
    text = page.read_text(encoding="utf-8")
    if under:
        text = text.partition(f"\n## {under}\n")[2].partition("\n## ")[0]
    found = []
    for language, block in FENCE.findall(text):
        if language in {"bash", "sh"}:
            joined = block.replace("\\\n", " ")
            stripped = (COMMENT.sub("", line).strip() for line in joined.splitlines())
            found += [" ".join(line.split()) for line in stripped if line]
    return found


def broken_links(page: Path) -> Iterator[Fault]:
    """Relative links whose file, or whose heading in it, does not exist."""
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists():
            yield f"link to {target}: no such file"
        elif anchor and file.suffix == ".md" and anchor not in headings(file):
            yield f"link to {target}: no such heading"


@cache
def headings(page: Path) -> frozenset[str]:
    """The anchors of a page's headings, as GitHub forms them."""
    titles = re.findall(r"^#+ +(.*)$", page.read_text(encoding="utf-8"), re.M)
    return frozenset(re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles)


def missing_paths(page: Path) -> Iterator[Fault]:
    """Paths of this checkout that a page names and that are not there."""
    for path in sorted(set(PATH.findall(page.read_text(encoding="utf-8")))):
        name = path.rstrip(".")
        if not name.startswith(MADE_BY_A_RUN) and not any(ROOT.glob(name.rstrip("/"))):
            yield f"names {name}, which does not exist"


def refused_commands(page: Path) -> Iterator[Fault]:
    """Commands of a page, in its blocks and between backticks, that cannot be given as they stand there."""
    between = INLINE.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    for command in dict.fromkeys([*commands(page), *(found for found in between if "..." not in found)]):
        for part in command.split(" && "):
            if reason := refusal(part):
                yield f"`{part}`: {reason}"


@cache
def refusal(command: str) -> str | None:
    """Why a command cannot be given: the program, script or target, or what its own parser says; None where it can."""
    words = shlex.split(command.removesuffix("&"))
    settings = {}
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, settings[name] = words.pop(0).partition("=")
    match words:
        case ["make", target] if not re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), re.M):
            return f"the Makefile has no {target}"
        case ["pip", "install", *wanted] if unknown := unknown_extras(wanted):
            return f"pyproject.toml has no extra {unknown[0]}"
        case ["qwen-chat", name, *rest]:
            return (
                from_parser(SCRIPTS[name], *rest) if name in SCRIPTS else f"qwen-chat has no command {name}"
            )
        case ["python", script, *rest] if script.endswith(".py"):
            return from_parser(script, *rest)
        case ["bash", script, *rest]:
            return from_shell(script, rest, settings)
        case ["sbatch", *rest]:  # its own flags come before the script, the run's behind it
            given = rest[rest.index("finetune/cluster/slurm.sh") + 1 :]
            return from_shell("finetune/finetune.sh", given, settings)
        case [program, *_] if Path(program).name not in OTHERS | {"make", "pip"}:
            return f"no check knows {program}"
    return None


def unknown_extras(wanted: Sequence[str]) -> list[str]:
    """The extras of `.[a,b]` that the wheel does not have."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    named = [name for word in wanted if word.startswith(".[") for name in word[2:-1].split(",")]
    return [name for name in named if name not in project["optional-dependencies"]]


def from_shell(script: str, words: Sequence[str], settings: Mapping[str, str]) -> str | None:
    """What finetune.sh, or finetune.py behind it, says against a command line."""
    done = subprocess.run(
        ["bash", str(ROOT / script), *words, "--dry_run"],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return done.stderr.strip()
    launched = shlex.split(done.stdout)
    return from_parser(SCRIPTS["tune"], *launched[launched.index(str(ROOT / SCRIPTS["tune"])) + 1 :])


class TakenError(Exception):
    """A script's parser has taken its words; nothing of it is run."""


def from_parser(script: str, *words: str) -> str | None:
    """What a script's own parser says against the words of its command line; None where it takes them."""
    if not (ROOT / script).is_file():
        return f"there is no {script}"
    if not words or "--help" in words:
        return None
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    with ExitStack() as patched:
        for owner, name in ((parser, "read"), (run_problems, "read_run_and"), (ArgumentParser, "parse_args")):
            patched.enter_context(patch.object(owner, name, stopping_behind(getattr(owner, name))))
        patched.enter_context(patch.object(ArgumentParser, "error", refuse))
        # The run.json that a command names is made by one before it.
        patched.enter_context(patch.object(config_file, "named", return_value=None))
        patched.enter_context(patch.object(sys, "argv", [script, *words]))
        try:
            # What is installed here does not matter, nor the data that --config names.
            if script == SCRIPTS["tune"]:
                run_problems.read_run_and(words, needs_data=False)
            module.main()
        except TakenError:
            return None
        except OptionError as error:
            return str(error)
    return f"{script} never read its words"


def stopping_behind(read: Callable[..., Any]) -> Callable[..., Any]:
    """A parser that ends its script where it would go on."""

    def read_and_stop(*words: Any, **options: Any) -> None:
        read(*words, **options)
        raise TakenError

    return read_and_stop


def refuse(parser: ArgumentParser, message: str) -> None:
    """argparse's error, without its usage."""
    raise OptionError(message)


def long_lines(page: Path) -> Iterator[Fault]:
    """Lines of text or code over LONGEST_LINE characters."""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if len(line) > LONGEST_LINE and not line.startswith("|"):
            yield f"line {number} has {len(line)} characters; wrap it at {LONGEST_LINE}"


def unequal_languages() -> Iterator[Fault]:
    """Each page but the contributors' is there in English and in Chinese, with the same things in the same order."""
    for english in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]:
        if english.name.endswith(CHINESE) or english.name in FOR_CONTRIBUTORS:
            continue
        chinese = chinese_of(english)
        if not chinese.exists():
            yield f"{english.relative_to(ROOT)}: {chinese.name} is missing"
            continue
        place = chinese.relative_to(ROOT)
        yield from (f"{place}: {fault}" for fault in unequal(english, chinese))
        for page, sister in ((english, chinese), (chinese, english)):
            if f"]({sister.name})" not in page.read_text(encoding="utf-8").split("\n")[2]:
                yield f"{page.relative_to(ROOT)}: its third line does not link to {sister.name}"


def unequal(english: Path, chinese: Path) -> Iterator[Fault]:
    """What a Chinese page has otherwise than the English one; a link to an English page is one of these things."""
    for what, read in (("heading", levels), ("table", tables), ("block", blocks)):
        ours, theirs = read(english), read(chinese)
        if len(ours) != len(theirs):
            yield f"{what}s: {len(theirs)}, {english.name} has {len(ours)}"
        for number, (a, b) in enumerate(zip(ours, theirs, strict=False), 1):
            if a != b:
                yield f"{what} {number}: `{b}` where {english.name} has `{a}`"
                break
    for target in LINK.findall(chinese.read_text(encoding="utf-8")):
        page = chinese.parent / target.partition("#")[0]
        if page.suffix == ".md" and page.name != english.name and chinese_of(page).exists():
            yield f"link to {target}, which is there in Chinese"


def levels(page: Path) -> list[str]:
    """The depth of each heading."""
    return re.findall(r"^#+(?= )", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)


def tables(page: Path) -> list[str]:
    """The size of each table."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found = (table.splitlines() for table in re.findall(r"(?:^\|.*\n)+", text, re.M))
    return [f"{len(rows)} rows of {rows[1].count('---')}" for rows in found]


def blocks(page: Path) -> list[str]:
    """The code blocks, without comments; of Python without texts too; of what is said or answered the kind alone."""
    found = []
    for language, code in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            tree = ast.parse(code)
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    node.value = ""
            code = ast.unparse(tree)
        elif language in {"json", ""}:
            code = ""
        found.append(f"{language}\n{COMMENT.sub('', code)}")
    return found


def chinese_of(page: Path) -> Path:
    return page.with_name(page.name.removesuffix(".md") + CHINESE)


def made_tables() -> dict[str, tuple[Path, str]]:
    """What is made from the code and from benchmarks/results: the table's name, its page, its text."""
    return {
        "models": (ROOT / "docs/models.md", families.families_table()),
        "training_fields": (ROOT / "docs/finetune.md", training_fields.markdown()),
        "floors": (ROOT / "docs/architecture.md", floors_table()),
        "modules": (ROOT / "docs/architecture.md", modules_table()),
        "large_loading": (ROOT / "docs/inference.md", large_loading_table()),
        "serve": (ROOT / "docs/inference.md", serve_table()),
        "large_serving": (ROOT / "docs/inference.md", large_serving_table()),
        "large_training": (ROOT / "docs/scale.md", large_training_table()),
        "quantize": (ROOT / "docs/inference.md", quantize_table()),
        "defaults": (ROOT / "docs/finetune.md", defaults_table("loss")),
        "forgotten": (ROOT / "docs/finetune.md", defaults_table("general")),
    }


def floors_table() -> str:
    """Which rooms may import which: each floor those above it."""
    rows = [", ".join(f"`{room}{_slash(room)}`" for room in rooms) for rooms in FLOORS]
    return "| floor | rooms |\n| --- | --- |\n" + "".join(
        f"| {k} | {row} |\n" for k, row in enumerate(rows, 1)
    )


def modules_table() -> str:
    """Every module and the first sentence of its docstring: the single ones, then wing by wing, in floor order."""
    wings = {f"`{room}/`": sorted((PACKAGE / room).glob("[a-z]*.py")) for room in ROOMS if _slash(room)}
    single = [PACKAGE / f"{room}.py" for room in ROOMS if not _slash(room)]
    parts = []
    for title, files in {"Single modules": single, **wings}.items():
        rows = "".join(f"| `{file.name}` | {first_sentence(file)} |\n" for file in files)
        parts.append(f"### {title}\n\n| module | holds |\n| --- | --- |\n{rows}")
    return "\n".join(parts)


def large_loading_table() -> str:
    """What benchmarks/bench_large.py measured of a 7B: memory of the service by number type."""
    rows = [
        (run, row["ready_peak_gib"], row["peak_gib"], round(row["ready_s"]))
        for run, row in large_rows("loading").items()
    ]
    return table(("weights", "peak when ready, GiB", "and when it has answered", "ready after, s"), rows)


def serve_table() -> str:
    """What benchmarks/bench_serve.py recorded: tokens per second of each server, within a model and an arithmetic."""
    record = json.loads((ROOT / "benchmarks/results/serve.json").read_text(encoding="utf-8"))
    found = {(row["model"], row["server"], row["concurrency"]): row for row in record["rows"]}
    rows = []
    for model in ("demo", "0.5b"):
        for server in SERVERS:
            each = [found.get((model, server, count)) for count in (1, 8, 32)]
            if each[0]:
                rates = (row["tokens_per_s"] if row else "" for row in each)
                rows.append((model, server, *rates, each[0]["ttft_ms_p50"]))
    titles = ("model", "server", "tokens/s alone", "8 at once", "32 at once", "first token alone, ms")
    return table(titles, rows)


def large_serving_table() -> str:
    """The same: tokens per second of our server and llama.cpp's."""
    found = large_rows("serving")
    rows = []
    for server in dict.fromkeys(row["server"] for row in found.values() if "server" in row):
        alone, many = (found[f"{server}, {count} at once"]["tokens_per_s"] for count in (1, 8))
        step = found[f"{server}, a step alone"]
        share = f"{step['bandwidth_share']:.0%}" if "bandwidth_share" in step else ""
        rows.append((server, alone, many, step["ms"], share))
    titles = ("server", "tokens/s alone", "8 at once", "a step alone, ms", "of the memory's bandwidth")
    return table(titles, rows)


def large_training_table() -> str:
    """The same: memory and time of two steps."""
    rows = [
        (run, row["planned_gib"], row["measured_gib"], row["ratio"], " and ".join(map(str, row["seconds"])))
        for run, row in large_rows("training").items()
    ]
    return table(("run", "planned, GiB", "measured, GiB", "ratio", "seconds of the steps"), rows)


def large_rows(part: str) -> dict[str, dict[str, Any]]:
    """The record's rows of one part, by run."""
    record = json.loads((ROOT / "benchmarks/results/large.json").read_text(encoding="utf-8"))
    return {row["run"]: row for row in record["rows"] if row["part"] == part}


def table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def quantize_table() -> str:
    """What benchmarks/bench_quantize.py recorded."""
    record = json.loads((ROOT / "benchmarks/results/quantize.json").read_text(encoding="utf-8"))
    tokens = record["rows"][0]["tokens"]
    lines = [
        f"| demo model | type | loss ({tokens:,} tokens) | agreement | size |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['weights']} | {row['type']} | {row['loss']:.3f} | {row['agreement']:.1%} "
        f"| {row['bytes'] / 1e6:.0f} MB |"
        for row in record["rows"]
    ]
    return "\n".join(lines) + "\n"


def defaults_table(kind: Literal["loss", "general"]) -> str:
    """What benchmarks/bench_defaults.py recorded: the mean over the seeds of the held-out loss, with the interval of
    auto's less each other setting's, or of general text's loss."""
    record = json.loads((ROOT / "benchmarks/results/defaults.json").read_text(encoding="utf-8"))
    apart = {(found["data"], found["against"]): found["interval"] for found in record["differences"]}
    every = [row for row in record["rows"] if row["part"] == "table"]
    lines = []
    measured = {row["data"] for row in every}
    for data in (name for name in record["data"] if name in measured):
        line: list[object] = [f"`{data}`"]
        for setting in record["settings"]:
            rows = [row for row in every if (row["data"], row["setting"]) == (data, setting)]
            if setting == "auto":
                before = next(row[f"{kind}_before"] for row in rows if f"{kind}_before" in row)
                line += [f"{statistics.mean(row['tokens'] for row in rows):,.0f}", len(rows), f"{before:.2f}"]
            cell = f"{statistics.mean(row[kind] for row in rows):.2f}" if rows else ""
            if kind == "loss" and rows and setting != "auto":
                low, high = apart[data, setting]
                cell += f" ({low:+.2f}, {high:+.2f})"
            line.append(cell)
        lines.append(line)
    names = [f"`{name}`" for name in record["settings"]]
    return table(("", "tokens", "seeds", "before", *names), lines)


def first_sentence(file: Path) -> str:
    """What a module's docstring opens with."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"(?<=\.) ", paragraph)[0].removesuffix(".").replace("|", "\\|")


def _slash(room: str) -> str:
    return "/" if (PACKAGE / room).is_dir() else ""


def with_table(name: str, page: str, table: str) -> str | None:
    """A page with the text between the two marks of a table replaced; None where it has no marks."""
    begin, end = f"<!-- table {name}: made by docs/check.py --write -->\n", "<!-- end of table -->\n"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    return f"{before}{begin}{table}{end}{after}" if found and closed else None


def stale_tables() -> Iterator[Fault]:
    """Tables that say something else than the code."""
    for name, file, table in places_of_tables():
        page = file.read_text(encoding="utf-8")
        if with_table(name, page, table) != page:
            yield f"{file.relative_to(ROOT)}: the table {name} is not the code's; python docs/check.py --write"


def write_tables() -> None:
    for name, file, table in places_of_tables():
        page = with_table(name, file.read_text(encoding="utf-8"), table)
        if page is not None:
            file.write_text(page, encoding="utf-8")


def places_of_tables() -> Iterator[tuple[str, Path, str]]:
    """The tables with each page that holds them; a Chinese page holds its sister's as they are."""
    for name, (english, table) in made_tables().items():
        for page in (english, chinese_of(english)):
            if page.exists():
                yield name, page, table


def homeless_modules() -> Iterator[Fault]:
    """Modules whose room stands on no floor, so that no table of docs/architecture.md names them."""
    for file in sorted(PACKAGE.rglob("[a-z]*.py")):
        if file.relative_to(PACKAGE).with_suffix("").parts[0] not in ROOMS:
            yield f"docs/measure.py: FLOORS does not name the room of {file.relative_to(ROOT)}"


def unknown_hops() -> Iterator[Fault]:
    """Functions and classes that docs/architecture.md walks through by dotted name, and that are not there."""
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    for name in sorted(set(HOP.findall(page))):
        if name.split(".")[0] in ROOMS and not is_defined(name):
            yield f"docs/architecture.md: walks through {name}, which does not exist"


def is_defined(name: str) -> bool:
    """Whether `wing.module`, or `wing.module.Class.method`, is in the package."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        file = PACKAGE.joinpath(*parts[:depth]).with_suffix(".py")
        if file.exists():
            body = ast.parse(file.read_text(encoding="utf-8")).body
            for part in parts[depth:]:
                found = [node for node in body if isinstance(node, DEFINITION) and node.name == part]
                if not found:
                    return False
                body = found[0].body
            return True
    return False


def faults() -> list[Fault]:
    """All that is wrong, each with its page."""
    found = [
        f"{page.relative_to(ROOT)}: {fault}"
        for page in documents()
        for check in (broken_links, missing_paths, refused_commands, long_lines)
        for fault in check(page)
    ]
    return [*found, *unequal_languages(), *homeless_modules(), *unknown_hops(), *stale_tables()]


def main() -> int:
    flags = ArgumentParser(description="Hold the documents against the checkout.")
    flags.add_argument(
        "--write", action="store_true", help="first make the tables anew that come from the code"
    )
    if flags.parse_args().write:
        write_tables()
    found = faults()
    for fault in found:
        print(fault, file=sys.stderr)
    print(f"{len(documents())} pages, {len(found)} faults", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
