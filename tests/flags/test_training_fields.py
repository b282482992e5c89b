"""Every field of transformers' TrainingArguments has its entry, and each that is said to work does.

The runs here are real ones of a model with 8,000 weights over twelve conversations of four to nine tokens.
"""

import dataclasses
import gc
import json
import math
import os
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qwen_chat.chat.encoded import Encoded
from qwen_chat.data import mixture
from qwen_chat.errors import OptionError, TrainingError
from qwen_chat.flags import training_fields
from qwen_chat.flags.run_problems import read_run
from qwen_chat.flags.training_fields import ENTRIES, FIELDS, trainer_options
from qwen_chat.training import attention, options, result, run_folder
from qwen_chat.training.session import Session
from qwen_chat.training.step_log import StepLog

ROOT = Path(__file__).resolve().parents[2]


# ---------------------------------------------------------------------------------------------------- the table


def test_each_field_of_transformers_has_one_entry_and_each_entry_its_field() -> None:
    from transformers import TrainingArguments

    listed = [name for entry in ENTRIES for name in entry.names]
    assert len(listed) == len(set(listed))
    theirs = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    assert set(listed) - {"local_rank"} == theirs - {"local_rank"}


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.state == "works"], ids=lambda e: e.names[0])
def test_what_works_names_a_test_that_is_there(entry: training_fields.Entry) -> None:
    file, _, test = entry.says.partition("::")
    text = (ROOT / file).read_text(encoding="utf-8")
    assert re.search(rf"^def {test or 'test_'}", text, re.M)
    asked = {
        "output_dir": '"-o"',
        "resume_from_checkpoint": "resumed from",
    }  # where the test has other words for it
    assert [name for name in entry.names if asked.get(name, name) not in text] == []


def test_each_optimizer_and_schedule_of_transformers_has_its_entry() -> None:
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    ours = {*training_fields.OPTIMIZERS, *training_fields.REFUSED_OPTIMIZERS}
    assert ours == {name.value for name in OptimizerNames}
    assert set(training_fields.SCHEDULES) == {name.value for name in SchedulerType}


# A value of each kind that asks for something, and the words that begin a cure.
ASKING = {bool: "True", int: "7", float: "7", dict: '{"a": 1}', list: "[7]", str: "x"}
CURE = r"(leave (it|that) (out|on)|use --|choose --|-o must|auto, True or False|set |hf upload )"
CLOSED = [(name, entry) for entry in ENTRIES if entry.state != "works" for name in entry.names]


@pytest.mark.parametrize(("name", "entry"), CLOSED, ids=[name for name, _ in CLOSED])
def test_a_field_that_is_refused_says_why_but_may_ask_for_what_is_done_anyway(
    name: str, entry: training_fields.Entry
) -> None:
    (option,) = [option for option in trainer_options() if option.name == name]
    if name == "local_rank":  # a launcher's word
        assert read_run(["-d", "x", "--local_rank=3"]).extra == {}
        return
    kinds = [kind for kind in ASKING if kind in (typing.get_args(option.kind) or (option.kind,))]
    word = ASKING[kinds[0]]
    off = next((value for value in entry.harmless if type(value) in kinds), option.default)
    if kinds[0] is bool and off is True:
        word = "False"
    with pytest.raises(OptionError, match=rf"^--{name}\b.*{CURE}"):
        read_run(["-d", "x", f"--{name}", word])
    quiet = [value for value in entry.harmless if type(value) in kinds]
    quiet += [option.default] if entry.state == "refused" and option.default is not None else []
    for value in quiet:
        shown = json.dumps(value) if isinstance(value, dict | list) else str(value)
        assert read_run(["-d", "x", f"--{name}={shown}"]).extra == {}


def test_a_field_that_is_new_in_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_fields, "FIELDS", {k: v for k, v in FIELDS.items() if k != "run_name"})
    with pytest.raises(OptionError, match=r"^--run_name is new in transformers and has not been tried here"):
        read_run(["-d", "x", "--run_name", "y"])


