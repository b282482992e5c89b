"""A run, or several beside each other, as one HTML file in two languages; it asks the network for nothing.

In: `PastRun`s. Out: the page's text; a button switches between English and Chinese. `write_page` leaves the loss as a
picture beside it.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path

from qwen_chat import place
from qwen_chat.errors import OutputError
from qwen_chat.files import write_whole, written_whole
from qwen_chat.report import sections
from qwen_chat.report.chart import look
from qwen_chat.report.markup import as_table, both, listed, section
from qwen_chat.report.past_run import PastRun, names_of
from qwen_chat.report.picture import png
from qwen_chat.training.run_folder import PAGE_FILE, PICTURE_FILE

STYLE = """
:root{--ink:#1d2330;--soft:#667085;--line:#e4e7ec;--back:#fff;--card:#f8f9fb;--a:#3b5bdb;--b:#e8590c;--c:#2b8a3e;
--d:#9c36b5;--e:#0b7285;--f:#c92a2a}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ef;--soft:#98a2b3;--line:#303747;--back:#12151c;--card:#1a1f29;
--a:#91a7ff;--b:#ffa94d;--c:#69db7c;--d:#da77f2;--e:#66d9e8;--f:#ff8787}}
body{margin:0 auto;max-width:60rem;padding:1.5rem;color:var(--ink);background:var(--back);
font:16px/1.55 system-ui,"PingFang SC","Microsoft YaHei",sans-serif}
h1{font-size:1.6rem;margin:.2rem 0 1rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2rem 0 .6rem}p{margin:.4rem 0}
pre{background:var(--card);padding:.8rem;overflow:auto;border-radius:6px;font-size:.85rem}
ul{margin:.4rem 0;padding-left:1.2rem;overflow-wrap:anywhere}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.92rem}
td,th{text-align:left;padding:.35rem .6rem;border-bottom:1px solid var(--line);vertical-align:top}
td{font-variant-numeric:tabular-nums}th{color:var(--soft);font-weight:600}
.wide+.wide{margin-top:1rem}td:first-child{min-width:7em}th{min-width:4em}code{overflow-wrap:anywhere}
figure{margin:1rem 0}figcaption{color:var(--soft);font-size:.92rem;margin-bottom:.3rem}
svg{width:100%;height:auto;background:var(--card);border-radius:6px}
.grid{stroke:var(--line)}.tick{fill:var(--soft);font-size:11px;text-anchor:middle}.end{text-anchor:end}
.line{fill:none;stroke-width:1.6}.bar{fill:var(--a)}
.line.c0{stroke:var(--a)}.line.c1{stroke:var(--b)}.line.c2{stroke:var(--c)}.line.c3{stroke:var(--d)}
.line.c4{stroke:var(--e)}.line.c5{stroke:var(--f)}.dots.c0{fill:var(--a)}.dots.c1{fill:var(--b)}
.dots.c2{fill:var(--c)}.dots.c3{fill:var(--d)}.dots.c4{fill:var(--e)}.dots.c5{fill:var(--f)}
.d1{stroke-dasharray:7 4}.d2{stroke-dasharray:2 3}
.key span{margin-right:1rem}.key svg{width:2rem;margin-right:.35rem;background:none;vertical-align:2px}
.key .line{stroke-width:3}.warn{border-left:4px solid var(--b);padding:.4rem .8rem;background:var(--card)}
.said td{white-space:pre-wrap;overflow-wrap:anywhere;width:33%}
button{float:right;font:inherit;padding:.2rem .8rem;border-radius:6px;border:1px solid var(--line);
background:var(--card);color:var(--ink);cursor:pointer}
@media(max-width:40rem){body{padding:1rem}pre{white-space:pre-wrap;overflow-wrap:anywhere}
.said tr,.said td{display:block;width:auto;border:0}.said th{display:none}
.said tr{padding:.5rem 0;border-bottom:1px solid var(--line)}.said td::before{content:attr(data-en);display:block;
color:var(--soft);font-size:.85rem}html[lang=zh] .said td::before{content:attr(data-zh)}.tick{font-size:16px}}
html[lang=en] .zh,html[lang=zh] .en{display:none}
"""
LANGUAGE_SWITCH = (
    "const h=document.documentElement;if(navigator.language.startsWith('zh'))h.lang='zh';"
    "document.querySelector('button').onclick=()=>{h.lang=h.lang=='en'?'zh':'en'}"
)
HEAD = '<!doctype html><html lang="en"><head><meta charset="utf-8">'
# Where a run writes and how it is told to go on sets no run apart.
NO_DIFFERENCE = frozenset({"output_dir", "config", "check", "resume", "resume_anyway", "plan_anyway"})


def write_page(folder: Path) -> Path:
    """The report of the run in `folder`, into it, and its loss as a picture. OutputError where that cannot be."""
    run = PastRun.read(folder)
    try:
        with written_whole(folder / PICTURE_FILE) as picture:
            picture.buffer.write(png(sections.loss_series([run])))
        write_whole(folder / PAGE_FILE, page([run]))
    except OSError as error:
        raise OutputError(
            f"{folder}: the page cannot be written ({error.strerror}); give its file with {place.invocation('report')}"
            f" {shlex.quote(str(folder))} -o FILE"
        ) from None
    return folder / PAGE_FILE


def write_page_as(file: Path, runs: Sequence[PastRun]) -> None:
    """The page of these runs, as a file that a person named; an earlier page gives way, nothing else does."""
    try:
        if file.exists() and not file.read_bytes()[: len(HEAD)] == HEAD.encode():
            raise OutputError(f"{file}: holds something else than a page of runs; give another file with -o")
        write_whole(file, page(runs))
    except OSError as error:
        raise OutputError(
            f"{file}: cannot be written ({error.strerror}); give another file with -o"
        ) from None


def page(runs: Sequence[PastRun]) -> str:
    """One run in full; of several what sets them apart."""
    body = _one(runs[0]) if len(runs) == 1 else _several(runs)
    title = escape(" / ".join(names_of(runs)))
    return (
        f"{HEAD}<title>{title}</title>"
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head><body><button>中文 / English</button>'
        f"<h1>{title}</h1>{body}<script>{LANGUAGE_SWITCH}</script></body></html>\n"
    )


def _one(run: PastRun) -> str:
    facts = run.facts
    versions = [(escape(name), escape(str(value))) for name, value in facts.get("versions", {}).items()]
    parts = (
        _unfinished(run, run.name),
        as_table([(label, take(run)) for label, take in sections.FIGURES]),
        section("Warnings", "警告", listed(facts.get("warnings", ()))),
        section("To repeat it", "重复这次训练", f"<pre>{escape(run.command)}</pre>"),
        section("Data", "数据", sections.data(facts)),
        section("Curves", "曲线", sections.charts([run])),
        section("Learnt and forgotten", "学到的与遗忘的", sections.changes(run)),
        section("Function calls", "函数调用", sections.calls(run)),
        section("Answers before and after", "训练前后的回答", sections.answers(run)),
        section("Memory, GiB", "内存（GiB）", sections.memory(facts)),
        section("What was decided", "自动作出的决定", listed(facts.get("decisions", ()))),
        section("Versions", "版本", as_table(versions)),
    )
    return "".join(parts)


def _several(runs: Sequence[PastRun]) -> str:
    keys = " ".join(
        f'<span><svg viewBox="0 0 32 8"><line class="line {look(k)}" x2="32" y1="4" y2="4"/></svg>{escape(name)}</span>'
        for k, name in enumerate(names_of(runs))
    )
    rows: list[tuple[str, ...]] = []
    # What a preset chose too, which nobody gave.
    for name in sorted({name for run in runs for name in run.facts["options"]} - NO_DIFFERENCE):
        values = [run.facts["options"].get(name) for run in runs]
        if any(value != values[0] for value in values):
            rows.append((f"<code>--{escape(name)}</code>", *(escape(str(value)) for value in values)))
    contents = [str(run.facts.get("data", {}).get("fingerprint", "–"))[:8] for run in runs]
    if len(set(contents)) > 1:
        rows.append(
            (both("data, by the hash of their content", "数据（按内容的哈希）"), *map(escape, contents))
        )
    rows += [(label, *(take(run) for run in runs)) for label, take in sections.FIGURES]
    head = ("", *map(escape, names_of(runs)))
    states = "".join(map(_unfinished, runs, names_of(runs)))
    return (
        states
        + section("What sets them apart", "区别", as_table(rows, head))
        + section("Curves", "曲线", f'<p class="key">{keys}</p>{sections.charts(runs)}')
    )


def _unfinished(run: PastRun, name: str) -> str:
    if run.is_finished:
        return ""
    name, last = escape(name), len(run.steps)
    english = f"{name} did not finish: it was stopped, or still runs. {last} steps are in its log; they are shown here."
    chinese = f"{name} 没有结束：被中断，或仍在运行。日志中有 {last} 步，下面是这些。"
    return f'<p class="warn">{both(english, chinese)}</p>'
