"""The ways out: each makes a new folder that another program serves as it lies there.

In: a whole model's folder, or an adapter (merged first). Out: a folder that appears when all of it is written.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_chat import models
from qwen_chat.errors import OptionError, first_line
from qwen_chat.export.gguf_file import FILE_TYPES, write_gguf
from qwen_chat.export.source import Exported, build_new
from qwen_chat.service import vllm

# Flags of vLLM's command that depend on the model, and not on the machine.
_SPOKEN = ("--enable-auto-tool-choice", "--tool-call-parser", "--reasoning-parser")


@dataclass(frozen=True)
class WrittenExport:
    """What an export made, for a person and for a program."""

    lines: tuple[str, ...]
    facts: Mapping[str, Any]


def to_gguf(model: Path, folder: Path, kind: str, quantizer: str | None) -> WrittenExport:
    """`model-TYPE.gguf`. K-quants are made by llama.cpp's own llama-quantize from a BF16 file."""
    kind = kind.lower()
    if kind not in FILE_TYPES and quantizer is None:
        raise OptionError(
            f"--type {kind}: expected {', '.join(FILE_TYPES)}; any other is made by llama.cpp's llama-quantize: give"
            " its path with --llama_quantize"
        )
    if quantizer is not None and shutil.which(quantizer) is None:
        raise OptionError(
            f"--llama_quantize {quantizer}: no program there; give the path of llama.cpp's llama-quantize"
        )
    name, facts = f"model-{kind}.gguf", {}

    def build(aside: Path) -> None:
        first = aside / (name if kind in FILE_TYPES else "unquantised.gguf")
        facts.update(write_gguf(model, first, kind if kind in FILE_TYPES else "bf16"))
        if kind not in FILE_TYPES:
            words = [str(quantizer), str(first), str(aside / name), kind.upper()]
            done = subprocess.run(words, capture_output=True, text=True, errors="replace")
            if done.returncode:
                raise OptionError(
                    f"--type {kind}: llama-quantize refuses ({_closing_line(done.stdout + done.stderr)})"
                )
            first.unlink()
            facts["type"] = kind
        _carry_lock(model, aside)

    build_new(folder, build)
    lines = [f"written: {folder / name}"]
    if facts["left_out"]:
        lines.append(
            f"left out, as llama.cpp's text model has no place for it: {len(facts['left_out'])} tensors,"
            f" {facts['left_out'][0]} first"
        )
    lines += ["serve it:", f"  llama-server -m {shlex.quote(str(folder / name))} --jinja"]
    return WrittenExport(tuple(lines), facts)


def to_vllm(model: Path, folder: Path) -> WrittenExport:
    """`serve.sh` with the parsers that the model's dialect needs, and the template that it was trained under."""
    found = vllm.command(
        model,
        name=model.name,
        python="python",
        host="127.0.0.1",
        port=8000,
        dtype="auto",
        adapters={},
        api_keys=(),
        cors_origins=(),
        max_batch=1,
        max_queue=0,
    ).words
    words = ["vllm", "serve", str(model.absolute()), "--served-model-name", model.name]
    for flag in _SPOKEN:
        if flag in found:
            value = found[found.index(flag) + 1]
            words += [flag] if value.startswith("--") else [flag, value]
    command = shlex.join(words)

    def build(aside: Path) -> None:
        template = found[found.index("--chat-template") + 1]
        shutil.copyfile(template, aside / "chat_template.jinja")
        script = f'#!/bin/sh\n# "$@": more flags of vLLM.\nexec {command} \\\n'
        script += '    --chat-template "$(dirname "$0")/chat_template.jinja" "$@"\n'
        (aside / "serve.sh").write_text(script, encoding="utf-8")
        _carry_lock(model, aside)

    build_new(folder, build)
    return WrittenExport(
        (f"written: {folder / 'serve.sh'}", "serve it:", f"  sh {shlex.quote(str(folder / 'serve.sh'))}"),
        {"command": words},
    )


def to_hub(model: Path, source: Exported, folder: Path) -> WrittenExport:
    """The model's files with a README.md that tells what its run did; nothing is sent."""

    def build(aside: Path) -> None:
        for path in model.iterdir():
            if path.is_file() and path.suffix in (".json", ".safetensors", ".jinja", ".txt", ".lock", ".py"):
                shutil.copyfile(path, aside / path.name)
        (aside / "README.md").write_text(_card(source), encoding="utf-8")

    build_new(folder, build)
    upload = f"hf upload USER/NAME {shlex.quote(str(folder))}"
    return WrittenExport(
        (f"written: {folder}", "read README.md, then send it:", f"  {upload}"), {"upload": upload}
    )


def _card(source: Exported) -> str:
    """Facts of run.json, and nothing that it does not say."""
    run, options = source.run, source.options
    base = options.get("model") or run.get("model") or str(source.base)
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if models.HUB_NAME.fullmatch(str(base)):
        lines.append(f"base_model: {base}")
    lines += ["---", "", f"# {source.folder.name}", "", f"Tuned from {Path(str(base)).name}.", ""]
    data, evaluation = run.get("data") or {}, run.get("evaluation") or {}
    facts = {
        "method": run.get("method"),
        "steps": run.get("steps"),
        "conversations": data.get("conversations"),
        "tokens": run.get("tokens"),
        "learning rate": options.get("learning_rate"),
        "loss of the last step": (run.get("losses") or {}).get("last"),
        **{key.removeprefix("eval_") + " on held-out data": value for key, value in evaluation.items()},
    }
    known = {key: value for key, value in facts.items() if value is not None}
    lines += ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in known.items())]
    return "\n".join(lines) + "\n"


def _carry_lock(model: Path, folder: Path) -> None:
    if (model / "format.lock").is_file():
        shutil.copyfile(model / "format.lock", folder / "format.lock")


def _closing_line(text: str) -> str:
    return first_line(ValueError((text.strip().splitlines() or ["no word"])[-1]))
