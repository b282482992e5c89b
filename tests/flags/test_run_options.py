"""The parser: every flag by its name and type, every combination that cannot work, nothing imported."""

import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qwen_chat import hardware
from qwen_chat.errors import OptionError
from qwen_chat.flags import deepspeed_file, training_fields
from qwen_chat.flags.parser import option, read
from qwen_chat.flags.run_options import DataArguments, ModelArguments, Run
from qwen_chat.flags.run_problems import read_run

ROOT = Path(__file__).resolve().parents[2]
DATA = ["-d", "data.jsonl"]

# The seed document's parameters, each with a value as its users write it, and what it must mean.
SEED = {
    "bf16": ("False", False),
    "fp16": ("False", False),
    "num_train_epochs": ("5", 5.0),
    "per_device_train_batch_size": ("2", 2),
    "per_device_eval_batch_size": ("3", 3),
    "gradient_accumulation_steps": ("16", 16),
    "eval_strategy": ("no", "no"),
    "save_strategy": ("steps", "steps"),
    "save_steps": ("1000", 1000.0),
    "save_total_limit": ("10", 10),
    "learning_rate": ("3e-4", 3e-4),
    "weight_decay": ("0.01", 0.01),
    "adam_beta2": ("0.95", 0.95),
    "warmup_ratio": ("0.01", 0.01),
    "lr_scheduler_type": ("cosine", "cosine"),
    "logging_steps": ("1", 1.0),
    "report_to": ("none", ("none",)),
    "model_max_length": ("512", 512),
    "lazy_preprocess": ("True", True),
    "gradient_checkpointing": ("True", True),
    "use_lora": ("True", True),
    "q_lora": ("False", False),
    "lora_r": ("8", 8),
    "lora_alpha": ("32", 32),
    "lora_dropout": ("0.1", 0.1),
    "lora_target_modules": ("q_proj", ("q_proj",)),
    "lora_bias": ("lora_only", "lora_only"),
    "data_path": ("a.jsonl", ("a.jsonl",)),
    "output_dir": ("out", "out"),
}


def problems_of(*words: str) -> list[str]:
    with pytest.raises(OptionError) as caught:
        read_run(words)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("name", SEED)
def test_each_seed_flag_is_read_by_its_name(name: str) -> None:
    word, meant = SEED[name]
    base = [] if name == "data_path" else DATA
    lora = ["--use_lora", "True"] if name.startswith("lora_") else []
    run = read_run([*base, *lora, f"--{name}", word])
    assert run.as_dict()[name] == meant
    assert type(run.as_dict()[name]) is type(meant)


def test_the_whole_old_command_line() -> None:
    words = [f"--{name}={value}" for name, (value, _) in SEED.items()]
    run = read_run([*words, "--evaluation_strategy", "no"])
    assert {name: run.as_dict()[name] for name in SEED} == {name: meant for name, (_, meant) in SEED.items()}
    assert run.train.warmup_steps == 0.01  # transformers' word for a share
    assert run.notes == ("--evaluation_strategy is called --eval_strategy today; read as that",)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--use_lora"], True),
        (["--use_lora", "True"], True),
        (["--use_lora", "false"], False),
        (["--use-lora=1"], True),
        (["--use_lora", "True", "--use_lora", "False"], False),
    ],
)
def test_switches_stand_bare_or_with_a_value_and_the_last_wins(words: list[str], value: bool) -> None:
    assert read_run([*DATA, *words]).lora.use_lora is value


def test_several_data_files_in_either_way() -> None:
    assert read_run(["-d", "a", "-d", "b c"]).data.data_path == ("a", "b c")
    assert read_run(["-d", "a", "b c", "--data_weights", "1,0.5"]).data.data_path == ("a", "b c")
    assert read_run(["-d", "a", "b", "--data_weights", "1", ".5"]).data.data_weights == (1.0, 0.5)


