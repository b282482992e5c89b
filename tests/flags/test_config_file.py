"""Flags from a file: read as the command line's are, told with their line, beaten by flags."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_chat.errors import OptionError
from qwen_chat.flags.config_file import LONGEST_YAML, named
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
        ("report_to:\n", ["run.yaml:1: --report_to: no value; expected at least one"]),
        ("data_path: x\nuse_lora: []\n", ["run.yaml:2: use_lora: an empty list; expected True or False"]),
        ("config: other.yaml\n", ["run.yaml:1: config: a file of flags cannot name another; leave it out"]),
        (
            "<<: {seed: 1}\n",
            ["run.yaml:1: <<: mappings are not merged; write the flags of the other one here"],
        ),
        (
            "model: a\nm: b\n",
            ["run.yaml:2: m: is --model, which run.yaml:1 gives; leave one of them out"],
        ),
        ("template_kwargs: {a: {b: 1, b: 2}}\n", ["run.yaml:1: template_kwargs: key 'b' stands twice"]),
        ("template_kwargs: {a: .nan}\n", ["run.yaml:1: --template_kwargs: '{\"a\": NaN}'; expected a JSON"]),
        ("x" * (LONGEST_YAML + 1), ["--config "]),
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
    assert named(["--config"]) is None and named(["--seed", "config"]) is None
    # The parser reads one dash and an empty word too: neither is passed over.
    assert (named(["-config", "a"]), named(["--config="]), named(["--config", ""])) == ("a", "", "")
    with pytest.raises(OptionError, match=r"--config '': no file's name"):
        read_run(["-d", "x", "--config", ""])


def test_the_last_line_end_of_a_block_is_no_part_of_its_text(tmp_path: Path) -> None:
    file = config(tmp_path, "data_path: x\nsystem: |\n  You are\n  Willow.\n")
    assert read_run(["--config", str(file)]).data.system == "You are\nWillow."


def record_of(*words: str) -> dict[str, Any]:
    run = read_run(["-d", "x.jsonl", *words])
    return {"options": run.as_dict(), "shaped_by": {"data": "x"}, "given": sorted(run.given)}


def test_a_run_json_is_read_as_json_however_it_was_saved(tmp_path: Path) -> None:
    """Editors put a mark in front and tabs between; `python -m json.tool` writes an emoji as two escapes."""
    record = record_of("--use_lora", "--system", "Hi 😀 there")
    expected = read_run(["-d", "x.jsonl", "--use_lora", "--system", "Hi 😀 there"]).as_dict()
    file = tmp_path / "run.json"
    for text in (
        json.dumps(record, ensure_ascii=True),
        "\ufeff" + json.dumps(record, ensure_ascii=False, indent="\t").replace("\n", "\r\n"),
    ):
        file.write_bytes(text.encode())
        assert read_run(["--config", str(file)]).as_dict() == expected | {"config": str(file)}


def test_a_run_json_that_an_edit_broke_is_one_line(tmp_path: Path) -> None:
    record = record_of()
    whole = json.dumps(record, indent=2)
    file = tmp_path / "run.json"
    last, rank = (1 + text.count("\n") for text in (whole, whole.partition('"lora_r"')[0]))
    for text, line in (
        (whole[:-2] + ",\n}", f"run.json:{last}: no JSON (expected a key in quotes); correct it there"),
        (whole[:-2], f"run.json:{last - 1}: no JSON (expected ',' or '}}'); correct it there"),
        (whole + "{}", f"run.json:{last}: no JSON (something stands after its end); correct it there"),
        (
            json.dumps(record | {"given": None}),
            "run.json: 'given' is not a list; expected run.json as a run has written it",
        ),
        (
            json.dumps(record | {"options": ["x"]}),
            "run.json: 'options' is not an object; expected run.json as a run has written it",
        ),
        (
            whole.replace('"lora_r": 64,', '"lora_r": 64,\n"lora_r": 8,'),
            f"run.json:{rank + 1}: lora_r: stands in line {rank} too; leave one of them out",
        ),
    ):
        file.write_text(text, encoding="utf-8")
        assert told(file) == [line]
