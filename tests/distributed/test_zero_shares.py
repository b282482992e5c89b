"""ZeRO's shares by rule against the tensors of two real ranks, of six layers of the demo model's shape in float32."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_chat import demo_model
from qwen_chat.flags.run_options import LoraArguments
from qwen_chat.training import simulation
from qwen_chat.training.memory_plan import Setup
from qwen_chat.training.ranks import free_port
from tests.support.runs import ROOT

LAYERS, ROW = 6, 128
# By how much of the real peak the rules may miss it.
TOLERANCE = {(1, "full"): 0.03, (2, "full"): 0.03, (3, "full"): 0.07, (3, "lora"): 0.02}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("stage", "method"), TOLERANCE)
def test_the_simulated_peak_is_that_of_two_real_ranks(stage: int, method: str, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.support.zero_rank", str(stage), method, str(ROW), str(LAYERS)]
    joined = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    joined |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    started = []
    for rank in range(2):
        own = os.environ | joined | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (tmp_path / str(rank)).open(
            "w"
        ) as out:  # torch warns at every reduction: more than a pipe holds
            started.append(subprocess.Popen(words, cwd=ROOT, env=own, stdout=out, stderr=subprocess.STDOUT))
    ended = [process.wait(timeout=1200) for process in started]
    said = (tmp_path / "0").read_text()
    assert ended == [0, 0], said[-2000:]
    real = json.loads(said.splitlines()[-1])["peak"]
    config = json.loads((demo_model.ensure() / "config.json").read_text("utf-8")) | {
        "num_hidden_layers": LAYERS
    }
    setup = Setup(
        method=method,  # type: ignore[arg-type]
        zero=stage,
        ranks=2,
        row=ROW,
        supervised=ROW,
        device="cuda",
        lora_dropout=0,
    )
    few = {"stage3_max_live_parameters": 2 * 10**7, "stage3_max_reuse_distance": 2 * 10**7}
    lora = LoraArguments(use_lora=method == "lora", lora_dropout=0)
    found = simulation.simulate(config, setup, lora, zero=few)
    assert found.peak_bytes == pytest.approx(real, rel=TOLERANCE[stage, method])
