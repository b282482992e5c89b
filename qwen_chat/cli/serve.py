"""Serve a model over HTTP, in OpenAI's protocol.

    qwen-chat serve
    qwen-chat serve -m Qwen/Qwen2-7B-Instruct --adapter mine=DIR --port 8000

In: a model (a folder, a hub name, or nothing: the demo model, or what an adapter names), adapters.
Out: POST /v1/chat/completions and its siblings (docs/service.md) until Ctrl-C or SIGTERM; one JSON line a
request in fast_api_svc.log. `--engine vllm` hands the process over to vLLM. Without a key it
answers this machine only.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qwen_chat import hardware, place
from qwen_chat.errors import FormatError, ModelError, OptionError
from qwen_chat.flags import parser
from qwen_chat.flags.parser import option

if TYPE_CHECKING:
    from qwen_chat.inference.engine import Engine


@dataclass(frozen=True)
class ServeModelArguments:
    """Model"""

    model: str | None = option(
        None,
        "local folder or hub name; without it the adapter's base, or the demo model",
        "-m",
        "--model_name_or_path",
    )
    adapter: tuple[str, ...] = option(
        (),
        "a LoRA adapter: NAME=DIR, asked for by NAME, or DIR, named after the folder; several: repeat it",
        appends=True,
    )
    name: str | None = option(None, "what clients call the model; the folder's or hub's name without it")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "number type; float32 on a CPU")
    quantize: Literal["int8", "int4"] | None = option(
        None, "weights on a CPU: int8 is smaller and faster, int4 smallest; each a little less exact"
    )
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = option(
        "auto", "where it computes; auto: an accelerator where one is"
    )
    trust_remote_code: bool = option(False, "run Python code that comes with the model")


@dataclass(frozen=True)
class ServiceArguments:
    """Service"""

    host: str = option("127.0.0.1", "address to listen on; other than this machine's own needs a key")
    port: int = option(8000, "port; 0 takes a free one")
    api_key: tuple[str, ...] = option(
        (), "a key that clients must send; several: repeat it; also API_KEY (a,b)", appends=True
    )
    api_key_file: str | None = option(None, "a file with one key a line")
    allow_without_key: bool = option(False, "listen on any address without a key")
    cors_origin: tuple[str, ...] = option((), "origins whose web pages may ask (https://example.org)")
    log_file: str | None = option(None, "one JSON line a request; fast_api_svc.log without it")
    log_prompts: bool = option(False, "write prompts and answers into the log too")


@dataclass(frozen=True)
class LimitArguments:
    """Limits"""

    max_batch: int = option(32, "requests that are computed at once")
    max_queue: int = option(64, "requests that may wait; beyond them 429 with Retry-After")
    cache_tokens: int = option(16_384, "tokens of prompts kept for the next that begins alike; 0: none")
    max_body_mb: float = option(4.0, "largest request body, in MiB")
    request_seconds: float = option(600.0, "longest time for one request")
    drain_seconds: int = option(30, "seconds that running requests may take to finish after SIGTERM")


@dataclass(frozen=True)
class VllmArguments:
    """Engine"""

    engine: Literal["auto", "transformers", "vllm"] = option(
        "auto",
        "transformers: the toolkit's own; vllm: hand over to vLLM; auto: vLLM on a GPU where it is installed",
    )
    compile: bool = option(False, "fewer kernels a step through torch.compile (accelerators only)")
    tensor_parallel_size: int = option(1, "vLLM: GPUs that share each layer")
    pipeline_parallel_size: int = option(1, "vLLM: groups of layers on different GPUs")
    vllm_python: str | None = option(None, "vLLM: the Python that has it installed; this one without it")
    vllm_args: str = option("", 'vLLM: further flags in one string: --vllm_args="--max-model-len 4096"')
    dry_run: bool = option(False, "vLLM: print the command and stop")


@dataclass(frozen=True)
class Asked:
    """What the words came to, before anything is loaded."""

    model: ServeModelArguments
    service: ServiceArguments
    limits: LimitArguments
    vllm: VllmArguments
    base: str | None
    adapters: dict[str, Path]
    keys: tuple[str, ...]


def main(argv: Sequence[str], about: str = str(__doc__)) -> int:
    groups = [ServeModelArguments, ServiceArguments, LimitArguments, VllmArguments]
    values = parser.read(argv, groups, about=about)
    model, service = values[ServeModelArguments], values[ServiceArguments]
    limits, vllm = values[LimitArguments], values[VllmArguments]
    device = hardware.choose_device(model.device)  # refused before anything is loaded
    engine, why = choose_engine(model, service, limits, vllm, device)
    check_engine(model, service, limits, vllm, engine)
    if vllm.compile and device.kind == "cpu":
        raise OptionError(
            f"--compile: for accelerators, and this is {device}, whose layers are packed; leave it out"
        )
    adapters = read_adapters(model.adapter)
    if model.name in adapters:
        raise OptionError(f"--name {model.name}: an adapter has this name; choose another")
    keys = read_keys(service)
    check_address(service, keys)
    base = find_base(model.model, list(adapters.values()))
    asked = Asked(model, service, limits, vllm, base, adapters, keys)
    if engine == "vllm":
        try:
            if vllm.engine == "auto":
                check_beside(adapters)
            return hand_over(asked, why)
        except (OptionError, FormatError) as error:
            if vllm.engine == "vllm" or given(vllm, VLLMS):
                raise
            why = f"vLLM is installed, but: {error}"
    return serve_here(asked, why)


def serve_here(asked: Asked, why: str) -> int:
    """Serve with the toolkit's own engine until a signal."""
    from qwen_chat.service import server
    from qwen_chat.service.request_log import RequestLog

    model, service, limits, adapters = asked.model, asked.service, asked.limits, asked.adapters
    faulthandler.enable()  # a crash in native code tells on standard error where it was
    listener = server.bind(service.host, service.port)  # a port in use is told before a model is loaded
    log = RequestLog(Path(service.log_file or place.LOG_FOLDER / "fast_api_svc.log"))

    from qwen_chat import families, models

    folder = models.resolve(asked.base)
    families.check_served(models.read_config(folder), folder / "config.json")  # before torch comes in

    from qwen_chat.service.app import create_app
    from qwen_chat.service.prepare import SamplingDefaults, recommended_sampling
    from qwen_chat.service.self_check import check_formats
    from qwen_chat.service.settings import ServiceSettings

    engine, name = start_engine(asked, folder)
    compiled = (engine.decoder.compile(),) if asked.vllm.compile else ()
    settings = ServiceSettings(
        model_name=name,
        sampling=recommended_sampling(folder),
        max_queue=limits.max_queue,
        max_body_bytes=int(limits.max_body_mb * 2**20),
        request_seconds=limits.request_seconds,
        log_prompts=service.log_prompts,
    )
    hosts, origins = allowed_hosts(service, asked.keys), service.cors_origin
    app = create_app(
        engine, settings=settings, api_keys=asked.keys, log=log, hosts=hosts, cors_origins=origins
    )
    host, port = shown_host(service.host), listener.getsockname()[1]
    sampling = f"{settings.sampling} (the model's generation_config.json; a request's own values win)"
    asks_for = name if engine.serves_base else next(iter(adapters))
    for line in (
        f"model {name} ({folder})" + ("" if engine.serves_base else ": not served itself"),
        f"engine transformers ({why})",
        *engine.decisions,
        *compiled,
        *(f"adapter {known} ({adapters[known]})" for known in adapters),
        *system_lines(engine, name, adapters),
        *check_formats(engine, folder, adapters),
        *([f"weights {model.quantize} (as asked)"] if model.quantize else []),
        *([f"sampling {sampling}"] if settings.sampling != SamplingDefaults() else []),
        f"log {log.path}",
        f"listening on http://{host}:{port} (Ctrl-C ends it); try:",
        example_curl(host, port, asks_for, bool(asked.keys)),
    ):
        print(line, flush=True)
    server.serve(app, listener, drain_seconds=limits.drain_seconds)
    log.close()
    return 0


