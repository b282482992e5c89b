"""The chat templates of published models, as their authors wrote them.

They come out of the wheel `trl` (Apache-2.0), which carries a copy of each: fetched once, verified by its hash, cached
like the demo model. They are other people's text, so none of it lies in this repository.
"""

from __future__ import annotations

from qwen_chat import demo_model

WHEEL = ("trl", "1.16.0", "c4726e139dd40e1a41661511c639c8a68416782b2e3e8c0befebd77bb7ba0396")
NAMES = ("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8")


def fetch() -> dict[str, str]:
    """Each template's source by its name in `NAMES`."""
    folder = demo_model.unpacked_wheel(*WHEEL) / "trl" / "chat_templates"
    return {name: (folder / f"{name}.jinja").read_text(encoding="utf-8") for name in NAMES}
