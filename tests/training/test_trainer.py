"""The trainer's parts alone: data mixed by weight, what a device decides, the run's folder, the log."""

import json
import time
from collections import Counter
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qwen_chat import place
from qwen_chat.data import mixture
from qwen_chat.errors import OutputError
from qwen_chat.flags import training_fields
from qwen_chat.flags.run_problems import read_run
from qwen_chat.training import options, ranks, result, run_folder, session, step_log, trainer, tuned_model

RUN = read_run(["-d", "my data.v2.jsonl", "--use_lora"])


class Numbers:
    """Ten conversations, four of the first file, six of the second."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> int:
        return i

    def given_of(self, i: int) -> int:
        return int(i >= 4)

    def where(self, i: int) -> str:
        return f"file:{i + 1}"


def test_weights_say_how_often_an_epoch_sees_a_conversation() -> None:
    mixed = mixture.Mixture(Numbers(), [2.0, 0.5], seed=1)
    seen = Counter(mixed[i] for i in range(len(mixed)))
    assert {i: seen[i] for i in range(4)} == dict.fromkeys(range(4), 2)
    assert sum(seen[i] for i in range(4, 10)) == 3 and max(seen[i] for i in range(4, 10)) == 1
    assert all(mixed.where(i) == f"file:{mixed[i] + 1}" for i in range(len(mixed)))


def test_weights_count_in_an_epochs_tokens() -> None:
    def one(i: int) -> tuple[Any, ...]:  # conversation i: sequences of i + 1 and 10 tokens
        return tuple(SimpleNamespace(input_ids=[0] * n, supervised=n // 2) for n in (i + 1, 10))

    numbers = Numbers()
    data = SimpleNamespace(given_of=numbers.given_of, __len__=lambda: 10)
    summary = SimpleNamespace(tokens=155, supervised=75)

    class Texts(Numbers):
        __getitem__ = staticmethod(one)  # type: ignore[assignment]

    mixed = mixture.Mixture(Texts(), [2.0, 0], seed=1)
    assert mixture.Data(mixed, None, "", summary).budget() == (
        2 * (1 + 2 + 3 + 4 + 40),
        2 * (0 + 1 + 1 + 2 + 20),
    )
    assert mixture.Data(data, None, "", summary).budget() == (155, 75)


def test_a_mixture_is_the_seeds() -> None:
    picked = [list(mixture.Mixture(Numbers(), [0.5, 1.25], seed=seed).index) for seed in (1, 1, 2)]
    assert picked[0] == picked[1] != picked[2]
    assert len(picked[0]) == 2 + 6 + 2
    assert len(mixture.Mixture(Numbers(), [0, 0], seed=1)) == 0


def test_training_arguments_are_ours_and_the_users(tmp_path: Path) -> None:
    words = ["-d", "x", "--use_lora", "--seed", "7", "--max_steps", "3", "--optim", "adafactor"]
    run = read_run([*words, "--warmup_ratio", "0.25"])
    args, _ = options.training_arguments(run, tmp_path, checkpointing=True)
    assert (args.seed, args.max_steps, args.optim, args.learning_rate) == (7, 3, "adafactor", 1e-4)
    assert (args.warmup_steps, args.get_warmup_steps(100)) == (0.25, 25)
    assert (args.gradient_checkpointing, args.adam_beta2, args.report_to) == (True, 0.95, [])
    assert (args.world_size, args.use_cpu, args.remove_unused_columns) == (
        1,
        not torch.cuda.is_available(),
        False,
    )
    assert mixture.seed_of(run) == 7
    assert mixture.seed_of(read_run([*words, "--data_seed", "0"])) == 0


def test_a_process_trains_on_one_of_several_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda args: 4))
    args, _ = options.training_arguments(read_run(["-d", "x"]), tmp_path, checkpointing=False)
    assert vars(args)["_n_gpu"] == 1


@pytest.mark.parametrize("here", [True, False])
def test_every_rank_takes_part_in_the_choice_of_checkpointing(
    here: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(session, "any_rank", lambda value: asked.append(value) or True)
    verdict: Any = SimpleNamespace(checkpointing=here, in_passes=False, line="")
    before: Any = SimpleNamespace(choices={})
    nothing: Any = None
    run = read_run(["-d", "x"])
    joined = session.join(
        session.Prepared(run, tmp_path, tmp_path, nothing, nothing, {}, before, verdict, ())
    )
    assert asked == [here]  # a rank that left the question out would let the others wait for ever
    assert joined.args.gradient_checkpointing and joined.choices["gradient_checkpointing"] is True
    assert joined.folder == Path(joined.args.output_dir) == tmp_path


def test_alone_every_rank_is_this_one() -> None:
    assert (ranks.any_rank(True), ranks.any_rank(False)) == (True, False)


def test_generation_stops_where_training_stopped() -> None:
    tokenizer = SimpleNamespace(pad_token_id=0)
    fmt = SimpleNamespace(stop_token_ids=(2, 0), tokenizer=tokenizer)
    for old, new in (([5, 2], [2, 0, 5]), (None, [2, 0]), (0, [2, 0])):
        config = SimpleNamespace(eos_token_id=old, pad_token_id=None)
        result.stop_where_trained(SimpleNamespace(generation_config=config), fmt)
        assert (config.eos_token_id, config.pad_token_id) == (new, 0)


# --------------------------------------------------------------------------------------------- the run's folder


def test_a_folder_is_named_after_data_method_and_time() -> None:
    now = datetime(2026, 11, 24, 5, 6, 7)
    assert run_folder.choose_folder(RUN, now) == place.OUTPUTS / "my_data-lora-20261124-050607"
    given = replace(RUN, train=replace(RUN.train, output_dir="here/out"))
    assert run_folder.choose_folder(given, now) == Path("here/out")


def test_a_run_that_repeats_another_makes_its_choices_and_says_what_has_changed(tmp_path: Path) -> None:
    shape = {"options": RUN.as_dict(), "data": "a", "model": "m", "world_size": 1}
    record = {"shaped_by": shape | {"data": "b"}, "choices": {"threads": 2}}
    again = replace(RUN, train=replace(RUN.train, config="old/run.json"), repeats=record)
    found = run_folder.resume(again, tmp_path / "new", shape | {"options": again.as_dict()})
    assert (found.source, found.choices) == (None, {"threads": 2})
    assert found.notes == ("repeats old/run.json, with a change: the data has other content",)
    assert run_folder.resume(RUN, tmp_path / "new", shape) == run_folder.Resume(None, {})


def test_folders_that_may_be_written_to(tmp_path: Path) -> None:
    run_folder.check_usable(tmp_path / "new" / "deeper")
    run_folder.check_usable(tmp_path)
    own = tmp_path / "own"
    (own / "checkpoint-3").mkdir(parents=True)
    (own / "train_log.jsonl").touch()
    with pytest.raises(OutputError, match=r"holds checkpoints but no run\.json"):
        run_folder.check_usable(own)
    run_folder.write_run_json(own, {"state": "running"})
    run_folder.check_usable(own)
    run_folder.write_run_json(own, {"state": "finished"})
    with pytest.raises(OutputError, match="holds a finished run; nothing is overwritten"):
        run_folder.check_usable(own)


def test_folders_that_hold_something_else(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "checkpoint-x", "d"):
        (tmp_path / name).touch()
    with pytest.raises(OutputError) as caught:
        run_folder.check_usable(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: holds something else (a.txt, b.txt, checkpoint-x ...); give a new or empty folder with -o"
    )
    with pytest.raises(OutputError, match=r"a\.txt: a file; the output needs a folder"):
        run_folder.check_usable(tmp_path / "a.txt" / "out")


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    run_folder.check_disk(tmp_path / "new", 1)
    with pytest.raises(OutputError, match=r"free some, lower --save_total_limit"):
        run_folder.check_disk(tmp_path / "new", 2**60)


def test_the_status_that_a_launcher_would_hide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_folder.tell_status(2) == 2
    monkeypatch.setenv("FINETUNE_STATUS_DIR", str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    assert run_folder.tell_status(0) == 0 and not list(tmp_path.iterdir())
    assert run_folder.tell_status(2) == 2
    assert (tmp_path / "3").read_text() == "2\n"


def test_what_may_change_when_a_run_goes_on() -> None:
    plain = run_folder.free({"lr_scheduler_type": "cosine"})
    harmless = {"dataloader_num_workers", "run_name", "eval_steps", "eval_delay", "disable_tqdm", "log_level"}
    assert harmless | {"ddp_timeout", "eval_data_path", "save_steps", "logging_steps"} <= plain
    assert not plain & {"max_steps", "num_train_epochs", "learning_rate", "seed", "layout", "lora_dropout"}
    assert run_folder.free({"lr_scheduler_type": "constant"}) - plain == {"max_steps", "num_train_epochs"}
    for decides in (
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        {"lr_scheduler_type": "greedy"},
        {"lr_scheduler_type": "cosine", "load_best_model_at_end": True},
    ):  # held-out losses set the rate, or which model is kept
        assert not run_folder.free(decides) & {"eval_data_path", "eval_strategy", "eval_steps", "eval_delay"}


def test_every_option_that_may_change_is_an_option() -> None:
    known = {*RUN.as_dict(), *(option.name for option in training_fields.trainer_options())}
    assert run_folder.free({"lr_scheduler_type": "constant"}) <= known


# ------------------------------------------------------------------------------------------------------ the log


@pytest.mark.parametrize(
    ("before", "step", "allowed"),
    [(0.02, 2, True), (2.0, 1, False), (None, 0, False), (None, 7, True), (0.0, 9, True)],
    ids=["after a descent", "from any height", "at once", "after a resume", "again"],
)
def test_a_loss_of_zero_may_be_learnt_by_heart(before: float | None, step: int, allowed: bool) -> None:
    assert trainer.is_learnt_by_heart(before, step) is allowed


def test_lines_after_the_checkpoint_are_written_again(tmp_path: Path) -> None:
    log = step_log.StepLog(tmp_path)
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 6)]
    log.path.write_text("\n".join(lines) + '\n{"step": 6, "lo', encoding="utf-8")
    log.forget_after(3)
    assert log.path.read_text() == "\n".join(lines[:3]) + "\n"


def test_a_report_says_what_came_of_it_and_what_to_type() -> None:
    outcome: dict[str, Any] = {"steps": 3, "tokens": 1200, "seconds": 2.0, "tokens_per_s": 600.0}
    outcome |= {"losses": {"first": 2.0, "last": 1.5}, "evaluation": {}}
    assert result.report(RUN, Path("my out"), outcome).splitlines() == [
        "3 steps, 1,200 tokens in 2 s (600 tokens/s); loss 2.0000 -> 1.5000",
        "saved in my out; now talk to it:",
        "  python fast_start/simple_try_0.py --adapter 'my out'",
    ]
    outcome["evaluation"] = {"eval_loss": 1.0, "eval_perplexity": 2.718, "eval_token_accuracy": 0.5}
    full = replace(RUN, lora=replace(RUN.lora, use_lora=False))
    assert result.report(full, Path("out"), outcome).splitlines()[1:] == [
        "held out: loss 1.0000, perplexity 2.72, token accuracy 50.0%",
        "saved in out; now talk to it:",
        "  python fast_start/simple_try_0.py -m out",
    ]


def test_a_report_says_what_is_forgotten() -> None:
    outcome: dict[str, Any] = {"steps": 3, "tokens": 1200, "seconds": 2.0, "tokens_per_s": 600.0}
    moved = {"value": 0.25, "low": 0.125, "high": 0.5, "n": 200}
    general = {"conversations": 200, "tokens": 900, "before": 2.0, "after": 2.25, "difference": moved}
    outcome |= {"losses": {}, "evaluation": {}, "changes": {"general": general}}

    def said() -> str:
        return result.report(RUN, Path("out"), outcome).splitlines()[1]

    told = (
        "general data: loss 2.0000 before the first step, 2.2500 after the last: +0.2500 [+0.1250, +0.5000]"
    )
    told += " (95 %, bootstrap over 200 conversations)"
    assert said() == f"{told}; some of what it knew is forgotten"
    moved["low"] = -0.125
    assert said().endswith("conversations); nothing is forgotten that this could tell")
    outcome["changes"] = {"held_out": general}
    assert said() == told.replace("general data", "held out").replace("[+0.1250", "[-0.1250")
    general |= {"before": None, "difference": None}
    assert said() == "saved in out; now talk to it:"
    outcome["changes"] = {"general": general}
    assert said().startswith(
        "general data: loss 2.2500 after the last step; before the first it was not measured"
    )


def test_a_report_names_the_best_checkpoint_and_a_run_that_learnt_nothing() -> None:
    outcome: dict[str, Any] = {"steps": 16, "tokens": 1, "seconds": 1.0, "tokens_per_s": 1.0}
    outcome |= {"losses": {}, "evaluation": {}, "best_checkpoint": "out/checkpoint-12"}
    outcome["best"] = {"step": 12, "metric": "eval_loss", "value": 4.765, "saved_step": 16}
    said = result.report(RUN, Path("out"), outcome).splitlines()
    assert said[1] == "best on held-out data: checkpoint-12 (loss 4.7650); what is saved is step 16"
    outcome["best"] |= {"metric": "token_accuracy", "value": 0.5, "saved_step": 12}
    said = result.report(RUN, Path("out"), outcome | {"highest_learning_rate": 0.0}).splitlines()
    assert said[1] == "nothing was learnt: every step ran at a rate of 0 (warming up); give --warmup_steps 0"
    assert said[2] == "best on held-out data: checkpoint-12 (token_accuracy 0.5000); that is what is saved"


def test_a_long_first_example_is_shown_by_its_ends() -> None:
    class Words:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return "".join(f"{i}," for i in ids)

    def shown(length: int) -> str:
        first = SimpleNamespace(input_ids=np.arange(length), spans=np.array([[length - 2, length]]))
        data: Any = SimpleNamespace(train=[(first,)])
        return mixture.first_example(Words(), data, colour=False)

    assert shown(1000) == "".join(f"{i}," for i in range(998)) + "⟦998,999,⟧"
    head, middle, tail = shown(10_000).split("\n")
    assert (head[-8:], middle) == ("498,499,", "... 9,000 tokens are not shown ...")
    assert tail.startswith("9500,9501,") and tail.endswith("⟦9998,9999,⟧")


def test_a_run_is_recorded_whole(tmp_path: Path) -> None:
    data = mixture.Data(Numbers(), None, "abc", SimpleNamespace(to_json=lambda: {"tokens": 5}))
    verdict: Any = SimpleNamespace(row=9, need=SimpleNamespace(to_json=lambda: {"total": 8}))
    nothing: Any = None
    shaped_by = {"data": "abc"}
    one = session.Session(
        *(RUN, tmp_path, Path("m"), nothing, data, shaped_by, nothing, verdict),
        *(("look out",), nothing, (), {}),
    )
    record = result.record(one, {"threads": 3}, ["one"])
    run_folder.write_run_json(tmp_path, record)
    found = run_folder.read_run_json(tmp_path)
    assert found["options"] == json.loads(json.dumps(RUN.as_dict()))
    assert found["data"] == {"fingerprint": "abc", "epoch_conversations": 10, "tokens": 5}
    assert (found["state"], found["method"], found["decisions"][-1]) == ("running", "lora", "one")
    chosen = [f"--{choice['flag']} {choice['value']:g} ({choice['reason']})" for choice in found["preset"]]
    assert found["decisions"][:-1] == [f"--preset auto: {choice}" for choice in chosen] != []
    assert found["warnings"] == ["look out"] and not {"held_out", "general"} & found.keys()
    assert found["plan"] == {"row": 9, "total": 8}
    assert (found["shaped_by"], found["choices"], found["model"]) == (shaped_by, {"threads": 3}, "m")
    assert found["versions"]["torch"] == torch.__version__
    assert time.strptime(found["started"][:19], "%Y-%m-%dT%H:%M:%S")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_run_on_the_cpu_of_a_machine_with_a_gpu_keeps_float32(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--use_cpu True: bfloat16 weights would lose updates below 1/256."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    run = read_run(["-d", "x", "--use_cpu", "True"])
    args = SimpleNamespace(device=torch.device("cpu"), bf16=False, fp16=False)
    loaded = tuned_model.load(run, tiny_model_path, args)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}


def test_our_attention_may_be_asked_for_by_its_name(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.AttentionInterface._global_mapping", {})  # nobody has registered it
    args = SimpleNamespace(device=torch.device("cpu"), bf16=False, fp16=False)
    run = read_run(["-d", "x", "--attn_implementation", "qwen_chat"])
    loaded = tuned_model.load(run, tiny_model_path, args)
    assert loaded.model.config._attn_implementation == "qwen_chat"
    assert any(line.startswith("attention qwen_chat (blocks; ") for line in loaded.decisions)
