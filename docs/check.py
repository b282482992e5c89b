"""Do the documents tell the truth? Links, paths, commands and flags are held against the checkout; lines end in time.

In: README*.md, CHANGELOG.md, docs/*.md. Out: one line a fault; exit 0 when there is none, 1 otherwise.

    python docs/check.py
    python docs/check.py --write     # the tables that are made from the code, made anew
"""

import argparse
import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout

from docs.measure import FLOORS, PACKAGE

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(r"(?<![\w/.~{}-])(?:qwen_chat|finetune|fast_start|benchmarks|tests|docs)/[\w./*-]+")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
LONGEST_LINE = 120  # characters; tables, whose rows cannot be wrapped, excepted
MADE_BY_A_RUN = ("finetune/io_file/output_data/", "fast_start/fast_api_svc.log")
ROOMS = [room for floor in FLOORS for room in floor]
HOP = re.compile(r"`([a-z_]+(?:\.\w+)+)(?<!\.py)`")
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
            stripped = (re.sub(r"(^|\s)#.*", "", line).strip() for line in joined.splitlines())
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


def unknown_flags(page: Path) -> Iterator[Fault]:
    """Flags in a page's commands that the script's own --help does not know."""
    from qwen_chat.place import SCRIPTS

    for command in commands(page):
        installed = re.match(r"qwen-chat (\w+)", command)
        script = installed or re.search(
            r"(?:python|bash) ((?:finetune|fast_start|benchmarks|docs)/\w+\.(?:py|sh))", command
        )
        if not script:
            continue
        name = SCRIPTS.get(script.group(1), "") if installed else script.group(1)
        known = known_flags(name) if name else frozenset()
        for flag in re.findall(r"(?<=\s)(--?[A-Za-z][\w-]*)", command[script.end() :]):
            if flag not in known:
                yield f"`{command}`: {name or 'qwen-chat'} --help does not know {flag}"


@cache
def known_flags(script: str) -> frozenset[str]:
    """Every flag that a script takes: what its --help prints, and TrainingArguments' fields for finetune."""
    runner = "bash" if script.endswith(".sh") else sys.executable
    shown = subprocess.run([runner, str(ROOT / script), "--help"], capture_output=True, text=True, check=True)
    flags = set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", shown.stdout))
    if script.startswith("finetune/finetune"):
        from qwen_chat.flags.training_fields import FIELDS

        flags |= {f"--{name}" for name, entry in FIELDS.items() if entry.state == "works"}
        flags |= known_flags_of_finetune()
    return frozenset(flags)


def known_flags_of_finetune() -> frozenset[str]:
    """finetune.sh passes on whatever finetune.py takes."""
    shown = subprocess.run(
        [sys.executable, str(ROOT / "finetune/finetune.py"), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    return frozenset(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", shown.stdout))


def long_lines(page: Path) -> Iterator[Fault]:
    """Lines of text or code over LONGEST_LINE characters."""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if len(line) > LONGEST_LINE and not line.startswith("|"):
            yield f"line {number} has {len(line)} characters; wrap it at {LONGEST_LINE}"


def unequal_languages() -> Iterator[Fault]:
    """The Chinese page must show the same commands as the English one, in the same order."""
    for chinese in sorted([*ROOT.glob("*.zh-CN.md"), *ROOT.glob("docs/*.zh-CN.md")]):
        english = chinese.with_name(chinese.name.replace(".zh-CN", ""))
        ours, theirs = commands(english), commands(chinese)
        for a, b in zip(ours, theirs, strict=False):
            # A question may be in either language.
            if re.sub(r'"[^"]*"', '""', a) != re.sub(r'"[^"]*"', '""', b):
                yield f"{chinese.relative_to(ROOT)}: `{b}` where {english.name} has `{a}`"
                break
        else:
            if len(ours) != len(theirs):
                yield f"{chinese.relative_to(ROOT)}: {len(theirs)} commands, {english.name} has {len(ours)}"


def made_tables() -> dict[str, tuple[Path, str]]:
    """What is made from the code and from benchmarks/results: the table's name, its page, its text."""
    from qwen_chat import families
    from qwen_chat.flags import training_fields

    return {
        "models": (ROOT / "docs/models.md", families.families_table()),
        "training_fields": (ROOT / "docs/finetune.md", training_fields.markdown()),
        "floors": (ROOT / "docs/architecture.md", floors_table()),
        "modules": (ROOT / "docs/architecture.md", modules_table()),
        "large_loading": (ROOT / "docs/inference.md", large_loading_table()),
        "large_serving": (ROOT / "docs/inference.md", large_serving_table()),
        "large_training": (ROOT / "docs/scale.md", large_training_table()),
        "quantize": (ROOT / "docs/inference.md", quantize_table()),
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
    for name, (file, table) in made_tables().items():
        page = file.read_text(encoding="utf-8")
        if with_table(name, page, table) != page:
            yield f"{file.relative_to(ROOT)}: the table {name} is not the code's; python docs/check.py --write"


def write_tables() -> None:
    for name, (file, table) in made_tables().items():
        page = with_table(name, file.read_text(encoding="utf-8"), table)
        if page is not None:
            file.write_text(page, encoding="utf-8")


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
        for check in (broken_links, missing_paths, unknown_flags, long_lines)
        for fault in check(page)
    ]
    return [*found, *unequal_languages(), *homeless_modules(), *unknown_hops(), *stale_tables()]


def main() -> int:
    parser = argparse.ArgumentParser(description="Hold the documents against the checkout.")
    parser.add_argument(
        "--write", action="store_true", help="first make the tables anew that come from the code"
    )
    if parser.parse_args().write:
        write_tables()
    found = faults()
    for fault in found:
        print(fault, file=sys.stderr)
    print(f"{len(documents())} pages, {len(found)} faults", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
