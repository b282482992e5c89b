"""What a run needs before anything is loaded: memory for each method and engine, disk, steps, tokens.

    qwen-chat plan -m Qwen/Qwen2-7B-Instruct --ranks 8 --gpu_gib 80
    qwen-chat plan -m Qwen/Qwen2-7B-Instruct --use_lora True --gpu_gib 24 --simulate True
    qwen-chat plan --models        # which families are trained and served, and what shows it

In: a model (its config.json alone is read), any flag of a run, and the data where it is known. Out: a
table of full / LoRA / Q-LoRA x none / ZeRO-2 / ZeRO-3 / offload x gradient checkpointing on and off, what fits
the devices seen here (or those that are named), and the flags to give. Ends with 0, or 2 where nothing fits.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qwen_chat import errors, families, models, place
from qwen_chat.errors import MissingDependency, ModelError, OptionError
from qwen_chat.flags import preset, run_problems
from qwen_chat.flags.parser import option
from qwen_chat.flags.run_options import Run
from qwen_chat.training import memory_plan


@dataclass(frozen=True)
class PlanArguments:
    """Planning"""

    ranks: int | None = option(None, "processes in all; those of this machine without it")
    gpu_gib: float | None = option(None, "memory of one device; what is free here without it")
    row_tokens: int | None = option(
        None, "tokens of the longest row; from the data, else batch size x model_max_length"
    )
    simulate: bool = option(
        False, "also run a step of the run on a stand-in for its GPU, and count its memory tensor by tensor"
    )
    models: bool = option(False, "list the families of models and what each can do here, and stop")
    json: bool = option(False, "print one JSON object on standard output; the rest goes to standard error")


def main(argv: Sequence[str], about: str = str(__doc__)) -> int:
    run, values = run_problems.read_run_and(argv, PlanArguments, about=about, needs_data=False)
    options = values[PlanArguments]
    check_planned(options)
    if options.models:
        print(families.listing(), file=sys.stderr if options.json else sys.stdout)
        if options.json:
            print(json.dumps({"models": [asdict(family) for family in families.TABLE]}))
        return 0
    config = config_of(run.model.model)
    families.check_trainable(config, run.model.model)
    shape = memory_plan.Shape.of(config)
    if not shape.counted:
        raise ModelError(
            f"config.json: model_type {shape.kind!r}, whose parameters are not counted; expected one of"
            f" {', '.join(memory_plan.COUNTED)}; finetune.py tunes it without a plan"
        )
    memory_plan.check_targets(run, shape)
    run, counted = count_data(run, options.ranks) if run.data.data_path else (run, {})
    for note in families.positions_note(config, counted.get("longest", run.data.model_max_length)):
        print(f"note: {note}", file=sys.stderr)
    setup, have = situation(run, options, counted)
    assert have.free is not None, "situation ends where it is not known"
    rows = memory_plan.compare(shape, setup, have.free)
    best = memory_plan.recommend(rows, run.method)
    answer: dict[str, Any] = {
        "model": run.model.model or "the demo model",
        "parameters": shape.parameters,
        "active_parameters": shape.active,
        "vision_parameters": shape.vision,
        "method": run.method,
        "row_tokens": setup.row,
        "ranks": setup.ranks,
        "device_free": have.free,
        "rows": rows,
        "fits": best is not None,
        "recommended": None if best is None else flags(run, best),
        "main_memory": memory_plan.in_main_memory(shape, setup),
        "disk_needed": memory_plan.disk_needed(shape, run),
        "preset": [asdict(choice) for choice in run.chosen],
        **({} if not counted else length(run, counted, setup.ranks)),
    }
    if options.simulate:
        answer["simulated"] = simulated(run, config, setup, have.free)
    chosen = preset.explained(run.train.preset, run.chosen)
    print(plan_text(answer, have, chosen), file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps(answer, ensure_ascii=True))
    return 0 if best is not None else 2


def config_of(name: str | None) -> dict[str, Any]:
    """config.json of a folder, of a hub name (that one file is fetched), or of the demo model."""
    if name is None:
        from qwen_chat import demo_model

        return models.read_config(demo_model.ensure())
    if Path(name).expanduser().exists():
        return models.read_config(Path(name).expanduser())
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise MissingDependency("huggingface_hub", "a model by its hub name") from None
    try:
        return models.read_config(Path(hf_hub_download(name, "config.json")))
    except Exception as error:  # every kind of network and hub failure ends in the same cure
        raise ModelError(
            f"{name}: no such folder, and the hub does not give its config.json ({errors.first_line(error, 120)})"
        ) from None


def check_planned(options: PlanArguments) -> None:
    """OptionError where a number of the plan's own is none of anything."""
    numbers = {"ranks": options.ranks, "gpu_gib": options.gpu_gib, "row_tokens": options.row_tokens}
    wrong = [
        f"--{name} {value}: expected a number above 0"
        for name, value in numbers.items()
        if value is not None and not (value > 0 and math.isfinite(value))
    ]
    if wrong:
        raise OptionError("\n".join(wrong))


