"""The ways out: each makes a new folder that another program serves as it lies there.

In: a whole model's folder, or an adapter (merged first). Out: a folder that appears when all of it is written.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_chat import models
from qwen_chat.chat.format import ChatFormat
from qwen_chat.errors import OptionError, first_line, printable
from qwen_chat.export import elsewhere, ollama
from qwen_chat.export.gguf_adapter import write_adapter
from qwen_chat.export.gguf_file import FILE_TYPES, read_shape, write_gguf
from qwen_chat.export.source import MERGE_FILE, Exported, build_new, shown_name, shown_path
from qwen_chat.service import vllm
from qwen_chat.service.prepare import recommended_sampling
from qwen_chat.training.checkpoints import RUN_FILE
from qwen_chat.training.run_folder import LOSSES_FILE
from qwen_chat.weights import model_tensors

# Flags of vLLM's command that depend on the model, and not on the machine.
_SPOKEN = (
    "--enable-auto-tool-choice",
    "--tool-call-parser",
    "--exclude-tools-when-tool-choice-none",
    "--reasoning-parser",
    "--default-chat-template-kwargs",
)

_OF_A_MODEL = (".json", ".safetensors", ".jinja", ".txt", ".model", ".tiktoken", ".lock", ".py")
_OF_THIS_MACHINE = (RUN_FILE, LOSSES_FILE, MERGE_FILE)  # they name its folders and data
_MEASURED = 16_384  # tokens of a batch: what calibrates, and what measures, is cut out of it
ADAPTER_TYPES = ("f32", "f16", "bf16")
_TYPE = re.compile(r"[a-z0-9_]+")  # it becomes a part of the file's name
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~!&$])")


@dataclass(frozen=True)
class WrittenExport:
    """What an export made, for a person and for a program."""

    lines: tuple[str, ...]
    facts: Mapping[str, Any]


def to_gguf(model: Path, folder: Path, kind: str, quantizer: str | None) -> WrittenExport:
    """`model-TYPE.gguf`. K-quants are made by llama.cpp's own llama-quantize from a BF16 file."""
    file, facts = folder / f"model-{kind}.gguf", {}

    def build(aside: Path) -> None:
        facts.update(_write_model(model, aside / file.name, kind, quantizer))
        _carry_lock(model, aside)

    build_new(folder, build)
    lines = [f"written: {file}", *_placeless(facts)]
    return WrittenExport((*lines, "serve it:", f"  llama-server -m {shown_path(file)} --jinja"), facts)


def to_gguf_adapter(source: Exported, folder: Path, kind: str) -> WrittenExport:
    """`adapter-TYPE.gguf`, and the template that the run was trained under, which the base's file need not have."""
    file, facts = folder / f"adapter-{kind}.gguf", {}

    def build(aside: Path) -> None:
        facts.update(write_adapter(source.adapters[0], source.base, aside / file.name, kind))
        source.copy_speech(aside, ("chat_template.jinja", "format.lock"))

    build_new(folder, build)
    command = f"llama-server -m BASE.gguf --lora {shown_path(file)} --jinja"
    if (folder / "chat_template.jinja").is_file():
        command += f" --chat-template-file {shown_path(folder / 'chat_template.jinja')}"
    return WrittenExport((f"written: {file}", "serve it over its base's GGUF:", f"  {command}"), facts)


def to_ollama(model: Path, folder: Path, kind: str, quantizer: str | None) -> WrittenExport:
    """The same file, and a Modelfile."""
    fmt = ChatFormat(models.load_tokenizer(model))
    wording, lost = ollama.find_wording(fmt)
    shape, _ = read_shape(model)
    file, facts = f"model-{kind}.gguf", {}
    text = ollama.modelfile(
        wording,
        file,
        recommended_sampling(model),
        [fmt.tokenizer.decode([token]) for token in fmt.stop_token_ids],
        shape["max_position_embeddings"],
    )

    def build(aside: Path) -> None:
        facts.update(_write_model(model, aside / file, kind, quantizer))
        (aside / "Modelfile").write_text(text, encoding="utf-8")
        _carry_lock(model, aside)

    build_new(folder, build)
    lines = [f"written: {folder / file}, {folder / 'Modelfile'}", *_placeless(facts)]
    lines += [f"not carried by Ollama's template: {what}" for what in lost]
    made = f"ollama create {ollama.model_name(shown_name(model))} -f {shown_path(folder / 'Modelfile')}"
    return WrittenExport((*lines, "serve it:", f"  {made}"), {**facts, "not_carried": lost})


def check_adapter_type(kind: str) -> str:
    """As `check_type`, of an adapter."""
    if kind.lower() not in ADAPTER_TYPES:
        raise OptionError(f"--type {kind}: expected {', '.join(ADAPTER_TYPES)} with --adapter_only")
    return kind.lower()


def check_type(kind: str, quantizer: str | None) -> str:
    """The type in small letters. OptionError for one that cannot be made."""
    kind = kind.lower()
    if not _TYPE.fullmatch(kind):
        raise OptionError(f"--type {printable(kind)}: no name of a type; expected one such as q8_0")
    if kind not in FILE_TYPES and quantizer is None:
        raise OptionError(
            f"--type {kind}: expected {', '.join(FILE_TYPES)}; any other is made by llama.cpp's llama-quantize: give"
            " its path with --llama_quantize"
        )
    if quantizer is not None and shutil.which(quantizer) is None:
        raise OptionError(
            f"--llama_quantize {quantizer}: no program there; give the path of llama.cpp's llama-quantize"
        )
    return kind


