"""Flags from a file: read as the command line's are, told with their line, beaten by flags."""

import json
from pathlib import Path

import pytest

from qwen_chat.errors import OptionError
from qwen_chat.flags.config_file import named
from qwen_chat.flags.run_options import Run
from qwen_chat.flags.run_problems import read_run

WHOLE = """# a comment
data_path: [a.jsonl, b b.jsonl]
use-lora: yes
lora_r: 16
learning_rate: 1e-4
template_kwargs: {enable_thinking: true, note: "é"}
lora_target_modules:
  - q_proj
  - v_proj
report_to: none
seed: 7
save_total_limit:
"""


def config(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def told(file: Path, *words: str) -> list[str]:
    with pytest.raises(OptionError) as error:
        read_run(["--config", str(file), *words])
    return str(error.value).splitlines()


def test_a_file_is_the_same_as_its_flags(tmp_path: Path) -> None:
    run = read_run(["--config", str(config(tmp_path, WHOLE))])
    words = ["-d", "a.jsonl", "b b.jsonl", "--use_lora", "--lora_r", "16", "--learning_rate", "1e-4"]
    words += ["--template_kwargs", '{"enable_thinking": true, "note": "é"}', "--report_to", "none"]
    words += ["--lora_target_modules", "q_proj", "v_proj", "--seed", "7", "--save_total_limit", "None"]
    same = read_run(words)
    assert {**run.as_dict(), "config": None} == same.as_dict()
    assert run.given == same.given | {"config"}
    assert run.data.data_path == ("a.jsonl", "b b.jsonl") and run.extra == {"seed": 7}


def test_flags_win_and_take_the_place_of_a_whole_list(tmp_path: Path) -> None:
    file = str(config(tmp_path, WHOLE))
    run = read_run(["-d", "c.jsonl", "--config", file, "--lora_r", "8"])
    assert (run.data.data_path, run.lora.lora_r, run.train.learning_rate) == (("c.jsonl",), 8, 1e-4)
    assert read_run([f"--config={file}"]).lora.lora_r == 16


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lora_r: 8\nlora_rr: 8\n", ["run.yaml:2: --lora_rr: unknown flag; did you mean --lora_r?"]),
        ("a: 1\nb: 2\n", ["run.yaml:1: --a: unknown flag; --help lists them"]),
        (
            "lora_r: 8\nseed: 1\nlora-r: 9\n",
            ["run.yaml:3: lora-r: stands in line 1 too; leave one of them out"],
        ),
        ("lora_r: 8\n\tseed: 1\n", ["run.yaml:2: a tab; YAML is indented and spaced by blanks"]),
        ("lora_r:\t8\n", ["run.yaml:1: a tab; YAML is indented and spaced by blanks"]),
        ("seed: 1\nlora_r: many\n", ["run.yaml:2: --lora_r: 'many'; expected a whole number"]),
        ("seed: [1, 2]\n", ["run.yaml:1: --seed: 2 values (1 2); expected one"]),
        ("lora_r: 8\n- 9\n", ["run.yaml:2: no YAML ("]),
        ("- 9\n", ["run.yaml:1: expected one `flag: value` a line"]),
        ("", ["run.yaml:1: expected one `flag: value` a line"]),
        ("[a]: 1\n", ["run.yaml:1: a key that is no word"]),
        ("seed: 1\nseed: !!python/name:os.system x\n", ["run.yaml:2: seed: stands in line 1 too"]),
        ("[" * 20_000, ["run.yaml: no YAML ("]),
        (
            "data_path: x\nuse_lora: true\n\nlora_r: -3\n",
            ["run.yaml:4: --lora_r -3: expected a number above 0"],
        ),
    ],
)
def test_what_is_wrong_is_told_with_its_line(text: str, says: list[str], tmp_path: Path) -> None:
    lines = told(config(tmp_path, text))
    assert [line[: len(start)] for line, start in zip(lines, says, strict=False)] == says


def test_a_value_that_a_flag_replaced_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    file = config(tmp_path, "data_path: x\nlora_r: 8\nuse_lora: true\n")
    assert told(file, "--lora_r", "0") == ["--lora_r 0: expected a number above 0"]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    (line,) = told(missing)
    assert line.startswith(f"--config {missing}: cannot be read (No such file or directory); expected a YAML")
    (tmp_path / "latin.yaml").write_bytes(b"seed: \xff\n")
    assert "cannot be read (not UTF-8)" in told(tmp_path / "latin.yaml")[0]


def test_a_run_json_gives_every_option_and_what_was_chosen(tmp_path: Path) -> None:
    words = [
        "-d",
        "x.jsonl",
        "--q_lora",
        "--lora_r",
        "8",
        "--warmup_ratio",
        "0.1",
        "--max_steps",
        "5",
        "-o",
        "out",
    ]
    words += ["--template_kwargs", '{"enable_thinking": false}', "--resume", "never"]
    run = read_run(words)
    assert isinstance(run, Run)
    record = {"options": run.as_dict(), "shaped_by": {"data": "x"}, "given": sorted(run.given)}
    file = tmp_path / "run.json"
    file.write_text(json.dumps(record | {"choices": {"threads": 3}}, indent=2), encoding="utf-8")
    again = read_run(["--config", str(file)])
    own = {"output_dir": None, "resume": "auto", "config": str(file)}
    assert again.as_dict() == run.as_dict() | own
    assert again.given == run.given - {"output_dir", "resume"} | {"config"}
    assert again.repeats["choices"] == {"threads": 3}
    assert read_run(["--config", str(file), "--max_steps", "9"]).extra["max_steps"] == 9
    damaged = file.read_text(encoding="utf-8").replace('"lora_dropout"', '"lora_drop"')
    file.write_text(damaged, encoding="utf-8")
    line = 1 + damaged[: damaged.index('"lora_drop"')].count("\n")
    assert told(file) == [f"run.json:{line}: --lora_drop: unknown flag; did you mean --lora_dropout?"]


def test_which_file_is_named() -> None:
    assert named(["--config", "a", "--seed", "1", "--config=b"]) == "b"
    assert named(["--config", "--seed", "1"]) is None
    assert named([]) is None