def test_fields_of_training_arguments_keep_their_types() -> None:
    words = ["--max_steps", "8", "--max_grad_norm", "5", "--full_determinism", "--data_seed", "1"]
    words += ["--lr_scheduler_kwargs", '{"num_cycles": 2}', "--eval_on_start=True", "--optim", "adafactor"]
    words += ["--eval_data_path", "e"]
    assert read_run([*DATA, *words]).extra == {
        "max_steps": 8,
        "max_grad_norm": 5.0,
        "full_determinism": True,
        "data_seed": 1,
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "eval_on_start": True,
        "optim": "adafactor",
    }


def test_every_field_of_training_arguments_is_known() -> None:
    from dataclasses import fields

    from transformers import TrainingArguments

    found = {entry.name for entry in training_fields.trainer_options()}
    assert found == {f.name for f in fields(TrainingArguments) if f.init}


def test_defaults_fit_the_method() -> None:
    assert read_run(DATA).train.learning_rate == 1e-5
    assert read_run([*DATA, "--use_lora"]).train.learning_rate == 1e-4
    assert read_run([*DATA, "--q_lora"]).train.learning_rate == 1e-4
    assert read_run([*DATA, "--use_lora", "--learning_rate", "1e-3"]).train.learning_rate == 1e-3
    assert read_run(DATA).train.eval_strategy == "no"
    assert read_run([*DATA, "--eval_data_path", "e"]).train.eval_strategy == "epoch"


def test_q_lora_implies_lora() -> None:
    run = read_run([*DATA, "--q_lora", "True"])
    assert (run.lora.use_lora, run.method) == (True, "qlora")
    assert read_run([*DATA, "--use_lora", "False", "--q_lora", "True"]).method == "qlora"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--lora_rank", "8"], "--lora_rank: unknown flag; did you mean --lora_r?"),
        (["--learning_rat", "1"], "--learning_rat: unknown flag; did you mean --learning_rate?"),
        (["--bf16", "maybe"], "--bf16: 'maybe'; expected True or False or None"),
        (["--max_steps", "many"], "--max_steps: 'many'; expected a whole number"),
        (["--max_steps"], "--max_steps: no value; expected a whole number"),
        (["-m", "my", "model"], "-m: 2 values (my model); expected one; quote a value with spaces"),
        (["--too_long", "cut"], "--too_long: 'cut'; expected drop or truncate or error"),
        (["--label_names", "[]"], "--label_names is set by the toolkit itself; leave it out"),
        (
            ["--packing", "True"],
            "--packing: unknown flag; did you mean --layout packed (shared_prefix, the default, packs too)?",
        ),
        (
            ["--early_stopping_patience", "3"],
            "--early_stopping_patience: unknown flag; did you mean --patience N?",
        ),
        (["--max_seq_length", "9"], "--max_seq_length: unknown flag; did you mean --model_max_length?"),
        (["--push_to_hubs", "9"], "--push_to_hubs: unknown flag; --help lists them"),
        (
            ["--group_by_length"],
            "--group_by_length is gone: rows are always balanced by length; leave it out",
        ),
    ],
)
def test_a_word_that_cannot_be_read_is_named(words: list[str], line: str) -> None:
    assert problems_of(*DATA, *words) == [line]


def test_words_without_a_flag() -> None:
    assert problems_of("data.jsonl", *DATA) == [
        "'data.jsonl': no flag stands before this value; flags begin with --"
    ]


def test_all_problems_come_at_once() -> None:
    lines = problems_of("--lora_r", "0", "--warmup_ratio", "2", "--lora_bias", "all")
    assert lines == [
        "--lora_r 0: expected a number above 0",
        "--warmup_ratio 2.0: expected a share between 0 and 1",
        "no data: give the conversations with -d FILE",
        "--lora_bias, --lora_r without --use_lora: a full fine-tune has no adapter; add --use_lora True",
    ]


def test_q_lora_with_zero_3() -> None:
    config = str(ROOT / "finetune" / "ds_config_zero3.json")
    assert problems_of(*DATA, "--q_lora", "--deepspeed", config) == [
        f"--q_lora with ZeRO-3 ({config}): 4-bit weights cannot be split over processes; "
        "use --deepspeed finetune/ds_config_zero2.json"
    ]


