"""The loss curve, and what is measured before and after, do not depend on accumulation, ranks, engine or laziness."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support.runs import ROOT, curve, finish

ZERO2, ZERO3 = (str(ROOT / "finetune" / f"ds_config_zero{stage}.json") for stage in (2, 3))
STEPS = 8  # into the second epoch, over its short last window
METHODS = {
    "full": ["--learning_rate", "5e-3"],
    "lora": ["--use_lora", "True", "--lora_r", "4", "--lora_dropout", "0", "--learning_rate", "2e-2"],
}
DDP = [
    *("--ddp_bucket_cap_mb", "1", "--ddp_broadcast_buffers", "False", "--ddp_static_graph", "True"),
    *("--ddp_backend", "gloo", "--ddp_timeout", "60", "--ddp_find_unused_parameters", "False"),
]
WAYS = {
    "8x1": (8, 1, 1, []),
    "2 ranks x4": (4, 1, 2, []),
    "lazy": (4, 2, 1, ["--lazy_preprocess", "True"]),
    "packed": (4, 2, 1, ["--layout", "packed"]),
    "checkpointing": (4, 2, 1, ["--gradient_checkpointing", "True"]),
    "2 ranks, DDP's flags": (4, 1, 2, DDP),
    "2 ranks ZeRO-2": (2, 2, 2, ["--deepspeed", ZERO2]),
    "2 ranks ZeRO-3": (2, 2, 2, ["--deepspeed", ZERO3]),
}


def words(tiny: Path, data: Path, method: str, batch: int, accumulation: int) -> list[str]:
    return [
        *("-m", str(tiny), "-d", str(data), *METHODS[method]),
        *("--per_device_train_batch_size", str(batch), "--gradient_accumulation_steps", str(accumulation)),
        *("--max_steps", str(STEPS), "--save_strategy", "no", "--model_max_length", "256"),
        *(
            "--general_data",
            str(data),
        ),  # more conversations than one row holds, and a rank may get none of the last
    ]


def measured(folder: Path) -> list[float]:
    """Of each general conversation the loss before and after, then how many tokens it has."""
    found = json.loads((folder / "losses.json").read_text())["general"]
    return [value for when in ("before", "after") for pair in found[when] for value in pair]


@pytest.fixture(scope="module")
def reference(
    tiny: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[list[float], list[float]]]:
    """Each method's curve and general losses, one conversation a row: 1x8."""
    found = {}
    for method in METHODS:
        folder = tmp_path_factory.mktemp("reference") / method
        finish(words(tiny, conversations, method, 1, 8), folder)
        losses = curve(folder)
        assert len(losses) == STEPS
        assert losses[-1] < losses[0] - 0.2  # it learns: equal curves would mean nothing else
        found[method] = losses, measured(folder)
        assert len(found[method][1]) == 2 * 2 * 44
    return found


DEFAULT = {  # the rest is left to the slow tier: a start costs seconds
    *((way, "full") for way in ("2 ranks x4", "lazy", "2 ranks ZeRO-2", "2 ranks ZeRO-3")),
    *((way, "lora") for way in ("8x1", "2 ranks ZeRO-3")),
}
CASES = [
    pytest.param(
        way, method, id=f"{way} {method}", marks=[] if (way, method) in DEFAULT else pytest.mark.slow
    )
    for way in WAYS
    for method in METHODS
]


@pytest.mark.parametrize(("way", "method"), CASES)
def test_same_curve(
    way: str,
    method: str,
    tiny: Path,
    conversations: Path,
    tmp_path: Path,
    reference: dict[str, tuple[list[float], list[float]]],
) -> None:
    batch, accumulation, ranks, more = WAYS[way]
    finish([*words(tiny, conversations, method, batch, accumulation), *more], tmp_path / "run", ranks=ranks)
    found = curve(tmp_path / "run")
    losses, general = reference[method]
    differences = [abs(a - b) for a, b in zip(found, losses, strict=True)]
    assert max(differences) < 2e-4, (found, losses)
    assert sum(differences) / STEPS < 5e-5
    assert measured(tmp_path / "run") == pytest.approx(general, rel=1e-3)


@pytest.fixture(scope="module")
def routed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture whose config.json turns the router's loss on, so heavy that it moves the words' curve."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("routed") / "model"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
    shutil.copy(tiny / "tokenizer_config.json", folder)
    plain = json.loads((tiny / "config.json").read_text())
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    shape = {name: plain[name] for name in (*names, "intermediate_size", "initializer_range", "eos_token_id")}
    shape |= {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    shape |= {"output_router_logits": True, "router_aux_loss_coef": 2.0, "tie_word_embeddings": True}
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape)).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_same_curve_with_a_routers_loss(routed: Path, conversations: Path, tmp_path: Path) -> None:
    curves: dict[str, dict[str, list[float]]] = {}
    again = ["--deepspeed", ZERO3, "--gradient_checkpointing", "True"]
    ways = WAYS | {"1x8": (1, 8, 1, []), "2 ranks ZeRO-3, checkpointing": (2, 2, 2, again)}
    for way, (batch, accumulation, ranks, more) in ways.items():
        folder = tmp_path / way.replace(" ", "_")
        finish([*words(routed, conversations, "full", batch, accumulation), *more], folder, ranks=ranks)
        lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
        curves[way] = {name: [line[name] for line in lines] for name in ("loss", "router_loss")}
    for way in ways:
        for name in ("loss", "router_loss"):
            assert curves[way][name] == pytest.approx(curves["1x8"][name], abs=5e-5), (way, name)
    assert curves["1x8"]["router_loss"][-1] < curves["1x8"]["router_loss"][0] - 0.02  # it is learnt
