"""The function-calling benchmark where a fault would go unseen in its figures: split, references, phases."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_function_calling as bench
from qwen_chat.errors import OptionError

PARAMETERS = {
    "type": "dict",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "scale": {"type": "float"}},
    "required": ["city"],
}


def make_item(name: str, functions: list[str], *, fits: bool = True, asked: str = "Roma") -> bench.Item:
    offered = [{"name": one, "description": "weather", "parameters": PARAMETERS} for one in functions]
    truth = [{functions[0]: {"city": ["Rome", "Roma"], "days": [3, ""], "scale": [2, ""]}}] if fits else []
    return bench.Item(name, [{"role": "user", "content": asked}], offered, truth)


def many() -> list[bench.Item]:
    """600 calls, of which every third shares a function with the one before it, and 240 without a function."""
    calls = [make_item(f"simple_{n}", [f"f{n - (n % 3 == 2)}", f"g{n}"]) for n in range(600)]
    return calls + [make_item(f"irrelevance_{n}", [f"h{n}"], fits=False) for n in range(240)]


def names(items: list[bench.Item]) -> set[str]:
    return {function["name"] for item in items for function in item.functions}


def test_no_function_is_on_both_sides() -> None:
    items = many()
    train, held = bench.split(items, bench.Settings())
    assert [sum(bool(i.truth) for i in held), sum(not i.truth for i in held)] == [100, 60]
    assert [sum(bool(i.truth) for i in train), sum(not i.truth for i in train)] == [300, 120]
    assert not names(train) & names(held)
    assert any(len(family) > 1 for family in bench.families(items))


def test_the_split_hangs_on_names_alone() -> None:
    items = many()
    train, held = bench.split(items, bench.Settings())
    again = bench.split(items[::-1], bench.Settings())
    assert ([i.name for i in train], {i.name for i in held}) == (
        [i.name for i in again[0]],
        {i.name for i in again[1]},
    )
    fewer, same = bench.split(items, bench.Settings(train_calls=75, train_others=30))
    assert same == held
    assert {i.name for i in fewer} < {i.name for i in train}


def test_families_join_through_others() -> None:
    items = [
        make_item("a", ["one", "two"]),
        make_item("b", ["three", "four"]),
        make_item("c", ["two", "three"]),
    ]
    assert [{item.name for item in family} for family in bench.families(items)] == [{"a", "b", "c"}]


def test_a_reference_is_right_and_passes_on_what_is_said() -> None:
    told = make_item("told", ["f"], asked="Weather of Roma for 3 days")
    untold = make_item("untold", ["f"], asked="Weather of Rome")
    assert bench.answer(told) == [{"f": {"city": "Roma", "days": 3}}]
    assert bench.answer(untold) == [{"f": {"city": "Rome"}}]
    assert all(bench.right_by_us(item, bench.answer(item)) for item in (told, untold))


@pytest.mark.parametrize(
    ("arguments", "is_right"),
    [
        ({"city": "rome "}, True),  # the leaderboard compares text without case and spaces
        ({"city": "Rome", "scale": 2}, True),  # a whole number where a float is wanted
        ({"city": "Rome", "days": 3.0}, False),  # and never the other way round
        ({"city": "Rome", "days": "3"}, False),
        ({"city": "Oslo"}, False),
        ({"days": 3}, False),
        ({"city": "Rome", "more": 1}, False),
    ],
)
def test_how_a_call_is_judged(arguments: dict[str, object], is_right: bool) -> None:
    assert bench.right_by_us(make_item("one", ["f"]), [{"f": arguments}]) is is_right


def test_a_call_where_none_fits_is_wrong() -> None:
    nothing_fits = make_item("none", ["f"], fits=False)
    assert bench.right_by_us(nothing_fits, [])
    assert not bench.right_by_us(nothing_fits, [{"f": {"city": "Rome"}}])


def test_damage_is_found() -> None:
    """A checker that takes everything differs from ours on damaged answers, and each difference is listed."""
    items = [make_item(f"simple_{n}", [f"f{n}"], asked="Roma, 3 days") for n in range(20)]
    found = bench.agreement(items, lambda item, calls: True)
    assert found["answers"] == 220
    assert found["agree"] == found["accepted_by_both"] >= 20
    assert len(found["differences"]) == 220 - found["agree"] > 100
    assert {"id", "what", "calls", "ours", "theirs"} == set(found["differences"][0])


def test_a_phase_runs_once(tmp_path: Path) -> None:
    made = []
    for _ in range(2):
        result = bench.phase(tmp_path, "after", lambda: {"exact": len(made), "made": made.append(1)})
        assert result["exact"] == 0
    assert made == [1]


def test_a_phase_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        bench.phase(tmp_path, "after", lambda: {"exact": 1 / 0})
    assert bench.phase(tmp_path, "after", lambda: {"exact": 1.0}) == {"exact": 1.0}


@pytest.mark.parametrize("change", ["settings", "data", "weights"])
def test_phases_of_something_else_are_refused(
    tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN_CHAT_CACHE", str(tmp_path / "cache"))
    base, work = tmp_path / "model", tmp_path / "work"
    base.mkdir()
    (base / "model.safetensors").write_bytes(b"1234")
    texts = {"train.jsonl": "{}\n"}
    assert bench.open_work(work, base, bench.Settings(), texts) == work
    assert bench.open_work(work, base, bench.Settings(), texts) == work  # the same again: its phases count
    settings = bench.Settings()
    if change == "settings":
        settings = dataclasses.replace(settings, epochs=1.0)
    elif change == "data":
        texts = {"train.jsonl": "{} \n"}
    else:
        (base / "model.safetensors").write_bytes(b"12345")
    with pytest.raises(OptionError, match="choose another folder"):
        bench.open_work(work, base, settings, texts)
    assert (work / "train.jsonl").read_text("utf-8") == "{}\n"
    assert bench.open_work(None, base, settings, texts).is_relative_to(tmp_path / "cache")  # one of its own


def test_a_point_of_the_curve_has_its_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def tune(work: Path, name: str, train: Any, base: Path, data: Path, held: Any, settings: Any) -> Any:
        lines = data.read_text("utf-8").splitlines()
        asked.append((name, len(lines), len(held), settings.train_others))
        return {"exact": 0.5, "seconds": 1.0}

    monkeypatch.setattr(bench, "tune", tune)
    found = bench.at_size(75, tmp_path / "work", tmp_path, many(), bench.Settings())
    assert found == {"train_calls": 75, "train_others": 30, "exact": 0.5}
    assert asked == [("after", 105, 160, 30)]


def test_the_record_has_no_long_lists(tmp_path: Path) -> None:
    block = {"exact": 0.5, "worst": [{"written": "x"}] * 99, "free": {"exact": 0.4}}
    bench.write(tmp_path / "r.json", {"command": "python x.py", "after": block, "curve": [block]})
    kept = {"exact": 0.5, "free": {"exact": 0.4}}
    written = json.loads((tmp_path / "r.json").read_text("utf-8"))
    assert written == {"command": "python x.py", "after": kept, "curve": [kept]}
