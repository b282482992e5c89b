"""A run, or several beside each other, as one HTML file in two languages; it asks the network for nothing.

In: `PastRun`s. Out: the page's text; a button switches between English and Chinese.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from qwen_chat import place
from qwen_chat.files import write_whole
from qwen_chat.report.chart import Series, bars, curves
from qwen_chat.report.past_run import PastRun
from qwen_chat.training.run_folder import PAGE_FILE

GIBIBYTE = 2**30
STYLE = """
:root{--ink:#1d2330;--soft:#667085;--line:#e4e7ec;--back:#fff;--card:#f8f9fb;--a:#3b5bdb;--b:#e8590c;--c:#2b8a3e;
--d:#9c36b5;--e:#0b7285;--f:#c92a2a}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ef;--soft:#98a2b3;--line:#303747;--back:#12151c;--card:#1a1f29;
--a:#91a7ff;--b:#ffa94d;--c:#69db7c;--d:#da77f2;--e:#66d9e8;--f:#ff8787}}
body{margin:0 auto;max-width:60rem;padding:1.5rem;color:var(--ink);background:var(--back);
font:16px/1.55 system-ui,"PingFang SC","Microsoft YaHei",sans-serif}
h1{font-size:1.6rem;margin:.2rem 0}h2{font-size:1.15rem;margin:2rem 0 .6rem}p{margin:.4rem 0}
pre{background:var(--card);padding:.8rem;overflow:auto;border-radius:6px;font-size:.85rem}
table{border-collapse:collapse;width:100%;font-size:.92rem}td,th{text-align:left;padding:.35rem .6rem;
border-bottom:1px solid var(--line);vertical-align:top}td.n{text-align:right;font-variant-numeric:tabular-nums}
th{color:var(--soft);font-weight:600}svg{width:100%;height:auto;background:var(--card);border-radius:6px}
.grid{stroke:var(--line)}.tick{fill:var(--soft);font-size:11px;text-anchor:middle}.end{text-anchor:end}
.line{fill:none;stroke-width:1.6}.bar{fill:var(--a)}
.line.c0{stroke:var(--a)}.line.c1{stroke:var(--b)}.line.c2{stroke:var(--c)}.line.c3{stroke:var(--d)}
.line.c4{stroke:var(--e)}.line.c5{stroke:var(--f)}.dots.c0{fill:var(--a)}.dots.c1{fill:var(--b)}
.dots.c2{fill:var(--c)}.dots.c3{fill:var(--d)}.dots.c4{fill:var(--e)}.dots.c5{fill:var(--f)}
.key span{margin-right:1rem}.key i{display:inline-block;width:.8rem;height:.8rem;border-radius:3px;
margin-right:.35rem;vertical-align:-1px}.warn{border-left:4px solid var(--b);padding:.4rem .8rem;background:var(--card)}
.said{white-space:pre-wrap;overflow-wrap:anywhere}button{float:right;font:inherit;padding:.2rem .8rem;border-radius:6px;
border:1px solid var(--line);background:var(--card);color:var(--ink);cursor:pointer}
html[lang=en] .zh,html[lang=zh] .en{display:none}
"""
LANGUAGE_SWITCH = (
    "const h=document.documentElement;if(navigator.language.startsWith('zh'))h.lang='zh';"
    "document.querySelector('button').onclick=()=>{h.lang=h.lang=='en'?'zh':'en'}"
)
COLOURS = "abcdef"


def write_page(folder: Path) -> Path:
    """The report of the run in `folder`, into it."""
    file = folder / PAGE_FILE
    write_whole(file, page([PastRun.read(folder)]))
    return file


def both(english: str, chinese: str) -> str:
    """Text in the language that is chosen."""
    return f'<span class="en">{english}</span><span class="zh">{chinese}</span>'


def page(runs: Sequence[PastRun]) -> str:
    """One run in full; of several what sets them apart."""
    first = runs[0]
    body = _one(first) if len(runs) == 1 else _several(runs)
    title = escape(" / ".join(run.name for run in runs))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head><body><button>中文 / English</button>'
        f"<h1>{title}</h1>{body}<script>{LANGUAGE_SWITCH}</script></body></html>\n"
    )


def _one(run: PastRun) -> str:
    facts = run.facts
    parts = [_unfinished(run), _summary(run)]
    parts.append(_section("To repeat it", "重复这次训练", f"<pre>{escape(run.command)}</pre>"))
    parts.append(_section("Data", "数据", _data(facts.get("data", {}), facts.get("held_out"))))
    parts.append(_section("Curves", "曲线", _charts([run])))
    parts.append(_section("Memory, GiB", "内存（GiB）", _memory(facts)))
    parts.append(_section("Answers before and after", "训练前后的回答", _samples(run)))
    parts.append(_section("What was decided", "自动作出的决定", _list(facts.get("decisions", ()))))
    versions = [(escape(name), escape(str(value))) for name, value in facts.get("versions", {}).items()]
    parts.append(_section("Versions", "版本", _table(versions)))
    return "".join(parts)


def _several(runs: Sequence[PastRun]) -> str:
    keys = " ".join(
        f'<span><i style="background:var(--{COLOURS[k % 6]})"></i>{escape(run.name)}</span>'
        for k, run in enumerate(runs)
    )
    given = sorted({name for run in runs for name in run.facts.get("given", ())} - {"output_dir"})
    rows: list[tuple[str, ...]] = []
    for name in given:
        values = [str(run.facts["options"].get(name)) for run in runs]
        if len(set(values)) > 1:
            rows.append((f"<code>--{escape(name)}</code>", *map(escape, values)))
    for label, take in FIGURES:
        rows.append((label, *(take(run) for run in runs)))
    head = ("", *(escape(run.name) for run in runs))
    states = "".join(_unfinished(run) for run in runs)
    return (
        f'{states}<p class="key">{keys}</p>'
        + _section("What sets them apart", "区别", _table(rows, head))
        + _section("Curves", "曲线", _charts(runs))
    )


def _unfinished(run: PastRun) -> str:
    if run.is_finished:
        return ""
    name, last = escape(run.name), len(run.steps)
    english = f"{name} did not finish: it was stopped, or still runs. {last} steps are in its log; they are shown here."
    chinese = f"{name} 没有结束：被中断，或仍在运行。日志中有 {last} 步，下面是这些。"
    return f'<p class="warn">{both(english, chinese)}</p>'


def _summary(run: PastRun) -> str:
    return _table([(label, take(run)) for label, take in FIGURES])


def _figure(value: object, form: str = ",.4g") -> str:
    return format(value, form) if isinstance(value, (int, float)) else "–"


def _ends(run: PastRun) -> str:
    if not run.steps:
        return "–"
    first, last = run.steps[0], run.steps[-1]
    return f"{_figure(first['loss'])} → {_figure(last['loss'])} ({len(run.steps)})"


# A row's name, and its text for a run.
FIGURES: tuple[tuple[str, Callable[[PastRun], str]], ...] = (
    (both("model", "模型"), lambda run: escape(run.facts.get("model", "–").rsplit("/", 1)[-1])),
    (both("method", "方法"), lambda run: escape(str(run.facts.get("method", "–")))),
    (both("loss, first → last step (steps)", "损失，第一步 → 最后一步（步数）"), _ends),
    (
        both("held-out loss", "验证损失"),
        lambda run: _figure(
            run.facts.get("evaluation", {}).get("eval_loss")
            or (run.evaluations[-1]["eval_loss"] if run.evaluations else None)
        ),
    ),
    (both("tokens", "词元数"), lambda run: _figure(run.facts.get("tokens"), ",d")),
    (both("seconds", "秒"), lambda run: _figure(run.facts.get("seconds"), ",.0f")),
    (both("tokens/s", "词元/秒"), lambda run: _figure(run.facts.get("tokens_per_s"), ",.0f")),
    (both("peak memory, GiB", "内存峰值（GiB）"), lambda run: _figure(run.facts.get("peak_memory_gib"))),
)


def _data(data: dict[str, Any], held_out: dict[str, Any] | None) -> str:
    names = (
        ("conversations", both("conversations", "对话")),
        ("tokens", both("tokens", "词元")),
        ("supervised", both("of these learnt", "其中学习的")),
        ("dropped", both("left out: too long", "略去：过长")),
        ("truncated", both("cut", "截断")),
        ("skipped", both("left out: bad lines", "略去：有误的行")),
    )
    head = ("", both("training", "训练"), *((both("held out", "验证"),) if held_out else ()))
    columns = [data, *([held_out] if held_out else [])]
    rows = [(label, *(_figure(column.get(key), ",d") for column in columns)) for key, label in names]
    quantiles = [(name, float(value)) for name, value in data.get("quantiles", {}).items()]
    lengths = bars(quantiles, x_name="tokens a conversation / 每段对话的词元", y_name="tokens")
    return _table(rows, head) + lengths


def _charts(runs: Sequence[PastRun]) -> str:
    wanted = (
        ("loss", "loss / 损失"),
        ("learning_rate", "rate / 学习率"),
        ("grad_norm", "gradient norm / 梯度范数"),
    )
    found = []
    for key, name in wanted:
        series = [
            Series(run.name, [(line["step"], line[key]) for line in run.steps if line.get(key) is not None])
            for run in runs
        ]
        if key == "loss":
            series += [
                Series(
                    f"{run.name}: held out",
                    [(line["step"], line["eval_loss"]) for line in run.evaluations],
                    marked=True,
                )
                for run in runs
            ]
        found.append(curves(series, x_name="step / 步", y_name=name))
    return "<br>".join(part for part in found if part)


def _memory(facts: dict[str, Any]) -> str:
    plan = facts.get("plan", {})
    parts = ("weights", "gradients", "optimizer", "activations", "loss", "runtime")
    rows = [(part, _figure(plan[part] / GIBIBYTE, ".2f")) for part in parts if part in plan]
    rows.append((both("planned in all", "计划合计"), _figure(plan.get("total", 0) / GIBIBYTE, ".2f")))
    rows.append((both("measured at most", "实测峰值"), _figure(facts.get("peak_memory_gib"), ".2f")))
    return _table(rows)


def _samples(run: PastRun) -> str:
    if not run.samples:
        folder = escape(str(run.folder))
        ask = f"<pre>{place.invocation('report')} {folder} --samples 10</pre>"
        return both("None were asked for. They take a model's time:", "尚未生成；生成需要模型运行：") + ask
    head = (both("question", "问题"), both("before", "训练前"), both("after", "训练后"))
    cells = [
        tuple(f'<span class="said">{escape(text)}</span>' for text in (one.question, one.before, one.after))
        for one in run.samples
    ]
    return _table(cells, head)


def _section(english: str, chinese: str, body: str) -> str:
    return f"<h2>{both(english, chinese)}</h2>{body}" if body else ""


def _list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    heading = f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>" if head else ""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>{heading}{body}</table>"
