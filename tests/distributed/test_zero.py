"""What two ranks under DeepSpeed leave behind on a CPU is a model, or an adapter, that loads and has learnt."""

import json
from pathlib import Path

import pytest
import torch
from runs import ROOT, curve, finish

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