def system_lines(engine: Engine, name: str, adapters: Collection[str]) -> Iterator[str]:
    """What each model that was tuned with --system gives a request without a system message."""
    from qwen_chat.chat import system_text

    for adapter in (*([None] if engine.serves_base else []), *adapters):
        if told := system_text.told(engine.format_of(adapter).system):
            yield f"{adapter or name}: {told}"


def start_engine(asked: Asked, folder: Path) -> tuple[Engine, str]:
    """The engine over the model in `folder`, and the name that clients call it."""
    from qwen_chat.inference.loading import load_engine

    model, limits, adapters = asked.model, asked.limits, asked.adapters
    name = model.name or served_name(asked.base, folder)
    if name in adapters:
        raise OptionError(
            f"--adapter {name}: the model has this name; choose another (NAME=DIR), or give --name"
        )
    engine = load_engine(
        folder,
        adapters=adapters,
        dtype=model.dtype,
        device=model.device,
        quantize=model.quantize,
        trust_remote_code=model.trust_remote_code,
        max_batch=limits.max_batch,
        cache_tokens=limits.cache_tokens,
    )
    if not engine.serves_base and model.name is not None:
        raise OptionError(f"--name {name}: the base is not served beside {', '.join(adapters)}; leave it out")
    return engine, name


