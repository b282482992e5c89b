"""Each layer imports only those above it: a child interpreter imports a module and says what came along."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "deepspeed",
    "accelerate",
    "bitsandbytes",
    "fastapi",
    "vllm",
    "gradio",
}
STANDARD = ["errors", "hardware", "conversation", "records", "tool_calls", "packing", "arguments", "memory"]
NO_TORCH = [*STANDARD, "chatml", "token_cache", "demo_model", "tool_loop", "protocol", "logs"]
TRAINING = ["dataset", "attention", "loss", "matmul", "adapters", "checkpoints", "training", "probe"]
SERVING = ["sampling", "engine", "service"]
SCRIPTS = sorted(
    str(script.relative_to(ROOT))
    for folder in ("finetune", "fast_start")
    for script in (ROOT / folder).glob("*.py")
)


def modules_after(statement: str) -> set[str]:
    """The top-level names in sys.modules of a fresh interpreter after `statement`."""
    program = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def present(names: list[str]) -> list[str]:
    return [name for name in names if (ROOT / "qwen_chat" / f"{name}.py").exists()]


@pytest.mark.parametrize("name", present(NO_TORCH))
def test_no_torch_comes_along(name: str) -> None:
    allowed = {"fastapi"} if name == "protocol" else set()
    assert modules_after(f"import qwen_chat.{name}") & HEAVY <= allowed


def imports_of(name: str) -> set[str]:
    """The modules of the package that a module imports, wherever in the file."""
    tree = ast.parse((ROOT / "qwen_chat" / f"{name}.py").read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("qwen_chat"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("qwen_chat.")}
    return found


@pytest.mark.parametrize(
    ("side", "other"), [(TRAINING, SERVING), (SERVING, TRAINING)], ids=["training", "serving"]
)
def test_the_two_branches_never_import_each_other(side: list[str], other: list[str]) -> None:
    assert {name: imports_of(name) & set(other) for name in present(side)} == {
        name: set() for name in present(side)
    }


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_no_torch(script: str) -> None:
    program = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, '--help']\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "heavy = {name.partition('.')[0] for name in sys.modules}\n"
        f"print('LOADED', *sorted(heavy & {HEAVY!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1].split() == ["LOADED"]
