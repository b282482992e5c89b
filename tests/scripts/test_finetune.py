"""finetune.py as a person uses it: each method trains, saves, loads, answers; bad input is one line and status 2."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen_chat import files, models, place
from qwen_chat.cli import serve
from qwen_chat.training import checkpoints, run_folder
from tests.support.scripts import Finetune, runner

ROOT = Path(__file__).resolve().parents[2]
INPUT = ROOT / "finetune" / "io_file" / "input_data"
# A warm-up begins at a rate of 0; a step has all eight conversations of `short`.
STEP = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
RATE = ["--learning_rate", "1e-2", "--warmup_steps", "0", "--num_train_epochs", "3.0", *STEP]


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight conversations of the example data, tools and Chinese among them."""
    lines = (INPUT / "example_data.jsonl").read_text(encoding="utf-8").splitlines()
    plain = [line for line in lines if '"type": "tool"' not in line]
    tools = [line for line in lines if '"type": "tool"' in line]
    file = tmp_path_factory.mktemp("data") / "short data.jsonl"
    file.write_text("\n".join([*plain[:3], *plain[20:23], *tools[:2]]) + "\n", encoding="utf-8")
    return file


def steps(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / run_folder.LOG_FILE).read_text().splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in steps(folder)]


def answer(model: Path | None, adapter: Path | None) -> Any:
    """A completion of at most 4 tokens through the engine that serves."""
    from qwen_chat.inference.loading import load_engine
    from qwen_chat.inference.sampling import GenerationRequest

    engine = load_engine(model, adapters={"a": adapter} if adapter else {})
    ids = engine.fmt.prompt_ids([{"role": "user", "content": "Who are you?"}])
    return engine.generate([GenerationRequest(ids, max_tokens=4, temperature=0, adapter=adapter and "a")])[0]


def weights(folder: Path) -> bytes:
    return next(folder.glob("*model.safetensors")).read_bytes()


def as_killed_before_the_end(folder: Path) -> None:
    """The folder of a finished run as it lies when the run is killed while it saves its result."""
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {"state": "running"}))