def test_a_share_of_one_is_the_whole_run() -> None:
    for ratio, steps, warm in ((1.0, 1, 1), (1.0, 8, 8), (1.0, 12345, 12345), (0.5, 8, 4), (0.03, 100, 3)):
        share = read_run([*DATA, "--warmup_ratio", str(ratio)]).train.warmup_steps
        assert share is not None and share < 1 and math.ceil(steps * share) == warm


@pytest.mark.parametrize(("word", "limit"), [("-1", None), ("0", None), ("None", None), ("1", 1), ("5", 5)])
def test_a_limit_below_one_keeps_all_checkpoints(word: str, limit: int | None) -> None:
    assert read_run([*DATA, "--save_total_limit", word]).train.save_total_limit == limit


def test_a_number_of_steps_is_not_ignored() -> None:
    assert read_run([*DATA, "--save_steps", "5"]).train.save_strategy == "steps"
    assert read_run([*DATA, "--save_steps", "5", "--save_strategy", "epoch"]).train.save_strategy == "epoch"
    words = [*DATA, "--eval_data_path", "e", "--eval_steps", "5"]
    assert read_run(words).train.eval_strategy == "steps"
    for flag in ("--keep_best", "--load_best_model_at_end"):
        best = [*DATA, "--eval_data_path", "e", flag]
        assert read_run(best).train.eval_strategy == "epoch"
        assert read_run([*best, "--save_steps", "5"]).train.eval_strategy == "steps"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"gradient_clipping": 0.5}, 'gradient_clipping is 0.5, --max_grad_norm is 1.0; write "auto" there'),
        (
            {"gradient_accumulation_steps": 1},
            "gradient_accumulation_steps is 1, --gradient_accumulation_steps is 2",
        ),
        (
            {"train_micro_batch_size_per_gpu": 1},
            "train_micro_batch_size_per_gpu is 1, --per_device_train_batch_size is 4",
        ),
        ({"fp16": {"enabled": True}}, "fp16.enabled is true, --fp16 is False"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is true, --bf16 is False"),
        (
            {"zero_optimization": {"stage": 3}},
            "a full fine-tune could not be saved; add stage3_gather_16bit_",
        ),
    ],
)
def test_a_deepspeed_file_that_contradicts_the_flags(
    content: dict[str, Any], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "has_accelerator", lambda: False)
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(content))
    (said,) = problems_of(*DATA, "--deepspeed", str(file))
    assert said.startswith(f"--deepspeed {file}: {line}")


def test_what_a_deepspeed_file_leaves_out_follows_the_flags(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0, "bf16": {}}')
    assert read_run([*DATA, "--deepspeed", str(file)]).train.deepspeed == str(file)
    assert deepspeed_file.read_deepspeed(str(file)) == (
        {
            "zero_optimization": {"stage": 2},
            "gradient_clipping": 1.0,
            "gradient_accumulation_steps": "auto",
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "bf16": {"enabled": "auto"},
            "fp16": {"enabled": "auto"},
        },
        None,
    )
    file.write_text('{"zero_optimization": {"stage": 3}}')
    assert (
        read_run([*DATA, "--use_lora", "--deepspeed", str(file)]).method == "lora"
    )  # an adapter is gathered


def test_deepspeed_paths_that_are_wrong(tmp_path: Path) -> None:
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "blocks.json").write_text(json.dumps({"scheduler": {}, "optimizer": {}}))
    ending = "expected a JSON file such as finetune/ds_config_zero2.json"
    missing = tmp_path / "none.json"
    assert problems_of(*DATA, "--deepspeed", str(missing)) == [
        f"--deepspeed {missing}: no such file; {ending}"
    ]
    for name, words in {"bytes.json": "no JSON (", "list.json": "not DeepSpeed's shape"}.items():
        (line,) = problems_of(*DATA, "--deepspeed", str(tmp_path / name))
        assert line.startswith(f"--deepspeed {tmp_path / name}: {words}") and line.endswith(ending)
    (line,) = problems_of(*DATA, "--deepspeed", str(tmp_path))
    assert "cannot be read (Is a directory)" in line
    assert len(problems_of(*DATA, "--deepspeed", str(tmp_path / "blocks.json"))) == 2