def _write_model(model: Path, file: Path, kind: str, quantizer: str | None) -> dict[str, Any]:
    """The file, by way of BF16 where llama-quantize makes its type; what `write_gguf` says of it."""
    if kind in FILE_TYPES:
        return write_gguf(model, file, kind)
    first = file.with_name("unquantised.gguf")
    facts = write_gguf(model, first, "bf16")
    words = [str(quantizer), str(first), str(file), kind.upper()]
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise OptionError(f"--llama_quantize {quantizer}: cannot be run ({first_line(error)})") from None
    if done.returncode:
        raise OptionError(
            f"--type {kind}: llama-quantize refuses ({_closing_line(done.stdout + done.stderr)})"
        )
    if not file.is_file():
        raise OptionError(
            f"--llama_quantize {quantizer}: ended without a file; give the path of llama.cpp's llama-quantize"
        )
    first.unlink()
    return {**facts, "type": kind}


def _placeless(facts: Mapping[str, Any]) -> list[str]:
    lost = facts["left_out"]
    if not lost:
        return []
    return [f"left out, as llama.cpp's text model has no place for it: {len(lost)} tensors, {lost[0]} first"]


def to_elsewhere(
    to: str, source: Exported, model: Path, folder: Path, kind: str, python: str, paths: Sequence[str]
) -> WrittenExport:
    """OpenVINO, GPTQ or compressed tensors, by their own libraries; perplexity before and after on the run's data."""
    models.check_unquantised(model)
    data = source.sequences(source.chat_format(models.load_tokenizer(model)), paths, _MEASURED)
    facts = elsewhere.write_elsewhere(to, model, folder, kind, python, data)
    told = (
        f"perplexity on {facts['held_out_tokens']:,} tokens of the run's data: {facts['perplexity_before']} before,"
        f" {facts['perplexity_after']} after"
    )
    if not facts["held_out_tokens"]:
        told = "perplexity not measured: the half of the data that measures has no reply; give more with -d"
    return WrittenExport((f"written: {folder}", told), facts)


def to_vllm(model: Path, folder: Path) -> WrittenExport:
    """`serve.sh` with the parsers that the model's dialect needs, and the template that it was trained under."""
    name = shown_name(model)
    found = vllm.command(
        model,
        name="model",
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
    words = ["vllm", "serve", str(model.absolute()), f"--served-model-name={name}"]
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
        (aside / "serve.sh").write_text(script, encoding="utf-8", errors="surrogateescape")
        _carry_lock(model, aside)

    build_new(folder, build)
    return WrittenExport(
        (f"written: {folder / 'serve.sh'}", "serve it:", f"  sh {shown_path(folder / 'serve.sh')}"),
        {"command": words},
    )


def to_hub(model: Path, source: Exported, folder: Path) -> WrittenExport:
    """The model's files with a README.md that tells what its run did; nothing is sent."""
    model_tensors(model)  # they are all there, and whole

    def build(aside: Path) -> None:
        for path in model.iterdir():
            if path.is_file() and path.suffix in _OF_A_MODEL and path.name not in _OF_THIS_MACHINE:
                shutil.copyfile(path, aside / path.name)
        (aside / "README.md").write_text(_card(source), encoding="utf-8", errors="replace")

    build_new(folder, build)
    upload = f"hf upload USER/NAME {shown_path(folder)}"
    return WrittenExport(
        (f"written: {folder}", "read README.md, then send it:", f"  {upload}"), {"upload": upload}
    )


def _card(source: Exported) -> str:
    """Facts of run.json, and nothing that it does not say."""
    run, options = source.run, source.options
    base = options.get("model") or run.get("model") or (str(source.base) if source.adapters else None)
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if models.HUB_NAME.fullmatch(str(base)) and not str(base).startswith("."):
        lines.append(f"base_model: {base}")
    lines += ["---", "", f"# {_shown(shown_name(source.folder))}", ""]
    lines += [f"Tuned from {_shown(Path(str(base)).name)}.", ""] if base else []
    data, evaluation = source.part("data"), source.part("evaluation")
    facts = {
        "method": run.get("method"),
        "steps": run.get("steps"),
        "conversations": data.get("conversations"),
        "tokens": run.get("tokens"),
        "learning rate": options.get("learning_rate"),
        "loss of the last step": source.part("losses").get("last"),
        **{key.removeprefix("eval_") + " on held-out data": value for key, value in evaluation.items()},
    }
    known = {key: value for key, value in facts.items() if value is not None}
    lines += [
        "| | |",
        "| --- | --- |",
        *(f"| {_shown(key)} | {_shown(value)} |" for key, value in known.items()),
    ]
    return "\n".join(lines) + "\n"


def _shown(value: object) -> str:
    """A name or a number as one line of Markdown that says just that."""
    return _MARKDOWN.sub(r"\\\1", printable(" ".join(str(value).split()), 200))


def _carry_lock(model: Path, folder: Path) -> None:
    if (model / "format.lock").is_file():
        shutil.copyfile(model / "format.lock", folder / "format.lock")


def _closing_line(text: str) -> str:
    return first_line(ValueError((text.strip().splitlines() or ["no word"])[-1]))