def stored_in_bfloat16(model: Path, folder: Path) -> Path:
    """A copy of a model whose matrices stay narrow under an adapter."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    narrow = {name: tensor.bfloat16() for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(narrow, folder / "model.safetensors", {"format": "pt"})
    return folder


METHODS = {"full": [], "lora": ["--use_lora", "True"], "qlora": ["--q_lora", "True"]}


@pytest.mark.slow
def test_a_share_is_held_out_and_the_best_of_it_saved(
    finetune: Finetune, short: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = [
        "-m",
        str(tiny_model_path),
        "-d",
        str(short),
        "-o",
        str(out),
        "--use_lora",
        "--learning_rate",
        "0.1",
    ]
    words += ["--eval_share", "0.4", "--patience", "1", "--num_train_epochs", "30", "--data_weights", "2"]
    status, said = finetune(*words)
    assert status == 0, said
    run = json.loads((out / "run.json").read_text())
    held_out, learnt = run["held_out"]["conversations"], run["data"]["epoch_conversations"]
    assert held_out > 0 and learnt == 2 * (8 - held_out)
    assert run["best"]["saved_step"] == run["best"]["step"] < run["steps"]
    assert run["evaluation"]["eval_loss"] == pytest.approx(run["best"]["value"], rel=1e-4)
    assert run["evaluation"]["eval_tokens"] == run["held_out"]["supervised"]
    assert "that is what is saved" in said and "(--patience)" in said


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_system_text_of_a_run_is_what_is_served(
    method: str,
    finetune: Finetune,
    tiny_model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From a folder of forms and a file with the text: in what is learnt, run.json, format.lock, the engine, a merged
    folder and a chat."""
    from qwen_chat.certificate.lock import FormatLock
    from qwen_chat.inference.loading import load_engine

    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    (data / "a.csv").write_text("prompt,response\nWho are you?,小明\n", "utf-8")
    (data / "b.jsonl").write_text('{"text": "Once upon a time"}\n', "utf-8")
    (tmp_path / "system.txt").write_text("You are 小明.\n", "utf-8")
    words = ["-m", str(tiny_model_path), "-d", str(data), *METHODS[method], *RATE, "--max_steps", "1"]
    status, said = finetune(*words, "--system", str(tmp_path / "system.txt"), "-o", str(out))
    assert status == 0, said
    assert "without a system message a conversation gets: 'You are 小明.'" in said
    begins = "<|im_start|>system\nYou are 小明.<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n"
    assert begins in said.replace("↵", "")
    run = json.loads((out / "run.json").read_text("utf-8"))
    assert run["options"]["system"] == "You are 小明."
    (tmp_path / "system.txt").unlink()
    status, said = finetune("--config", str(out / "run.json"), "-o", str(tmp_path / "again"), "--check")
    assert status == 0 and "'You are 小明.'" in said and "with a change" not in said
    folders = [out]
    if method == "lora":
        merge = runner("finetune/merge_adapter.py", monkeypatch, capsys)
        status, said, _ = merge("--adapter", str(out), "-o", str(tmp_path / "merged"))
        assert status == 0, said
        folders.append(tmp_path / "merged")
    for folder in folders:
        adapters = {"a": folder} if (folder / "adapter_config.json").is_file() else {}
        engine = load_engine(None if adapters else folder, adapters=adapters)
        fmt = engine.format_of("a" if adapters else None)
        question = [{"role": "user", "content": "Who are you?"}]
        assert fmt.prompt(question) == f"{begins}<|im_start|>assistant\n"
        lines = list(serve.system_lines(engine, "base", list(adapters)))
        name = "a" if adapters else "base"
        assert lines == [f"{name}: without a system message a conversation gets: 'You are 小明.'"]
        prompts = [entry.prompt for entry in FormatLock.read(folder).entries]
        assert any(prompt.startswith("<|im_start|>system\nYou are 小明.<|im_end|>") for prompt in prompts)
        flag = "--adapter" if adapters else "-m"
        status, said, _ = runner("fast_start/simple_try_0.py", monkeypatch, capsys)(
            flag, str(folder), "--prompt", "Hi", "--max_new_tokens", "1"
        )
        assert status == 0 and "without a system message a conversation gets: 'You are 小明.'" in said


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_run_s_record_repeats_it_bit_for_bit(
    method: str,
    finetune: Finetune,
    short: Path,
    tiny_model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dropout, the order of the data and the product that was measured as the faster one are those of the record."""
    from qwen_chat.training import matmul

    first, second = tmp_path / "first", tmp_path / "second"
    words = [
        "-m",
        str(tiny_model_path),
        "-d",
        str(short),
        *METHODS[method],
        "--warmup_steps",
        "0",
        "--seed",
        "3",
    ]
    words += ["--max_steps", "2", "--save_strategy", "no"]
    status, said = finetune(*words, "-o", str(first))
    assert status == 0, said
    monkeypatch.setattr(matmul, "fastest", lambda *_: matmul.Route("onednn", "faster today"))
    status, said = finetune("--config", str(first / "run.json"), "-o", str(second))
    assert status == 0, said
    assert "with a change" not in said
    assert files.sha256(next(first.glob("*model.safetensors"))) == files.sha256(
        next(second.glob("*model.safetensors"))
    )
    records = [json.loads((folder / "run.json").read_text()) for folder in (first, second)]
    assert [record["choices"]["matmul"]["route"] for record in records] == ["torch", "torch"]


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_saves_loads_and_answers(
    method: str, finetune: Finetune, short: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    base = tiny_model_path if method == "full" else stored_in_bfloat16(tiny_model_path, tmp_path / "base")
    words = ["-m", str(base), "-d", str(short), "-o", str(out), *METHODS[method], *RATE]
    status, said = finetune(*words, "--eval_data_path", str(short), "--num_train_epochs", "2")
    assert status == 0, said
    log = losses(out)
    assert len(log) == 2 and log[1] < log[0]
    adapter = method != "full"
    weights = (
        {"adapter_config.json", "adapter_model.safetensors"}
        if adapter
        else {"config.json", "model.safetensors"}
    )
    expected = weights | {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "run.json"}
    expected |= {"train_log.jsonl", "generation_config.json", "checkpoint-1", "checkpoint-2", "format.lock"}
    expected |= {"report.html", "loss.png", "losses.json"}
    assert {path.name for path in out.iterdir()} == expected

    run = json.loads((out / "run.json").read_text())
    assert (run["state"], run["method"], run["steps"]) == ("finished", method, 2)
    assert (run["losses"]["first"], run["losses"]["last"]) == (log[0], log[1])
    assert run["options"]["learning_rate"] == 0.01 and run["options"]["adam_beta2"] == 0.95
    assert run["data"]["conversations"] == 8 and len(run["data"]["fingerprint"]) >= 32
    assert run["supervised_tokens"] == 2 * run["data"]["supervised"]
    assert run["versions"]["transformers"] and run["evaluation"]["eval_tokens"] == run["data"]["supervised"]
    assert 0 <= run["evaluation"]["eval_token_accuracy"] <= 1

    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 0]
    flag = "--adapter" if adapter else "-m"
    assert said.splitlines()[-1] == f"  python fast_start/simple_try_0.py {flag} {out}"
    assert f"learnt {run['data']['supervised']:,} (" in said
    assert "greedy replies: 12 of at most 16 tokens" in said
    done = (
        answer(None, out) if adapter else answer(out, None)
    )  # an adapter alone takes the base that it names
    assert 1 <= len(done.token_ids) <= 4 and done.finish_reason in ("stop", "length")


def test_the_saved_template_is_the_one_it_was_trained_under(
    finetune: Finetune, short: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    from qwen_chat.chat.format import ChatFormat

    out = tmp_path / "out"
    words = ["-m", str(tiny_model_path), "-d", str(short), "-o", str(out), "--max_steps", "1"]
    assert finetune(*words)[0] == 0
    record = json.loads(short.read_text(encoding="utf-8").splitlines()[-1])
    saved = AutoTokenizer.from_pretrained(out)
    trained = ChatFormat(models.load_tokenizer(tiny_model_path)).prompt(
        record["messages"][:2], record["tools"]
    )
    assert "<tools>" in trained
    served = saved.apply_chat_template(
        record["messages"][:2], record["tools"], tokenize=False, add_generation_prompt=True
    )
    assert served == trained


def test_the_curve_does_not_depend_on_accumulation_layout_or_laziness(
    finetune: Finetune, short: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    words = [
        "-m",
        str(tiny_model_path),
        "-d",
        str(short),
        *RATE,
        "--num_train_epochs",
        "3",
        "--save_strategy",
        "no",
    ]
    curves = []
    for number, change in enumerate(
        (
            ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4"],
            ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"],
            ["--per_device_train_batch_size", "2", "--lazy_preprocess", "True", "--layout", "padded"],
            ["--per_device_train_batch_size", "2", "--gradient_checkpointing", "True", "--layout", "packed"],
        )
    ):
        out = tmp_path / str(number)
        status, said = finetune(*words, *change, "-o", str(out))
        assert status == 0, said
        curves.append(losses(out))
    assert len(curves[0]) == 6
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=2e-5)


@pytest.mark.parametrize(
    "flags",
    [
        ["--use_rslora"],
        ["--use_dora"],
        ["--lora_init", "pissa", "--lora_r", "8"],
        ["--loraplus_lr_ratio", "16"],
        ["--trainable_tokens", "<|im_start|>", "<|im_end|>"],
        ["--lora_bias", "all"],
        ["--lora_target_modules", "q_proj", "v_proj"],
    ],
    ids=lambda flags: flags[0],
)
def test_the_toolbox_learns(
    flags: list[str], finetune: Finetune, short: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["-m", str(tiny_model_path), "-d", str(short), "-o", str(out), "--use_lora", *RATE, *flags]
    status, said = finetune(*words, "--num_train_epochs", "4", "--save_strategy", "no")
    assert status == 0, said
    log = losses(out)
    assert len(log) == 4 and log[-1] < log[0] - 0.01
    models.load_model(tiny_model_path, adapter=out)


def test_several_files_with_weights_and_an_adapter_that_is_continued(
    finetune: Finetune, short: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    lines = short.read_text(encoding="utf-8").splitlines(keepends=True)
    one.write_text("".join(lines[:4]), encoding="utf-8")
    two.write_text("".join(lines[4:]), encoding="utf-8")
    first, second = tmp_path / "first", tmp_path / "second"
    base = ["-m", str(tiny_model_path), *RATE, "--save_strategy", "no"]
    words = ["-d", str(one), "-d", str(two), "--data_weights", "2", "0.5", "-o", str(first), "--use_lora"]
    assert finetune(*base, *words)[0] == 0
    run = json.loads((first / "run.json").read_text())
    assert (run["data"]["conversations"], run["data"]["epoch_conversations"]) == (8, 2 * 4 + 2)
    words = ["-d", str(one), "-o", str(second), "--use_lora", "--lora_weight_path", str(first)]
    status, said = finetune(*base, *words, "--max_steps", "1")
    assert status == 0 and f"continues {first}" in said
    assert losses(second)[0] < losses(first)[0]


def test_without_o_a_new_folder_is_named_after_data_method_and_time(
    finetune: Finetune, short: Path, tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "OUTPUTS", tmp_path / "outputs")
    words = ["-m", str(tiny_model_path), "-d", str(short), "--use_lora", "--max_steps", "1"]
    assert finetune(*words)[0] == 0
    (made,) = (tmp_path / "outputs").iterdir()
    assert made.name.startswith("short_data-lora-20")


def test_what_is_chosen_is_told_stored_kept_and_repeated(
    finetune: Finetune, short: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    data, out, again = tmp_path / "data.jsonl", tmp_path / "out", tmp_path / "again"
    shutil.copy(short, data)
    words = ["-m", str(tiny_model_path), "-d", str(data), "--use_lora", "--lora_r", "4", "-o", str(out)]
    words += [
        "--lr_scheduler_type",
        "constant",
        "--save_strategy",
        "steps",
        "--save_steps",
        "2",
        "--max_steps",
        "2",
    ]
    status, said = finetune(*words)
    assert status == 0, said
    run = json.loads((out / "run.json").read_text())
    chosen = {choice["flag"]: choice["value"] for choice in run["preset"]}
    assert {flag: run["options"][flag] for flag in chosen} == chosen
    assert chosen["lora_alpha"] == 8 and "lora_r" not in chosen and run["given"].count("lora_alpha") == 0
    assert json.loads((out / "adapter_config.json").read_text())["lora_alpha"] == 8
    told = said.index("chosen by --preset auto:")
    for choice in run["preset"]:
        line = f"--{choice['flag']} {choice['value']:g} ({choice['reason']})"
        assert f"\n  {line}\n" in said[told:] and f"--preset auto: {line}" in run["decisions"]
    # The same with more data goes on with what it began with.
    as_killed_before_the_end(out)
    data.write_text(data.read_text(encoding="utf-8") * 100, encoding="utf-8")
    status, said = finetune(*words, "--max_steps", "3", "--resume_anyway", "True")
    assert status == 0 and "resumed from checkpoint-2" in said, said
    assert "(as the run began)" in said
    grown = json.loads((out / "run.json").read_text())
    assert {flag: grown["options"][flag] for flag in chosen} == chosen
    # And so does a run that repeats it.
    status, said = finetune("--config", str(out / "run.json"), "-o", str(again), "--resume_anyway", "False")
    assert status == 0 and "--preset auto chose nothing" in said and "with a change" not in said
    repeated = json.loads((again / "run.json").read_text())
    assert {flag: repeated["options"][flag] for flag in chosen} == chosen


def test_a_finished_run_is_never_overwritten(
    finetune: Finetune, short: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["-m", str(tiny_model_path), "-d", str(short), "-o", str(out), "--use_lora", "--max_steps", "1"]
    assert finetune(*words)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert finetune(*words) == (
        2,
        f"error: {out}: holds a finished run; nothing is overwritten: give a new folder with -o\n",
    )
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_what_is_left_out_of_either_file_is_told_and_stored(
    finetune: Finetune, short: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    data, held_out, out = tmp_path / "data.jsonl", tmp_path / "held out.jsonl", tmp_path / "out"
    lines = short.read_text(encoding="utf-8").splitlines(keepends=True)
    long = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "word " * 600}]}
    data.write_text("".join([*lines[:2], "broken\n", lines[2]]), encoding="utf-8")
    held_out.write_text("".join([lines[3], json.dumps(long) + "\n"]), encoding="utf-8")
    words = ["-m", str(tiny_model_path), "-d", str(data), "--eval_data_path", str(held_out), "-o", str(out)]
    words += ["--use_lora", "--on_error", "skip", "--model_max_length", "512", "--num_train_epochs", "1"]
    status, said = finetune(*words, *STEP, "--keep_best", "True")
    assert status == 0, said
    assert "bad lines left out, of 4: 1 (data.jsonl:3)" in said
    assert "held out: conversations 1 of 2, " in said
    assert "dropped, longer than --model_max_length 512: 1 (held out.jsonl:2)" in said
    assert "best on held-out data: checkpoint-1 (loss " in said and "that is what is saved" in said
    run = json.loads((out / "run.json").read_text())
    assert (run["data"]["skipped"], run["data"]["skipped_at"]) == (1, ["data.jsonl:3"])
    assert (run["held_out"]["dropped"], run["held_out"]["dropped_at"]) == (1, ["held out.jsonl:2"])
    assert run["best"]["step"] == run["best"]["saved_step"] == 1


# ------------------------------------------------------------------------------------------------- going on


def test_nothing_is_trained_after_the_last_step(
    finetune: Finetune, short: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["-m", str(tiny_model_path), "-d", str(short), "-o", str(out), "--use_lora", *RATE]
    words += ["--lr_scheduler_type", "constant", "--per_device_train_batch_size", "1"]
    words += ["--max_steps", "3", "--save_strategy", "steps", "--save_steps", "3"]  # an epoch has 4
    assert finetune(*words)[0] == 0
    before, log = weights(out), (out / "train_log.jsonl").read_text()
    as_killed_before_the_end(out)
    status, said = finetune(*words)
    assert status == 0 and "resumed from checkpoint-3" in said and "nothing was learnt" not in said
    assert (weights(out), (out / "train_log.jsonl").read_text()) == (before, log)
    assert json.loads((out / "run.json").read_text())["steps"] == 3
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-3"}

    # A constant rate does not know how long the run is: it may be made longer.
    longer = tmp_path / "longer"
    words[words.index(str(out))], words[words.index("3")] = str(longer), "5"
    status, said = finetune(*words, "--resume", str(out), "--eval_data_path", str(short), "--eval_steps", "9")
    assert status == 0, said
    assert [line["step"] for line in steps(longer)] == [4, 5]


def test_evaluation_leaves_the_weights_alone(
    finetune: Finetune, short: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    words = ["-m", str(tiny_model_path), "-d", str(short), "--use_lora", *RATE, "--lora_dropout", "0.3"]
    words += ["--per_device_train_batch_size", "1", "--num_train_epochs", "1", "--save_strategy", "no"]
    held_out = ["--eval_data_path", str(short), "--eval_strategy", "steps", "--eval_steps", "1"]
    held_out += ["--general_data", str(short)]
    found = []
    for number, more in enumerate(([], held_out)):
        out = tmp_path / str(number)
        assert finetune(*words, *more, "-o", str(out))[0] == 0
        found.append((losses(out), weights(out)))
    assert found[0] == found[1]


def few_general(folder: Path) -> Path:
    """Six of the shipped general conversations, in both languages."""
    file = folder / "general.jsonl"
    lines = (INPUT / "general_data.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[97:103]), encoding="utf-8")
    return file


def test_what_is_not_learnt_is_measured_before_and_after(
    finetune: Finetune, short: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    """As evaluate.py measures base and result."""
    from qwen_chat.chat.format import ChatFormat
    from qwen_chat.data import records, token_cache
    from qwen_chat.evaluation.run import Kept, sequence_losses

    general = few_general(tmp_path)
    out = tmp_path / "out"
    words = ["-m", str(tiny_model_path), "-d", str(short), "--use_lora", *RATE, "--num_train_epochs", "2"]
    words += ["--eval_data_path", str(short), "--general_data", str(general), "-o", str(out)]
    status, said = finetune(*words)
    assert status == 0, said
    assert "before the first step: the loss of 14 conversations that are not learnt" in said
    assert "general: conversations 6 of 6" in said
    run = json.loads((out / "run.json").read_text())
    kept = json.loads((out / "losses.json").read_text())
    for kind, file in (("held_out", short), ("general", general)):
        change = run["changes"][kind]
        for when, adapter in (("before", None), ("after", out)):
            loaded = models.load_model(tiny_model_path, adapter=adapter)
            fmt = ChatFormat(loaded.tokenizer)
            data = token_cache.tokenise(records.open_records([file]), fmt, max_length=2048, too_long="drop")
            wanted = sequence_losses(loaded.model, data, range(len(data)), Kept(None))
            assert [loss for loss, _ in kept[kind][when]] == pytest.approx(
                [one.loss for one in wanted], rel=1e-4
            )
            assert [count for _, count in kept[kind][when]] == [one.tokens for one in wanted]
            mean = sum(one.loss for one in wanted) / sum(one.tokens for one in wanted)
            assert change[when] == pytest.approx(mean, rel=1e-4)
        moved = change["difference"]
        assert moved["value"] == pytest.approx(change["after"] - change["before"], abs=1e-6)
        assert moved["low"] <= moved["value"] <= moved["high"] and moved["low"] < moved["high"]
    assert run["changes"]["held_out"]["after"] == run["evaluation"]["eval_loss"]
    (told,) = [line for line in said.splitlines() if line.startswith("general data: loss ")]
    assert f"{moved['value']:+.4f} [{moved['low']:+.4f}, {moved['high']:+.4f}]" in told


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_what_its_first_start_measured(
    finetune: Finetune, short: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    general, out = few_general(tmp_path), tmp_path / "out"
    words = ["-m", str(tiny_model_path), "-d", str(short), "--use_lora", *RATE, "--num_train_epochs", "2"]
    words += ["--eval_data_path", str(short), "--general_data", str(general), "-o", str(out)]
    assert finetune(*words)[0] == 0
    run = json.loads((out / "run.json").read_text())
    kept = json.loads((out / "losses.json").read_text())

    as_killed_before_the_end(out)
    shutil.rmtree(out / "checkpoint-2")
    status, again = finetune(*words)
    assert (
        status == 0
        and "resumed from checkpoint-1" in again
        and "before the first step: the loss of" not in again
    )
    assert json.loads((out / "losses.json").read_text()) == kept
    assert json.loads((out / "run.json").read_text())["changes"] == run["changes"]

    as_killed_before_the_end(out)
    shutil.rmtree(out / "checkpoint-2")
    general.write_text(general.read_text(encoding="utf-8").replace("8848.86", "8848.85"), "utf-8")
    (out / "losses.json").write_text(json.dumps({"general": kept["general"]}))
    status, again = finetune(*words)
    assert status == 0, again
    changes = json.loads((out / "run.json").read_text())["changes"]
    assert [changes[kind]["before"] for kind in ("held_out", "general")] == [
        None,
        None,
    ]  # lost, and another file
    assert "before the first it was not measured" in again


def test_weights_alone_are_no_checkpoint(
    finetune: Finetune, short: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = [
        "-m",
        str(tiny_model_path),
        "-d",
        str(short),
        "-o",
        str(out),
        "--use_lora",
        "--num_train_epochs",
        "1",
        *STEP,
    ]
    assert finetune(*words)[0] == 0
    as_killed_before_the_end(out)
    (out / "checkpoint-1" / "optimizer.pt").unlink()
    checkpoints.seal(out / "checkpoint-1")
    status, said = finetune(*words)
    assert status == 2 and said.splitlines()[-1].startswith(
        f"error: {out}/checkpoint-1: holds no optimizer and scheduler state (--save_only_model?)"
    )


def test_the_log_tells_the_rate_that_a_step_ran_at(
    finetune: Finetune, short: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = [
        "-m",
        str(tiny_model_path),
        "-d",
        str(short),
        "-o",
        str(out),
        "--use_lora",
        "--save_strategy",
        "epoch",
    ]
    words += ["--lr_scheduler_type", "linear", "--warmup_steps", "1", *STEP]
    words += ["--per_device_train_batch_size", "1"]
    assert finetune(*words, "--num_train_epochs", "1", "--learning_rate", "3e-4")[0] == 0
    rates = [0, 3e-4, 2e-4, 1e-4]
    assert [line["learning_rate"] for line in steps(out)] == pytest.approx(rates)
    state = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())
    assert [line["learning_rate"] for line in state["log_history"] if "loss" in line] == pytest.approx(rates)


def test_weights_that_are_no_numbers_stop_the_run(
    finetune: Finetune, short: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model_path, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    status, said = finetune("-m", str(broken), "-d", str(short), "-o", str(out), "--use_lora")
    assert status == 1
    line = said.splitlines()[-1]
    assert line.startswith("error: step 1: the gradient is nan; likely the learning rate (")
    assert "or the base's weights are damaged; conversations of this step: short data.jsonl:" in line
    assert not list(out.glob("checkpoint-*")) and not list(out.glob("adapter_*"))


def test_a_loss_of_exactly_zero_stops_the_run(
    finetune: Finetune, short: Path, tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen_chat.training import loss, probe

    plain = loss.ModelLoss.__call__

    def nothing(self: Any, model: Any, batch: Any) -> Any:
        found = plain(self, model, batch)
        return loss.LossResult(found.loss_sum * 0, found.correct, found.tokens)

    monkeypatch.setattr(loss.ModelLoss, "__call__", nothing)
    out = tmp_path / "out"
    words = ["-m", str(tiny_model_path), "-d", str(short), "-o", str(out), "--use_lora"]
    status, said = finetune(*words)  # planted so, the probe finds it
    assert status == 2 and "the loss of a row is off by 1.0e+00" in said.splitlines()[-1]
    monkeypatch.setattr(probe, "prove", lambda model, layout: "as if it began later")
    words[words.index(str(out))] = str(tmp_path / "later")
    status, said = finetune(*words)
    assert status == 1, said
    assert said.splitlines()[-1].startswith("error: step 1: the loss is exactly 0; likely ")


# ------------------------------------------------------------------------------------------------ bad input

ZERO3 = str(ROOT / "finetune" / "ds_config_zero3.json")
BAD_LINES = {
    "empty.jsonl": ("", "empty; expected at least one conversation"),
    "text.jsonl": ("hello\n", "text.jsonl:1: "),
    "role.jsonl": (
        '{"messages": [{"role": "boss", "content": "x"}]}\n',
        "role.jsonl:1: message 0: role 'boss'",
    ),
    "silent.jsonl": (
        '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "train": false}]}\n',
        "no token is learnt",
    ),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_data(
    name: str, finetune: Finetune, tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load_model", None)  # calling it would be a TypeError
    text, part = BAD_LINES[name]
    (tmp_path / name).write_text(text)
    status, said = finetune(
        "-m", str(tiny_model_path), "-d", str(tmp_path / name), "-o", str(tmp_path / "out")
    )
    assert status == 2 and part in said and said.count("error: ") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--lora_rang", "4"], "--lora_rang: unknown flag; did you mean --lora_r?"),
        (["-m", "/no/model"], "/no/model: no such folder; give a model's folder or a hub name such as"),
        (["-d", "/no/data.jsonl"], "/no/data.jsonl: no such data file"),
        (
            ["--q_lora", "--deepspeed", ZERO3],
            f"--q_lora with ZeRO-3 ({ZERO3}): 4-bit weights cannot be split",
        ),
        (
            ["--deepspeed", "/no/config.json"],
            "--deepspeed /no/config.json: no such file; expected a JSON file",
        ),
        (["-o", "/proc/finetune"], "/proc/finetune"),
        (["-o", str(ROOT / "README.md")], f"{ROOT / 'README.md'}: a file; the output needs a folder"),
        (["-o", str(ROOT / "docs")], f"{ROOT / 'docs'}: holds something else ("),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_one_clear_line_and_status_2_before_any_model_is_loaded(
    words: list[str],
    line: str,
    finetune: Finetune,
    short: Path,
    tiny_model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(models, "load_model", None)
    monkeypatch.setattr(place, "OUTPUTS", tmp_path / "outputs")
    base = [*(() if "-m" in words else ("-m", str(tiny_model_path)))]
    base += [] if "-d" in words else ["-d", str(short)]
    status, said = finetune(*base, *words)
    errors_said = [text for text in said.splitlines() if text.startswith("error: ")]
    assert status == 2 and len(errors_said) == 1 and line in errors_said[0], said
    assert not (tmp_path / "outputs").exists()


def test_check_stops_short_of_the_model_and_makes_nothing(
    finetune: Finetune, short: Path, tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load_model", None)
    out = tmp_path / "out"
    status, said = finetune("-m", str(tiny_model_path), "-d", str(short), "-o", str(out), "--check")
    assert status == 0 and said.splitlines()[-1] == "everything is in order, short of loading the model"
    assert not out.exists()


def test_as_a_command_from_another_folder(short: Path, tiny_model_path: Path, tmp_path: Path) -> None:
    shutil.copy(short, tmp_path / "here.jsonl")
    command = [sys.executable, str(ROOT / "finetune" / "finetune.py"), "-m", str(tiny_model_path)]
    command += ["-d", "here.jsonl", "-o", "out", "--use_lora", "--max_steps", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    assert "[I am Willow" in done.stderr.replace("⟦", "[")  # the first example, what is learnt marked
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