def test_what_a_cpu_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "has_accelerator", lambda: False)
    assert problems_of(*DATA, "--ddp_backend", "nccl", "--fp16") == [
        "--ddp_backend nccl needs an accelerator; leave it out here",
        "--fp16 needs an accelerator; leave it out here",
    ]
    monkeypatch.setattr(hardware, "has_accelerator", lambda: True)
    assert read_run([*DATA, "--fp16"]).train.fp16


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--q_lora", "--lora_init", "pissa"], "PiSSA changes the base, 4 bits cannot"),
        (["--use_lora", "--lora_init", "pissa_niter_x"], "expected default, pissa or pissa_niter_N"),
        (
            ["--use_lora", "--lora_target_modules", "all-linear", "experts", "--lora_dropout", "0.05"],
            "--lora_dropout 0.05 with --lora_target_modules all-linear experts: peft has no dropout before an adapter"
            " over experts; give --lora_dropout 0",
        ),
        (
            ["--use_lora", "--lora_target_modules", "q_proj,experts", "--lora_dropout", "0", "--use_dora"],
            "--use_dora with --lora_target_modules q_proj,experts: peft has none for experts; leave one of them out",
        ),
        (["--use_lora", "--lora_weight_path", "/nowhere"], "no adapter_config.json there"),
        (["--use_lora", "--loraplus_lr_ratio", "0.5"], "expected 1 or more; 16 is usual"),
        (["--data_weights", "1", "2"], "--data_weights has 2 numbers for 1 data files"),
        (
            ["--warmup_ratio", ".1", "--warmup_steps", "5"],
            "--warmup_ratio and --warmup_steps: give one of them",
        ),
        (["--bf16", "--fp16"], "--bf16 and --fp16: give one of them"),
        (
            ["--label_smoothing_factor", "0.1"],
            "--label_smoothing_factor: the loss here is plain cross-entropy",
        ),
        (["--average_tokens_across_devices", "False"], "what a step's loss is divided by here"),
        (["--bf16_full_eval"], "computed as training computes them"),
        (["--attn_implementation", "sdpa"], "knows nothing of prefixes that conversations share"),
        (["--auto_find_batch_size"], "--auto_find_batch_size: would change what an optimizer step is"),
        (["--max_steps", "0"], "--max_steps 0: expected a number from 1 to 1,000,000,000, or -1"),
        (["--num_train_epochs", "inf"], "--num_train_epochs inf: expected a number above 0"),
        (["--warmup_steps", "-5"], "--warmup_steps -5.0: expected 0 or more"),
        (["--warmup_ratio", "-0.5"], "--warmup_ratio -0.5: expected a share between 0 and 1"),
        (["--weight_decay", "-1"], "--weight_decay -1.0: expected 0 or more"),
        (["--adam_beta1", "1"], "--adam_beta1 1.0: expected a share from 0 up to 1"),
        (["--adam_beta2", "1.5"], "--adam_beta2 1.5: expected a share from 0 up to 1"),
        (["--max_grad_norm", "nan"], "--max_grad_norm nan: expected 0 or more"),
        (["--seed", "-1"], "--seed -1: expected a whole number from 0 to 4294967295"),
        (["--data_weights", "inf"], "--data_weights: inf; expected a number from 0 (not used) to 1,000"),
        (["--data_weights", "1e9"], "--data_weights: 1e+09; expected a number from 0 (not used) to 1,000"),
        (
            ["--num_train_epochs", "1e300"],
            "--num_train_epochs 1e+300: expected a number above 0, and at most",
        ),
        (
            ["--max_steps", "1000000000000"],
            "--max_steps 1000000000000: expected a number from 1 to 1,000,000,000",
        ),
        (["--use_lora", "--loraplus_lr_ratio", "nan"], "nan: expected 1 or more; 16 is usual"),
        (["--use_lora", "--use_rslora", "--lora_r", "-5"], "--lora_r -5: expected a number above 0"),
        (
            ["--use_lora", "--lora_weight_path", ""],
            "--lora_weight_path: an empty value; give one, or leave the flag out",
        ),
        (["--gradient_accumulation_steps", "9" * 400], "expected a whole number"),
        (["--optim", "typo"], "--optim typo: no such optimizer; expected one of adamw_torch, "),
        (["--optim", "schedule_free_adamw"], "its averaged weights would be neither evaluated nor saved"),
        (["--optim", "lomo"], "--optim lomo: changes the weights during backward"),
        (["--optim", "stable_adamw"], "--optim stable_adamw: has not been tried here"),
        (["--optim_args", "momentum=1"], "--optim_args with --optim adamw_torch, which takes none"),
        (
            ["--lr_scheduler_type", "cosin"],
            "--lr_scheduler_type cosin: no such schedule; expected one of cosine, ",
        ),
        (
            ["--lr_scheduler_type", "constant", "--lr_scheduler_kwargs", '{"a": 1}'],
            "--lr_scheduler_kwargs with --lr_scheduler_type constant, which takes none",
        ),
        (
            ["--lr_scheduler_type", "constant", "--warmup_steps", "3"],
            "--warmup_steps with --lr_scheduler_type constant, which does not warm up; leave it out, or use",
        ),
        (
            ["--dataloader_prefetch_factor", "3"],
            "--dataloader_prefetch_factor without --dataloader_num_workers",
        ),
        (["--load_best_model_at_end"], "--load_best_model_at_end without --eval_data_path"),
        (["--metric_for_best_model", "loss"], "--metric_for_best_model without --eval_data_path"),
        (["--lr_scheduler_type", "greedy"], "--lr_scheduler_type greedy without --eval_data_path"),
        (["--eval_steps", "5"], "--eval_steps without --eval_data_path: give held-out conversations"),
        (["--eval_on_start"], "--eval_on_start without --eval_data_path: give held-out conversations"),
        (
            ["--eval_data_path", "e", "--metric_for_best_model", "bleu"],
            "--metric_for_best_model bleu: not measured; expected one of loss, perplexity, token_accuracy",
        ),
        (
            ["--eval_data_path", "e", "--metric_for_best_model", "perplexity", "--greater_is_better"],
            "--greater_is_better True: of perplexity less is better; leave it out",
        ),
        (
            [
                *("--eval_data_path", "e", "--metric_for_best_model", "eval_token_accuracy"),
                *("--lr_scheduler_type", "reduce_lr_on_plateau"),
            ],
            'it looks for a minimum; add --lr_scheduler_kwargs \'{"mode": "max"}\'',
        ),
        (
            ["--eval_data_path", "e", "--keep_best", "--eval_strategy", "steps"],
            "--keep_best where evaluation and checkpoint are not at the same step",
        ),
        (
            ["--eval_data_path", "e", "--keep_best", "--eval_strategy", "no"],
            "--keep_best with --eval_strategy no: nothing would be compared",
        ),
    ],
)
def test_a_combination_that_cannot_work(words: list[str], part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "has_accelerator", lambda: True)
    (line,) = problems_of(*DATA, *words)
    assert part in line