def hand_over(asked: Asked, why: str) -> int:
    """Become vLLM, with the template that the model was trained under. Returns only after --dry_run."""
    import shlex

    from qwen_chat import models
    from qwen_chat.service import vllm as service_vllm

    model, service, limits, vllm = asked.model, asked.service, asked.limits, asked.vllm
    if model.quantize:
        raise OptionError(
            f"--quantize {model.quantize} is for --engine transformers; vLLM reads quantised models as they are"
        )
    folder = models.resolve(asked.base)
    command = service_vllm.command(
        folder,
        name=model.name or served_name(asked.base, folder),
        python=vllm.vllm_python or sys.executable,
        host=service.host,
        port=service.port,
        dtype=model.dtype,
        adapters=asked.adapters,
        api_keys=asked.keys,
        cors_origins=service.cors_origin,
        hosts=allowed_hosts(service, asked.keys),
        max_batch=limits.max_batch,
        max_queue=limits.max_queue,
        tensor_parallel=vllm.tensor_parallel_size,
        pipeline_parallel=vllm.pipeline_parallel_size,
        trust_remote_code=model.trust_remote_code,
        more=vllm.vllm_args,
    )
    print(f"engine vllm ({why})", file=sys.stderr, flush=True)
    if command.told:
        print(command.told, file=sys.stderr, flush=True)
    print(shlex.join(command.words), flush=True)
    if not vllm.dry_run:
        service_vllm.replace_process(command)
    return 0


OURS = (
    *("device", "compile", "cache_tokens", "max_body_mb", "request_seconds", "drain_seconds"),
    *("log_file", "log_prompts"),
)
VLLMS = ("tensor_parallel_size", "pipeline_parallel_size", "vllm_python", "vllm_args", "dry_run")


def choose_engine(
    model: ServeModelArguments,
    service: ServiceArguments,
    limits: LimitArguments,
    vllm: VllmArguments,
    device: hardware.Device,
) -> tuple[Literal["transformers", "vllm"], str]:
    """Which engine serves, and why."""
    if vllm.engine != "auto":
        return vllm.engine, "as asked"
    groups = (model, service, limits, vllm)
    if own := [name for group in groups for name in given(group, (*OURS, "quantize"))]:
        return "transformers", f"--{own[0]} is its own"
    if device.kind not in ("cuda", "xpu"):
        return "transformers", f"vLLM would be slower on {device.kind}"
    from qwen_chat.service.vllm import is_installed

    python = vllm.vllm_python or sys.executable
    if not is_installed(python):
        return "transformers", f"vLLM is not installed in {python}"
    return "vllm", f"it is installed in {python}; {device}"


def check_beside(adapters: dict[str, Path]) -> None:
    """OptionError for an adapter that no server can run beside its base, as vLLM runs them."""
    from qwen_chat.inference.lora import why_merged

    for folder in adapters.values():
        if reason := why_merged(folder):
            raise OptionError(reason)


