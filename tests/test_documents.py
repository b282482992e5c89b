"""The documents against the checkout: links, paths, every command and its flags, one language against the other."""

import importlib.util
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qwen_chat import demo_model
from tests.support.scripted import LiveService

ROOT = Path(__file__).resolve().parents[1]
API = ROOT / "docs" / "api.md"
PUBLIC = (
    "ChatFormat",
    "Conversation",
    "Message",
    "ToolCall",
    "Reply",
    "load_engine",
    "run_tools",
    "create_app",
)


def load_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_documents", ROOT / "docs" / "check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check = load_check()


def test_the_documents_tell_the_truth() -> None:
    assert check.faults() == []


def test_a_false_link_path_and_flag_are_noticed(tmp_path: Path) -> None:
    page = ROOT / "docs" / "decisions.md"
    assert list(check.broken_links(page)) == []
    false = tmp_path / "false.md"
    false.write_text(
        "[x](nowhere.md) finetune/nothing.py\n```bash\npython finetune/inspect_data.py --no_such_flag 1\n```\n",
        encoding="utf-8",
    )
    assert list(check.broken_links(false)) == ["link to nowhere.md: no such file"]
    assert list(check.missing_paths(false)) == ["names finetune/nothing.py, which does not exist"]
    assert list(check.refused_commands(false)) == [
        "`python finetune/inspect_data.py --no_such_flag 1`: --no_such_flag: unknown flag; --help lists them"
    ]


def test_a_long_line_is_noticed_and_a_table_s_row_is_not(tmp_path: Path) -> None:
    page = tmp_path / "long.md"
    page.write_text("a" * 120 + "\n" + "长" * 121 + "\n| " + "b" * 200 + " |\n", encoding="utf-8")
    assert list(check.long_lines(page)) == ["line 2 has 121 characters; wrap it at 120"]


def test_a_module_s_line_is_the_first_sentence_of_its_docstring(tmp_path: Path) -> None:
    module = tmp_path / "rows.py"
    module.write_text('"""Rows: a | b,\nin order. More.\n\nIn: x."""\n', encoding="utf-8")
    assert check.first_sentence(module) == "Rows: a \\| b, in order"


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("conversation.Conversation.from_openai", True),
        ("chat.format.ChatFormat", True),
        ("chat.format.ChatFormat.no_such", False),
        ("chat.no_such.ChatFormat", False),
        ("conversation.no_such", False),
    ],
)
def test_a_hop_is_a_definition_of_the_package(name: str, known: bool) -> None:
    assert check.is_defined(name) is known


def test_a_table_that_the_code_has_left_behind_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "first_sentence", lambda file: "something else")
    assert list(check.stale_tables()) == [
        "docs/architecture.md: the table modules is not the code's; python docs/check.py --write"
    ]


def test_the_pictures_are_of_the_records_and_the_readmes() -> None:
    import docs.pictures

    for name, text in docs.pictures.pictures():
        assert (ROOT / "docs" / "pictures" / name).read_text(encoding="utf-8") == text, (
            "python docs/pictures.py"
        )


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("make nothing", "the Makefile has no nothing"),
        ('pip install ".[qlora,none]"', "pyproject.toml has no extra none"),
        ("qwen-chat tuna", "qwen-chat has no command tuna"),
        ("qwen-chat chat --prompt", "--prompt: no value; expected text or None"),
        ("python finetune/tune.py", "there is no finetune/tune.py"),
        ("python finetune/plan.py --ranks two", "--ranks: 'two'; expected a whole number or None"),
        ("python finetune/finetune.py -d x --lora_r 0", "--lora_r 0: expected a number above 0"),
        ("bash finetune/finetune.sh --use_loro True", "--use_loro: unknown flag; did you mean --use_lora?"),
        ("NNODES=2 NODE_RANK=2 bash finetune/finetune.sh", "error: NODE_RANK=2: expected 0 to 1"),
        ("sbatch -N 2 finetune/cluster/slurm.sh --deepspeed", "error: --deepspeed: 0 values; expected one"),
        ("python fast_start/try_function_calling.py --first no", "argument --first: invalid choice: 'no'"),
        ("python benchmarks/bench_serve.py --requests x", "argument --requests: invalid int value: 'x'"),
        ("curl -s x && launch it", "no check knows launch"),
    ],
)
def test_a_command_that_cannot_be_given_is_noticed(command: str, reason: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"`{command}`\n```bash\n{command}  # told once\n```\n", encoding="utf-8")
    (fault,) = check.refused_commands(page)
    assert fault.partition("`: ")[2].startswith(reason)


def test_what_a_chinese_page_has_otherwise_is_noticed(tmp_path: Path) -> None:
    english, chinese, other = (tmp_path / name for name in ("a.md", "a.zh-CN.md", "b.zh-CN.md"))
    other.touch()
    table = "| a | b |\n| --- | --- |\n| 1 | 2 |\n"
    block = '```python\ndef f():\n    """%s"""  # %s\n    return \'x\'\n```\n'
    same = "## A\n" + table + block + "```bash\nmake %s  # %s\n```\n"
    english.write_text(same % ("What it is", "one", "demo", "two"), encoding="utf-8")
    chinese.write_text(same % ("是什么", "一", "demo", "二"), encoding="utf-8")
    assert list(check.unequal(english, chinese)) == []
    text = same.replace("## A", "# A [b](b.md)").replace("| 1 | 2 |\n", "").replace("return 'x'", "return 2")
    chinese.write_text(text % ("是什么", "一", "test", "二") + "# B\n", encoding="utf-8")
    assert list(check.unequal(english, chinese)) == [
        "headings: 2, a.md has 1",
        "heading 1: `#` where a.md has `##`",
        "table 1: `2 rows of 2` where a.md has `3 rows of 2`",
        'block 1: `python\ndef f():\n    """"""\n    return 2` where a.md has '
        '`python\ndef f():\n    """"""\n    return \'\'`',
        "link to b.md, which is there in Chinese",
    ]


def test_the_lines_of_api_md_run_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, tiny_model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they stand there, with two things in their places: a tiny demo model, and a free port for port 8000."""
    blocks = [code for language, code in check.FENCE.findall(API.read_text("utf-8")) if language == "python"]
    assert {name for code in blocks for name in PUBLIC if f" {name}" in code} == set(PUBLIC)
    names: dict[str, Any] = {"__name__": "api"}
    monkeypatch.setattr(demo_model, "ensure", lambda: tiny_model_path)
    with ExitStack() as running:
        monkeypatch.setattr(
            "uvicorn.run", lambda app, **_: names.update(live=running.enter_context(LiveService(app)))
        )
        for code in blocks:
            url = names["live"].url if "live" in names else ""
            exec(code.replace("http://127.0.0.1:8000", url), names)
    prompt_ids = names["fmt"].prompt_ids(names["messages"][:1])
    assert names["prompt"].endswith("<|im_start|>assistant\n")
    assert names["sequence"].input_ids[: len(prompt_ids)] == prompt_ids
    assert "".join(delta.content or "" for delta in names["deltas"]) == "Hello"
    assert [message["role"] for message in names["done"].messages][:2] == ["user", "assistant"]
    assert {" stop", " length"} & {line[line.rfind(" ") :] for line in capsys.readouterr().out.splitlines()}