def count_data(run: Run, ranks: int | None) -> tuple[Run, dict[str, int]]:
    """The run with what --preset chooses for its data on so many processes; their conversations, tokens and longest
    row. They are tokenised as the run will, and kept for it."""
    from qwen_chat.data.mixture import read_data
    from qwen_chat.training import session

    path = models.resolve(run.model.model)
    data = read_data(run, session.format_of(run, path))
    run = session.settle(run, path, data, ranks=ranks)
    row, held, longest = session.longest_row(run, data, ranks=ranks)
    tokens, supervised = data.budget()
    return run, {
        "conversations": len(data.train),
        "tokens": tokens,
        "supervised": supervised,
        "row": row,
        "held": held,
        "longest": longest,
    }


def situation(
    run: Run, options: PlanArguments, counted: dict[str, int]
) -> tuple[memory_plan.Setup, memory_plan.Room]:
    """The run as it was asked for, on the devices seen or named."""
    whole = run.train.per_device_train_batch_size * run.data.model_max_length
    row = options.row_tokens or counted.get("row") or whole
    setup = memory_plan.setup_of(run, row, row, held=min(row, counted.get("held", row)))
    processes = options.ranks or setup.ranks
    named = options.gpu_gib is not None
    here = min(processes, setup.ranks_here if named else max(1, setup.ranks_here))
    if options.ranks is not None and not named and setup.device == "cpu":
        here = options.ranks  # they would share this machine's memory
    setup = replace(setup, ranks=processes, ranks_here=here)
    if options.gpu_gib is not None:
        free = int(memory_plan.ROOM * options.gpu_gib * memory_plan.GIB)
        half = run.train.bf16 is not False or run.train.fp16
        setup = replace(setup, device="cuda", half=half, lean=False)
        return setup, memory_plan.Room(free, f"a device of {options.gpu_gib:g} GiB")
    have = memory_plan.room(setup)
    if have.free is None:
        raise OptionError(f"what the accelerator has free is not known ({have.where}); give it: --gpu_gib 24")
    return setup, have


def simulated(run: Run, config: dict[str, Any], setup: memory_plan.Setup, free: int) -> dict[str, Any]:
    """The run itself on a stand-in, checkpointing as it would choose it. OptionError where it cannot be."""
    from qwen_chat.training import simulation

    shape, asked = memory_plan.Shape.of(config), run.train.gradient_checkpointing
    again = memory_plan.need(shape, setup).total > free if asked == "auto" else bool(asked)
    found = simulation.of_run(run, config, replace(setup, checkpointing=again))
    planned = memory_plan.need(shape, replace(setup, checkpointing=again))
    beside = {"checkpointing": again, "planned_bytes": planned.step - planned.runtime}
    return {name: found.to_json()[name] for name in ("peak_bytes", "transfers", "seconds")} | beside


