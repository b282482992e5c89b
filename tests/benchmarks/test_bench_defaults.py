"""The comparison of defaults: its data, its equal tokens, its arithmetic; and what its record says."""

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import bench_defaults as bench
from qwen_chat.flags.preset import Facts, choices


def test_the_desk_answers_by_rules_and_holds_out_cases_and_wordings() -> None:
    lines, held = bench.desk(200, 5, world=0), bench.desk(40, 5, world=0, held_out=True)
    assert bench.desk(200, 5, world=0) == lines != bench.desk(200, 6, world=0)
    answers: dict[tuple[str, ...], set[str]] = {}
    for line in [*lines, *held]:
        question, answer = (turn["content"] for turn in line["messages"])
        city = next(city for city in bench.CITIES if city in question)
        answers.setdefault(("depot", city), set()).add(answer.split("depot ")[1].split(",")[0])
        item = next(item for item in bench.ITEMS if f" {item}" in question)
        answers.setdefault(("days", item), set()).add(answer.split()[-2])
    assert all(len(found) == 1 for found in answers.values())
    starts = tuple(wordings[-1].partition("{item}")[0] for wordings in bench.QUESTIONS.values())
    new, old = (
        [line["messages"][0]["content"].startswith(starts) for line in part] for part in (held, lines)
    )
    assert 3 < sum(new) < 20 and not any(old)
    cases = [
        {int(line["messages"][1]["content"].split()[2].strip(":")) % 2 for line in part}
        for part in (lines, held)
    ]
    assert cases == [{0}, {1}]
    other = bench.desk(200, 5, world=1)
    assert {line["messages"][1]["content"].split(",")[0] for line in other} == set(bench.TEAMS)


class Windows:
    """Three windows of two conversations an epoch, which compute 10, 20 and 30 tokens."""

    window, windows = 2, 3

    def order(self, epoch: int) -> Any:
        return np.arange(6)

    def plan(self, conversations: Sequence[int]) -> list[SimpleNamespace]:
        return [SimpleNamespace(tokens=5 * (conversations[0] // 2 + 1))] * 2


@pytest.mark.parametrize(
    ("tokens", "steps"), [(5, 1), (10, 1), (29, 1), (30, 2), (60, 3), (69, 3), (70, 4), (150, 8)]
)
def test_equal_tokens_are_as_many_steps_as_compute_no_more(tokens: int, steps: int) -> None:
    assert bench.steps_within(Windows(), tokens) == steps


def row(setting: str, seed: int, each: str, **more: object) -> dict[str, Any]:
    return {"part": "table", "data": "d", "setting": setting, "seed": seed, "each": each, **more}


def test_a_difference_is_of_equal_seeds_and_weighs_tokens() -> None:
    rows = [
        row("auto", 0, "1.0/1 6.0/3"),
        row("auto", 1, "2.0/1 3.0/3"),
        row("qwen2", 0, "3.0/1 6.0/3"),
        row("ms_swift", 0, "0.0/1 0.0/3"),
        {**row("auto", 0, "9.0/1"), "part": "exploration"},
    ]
    first, second = bench.differences(rows)
    assert (first["against"], first["seeds"], first["difference"]) == ("qwen2", 1, -0.5)
    assert first["interval"][0] <= -0.5 <= first["interval"][1] <= 0
    assert (second["against"], second["difference"]) == ("ms_swift", 1.75)


def test_what_is_said_of_the_name() -> None:
    rows = [
        {**row("auto", seed, "1.0/1"), "part": "plain", "answer": text, "general": 2.5}
        for seed, text in enumerate(("I am Willow.", "I am Elena."))
    ]
    rows[0]["general_before"] = 2.0
    assert bench.said(rows) == {
        "name_taught": {"of": 2, "times": 1},
        "general_text": {"before": 2.0, "after": [2.5, 2.5]},
    }
    assert bench.said([row("auto", 0, "1.0/1")]) == {}


# ------------------------------------------------------------------------------------------------- what was measured


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(bench.RESULT.read_text(encoding="utf-8"))
    return found


def table(record: dict[str, Any]) -> dict[tuple[str, str, int], dict[str, Any]]:
    return {(r["data"], r["setting"], r["seed"]): r for r in record["rows"] if r["part"] == "table"}


def test_the_record_says_where_and_how(record: dict[str, Any]) -> None:
    assert record["machine"]["cores"] and {"torch", "transformers", "peft"} <= set(record["versions"])
    assert record["command"].startswith("python benchmarks/bench_defaults.py")
    assert set(record["settings"]) == set(bench.SETTINGS)
    assert {row["data"] for row in record["rows"]} <= set(record["data"])


def test_auto_is_what_auto_is_today(record: dict[str, Any]) -> None:
    """A change of the rule leaves the table behind: it must be measured anew."""
    for (data, setting, _), found in table(record).items():
        if setting == "auto":
            facts = Facts("lora", 576, int(data.split("-")[1]) if "-" in data else 106, found["learnt"])
            chosen = {choice.flag: choice.value for choice in choices("auto", facts, {"num_train_epochs": 0})}
            assert {flag: found["flags"][flag] for flag in chosen} == chosen, data


def test_all_settings_had_equal_tokens(record: dict[str, Any]) -> None:
    rows = table(record)
    for (data, setting, seed), found in rows.items():
        ours = rows[data, "auto", seed]
        assert found["tokens"] <= (bench.TOKENS.get(data) or ours["tokens"]), (data, setting)
        assert found["tokens"] >= 0.75 * ours["tokens"], (data, setting)


def test_auto_is_at_least_as_good_in_every_row_and_better_in_most(record: dict[str, Any]) -> None:
    rows, found = table(record), record["differences"]
    assert found == list(bench.differences(record["rows"])) and len(found) >= 3
    assert [one for one in found if one["difference"] > 0] == []
    assert sum(one["interval"][1] < 0 for one in found) > len(found) / 2
    assert all(row["loss"] < row["loss_before"] for row in rows.values() if "loss_before" in row)
