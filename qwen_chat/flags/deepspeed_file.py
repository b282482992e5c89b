"""DeepSpeed's JSON file: read, and held against the flags that it must not contradict.

In: what --deepspeed names (a path, or zero2 and zero3: the files beside this module), and the run. Out: the config with
"auto" where it says nothing, and a line for each thing that cannot work.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_chat import hardware, place
from qwen_chat.flags.run_options import Run

FOLLOW_FLAGS = (
    "gradient_clipping",
    "gradient_accumulation_steps",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
)


def deepspeed_problems(run: Run) -> list[str]:
    """Why the file cannot be used for this run, one line each."""
    path = run.train.deepspeed
    if path is None:
        return []
    config, problem = read_deepspeed(path)
    if problem:
        return [problem]
    found = []
    zero = config.get("zero_optimization", {})
    if run.lora.q_lora and zero.get("stage", 0) == 3:
        found.append(
            f"--q_lora with ZeRO-3 ({path}): 4-bit weights cannot be split over processes; "
            f"use --deepspeed {place.deepspeed_file('zero2')}"
        )
    whole = "stage3_gather_16bit_weights_on_model_save"
    if run.method == "full" and zero.get("stage", 0) == 3 and zero.get(whole) is not True:
        found.append(
            f"--deepspeed {path}: a full fine-tune could not be saved; add {whole}: true to zero_optimization"
        )
    found += [
        f"--deepspeed {path}: has a {block!r} block, which overrides the flags; remove it"
        for block in ("scheduler", "optimizer")
        if block in config
    ]
    numbers = "float16" if run.train.fp16 else None if hardware.has_accelerator() else "float32"
    return [*found, *deepspeed_contradictions(run, config, numbers=numbers)]


def deepspeed_contradictions(
    run: Run, config: Mapping[str, Any], *, numbers: str | None, ranks: int | None = None
) -> list[str]:
    """Values of a DeepSpeed file that a flag, or its default, contradicts.

    numbers: what the run computes in ("float32", "bfloat16", "float16"); None, and ranks None: not known yet.
    """
    train, found = run.train, []
    batch, rows = train.per_device_train_batch_size, train.gradient_accumulation_steps
    expected: dict[str, tuple[Any, str]] = {
        "gradient_clipping": (run.extra.get("max_grad_norm", 1.0), "--max_grad_norm"),
        "gradient_accumulation_steps": (rows, "--gradient_accumulation_steps"),
        "train_micro_batch_size_per_gpu": (batch, "--per_device_train_batch_size"),
        "train_batch_size": (
            None if ranks is None else batch * rows * ranks,
            "batch size x accumulation x processes",
        ),
        "fp16": (None if numbers is None else numbers == "float16", "--fp16"),
        "bf16": (None if numbers is None else numbers == "bfloat16", "--bf16"),
    }
    for key, (value, flag) in expected.items():
        given = config.get(key)
        if key in ("fp16", "bf16"):
            key, given = f"{key}.enabled", given.get("enabled", "auto") if isinstance(given, dict) else given
        if value is not None and given != "auto" and given != value:
            found.append(
                f'--deepspeed {train.deepspeed}: {key} is {json.dumps(given)}, {flag} is {value}; write "auto" there'
            )
    return found


def read_deepspeed(path: str) -> tuple[dict[str, Any], str | None]:
    """The config as a dict, or the one line that says why it cannot be read.

    What it leaves out is filled with "auto", so that the flag holds: without the key gradient_clipping, for one,
    DeepSpeed would not clip at all.
    """
    shape = f"expected a JSON file such as {place.deepspeed_file('zero2')}"
    try:
        file = Path(__file__).with_name(f"{path}.json") if path in ("zero2", "zero3") else Path(path)
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, f"--deepspeed {path}: no such file; {shape}"
    except OSError as error:
        return {}, f"--deepspeed {path}: cannot be read ({error.strerror}); {shape}"
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        return {}, f"--deepspeed {path}: no JSON ({error}); {shape}"
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization", {}), dict):
        return {}, f"--deepspeed {path}: not DeepSpeed's shape; {shape}"
    for key in FOLLOW_FLAGS:
        config.setdefault(key, "auto")
    for key in ("bf16", "fp16"):
        if isinstance(config.setdefault(key, {}), dict):
            config[key].setdefault("enabled", "auto")
    return config, None
