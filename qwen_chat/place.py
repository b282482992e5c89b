"""Where the package lies: in a checkout, whose scripts and folders people are shown, or installed from a wheel.

In: nothing. Out: the command that does a thing here, and the folder that runs go to.
"""

from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
IS_CHECKOUT = (_ROOT / "finetune" / "finetune.sh").is_file()

# Where results go that nobody gave a folder, and the service's log.
OUTPUTS = _ROOT / "finetune" / "io_file" / "output_data" if IS_CHECKOUT else Path("output_data")
LOG_FOLDER = _ROOT / "fast_start" if IS_CHECKOUT else Path()
LAUNCHER = "finetune.sh" if IS_CHECKOUT else "qwen-chat tune"

# What `qwen-chat NAME` is called in a checkout.
SCRIPTS = {
    "tune": "finetune/finetune.py",
    "serve": "fast_start/simple_try_create_service.py",
    "chat": "fast_start/simple_try_0.py",
    "call": "fast_start/try_call_service.py",
    "page": "fast_start/web_demo.py",
    "check": "finetune/inspect_data.py",
    "plan": "finetune/plan.py",
    "evaluate": "finetune/evaluate.py",
    "merge": "finetune/merge_adapter.py",
    "export": "finetune/export.py",
    "report": "finetune/report.py",
    "verify": "fast_start/verify_service.py",
}


def invocation(name: str) -> str:
    """What to type here for `qwen-chat NAME`."""
    return f"python {SCRIPTS[name]}" if IS_CHECKOUT else f"qwen-chat {name}"


def deepspeed_file(engine: str) -> str:
    """What --deepspeed is given for "zero2" or "zero3"."""
    return f"finetune/ds_config_{engine}.json" if IS_CHECKOUT else engine


def pip_install(packages: str, extra: str | None) -> str:
    """The pip command that brings packages; an installed wheel brings them in its own versions."""
    wanted = packages if IS_CHECKOUT or extra is None else f"'qwen-chat[{extra}]'"
    return f"pip install {wanted}"
