"""A GGUF file in llama.cpp's own server: our prompts, transformers' greedy tokens; what smaller numbers cost."""

from pathlib import Path

import pytest

from benchmarks import bench_export

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
# llama.cpp normalises no text; Qwen's tokenizers do, the demo model's does not.
NORMALISES = set(bench_export.TINY)
# Python's strip takes an ideographic space off, llama.cpp's does not.
TRIMS = {"qwen3_5_think"}


@pytest.mark.parametrize("name", ["demo", *bench_export.TINY])
@pytest.mark.usefixtures("llama_programs")
def test_prompts_and_greedy_tokens_are_ours(name: str, tmp_path: Path) -> None:
    row = bench_export.gguf_row(name, tmp_path)
    assert (row["conversations"], row["same_prompts"]) == (200, 200)
    assert row["same_greedy"] >= 48 and row["largest_gap"] <= 1e-3
    assert row["decomposed"] > 0
    assert row["same_decomposed"] == (0 if name in NORMALISES else row["decomposed"]), "NFC"
    assert row["wide_space"] > 0
    assert (row["same_wide_space"] < row["wide_space"]) == (name in TRIMS)


@pytest.mark.usefixtures("llama_programs")
def test_smaller_numbers_cost_what_is_stated(tmp_path: Path) -> None:
    more = bench_export.types_row(tmp_path)["more_than_f32"]
    assert abs(more["transformers"]) <= 1e-3, "the same arithmetic"
    assert abs(more["f16"]) <= 1e-3 and abs(more["bf16"]) <= 5e-3 and abs(more["q8_0"]) <= 0.01
    assert 0.01 < more["q4_0"] <= 0.2 and 0.0 < more[bench_export.K_QUANT] <= more["q4_0"]