def test_help_all_tells_what_is_refused_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_run(["--help_all"])
    works, _, refused = capsys.readouterr().out.partition("that are refused:")
    assert "--max_grad_norm a number" in works and "--save_only_model" not in works
    assert "  --save_only_model: a run could not go on from such a checkpoint" in refused
    assert "  --do_train: is set by the toolkit itself; leave it out" in refused


# ------------------------------------------------------------------------------------------------- tiny runs


class Conversations:
    """`count` short conversations; the last tokens of each are supervised."""

    def __init__(self, count: int, seed: int = 0) -> None:
        chance = torch.Generator().manual_seed(seed)
        self.rows = []
        for number in range(count):
            ids = torch.randint(3, 40, (4 + number % 6,), generator=chance).tolist()
            self.rows.append(Encoded(ids, [(1, len(ids))]))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> list[Encoded]:
        return [self.rows[i]]

    def where(self, i: int) -> str:
        return f"data:{i + 1}"


def model() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.2,
        attn_implementation=attention.NAME,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


class Tiny:
    """Runs of the tiny model: the words of a command line in, the trainer that has run out."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0

    def prepare(self, *words: str) -> tuple[Any, StepLog]:
        self.number += 1
        out = self.folder / f"run{self.number}"
        out.mkdir()
        base = ["-d", "x", "-o", str(out), "--per_device_train_batch_size", "2", "--model_max_length", "16"]
        base += [
            "--layout",
            "packed",
            "--learning_rate",
            "0.01",
            "--warmup_steps",
            "0",
            "--num_train_epochs",
            "1",
            "--gradient_accumulation_steps",
            "2",
        ]
        run = read_run([*base, *words])
        held_out = Conversations(5, seed=1) if run.data.eval_data_path else None
        summary = SimpleNamespace(to_json=dict, quantiles={})
        data = mixture.Data(Conversations(12), held_out, "hash", summary)
        args, _ = options.training_arguments(run, out, checkpointing=False)
        log = StepLog(out)
        nothing: Any = None
        fmt: Any = SimpleNamespace(tokenizer=None)
        session = Session(run, out, out, fmt, data, {}, nothing, nothing, (), args, (), {})
        return session.trainer(model(), {}, log), log

    def run(self, *words: str) -> Any:
        """A run of three steps an epoch unless the words say otherwise."""
        trainer, log = self.prepare(*words)
        with log:
            assert trainer.run(None)
        return trainer


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Tiny]:
    attention.register()
    gc.freeze()  # accelerate collects garbage before each run: over all that pytest holds that takes a second
    yield Tiny(tmp_path)
    gc.unfreeze()


def lines(trainer: Any) -> list[dict[str, Any]]:
    text = (Path(trainer.args.output_dir) / run_folder.LOG_FILE).read_text()
    return [json.loads(line) for line in text.splitlines()]


def checkpoints_of(trainer: Any) -> list[int]:
    return sorted(int(path.name[11:]) for path in Path(trainer.args.output_dir).glob("checkpoint-*"))


def flat(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


HELD_OUT = ["--eval_data_path", "y"]


def test_steps_and_epochs(tiny: Tiny) -> None:
    for words, steps in (
        (["--num_train_epochs", "2"], 6),
        (["--max_steps", "4"], 4),
        (["--max_steps", "-1"], 3),
    ):
        trainer = tiny.run(*words, "--save_strategy", "no")
        assert trainer.state.global_step == steps == len(lines(trainer))


def test_the_optimizer_gets_its_numbers(tiny: Tiny) -> None:
    words = ["--weight_decay", "0.3", "--adam_beta1", "0.5", "--adam_beta2", "0.7", "--adam_epsilon", "1e-3"]
    trainer, _ = tiny.prepare(*words)
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.3, 0.0}  # not on norms
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.01, (0.5, 0.7), 1e-3)


QUICK = (
    "adamw_torch",
    "adamw_torch_fused",
    "adafactor",
    "sgd",
    "adagrad",
    "rmsprop",
    "adamw_8bit",
    "lion_32bit",
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in training_fields.OPTIMIZERS
    ],
)
def test_each_optimizer_takes_a_step(name: str, tiny: Tiny) -> None:
    package = training_fields.OPTIMIZERS[name]
    if package is not None:
        pytest.importorskip(package)
    trainer = tiny.run("--optim", name, "--max_steps", "2", "--save_strategy", "no")
    begun, now = torch.cat([p.detach().flatten() for p in model().parameters()]), flat(trainer)
    assert torch.isfinite(now).all() and float((now - begun).abs().max()) > 1e-5


@pytest.mark.parametrize(
    ("name", "words", "key", "value"),
    [
        ("sgd", "momentum=0.9", "momentum", 0.9),
        ("adagrad", "lr_decay=0.1", "lr_decay", 0.1),
        ("rmsprop", "alpha=0.8", "alpha", 0.8),
    ],
)
def test_an_optimizer_gets_its_arguments(name: str, words: str, key: str, value: float, tiny: Tiny) -> None:
    trainer, _ = tiny.prepare("--optim", name, "--optim_args", words)
    assert trainer.create_optimizer().param_groups[0][key] == value


def test_the_gradient_is_clipped(tiny: Tiny) -> None:
    moved = {}
    for norm in ("0.01", "0"):
        words = [
            "--optim",
            "sgd",
            "--weight_decay",
            "0",
            "--max_steps",
            "1",
            "--lr_scheduler_type",
            "constant",
        ]
        trainer = tiny.run(*words, "--max_grad_norm", norm, "--save_strategy", "no")
        begun = torch.cat([p.detach().flatten() for p in model().parameters()])
        moved[norm] = float((flat(trainer) - begun).norm())
    assert moved["0.01"] == pytest.approx(0.01 * 0.01, rel=1e-2)
    assert moved["0"] == pytest.approx(0.01 * lines(trainer)[0]["grad_norm"], rel=1e-2)
    assert moved["0"] > 10 * moved["0.01"]


LINEAR = [0.01 * (1 - k / 4) for k in range(4)]
SCHEDULES = {
    "linear": ([], LINEAR),
    "cosine": ([], [0.005 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]),
    "constant": ([], [0.01] * 4),
    "constant_with_warmup": (["--warmup_steps", "2"], [0, 0.005, 0.01, 0.01]),
    "cosine_with_restarts": (['{"num_cycles": 2}'], [0.01, 0.005, 0.01, 0.005]),
    "cosine_with_min_lr": (
        ['{"min_lr": 0.01}'],
        [0.01] * 4,
    ),
    "cosine_warmup_with_min_lr": (['{"min_lr": 0.01}'], [0.01] * 4),
    "polynomial": (['{"lr_end": 0, "power": 1}'], LINEAR),
    "inverse_sqrt": (['{"timescale": 1}'], [0.01 / math.sqrt(k + 1) for k in range(4)]),
    "warmup_stable_decay": (['{"num_decay_steps": 2, "decay_type": "linear"}'], [0.01, 0.01, 0.01, 0.005]),
    "reduce_lr_on_plateau": (['{"factor": 0.5}', *HELD_OUT], None),
    "greedy": (['{"factor": 0.5}', *HELD_OUT], None),
}


@pytest.mark.parametrize("name", training_fields.SCHEDULES)
def test_each_schedule_gives_its_rates(name: str, tiny: Tiny) -> None:
    words, rates = SCHEDULES[name]
    if words and words[0].startswith("{"):
        words = ["--lr_scheduler_kwargs", *words]
    if "warmup" not in name:
        words = [*words, "--warmup_steps", "0"]
    if rates is None:
        trainer = tiny.run("--lr_scheduler_type", name, *words, "--eval_steps", "1", "--save_strategy", "no")
        assert trainer.lr_scheduler.factor in (0.5, [0.5]) or trainer.lr_scheduler.factors == [0.5]
        return
    trainer, _ = tiny.prepare("--lr_scheduler_type", name, *words)
    trainer.create_optimizer_and_scheduler(4)
    found = []
    for _ in range(4):
        found.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert found == pytest.approx(rates)


def test_a_share_of_one_warms_up_to_the_end(tiny: Tiny) -> None:
    trainer, _ = tiny.prepare("--lr_scheduler_type", "constant_with_warmup")
    run = read_run(["-d", "x", "--warmup_ratio", "1.0"])
    args, _ = options.training_arguments(run, Path(trainer.args.output_dir), checkpointing=False)
    assert [args.get_warmup_steps(steps) for steps in (1, 8, 1000)] == [1, 8, 1000]


def test_evaluations_come_when_they_are_asked_for(tiny: Tiny) -> None:
    def steps(*words: str) -> list[int]:
        trainer = tiny.run(*HELD_OUT, *words, "--save_strategy", "no", "--num_train_epochs", "2")
        found = [line["step"] for line in lines(trainer) if "eval_loss" in line]
        assert trainer.held_out.conversations_per_row == 3
        return found

    size = ["--per_device_eval_batch_size", "3"]
    assert steps(*size, "--eval_on_start") == [0, 3, 6]
    assert steps(*size, "--eval_strategy", "steps", "--save_steps", "5") == [5, 6]  # and at the end
    assert steps(*size, "--eval_steps", "2", "--eval_delay", "3") == [4, 6]


def test_checkpoints_come_and_go(tiny: Tiny) -> None:
    for words, kept in (
        (["--save_strategy", "epoch"], [3]),
        (["--save_steps", "1", "--save_total_limit", "1"], [3]),
        (["--save_steps", "1", "--save_total_limit", "-1"], [1, 2, 3]),
    ):
        assert checkpoints_of(tiny.run(*words)) == kept, words


KEEP, BEST, LOAD = ["--keep_best"], ["--save_strategy", "best"], ["--load_best_model_at_end"]


@pytest.mark.parametrize(
    ("how", "metric"),
    [
        (KEEP, "token_accuracy"),
        (BEST, "eval_token_accuracy"),
        (LOAD, "eval_perplexity"),
        *(
            pytest.param(how, metric, marks=pytest.mark.slow)
            for how in (KEEP, BEST, LOAD)
            for metric in ("loss", "perplexity", "eval_token_accuracy")
        ),
    ],
)
def test_the_best_by_any_metric_is_kept(how: list[str], metric: str, tiny: Tiny) -> None:
    words = [
        *HELD_OUT,
        *how,
        "--metric_for_best_model",
        metric,
        "--save_total_limit",
        "1",
        "--eval_steps",
        "1",
    ]
    if how[0] != "--save_strategy":
        words += ["--save_steps", "1"]
    if how == LOAD:  # said, where it is right
        words += ["--greater_is_better", str("accuracy" in metric)]
    trainer = tiny.run(*words, "--learning_rate", "0.05", "--num_train_epochs", "2")
    name = "eval_" + metric.removeprefix("eval_")
    measured = {line["step"]: line[name] for line in lines(trainer) if name in line}
    assert len(measured) == 6 and len(set(measured.values())) > 1
    best = (max if "accuracy" in metric else min)(measured.values())
    assert trainer.state.best_metric == best
    step = int(Path(trainer.state.best_model_checkpoint).name[11:])
    assert measured[step] == best and step in checkpoints_of(trainer)
    if how == ["--load_best_model_at_end"]:
        assert trainer.evaluate()[name] == pytest.approx(best, rel=1e-5)


def test_patience_stops_where_nothing_gets_better_and_leaves_the_best(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*HELD_OUT, "--patience", "2", "--eval_steps", "1", "--learning_rate", "0.2"]
    words += ["--num_train_epochs", "20", "--lr_scheduler_type", "constant"]
    trainer = tiny.run(*words)
    losses = [line["eval_loss"] for line in lines(trainer) if "eval_loss" in line]
    best = losses.index(min(losses)) + 1
    assert len(losses) == trainer.state.global_step == best + 2 < 60
    said = f"stops at step {best + 2}: loss was no better than its best 2 times in a row (--patience)"
    assert capsys.readouterr().err.count(said) == 1
    assert trainer.state.best_global_step == best and best in checkpoints_of(trainer)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)  # the best is loaded

    again, log = tiny.prepare(*words)  # killed after the last checkpoint, and gone on
    with log:
        again.run(Path(trainer.args.output_dir) / f"checkpoint-{best + 2}")
    assert again.state.global_step == best + 2
    assert torch.equal(flat(again), flat(trainer))


def test_what_reporters_get(tiny: Tiny) -> None:
    def logged(*words: str) -> list[int]:
        trainer = tiny.run(*words, "--save_strategy", "no")
        assert [line["step"] for line in lines(trainer)] == [1, 2, 3]  # whatever reporters get
        return [entry["step"] for entry in trainer.state.log_history if "loss" in entry]

    assert logged("--logging_steps", "2") == [2]
    assert logged("--logging_steps", "2", "--logging_first_step") == [1, 2]
    assert logged("--logging_strategy", "no") == []
    pytest.importorskip("tensorboard")
    trainer = tiny.run("--report_to", "tensorboard", "--save_strategy", "no")
    assert len(list((Path(trainer.args.output_dir) / "runs").rglob("events.*"))) == 1


QUIET = [
    *("--run_name", "mine", "--project", "mine", "--log_level", "error", "--log_level_replica", "error"),
    *("--log_on_each_node", "False", "--disable_tqdm", "--skip_memory_metrics", "False"),
    *(
        "--include_num_input_tokens_seen",
        "all",
        "--torch_empty_cache_steps",
        "1",
        "--debug",
        "underflow_overflow",
    ),
    *("--dataloader_pin_memory", "True", "--full_determinism"),
]
WORKERS = [
    *(
        "--dataloader_num_workers",
        "1",
        "--dataloader_persistent_workers",
        "--dataloader_prefetch_factor",
        "3",
    ),
]


@pytest.fixture
def determinism() -> Iterator[None]:
    """--full_determinism sets the process; it is set back."""
    before = dict(os.environ)
    yield
    torch.use_deterministic_algorithms(False)
    os.environ.clear()
    os.environ.update(before)


def test_what_does_not_touch_the_weights(
    tiny: Tiny, determinism: None, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = flat(tiny.run("--save_strategy", "no"))
    assert "step 3 of 3" in capfd.readouterr().err
    assert torch.equal(flat(tiny.run("--save_strategy", "no", *WORKERS)), plain)
    capfd.readouterr()
    trainer = tiny.run("--save_strategy", "no", *QUIET)
    assert torch.equal(flat(trainer), plain)
    assert "of 3" not in capfd.readouterr().err  # --disable_tqdm: no line at all
    assert trainer.state.num_input_tokens_seen == sum(line["tokens"] for line in lines(trainer)) > 0


# ------------------------------------------------------------------------------------------ what is no option


@pytest.mark.parametrize("height", [1e-3, 1.0])
def test_a_loss_of_zero_ends_a_run_that_did_not_descend_to_it(height: float, tiny: Tiny) -> None:
    trainer, log = tiny.prepare("--save_strategy", "no")
    own = trainer.model_loss

    def falling(model: Any, batch: Any) -> Any:
        found = own(model, batch)
        factor = height if trainer.state.global_step == 0 else 0
        return dataclasses.replace(found, loss_sum=found.loss_sum * factor)

    trainer.model_loss = falling
    with log:
        if height == 1:
            with pytest.raises(TrainingError, match="step 2: the loss is exactly 0"):
                trainer.run(None)
        else:  # learnt by heart
            assert trainer.run(None)
            assert [line["loss"] == 0 for line in lines(trainer)] == [False, True, True]


def test_a_run_that_only_warmed_up_is_known(tiny: Tiny) -> None:
    found = []
    for words in (["--warmup_steps", "1", "--max_steps", "1"], ["--max_steps", "1"]):
        trainer, log = tiny.prepare(*words, "--save_strategy", "no")
        with log:
            assert trainer.run(None)
        found.append(result.outcome(trainer, log, {})["highest_learning_rate"])
    assert found == [0, 0.01]
