"""What two ranks under DeepSpeed leave behind on a CPU is a model, or an adapter, that loads and has learnt."""

import json
from pathlib import Path

import pytest
import torch

from tests.support.runs import ROOT, curve, finish

ZERO2, ZERO3 = (str(ROOT / "finetune" / f"ds_config_zero{stage}.json") for stage in (2, 3))
CASES = {
    "zero3_full": ["--deepspeed", ZERO3],
    "zero3_lora": ["--deepspeed", ZERO3, "--use_lora", "--lora_bias", "all"],
    "zero2_qlora": ["--deepspeed", ZERO2, "--q_lora"],
}


@pytest.mark.parametrize("case", CASES)
def test_the_result_loads_and_has_learnt(case: str, tiny: Path, conversations: Path, tmp_path: Path) -> None:
    from qwen_chat import models

    out = tmp_path / "out"
    words = ["-m", str(tiny), "-d", str(conversations), "--max_steps", "3", "--learning_rate", "2e-2"]
    finish([*words, "--save_strategy", "no", *CASES[case]], out, ranks=2)
    losses = curve(out)
    assert len(losses) == 3 and losses[2] < losses[0]
    adapter = "lora" in case
    loaded = models.load_model(tiny if adapter else out, adapter=out if adapter else None)
    ids = torch.arange(300, 320)[None]
    with torch.no_grad():
        moved = loaded.model(input_ids=ids).logits - models.load_model(tiny).model(input_ids=ids).logits
    assert torch.isfinite(moved).all() and float(moved.abs().max()) > 1e-2
    assert json.loads((out / "run.json").read_text())["world_size"] == 2


@pytest.mark.slow
def test_a_file_that_does_not_speak_of_clipping_follows_the_flag(
    tiny: Path, conversations: Path, tmp_path: Path
) -> None:
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    words = ["-m", str(tiny), "-d", str(conversations), "--optim", "sgd", "--learning_rate", "0.5"]
    words += ["--max_steps", "4", "--warmup_steps", "0", "--save_strategy", "no", "--model_max_length", "256"]
    curves = {}
    for name, more in {
        "plain": ["--max_grad_norm", "0.01"],
        "file": ["--max_grad_norm", "0.01", "--deepspeed", str(config)],
        "unclipped": ["--max_grad_norm", "0"],
    }.items():
        finish([*words, *more], tmp_path / name)
        curves[name] = curve(tmp_path / name)
    assert curves["file"] == pytest.approx(curves["plain"], abs=2e-4)
    assert abs(curves["file"][3] - curves["unclipped"][3]) > 0.05