def flags(run: Run, row: dict[str, Any]) -> str:
    """The flags of a run for a row of the table."""
    found = {"full": "", "lora": "--use_lora True", "qlora": "--q_lora True"}[row["method"]].split()
    if row["engine"] != "none":
        found += ["--deepspeed", place.deepspeed_file(row["engine"].partition("+")[0])]
    if row["engine"].endswith("+offload"):
        found.append("(with offload_optimizer's device set to cpu in it)")
    elif row["engine"] == "none":
        found += ["--deepspeed", "none"]
    return " ".join([*found, "--gradient_checkpointing", str(row["checkpointing"])])


def length(run: Run, counted: dict[str, int], ranks: int) -> dict[str, int]:
    """Steps and tokens of the whole run."""
    steps = memory_plan.steps_of(run, counted["conversations"], ranks)
    window = run.train.per_device_train_batch_size * run.train.gradient_accumulation_steps * ranks
    epochs = steps / -(-counted["conversations"] // window)
    return {
        "steps": steps,
        "conversations": counted["conversations"],
        "tokens": round(counted["tokens"] * epochs),
        "supervised_tokens": round(counted["supervised"] * epochs),
    }


def plan_text(answer: dict[str, Any], have: memory_plan.Room, chosen: str) -> str:
    """The plan for a person. chosen: what --preset chose, as lines."""
    active = answer["active_parameters"]
    mixture = f" ({active:,} of them for one token of text)" if active < answer["parameters"] else ""
    lines = [
        f"{answer['model']}: {answer['parameters']:,} parameters{mixture}; a row of {answer['row_tokens']:,} tokens,"
        f" {answer['ranks']} process(es); {have}",
        f"{'method':7}{'engine':15}{'again':6}{'trained':>15}{'weights':>9}{'grads':>8}{'optim':>8}"
        f"{'activ':>8}{'loss':>7}{'total':>8}  GiB a process",
    ]
    for row in answer["rows"]:
        parts = [row[name] / memory_plan.GIB for name in ("weights", "gradients", "optimizer", "activations")]
        numbers = f"{parts[0]:9.1f}{parts[1]:8.1f}{parts[2]:8.1f}{parts[3]:8.1f}"
        numbers += f"{row['loss'] / memory_plan.GIB:7.1f}{row['total'] / memory_plan.GIB:8.1f}"
        mark = "fits" if row["fits"] else "-"
        host = f", and {memory_plan.gib(row['host'])} of main memory" if row["host"] else ""
        again = "on" if row["checkpointing"] else "off"
        lines.append(
            f"{row['method']:7}{row['engine']:15}{again:6}{row['trainable']:>15,}{numbers}  {mark}{host}"
        )
    if answer["main_memory"]:
        lines.append(
            f"main memory: {memory_plan.gib(answer['main_memory'])} a process while the model is loaded there,"
            " unless ZeRO-3 or 4 bits load it"
        )
    if "simulated" in answer:
        found = answer["simulated"]
        lines.append(
            f"simulated: {memory_plan.gib(found['peak_bytes'])} of tensors at the peak (planned:"
            f" {memory_plan.gib(found['planned_bytes'])}) for {answer['method']}, gradient checkpointing"
            f" {'on' if found['checkpointing'] else 'off'}; the host waits for the GPU {found['transfers']} times in a"
            f" row's forward and backward pass ({found['seconds']} s)"
        )
    lines.append(f"disk: {memory_plan.gib(answer['disk_needed'])} for the result and the checkpoints kept")
    if "steps" in answer:
        lines.append(
            f"the run: {answer['steps']:,} steps, {answer['tokens']:,} tokens,"
            f" {answer['supervised_tokens']:,} of them learnt"
        )
    lines.append(chosen)
    if answer["recommended"] is None:
        lines.append("nothing fits: use a smaller model, a lower --model_max_length, or more processes")
    else:
        lines.append(f"recommended: {answer['recommended']}")
    return "\n".join(lines)
