"""The documents against the checkout: links, paths, flags, and every command of the README."""

import importlib.util
import re
import shlex
import subprocess
import tomllib
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qwen_chat import demo_model
from qwen_chat.cli.main import COMMANDS as COMMANDS_OF_THE_WHEEL
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
COMMANDS = list(dict.fromkeys(check.commands(ROOT / "README.md") + check.commands(ROOT / "README.zh-CN.md")))


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
    assert list(check.unknown_flags(false)) == [
        "`python finetune/inspect_data.py --no_such_flag 1`: finetune/inspect_data.py --help does not know "
        "--no_such_flag"
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


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_can_be_given(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    elif words[0] == "bash":
        done = subprocess.run([*words, "--dry_run"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "finetune.py" in done.stdout + done.stderr
    elif words[0] == "pip":
        named = re.fullmatch(r"\.(?:\[([\w,]+)\])?", words[2])
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
            "optional-dependencies"
        ]
        assert named and set((named[1] or "all").split(",")) <= set(extras)
    elif words[0] == "qwen-chat":
        assert words[1] in COMMANDS_OF_THE_WHEEL
    elif words[0] == "llama-server":  # another project's: what it is given comes from a command above
        assert any(f"{Path(words[2]).parent}" in other for other in COMMANDS if other != command)
    else:
        assert words[0] == "python"
        assert (ROOT / words[1]).exists()  # its flags are held against --help by faults()


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
