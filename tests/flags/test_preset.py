"""What --preset chooses: from facts alone, with reasons; what was given, in words or in a file, always wins."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_chat.errors import OptionError
from qwen_chat.flags.preset import ADAPTER, LEARNS_BY, QWEN2, Chosen, Facts, choices, explained
from qwen_chat.flags.run_options import settled
from qwen_chat.flags.run_problems import read_run

LORA = ["-d", "x", "--use_lora"]
DEMO = Facts("lora", width=576, conversations=106, learnt=5_000)


def values(chosen: tuple[Chosen, ...]) -> dict[str, float]:
    return {choice.flag: choice.value for choice in chosen}


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        # Small data: many passes in small steps. Large data: one pass.
        (Facts("lora", 576, 20, 300), {"num_train_epochs": 7, "per_device_train_batch_size": 2}),
        (Facts("lora", 576, 106, 5_000), {"num_train_epochs": 3, "gradient_accumulation_steps": 1}),
        (Facts("lora", 576, 500, 9_000), {"num_train_epochs": 1, "per_device_train_batch_size": 2}),
        (
            Facts("lora", 576, 2_000, 9_000),
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        ),
        (Facts("lora", 576, 90_000, 9_000), {"num_train_epochs": 1, "gradient_accumulation_steps": 4}),
        (Facts("lora", 576, 1, 0), {"num_train_epochs": 10, "lora_r": 16}),
        # The rank follows what is to be held, the scale stays.
        (Facts("lora", 576, 500, 3_000_001), {"lora_r": 32, "lora_alpha": 64}),
        (Facts("qlora", 576, 500, 99_000_000), {"lora_r": 64, "lora_alpha": 128, "lora_dropout": 0}),
        (Facts("lora", 576, 500, None), {"lora_r": 16}),
        (Facts("lora", 576, 500, 9, rank_stabilised=True), {"lora_r": 16, "lora_alpha": 8}),
        # The rate follows the model's width: the demo model, a 0.5B, a 7B; a full fine-tune takes a tenth.
        (Facts("lora", 576, 500, 9), {"learning_rate": 5e-4}),
        (Facts("lora", 896, 500, 9), {"learning_rate": 4e-4}),
        (Facts("qlora", 3584, 500, 9), {"learning_rate": 1e-4}),
        (Facts("full", 3584, 500, 9), {"learning_rate": 1e-5}),
        (Facts("full", 576, 500, 9), {"learning_rate": 5e-5}),
        (Facts("lora"), {"learning_rate": 1e-4}),
        # Nothing is read yet: the most memory that may be taken.
        (Facts("lora"), {"lora_r": 64, "per_device_train_batch_size": 4, "num_train_epochs": 3}),
        # A step is that of all processes together.
        (
            Facts("lora", 576, 2_000, 9, processes=2),
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
        ),
        (
            Facts("lora", 576, 2_000, 9, processes=64),
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1},
        ),
    ],
    ids=lambda value: "-".join(map(str, vars(value).values())) if isinstance(value, Facts) else "",
)
def test_auto_follows_the_facts(facts: Facts, expected: dict[str, float]) -> None:
    found = values(choices("auto", facts, {}))
    assert {flag: found[flag] for flag in expected} == expected


@pytest.mark.parametrize("preset", ["auto", "qwen2"])
def test_each_flag_is_chosen_once_with_a_reason_unless_it_was_given(preset: Any) -> None:
    assert [choice.flag for choice in choices(preset, DEMO, {})] == list(LEARNS_BY)
    for flag in LEARNS_BY:
        chosen = choices(preset, DEMO, {flag: 1})
        assert [choice.flag for choice in chosen] == [name for name in LEARNS_BY if name != flag]
        assert all(choice.reason for choice in chosen)
    assert not set(ADAPTER) & {choice.flag for choice in choices(preset, Facts("full"), {})}


def test_what_is_given_leads_what_follows_from_it() -> None:
    assert values(choices("auto", DEMO, {"lora_r": 8}))["lora_alpha"] == 16
    large = Facts("lora", 576, 2_000, 9)
    assert (
        values(choices("auto", large, {"per_device_train_batch_size": 1}))["gradient_accumulation_steps"] == 8
    )
    assert (
        values(choices("auto", large, {"gradient_accumulation_steps": 4}))["per_device_train_batch_size"] == 2
    )
    assert (
        values(choices("auto", large, {"per_device_train_batch_size": 32}))["gradient_accumulation_steps"]
        == 1
    )


def test_qwen2_is_the_old_example_whatever_the_data() -> None:
    assert values(choices("qwen2", DEMO, {})) == QWEN2
    run = read_run([*LORA, "--preset", "qwen2"])
    assert (run.lora.lora_r, run.lora.lora_alpha, run.lora.lora_dropout) == (64, 16, 0.05)
    assert (run.train.learning_rate, run.train.num_train_epochs) == (3e-4, 5)
    assert settled(run, DEMO).as_dict() == run.as_dict()


def test_a_run_is_settled_when_its_data_are_known_and_given_flags_stay(tmp_path: Path) -> None:
    words = [*LORA, "--lora_r", "8", "--learning_rate", "3e-5"]
    run = settled(read_run(words), DEMO)
    assert (run.lora.lora_r, run.lora.lora_alpha, run.train.learning_rate) == (8, 16, 3e-5)
    assert {choice.flag for choice in run.chosen} == set(LEARNS_BY) - {"lora_r", "learning_rate"}
    assert run.train.num_train_epochs == 3 and run.given == {
        "data_path",
        "use_lora",
        "lora_r",
        "learning_rate",
    }
    file = tmp_path / "run.yaml"
    file.write_text("data_path: x\nuse_lora: true\nlora_r: 8\nlearning_rate: 3e-5\n", encoding="utf-8")
    assert settled(read_run(["--config", str(file)]), DEMO).chosen == run.chosen
    assert settled(read_run([*LORA, "--learning_rate", "none"]), DEMO).train.learning_rate == 5e-4


def test_what_does_not_concern_a_run_is_not_chosen(tmp_path: Path) -> None:
    steps = settled(read_run([*LORA, "--max_steps", "5"]), DEMO)
    assert "num_train_epochs" not in values(steps.chosen) and steps.train.num_train_epochs == 3
    (tmp_path / "adapter_config.json").write_text('{"r": 4}', encoding="utf-8")
    continued = settled(read_run([*LORA, "--lora_weight_path", str(tmp_path)]), DEMO)
    assert not set(ADAPTER) & values(continued.chosen).keys()


def recorded(path: Path, run: Any) -> str:
    record = {"options": run.as_dict(), "shaped_by": {"data": "x"}, "given": sorted(run.given)}
    path.write_text(json.dumps(record), encoding="utf-8")
    return str(path)


def test_a_record_s_values_are_not_chosen_anew_unless_a_preset_is_asked_for(tmp_path: Path) -> None:
    first = settled(read_run([*LORA, "--lora_dropout", "0.1"]), DEMO)
    record = recorded(tmp_path / "run.json", first)
    more = Facts("lora", width=576, conversations=5_000, learnt=9_000_000)
    again = settled(read_run(["--config", record]), more)
    own = {"config": record}
    assert again.as_dict() == first.as_dict() | own and again.chosen == ()
    anew = settled(read_run(["--config", record, "--preset", "auto"]), more)
    assert (anew.lora.lora_r, anew.lora.lora_dropout, anew.train.num_train_epochs) == (32, 0.1, 1)
    old = settled(read_run(["--config", record, "--preset", "qwen2"]), more)
    assert (old.lora.lora_r, old.lora.lora_dropout, old.train.num_train_epochs) == (64, 0.1, 5)


def test_a_run_that_goes_on_keeps_what_was_chosen_for_it() -> None:
    began = settled(read_run(LORA), DEMO).as_dict()
    grown = settled(read_run(LORA), Facts("lora", width=576, conversations=5_000, learnt=9_000_000), began)
    assert grown.as_dict() == began
    reasons = {choice.flag: choice.reason for choice in grown.chosen}
    assert reasons["num_train_epochs"] == "as the run began" != reasons["learning_rate"]


def test_it_is_told_a_line_each() -> None:
    lines = explained("auto", choices("auto", DEMO, {})).splitlines()
    assert lines[0] == "chosen by --preset auto:"
    assert [line.split()[0] for line in lines[1:]] == [f"--{flag}" for flag in LEARNS_BY]
    assert lines[4] == "  --learning_rate 0.0005 (an adapter, the model is 576 wide)"
    assert explained("auto", ()) == "--preset auto chose nothing: every flag that it would was given"


def test_a_preset_that_there_is_not() -> None:
    with pytest.raises(OptionError, match=r"^--preset: 'qwen3'; expected auto or qwen2$"):
        read_run([*LORA, "--preset", "qwen3"])


@pytest.mark.parametrize(
    ("processes", "given", "step"),
    [(1, {}, 16), (3, {}, 12), (64, {}, 64), (1, {"per_device_train_batch_size": 3}, 15)],
)
def test_the_step_that_is_told_is_the_step_that_comes_of_it(
    processes: int, given: dict[str, float], step: int
) -> None:
    facts = Facts("lora", 576, 5_000, 9, processes)
    chosen = {choice.flag: choice for choice in choices("auto", facts, given)}
    last = chosen["gradient_accumulation_steps"]
    assert last.reason == f"a step of {step} of 5,000 conversations"
    row = given.get("per_device_train_batch_size") or chosen["per_device_train_batch_size"].value
    assert row * last.value * processes == step
    assert "0 tokens are learnt" in choices("auto", Facts("lora", 576, 2, 0), {})[0].reason