@dataclass(frozen=True)
class ShowArguments:
    """Show"""

    show: int = option(3, "how many", "-n")


def test_other_scripts_read_their_own_groups() -> None:
    values = read(["-d", "x", "-n", "5"], [ModelArguments, DataArguments, ShowArguments])
    assert (values[ShowArguments].show, values[DataArguments].data_path, values[ModelArguments].model) == (
        5,
        ("x",),
        None,
    )
    with pytest.raises(OptionError, match="--max_steps: unknown flag"):
        read(["--max_steps", "5"], [ShowArguments])


def test_help_names_every_flag_and_needs_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        read_run(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert [name for name in SEED if f"--{name}" not in text] == []
    program = "import sys\nfrom qwen_chat.flags.run_problems import read_run\n"
    program += "read_run(['-d', 'x', '--max_steps', '2'])\n"
    program += "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
    assert time.perf_counter() - start < 5


def test_a_run_is_a_value() -> None:
    run = read_run(DATA)
    assert isinstance(run, Run)
    assert json.loads(json.dumps(run.as_dict()))["lora_target_modules"] == ["all-linear"]


def test_patience_writes_a_checkpoint_wherever_it_measures() -> None:
    run = read_run([*DATA, "--eval_share", "0.1", "--patience", "3"])
    assert (run.train.eval_strategy, run.train.save_strategy) == ("epoch", "epoch")
    assert run.extra == {"load_best_model_at_end": True}
    run = read_run([*DATA, "--eval_share", "0.1", "--patience", "3", "--eval_steps", "50"])
    assert (run.train.eval_strategy, run.train.save_strategy, run.train.save_steps) == ("steps", "steps", 50)
    given = ["--save_strategy", "best", "--eval_steps", "50"]
    assert read_run([*DATA, "--eval_share", "0.1", "--patience", "3", *given]).train.save_strategy == "best"
    assert problems_of(
        *DATA, "--patience", "3", "--eval_data_path", "y", "--save_steps", "7", "--eval_steps", "2"
    ) == [
        "--patience where evaluation and checkpoint are not at the same step: give --save_strategy and --eval_strategy"
        " (and --save_steps and --eval_steps) the same values, or --save_strategy best"
    ]
    assert problems_of(*DATA, "--patience", "0") == ["--patience 0: expected a number above 0"]
    assert problems_of(*DATA, "--patience", "1") == [
        "--patience without --eval_data_path: the best is found on held-out conversations; give some"
    ]


def test_what_is_held_out_is_a_share_or_files() -> None:
    assert problems_of(*DATA, "--eval_share", "0.1", "--eval_data_path", "y") == [
        "--eval_share and --eval_data_path: give one of them"
    ]
    for share in ("0", "1", "-0.1", "nan"):
        assert problems_of(*DATA, "--eval_share", share) == [
            f"--eval_share {float(share)}: expected a share between 0 and 1, such as 0.05"
        ]


def test_a_system_text_is_a_text_or_a_file_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "system.txt").write_text("  You are 小明.\nBe brief. \n", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    (tmp_path / "marked.txt").write_text("你是小明。\n", encoding="utf-8-sig")
    (tmp_path / "prompts").mkdir()
    (tmp_path / "blank.txt").write_bytes(b"\n")
    monkeypatch.chdir(tmp_path)
    for word, text in (
        ("system.txt", "You are 小明.\nBe brief."),
        ("Answer in JSON.", "Answer in JSON."),
        ("你是小明。", "你是小明。"),
        ("marked.txt", "你是小明。"),
        ("You say yes/no.", "You say yes/no."),
        ("x" * 5_000, "x" * 5_000),
    ):
        run = read_run([*DATA, "--system", word])
        assert run.data.system == run.as_dict()["system"] == text
    for word, wrong in (
        ("sytem.txt", "sytem.txt: no such file; a text of one word must not look like a file's name"),
        ("./sytem", "./sytem: no such file; a text of one word must not look like a file's name"),
        ("prompts/system", "prompts/system: no such file; "),
        ("prompts", "prompts: no file; expected a text, or a file that holds one"),
        ("\udcff", "'\\udcff': cannot be read as UTF-8 text ("),
        ("latin.txt", "'latin.txt': cannot be read as UTF-8 text ("),
        ("blank.txt", "'blank.txt': no text"),
        (" ", "' ': no text"),
    ):
        with pytest.raises(OptionError) as error:
            read_run([*DATA, "--system", word])
        assert str(error.value).startswith(f"--system: {wrong}")
