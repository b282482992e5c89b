"""plan.py as a person runs it: from config.json alone, and with data."""

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_chat import families
from tests.support.scripts import Ran, runner
from tests.support.shapes import PUBLISHED, QWEN2_5_SEVEN_BILLION
from tests.training.test_memory_plan import small

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "finetune" / "plan.py"


@pytest.fixture
def seven(tmp_path: Path) -> Path:
    """Qwen2-7B's config.json, and nothing else."""
    (tmp_path / "seven").mkdir()
    (tmp_path / "seven" / "config.json").write_text(json.dumps(QWEN2_5_SEVEN_BILLION))
    return tmp_path / "seven"


def plan(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=120)


def answer(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    (line,) = done.stdout.splitlines()  # one JSON object, the rest on standard error
    found: dict[str, Any] = json.loads(line)
    return found


def row(found: dict[str, Any], method: str, engine: str, again: bool) -> dict[str, Any]:
    wanted = (method, engine, again)
    (one,) = (r for r in found["rows"] if (r["method"], r["engine"], r["checkpointing"]) == wanted)
    return dict(one)


def test_seven_billion_on_eight_large_gpus(seven: Path) -> None:
    begun = time.monotonic()
    done = plan("-m", str(seven), "--ranks", "8", "--gpu_gib", "80", "--json")
    assert time.monotonic() - begun < 5  # no torch
    assert done.returncode == 0, done.stderr
    found = answer(done)
    assert found["parameters"] == 7_615_616_512
    assert len(found["rows"]) == 3 * 5 * 2 - 2 * 2  # Q-LoRA has no ZeRO-3
    assert not row(found, "full", "none", True)["fits"]
    assert row(found, "full", "zero3", True)["fits"]
    assert row(found, "full", "zero3", True)["total"] < row(found, "full", "zero2", True)["total"]
    assert row(found, "lora", "none", True)["fits"]
    assert found["recommended"].startswith("--deepspeed finetune/ds_config_zero")
    assert "recommended: " in done.stderr


def test_seven_billion_on_one_small_gpu(seven: Path) -> None:
    words = ["-m", str(seven), "--gpu_gib", "16", "--per_device_train_batch_size", "1", "--json"]
    found = answer(plan(*words))
    assert found["recommended"] == "--q_lora True --deepspeed none --gradient_checkpointing True"
    done = plan(*words, "--gpu_gib", "4")
    assert done.returncode == 2
    assert answer(done)["recommended"] is None


def test_a_mixture_of_experts_is_counted_whole(tmp_path: Path) -> None:
    """57 GiB of weights in bfloat16: no adapter over it fits one small GPU unless the weights lie in main memory."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Qwen3-30B-A3B"][0]))
    words = ["-m", str(tmp_path), "--use_lora", "True", "--gpu_gib", "24", "--json"]
    done = plan(*words)
    found = answer(done)
    assert (found["parameters"], found["active_parameters"]) == (30_532_122_624, 3_353_032_704)
    assert {one["engine"] for one in found["rows"] if one["fits"]} <= {"zero3", "zero3+offload"}
    assert not row(found, "lora", "none", True)["fits"]
    assert "parameters (3,353,032,704 of them for one token of text)" in done.stderr


def test_a_folder_with_a_part_that_sees_is_planned_whole(tmp_path: Path) -> None:
    config, published = PUBLISHED["Qwen3.5-27B"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = plan("-m", str(tmp_path), "--use_lora", "True", "--gpu_gib", "80", "--json")
    found = answer(done)
    assert (found["parameters"], found["active_parameters"]) == (published, 26_895_998_464)
    assert found["vision_parameters"] == published - 26_895_998_464
    assert row(found, "lora", "none", True)["fits"] and not row(found, "full", "none", True)["fits"]


def test_the_families_are_listed() -> None:
    begun = time.monotonic()
    done = plan("--models")
    assert time.monotonic() - begun < 5  # no torch
    assert (done.returncode, done.stdout) == (0, families.listing() + "\n")
    done = plan("--models", "--json")
    assert done.stderr == families.listing() + "\n"
    (first, *_) = answer(done)["models"]
    assert first["model_type"] == "qwen2" and first["trains"] == ["shared_prefix", "packed", "padded"]
    assert set(first) == {"model_type", "models", "trains", "engine", "dialect", "thinking", "proven"}


def test_a_type_that_is_not_counted_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phi3", "hidden_size": 64}))
    done = plan("-m", str(tmp_path))
    assert done.returncode == 2
    assert "model_type 'phi3', whose parameters are not counted; expected one of qwen2" in done.stderr


def test_with_data_it_counts_the_run(demo_model_path: Path) -> None:
    data = ROOT / "finetune" / "io_file" / "input_data" / "example_data.jsonl"
    done = plan(
        "-m", str(demo_model_path), "-d", str(data), "--use_lora", "True", "--num_train_epochs", "2", "--json"
    )
    assert done.returncode == 0, done.stderr
    found = answer(done)
    conversations = len(data.read_text(encoding="utf-8").splitlines())
    assert found["conversations"] == conversations
    chosen = {choice["flag"]: choice["value"] for choice in found["preset"]}
    step = chosen["per_device_train_batch_size"] * chosen["gradient_accumulation_steps"]
    assert found["steps"] == 2 * -(-conversations // step) and "num_train_epochs" not in chosen
    assert 0 < found["supervised_tokens"] < found["tokens"]
    assert 0 < found["row_tokens"] <= 4 * 2048


def test_weights_and_positions_count(
    tiny_model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = importlib.util.spec_from_file_location("plan_script", SCRIPT)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "plan_script", script)  # its dataclass looks itself up
    spec.loader.exec_module(script)
    for name, length in (("a", 9), ("b", 3000)):
        messages = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "!" + " word" * length},
        ]
        (tmp_path / name).write_text(json.dumps({"messages": messages}) + "\n")
    words = ["-m", str(tiny_model_path), "-d", str(tmp_path / "a"), "-d", str(tmp_path / "b"), "--json"]
    words += ["--model_max_length", "4000", "--num_train_epochs", "1"]
    tokens = []
    for more in ([], ["--data_weights", "3", "0"]):
        monkeypatch.setattr(sys, "argv", ["plan.py", *words, *more])
        script.main()
        out, err = capsys.readouterr()
        assert "for a model of 2,048 positions (max_position_embeddings)" in err
        tokens.append(json.loads(out)["tokens"])
    assert tokens[0] > 3000
    assert 3 * 10 < tokens[1] < 3 * 100 and tokens[1] % 3 == 0
    monkeypatch.setattr(sys, "argv", ["plan.py", *words, "--ranks", "2"])  # what such a run would choose
    script.main()
    chosen = {one["flag"]: one for one in json.loads(capsys.readouterr().out)["preset"]}
    assert chosen["per_device_train_batch_size"]["value"] == 1
    assert chosen["gradient_accumulation_steps"]["reason"] == "a step of 2 of 2 conversations"


Simulate = Callable[..., Ran]


@pytest.fixture
def simulate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Simulate:
    """plan.py --simulate True in this process, for a config.json with other fields than a small Qwen2's."""
    run = runner("finetune/plan.py", monkeypatch, capsys)

    def simulated(*words: str, **fields: object) -> Ran:
        (tmp_path / "config.json").write_text(json.dumps(small("qwen2") | {"vocab_size": 1000} | fields))
        return run("-m", str(tmp_path), "--simulate", "True", *words)

    return simulated


@pytest.mark.parametrize(
    ("words", "again"),
    [
        (["--use_lora", "True", "--row_tokens", "256"], False),
        (["--row_tokens", "65536", "--gpu_gib", "1.75"], True),  # only computed again it fits: auto
        (["--row_tokens", "256", "--gradient_checkpointing", "True"], True),
        (
            [
                *("--row_tokens", "256", "--gradient_checkpointing", "False", "--ranks", "8"),
                *("--deepspeed", str(ROOT / "finetune" / "ds_config_zero2.json")),
            ],
            False,
        ),
    ],
)
def test_a_step_is_simulated(simulate: Simulate, words: list[str], again: bool) -> None:
    words = ["--gpu_gib", "24", "--json", *words]
    status, said, printed = simulate(*words)
    assert status == 0, said
    found = json.loads(printed)
    counted = found["simulated"]
    assert set(counted) == {"peak_bytes", "transfers", "seconds", "checkpointing", "planned_bytes"}
    assert counted["checkpointing"] is again
    assert counted["planned_bytes"] == pytest.approx(counted["peak_bytes"], rel=0.08)
    assert counted["transfers"] == 2 and 0 < counted["seconds"] < 60
    assert f"gradient checkpointing {'on' if again else 'off'}; the host waits for the GPU 2 times" in said


@pytest.mark.parametrize(
    ("words", "fields", "said"),
    [
        (["--device", "cpu"], {}, "it stands in for a GPU; name one: --gpu_gib 24"),
        (
            ["--q_lora", "True", "--gpu_gib", "24"],
            {},
            "4-bit weights are multiplied by kernels of bitsandbytes",
        ),
        (["--gpu_gib", "24", "--optim", "adafactor"], {}, "--optim adafactor has none"),
        (["--gpu_gib", "24", "--deepspeed"], {}, "what is offloaded moves between a GPU and main memory"),
        (
            ["--gpu_gib", "24"],
            small("qwen3_moe"),
            "a model of type 'qwen3_moe' cannot be simulated so (",
        ),
    ],
)
def test_what_has_no_stand_in_is_one_line(
    simulate: Simulate, tmp_path: Path, words: list[str], fields: dict[str, object], said: str
) -> None:
    if words[-1] == "--deepspeed":
        file = tmp_path / "offload.json"
        block = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
        file.write_text(json.dumps({"zero_optimization": block}))
        words = [*words, str(file)]
    status, told, printed = simulate(*words, "--row_tokens", "64", **fields)
    assert (status, printed) == (2, "")
    assert told.splitlines()[-1].startswith("error: --simulate True: ") and said in told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-m", "no/where/at all"], "no such folder"),
        (["--rank", "2"], "did you mean --ranks?"),
        (
            ["--ranks", "0", "--gpu_gib", "nan"],
            "error: --ranks 0: expected a number above 0\n--gpu_gib nan: expected",
        ),
        (
            ["--q_lora", "True", "--deepspeed", str(ROOT / "finetune" / "ds_config_zero3.json")],
            "4-bit weights cannot",
        ),
        (["--lora_r", "0", "--use_lora", "True"], "--lora_r 0: expected a number above 0"),
        (
            ["--use_lora", "True", "--lora_target_modules", "all-linear", "experts", "--lora_dropout", "0"],
            "--lora_target_modules all-linear experts: a model of type 'qwen2' has no experts here; leave experts",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(words: list[str], said: str, seven: Path) -> None:
    done = plan(*(["-m", str(seven)] if "-m" not in words else []), *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_model_that_finetune_refuses_is_not_planned(seven: Path, tmp_path: Path) -> None:
    config = json.loads((seven / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"final_logit_softcapping": 30.0}))
    done = plan("-m", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        f"{tmp_path}: a model of type 'qwen2' cannot be trained here: final_logit_softcapping" in done.stderr
    )