def check_engine(
    model: ServeModelArguments,
    service: ServiceArguments,
    limits: LimitArguments,
    vllm: VllmArguments,
    engine: str,
) -> None:
    """Refuse what the chosen engine would not look at."""
    unread = given(vllm, VLLMS)
    if engine == "vllm":
        unread = [name for group in (model, service, limits, vllm) for name in given(group, OURS)]
    if unread:
        raise OptionError(f"--{unread[0]}: has no effect with --engine {engine}; leave it out")


def given(group: Any, names: Sequence[str]) -> list[str]:
    """Which of these options of a group are not as they are by default."""
    return [
        one.name for one in fields(group) if one.name in names and getattr(group, one.name) != one.default
    ]


def read_adapters(words: Sequence[str]) -> dict[str, Path]:
    """`NAME=DIR`, or `DIR` alone, which is asked for by the folder's name."""
    found: dict[str, Path] = {}
    for word in words:
        whole = Path(word).expanduser()
        name, equals, folder = word.partition("=")
        if whole.is_dir():
            name, folder = whole.resolve().name, word
        elif not equals or not name or not folder:
            raise OptionError(
                f"--adapter {word}: expected NAME=DIR or a folder that is there, such as "
                "mine=finetune/io_file/output_data/run"
            )
        if name in found or name == "default":
            raise OptionError(f"--adapter {name}: the name is taken; choose another")
        found[name] = Path(folder).expanduser()
        if not (found[name] / "adapter_config.json").is_file():
            raise ModelError(f"{folder}: no adapter_config.json in it; expected the folder of a LoRA adapter")
    return found


def find_base(model: str | None, adapters: Sequence[Path]) -> str | None:
    """The model as given, or the base that all adapters name; None is the demo model."""
    if model is not None or not adapters:
        return model
    from qwen_chat.models import adapter_base

    bases = {adapter_base(folder) for folder in adapters}
    if len(bases) > 1:
        raise OptionError(f"the adapters name different bases ({', '.join(sorted(bases))}); give one with -m")
    return bases.pop()


def read_keys(service: ServiceArguments) -> tuple[str, ...]:
    """All keys: from the flags, the environment and the file."""
    keys = [*service.api_key, *os.environ.get("API_KEY", "").split(",")]
    if service.api_key_file is not None:
        try:
            lines = Path(service.api_key_file).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise OptionError(f"--api_key_file {service.api_key_file}: cannot be read ({error})") from None
        named = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not named:
            raise OptionError(f"--api_key_file {service.api_key_file}: no key in it; write one a line")
        keys += named
    keys = [key.strip() for key in keys if key.strip()]
    if keys:
        from qwen_chat.tools.client import check_key

        for key in keys:
            check_key(key)
    return tuple(dict.fromkeys(keys))


def check_address(service: ServiceArguments, keys: Sequence[str]) -> None:
    """Without a key nobody from outside may reach the service."""
    from qwen_chat.service.server import is_loopback

    if not keys and not service.allow_without_key and not is_loopback(service.host):
        raise OptionError(
            f"--host {service.host}: everybody who reaches it could use the model; give --api_key "
            "(or API_KEY, or --api_key_file), or say --allow_without_key"
        )
    if not 0 <= service.port <= 65535:
        raise OptionError(f"--port {service.port}: expected 0 to 65535")


def allowed_hosts(service: ServiceArguments, keys: Sequence[str]) -> set[str] | None:
    """The names that the Host header may give where no key guards the service; None: any."""
    from qwen_chat.service.middleware import LOOPBACK_HOSTS

    return None if keys or service.allow_without_key else {*LOOPBACK_HOSTS, service.host}


def served_name(base: str | None, folder: Path) -> str:
    """A hub name as it is; of a folder the last part."""
    return base if base is not None and not Path(base).expanduser().exists() else folder.resolve().name


def shown_host(host: str) -> str:
    """The host as it stands in a URL that works on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def example_curl(host: str, port: int, name: str, has_key: bool) -> str:
    key = " -H 'Authorization: Bearer YOUR_KEY'" if has_key else ""
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    kind = "-H 'Content-Type: application/json'"
    return f"  curl http://{host}:{port}/v1/chat/completions{key} {kind} -d '{body}'"
