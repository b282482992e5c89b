"""The sections of a run's page: data, curves, what was learnt and forgotten, function calls, answers, memory.

In: `PastRun`s. Out: each section's HTML.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from html import escape

from qwen_chat import place
from qwen_chat.conversation import Json
from qwen_chat.report.chart import Series, bars, curves
from qwen_chat.report.markup import as_table, both, captioned, figure
from qwen_chat.report.past_run import EVALUATION_FILE, PastRun, names_of

GIBIBYTE = 2**30
MOST_FUNCTIONS = 40  # that are shown


def _ends(run: PastRun) -> str:
    if not run.steps:
        return "–"
    first, last = run.steps[0], run.steps[-1]
    return f"{figure(first['loss'])} → {figure(last['loss'])} ({len(run.steps)})"


def _moved(name: str) -> Callable[[PastRun], str]:
    """A loss before and after, as far as it is known."""

    def told(run: PastRun) -> str:
        change = run.changes.get(name, {})
        before, after = change.get("before"), change.get("after")
        if after is None and name == "held_out" and run.evaluations:
            after = run.evaluations[-1]["eval_loss"]
        return figure(after) if before is None else f"{figure(before)} → {figure(after)}"

    return told


# A row's name, and its text for a run.
FIGURES: tuple[tuple[str, Callable[[PastRun], str]], ...] = (
    (both("model", "模型"), lambda run: escape(str(run.facts.get("model", "–")).rsplit("/", 1)[-1])),
    (both("method", "方法"), lambda run: escape(str(run.facts.get("method", "–")))),
    (both("loss, first → last step (steps)", "损失，第一步 → 最后一步（步数）"), _ends),
    (both("held-out loss, before → after", "验证损失，训练前 → 后"), _moved("held_out")),
    (both("general loss, before → after", "通用损失，训练前 → 后"), _moved("general")),
    (both("tokens", "词元数"), lambda run: figure(run.facts.get("tokens"), ",d")),
    (both("seconds", "秒"), lambda run: figure(run.facts.get("seconds"), ",.0f")),
    (both("tokens/s", "词元/秒"), lambda run: figure(run.facts.get("tokens_per_s"), ",.0f")),
    (both("peak memory, GiB", "内存峰值（GiB）"), lambda run: figure(run.facts.get("peak_memory_gib"))),
)


def data(facts: Json) -> str:
    """The budgets of all data, and how long the conversations are."""
    names = (
        ("conversations", both("conversations", "对话")),
        ("tokens", both("tokens", "词元")),
        ("supervised", both("of these learnt", "其中学习的")),
        ("dropped", both("left out: too long", "略去：过长")),
        ("truncated", both("cut", "截断")),
        ("skipped", both("left out: bad lines", "略去：有误的行")),
        ("failed", both("left out: the template cannot write them", "略去：模板无法写出")),
        ("unsupervised", both("with nothing to learn", "没有可学的内容")),
    )
    kinds = (
        ("data", both("data", "数据")),
        ("held_out", both("held out", "验证")),
        ("general", both("general", "通用")),
    )
    columns = [(head, facts[key]) for key, head in kinds if facts.get(key)]
    rows = [(label, *(figure(column.get(key), ",d") for _, column in columns)) for key, label in names]
    counts = facts.get("data", {}).get("histogram", {})
    lengths = bars(
        [(end, float(count)) for end, count in counts.items()],
        x_name=("tokens, at most", "词元数，至多"),
        label="conversations by their tokens",
    )
    caption = both("conversations by their tokens", "按词元数的对话数")
    return as_table(rows, ("", *(head for head, _ in columns))) + captioned(lengths, caption)


def loss_series(runs: Sequence[PastRun]) -> list[Series]:
    """The losses of the steps as lines, the held-out ones as points."""
    found = []
    for number, (name, run) in enumerate(zip(names_of(runs), runs, strict=True)):
        found.append(Series(name, [(line["step"], line["loss"]) for line in run.steps], number))
        points = [(line["step"], line["eval_loss"]) for line in run.evaluations]
        colour = number if len(runs) > 1 else 1
        found.append(Series(f"{name}: held out", points, colour, marked=True))
    return found


def charts(runs: Sequence[PastRun]) -> str:
    """Loss, rate and gradient norm over the steps."""

    def over_steps(key: str) -> list[Series]:
        lines = [
            [(line["step"], line[key]) for line in run.steps if line.get(key) is not None] for run in runs
        ]
        return [Series(name, lines[k], k) for k, name in enumerate(names_of(runs))]

    dots = any(run.evaluations for run in runs)
    kinds = (
        (
            loss_series(runs),
            ("loss", "损失"),
            both("; the dots: held-out data", "；圆点为验证数据") if dots else "",
        ),
        (over_steps("learning_rate"), ("learning rate", "学习率"), ""),
        (over_steps("grad_norm"), ("gradient norm", "梯度范数"), ""),
    )
    return "".join(
        captioned(curves(some, x_name=("step", "步"), label=name[0]), both(*name) + more)
        for some, name, more in kinds
    )


def changes(run: PastRun) -> str:
    """Losses on what is not learnt, with the interval of their difference."""
    kinds = (
        ("held_out", both("held-out conversations: to be learnt", "验证对话：应当学到的")),
        ("general", both("general conversations: not to be forgotten", "通用对话：不应遗忘的")),
    )
    rows = []
    for name, label in kinds:
        if change := run.changes.get(name):
            moved = change.get("difference")
            told = f"{moved['value']:+.4f} [{moved['low']:+.4f}, {moved['high']:+.4f}]" if moved else "–"
            ends = (figure(change.get(key), ".4f") for key in ("before", "after"))
            rows.append((label, *ends, told, figure(change.get("conversations"), ",d")))
    if not rows:
        return both(
            "Not measured: --eval_share or --eval_data_path hold conversations out, --general_data names others"
            " that should not be forgotten.",
            "没有测量：--eval_share 或 --eval_data_path 留出验证对话，--general_data 给出不应遗忘的对话。",
        )
    head = ["", both("loss before", "训练前损失"), both("loss after", "训练后损失")]
    head += [both("difference [95 %]", "差值 [95 %]"), both("conversations", "对话")]
    note = both(
        "Mean loss of a learnt token, before the first step and after the last; the interval is a bootstrap's over"
        " the conversations, each held against itself. Above 0 is worse.",
        "每个学习词元的平均损失，分别在第一步之前和最后一步之后测得；区间由对各段对话的自助抽样得出，"
        "每段对话与自身比较。大于 0 为变差。",
    )
    return f"{as_table(rows, head)}<p>{note}</p>"


def calls(run: PastRun) -> str:
    """Of each function how often the data call it and, where evaluate.py was asked, how often the models do rightly."""
    counts: dict[str, int] = run.facts.get("data", {}).get("calls", {})
    sides = [run.evaluation.get(key) for key in ("compared_with", "model")]
    parts = [side.get("tools") for side in sides if isinstance(side, dict)]
    asked = [tools for tools in parts if tools and isinstance(tools, dict)]
    if not counts and not asked:
        return ""
    names = [both("before", "训练前"), both("after", "训练后")][2 - len(asked) :]
    kinds = (
        ("name", both("the right functions", "函数正确")),
        ("arguments", both("calls with the right arguments", "参数正确的调用")),
        ("exact", both("all calls right", "全部调用正确")),
        ("missing", both("nothing called", "没有调用")),
        ("false_calls", both("called without need", "多余的调用")),
    )
    shares = [(label, *(_percent(tools.get(key)) for tools in asked)) for key, label in kinds]
    per = [tools.get("tools", {}) for tools in asked]
    every = list(dict.fromkeys([*counts, *(name for tools in per for name in tools)]))
    head = [both("function", "函数"), both("calls in the data", "数据中的调用")]
    head += [f"{name} {both('(all calls right)', '（全部正确）')}" for name in names]
    rows = [
        (f"<code>{escape(name)}</code>", figure(counts.get(name), ",d"), *(_right(t.get(name)) for t in per))
        for name in every[:MOST_FUNCTIONS]
    ]
    if (more := len(every) - MOST_FUNCTIONS) > 0:
        rows.append((both(f"and {more:,} more", f"另有 {more:,} 个"), *[""] * (1 + len(per))))
    return (as_table(shares, ("", *names)) if asked else _how_to_evaluate(run)) + as_table(rows, head)


def _percent(share: Json | None) -> str:
    return "–" if share is None else f"{share['value']:.1%} [{share['low']:.1%}, {share['high']:.1%}]"


def _right(tool: Json | None) -> str:
    return "–" if tool is None else f"{tool['exact']:,} / {tool['n']:,}"


def _how_to_evaluate(run: PastRun) -> str:
    folder, base = (shlex.quote(str(name)) for name in (run.folder, run.facts.get("model")))
    both_sides = f"--adapter {folder} --compare base"
    if run.facts.get("method") == "full":
        both_sides = f"-m {folder} --compare {base}"
    lines = (
        f"{place.invocation('evaluate')} {both_sides} -d HELD_OUT.jsonl -o {folder}/{EVALUATION_FILE}",
        f"{place.invocation('report')} {folder}",
    )
    told = both("How many are right takes a model's time:", "有多少调用正确，需要模型运行：")
    return f"<p>{told}</p><pre>{escape(chr(10).join(lines))}</pre>"


def answers(run: PastRun) -> str:
    """Answers of base and result side by side; on a narrow screen one below the other."""
    if not run.samples:
        ask = f"{place.invocation('report')} {shlex.quote(str(run.folder))} --samples 10"
        told = both("None were asked for. They take a model's time:", "尚未生成；生成需要模型运行：")
        return f"<p>{told}</p><pre>{escape(ask)}</pre>"
    names = (("question", "问题"), ("before", "训练前"), ("after", "训练后"))
    rows = [
        "".join(
            f'<td dir="auto" data-en="{english}" data-zh="{chinese}">{escape(text)}</td>'
            for (english, chinese), text in zip(names, (one.question, one.before, one.after), strict=True)
        )
        for one in run.samples
    ]
    head = "".join(f"<th>{both(*name)}</th>" for name in names)
    return f'<table class="said"><tr>{head}</tr>{"".join(f"<tr>{row}</tr>" for row in rows)}</table>'


def memory(facts: Json) -> str:
    """What was planned, part by part, and what was measured."""
    plan = facts.get("plan", {})
    parts = (
        ("weights", both("weights", "权重")),
        ("gradients", both("gradients", "梯度")),
        ("optimizer", both("optimizer", "优化器")),
        ("activations", both("activations", "激活")),
        ("loss", both("loss", "损失")),
        ("runtime", both("the libraries", "运行库")),
        ("total", both("planned in all", "计划合计")),
    )
    rows = [(label, figure(plan[key] / GIBIBYTE, ".2f")) for key, label in parts if key in plan]
    return as_table(
        [*rows, (both("measured at most", "实测峰值"), figure(facts.get("peak_memory_gib"), ".2f"))]
    )
