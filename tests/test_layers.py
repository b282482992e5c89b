"""Each layer imports only those above it: a child interpreter imports a module and says what came along."""

import ast
import subprocess
import sys
from pathlib import Path

from docs import measure

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
SCRIPTS = sorted(
    str(script.relative_to(ROOT))
    for folder in ("finetune", "fast_start")
    for script in (ROOT / folder).glob("*.py")
)


# Rooms, and single modules of the others, that load none of HEAVY: refusals and --help come at once.
LIGHT_ROOMS = {
    "errors",
    "conversation",
    "console",
    "hardware",
    "threads",
    "flags",
    "tools",
    "dialects",
    "chat",
    "certificate",
    "data",
}
LIGHT_MODULES = {
    *(
        "demo_model",
        "training.packing",
        "training.memory_plan",
        "training.run_folder",
        "training.checkpoints",
    ),
    *("service.protocol", "service.queue_bound", "service.request_log", "service.workers", "service.vllm"),
    *("inference.grammar_trial",),
}


def test_every_import_goes_to_an_earlier_floor() -> None:
    """The rule is the folders': docs/measure.py lists the floors; a module in no room of them is told too."""
    found = measure.modules()
    assert measure.upward(found) == []
    assert measure.circle(measure.arrows(found)) == []


def test_every_room_has_its_floor_and_the_wings_import_nothing() -> None:
    rooms = {module.room for module in measure.modules()} - {"__init__"}
    assert rooms == {room for floor in measure.FLOORS for room in floor}
    for init in (ROOT / "qwen_chat").glob("*/__init__.py"):
        assert not any(
            isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(init.read_text()).body
        )


def test_an_upward_import_and_a_circle_would_be_seen() -> None:
    up = [
        measure.Module("errors", "errors", ast.parse("from qwen_chat.service import app")),
        measure.Module("training.a", "training", ast.parse("import qwen_chat.inference.b")),
        measure.Module(
            "inference.b", "inference", ast.parse("def f():\n    from qwen_chat.training.a import g")
        ),
        measure.Module("service.app", "service", ast.parse("import qwen_chat.new_room")),
        measure.Module("new_room", "new_room", ast.parse("")),
    ]
    assert measure.upward(up) == [
        "errors -> service.app",
        "inference.b -> training.a",
        "service.app -> new_room: no floor for new_room",
        "training.a -> inference.b",
    ]
    assert measure.circle(measure.arrows(up)) == ["inference.b", "training.a", "inference.b"]


def test_no_torch_comes_along() -> None:
    """One child imports them all, and says after which one something heavy is there."""
    names = [m.name for m in measure.modules() if m.room in LIGHT_ROOMS or m.name in LIGHT_MODULES]
    assert set(names) >= LIGHT_MODULES
    program = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module('qwen_chat.' + name.removesuffix('.__init__'))\n"
        f"    heavy = {{n.partition('.')[0] for n in sys.modules}} & {HEAVY!r} - {{'fastapi'}}\n"
        "    assert not heavy, (name, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_no_help_needs_torch() -> None:
    """One child says them all, and after which one something heavy is there."""
    program = (
        "import runpy, sys\n"
        f"for script in {SCRIPTS!r}:\n"
        "    sys.argv = [script, '--help']\n"
        "    try:\n        runpy.run_path(script, run_name='__main__')\n"
        "    except SystemExit as stop:\n        assert not stop.code, (script, stop.code)\n"
        f"    heavy = {{n.partition('.')[0] for n in sys.modules}} & {HEAVY!r}\n"
        "    assert not heavy, (script, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
