"""What HTTP costs: tokens a second of the engine alone, and through the service to clients in another process.

    python benchmarks/bench_http.py --quantize int8

In: the demo model, loaded once; replies of 64 tokens, streamed, sampled so that no draft helps. Out:
benchmarks/results/http.json, a row for each number of clients: both rates (medians of rounds that take turns in one
process) and the share of the tokens that the service, the sockets and the clients cost on the same cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout

from benchmarks.machine import merged, where, write
from qwen_chat.errors import ServiceError

RESULT = ROOT / "benchmarks" / "results" / "http.json"
TOKENS = 64


def messages(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Tell me about the sea, number {number}."}]


def ask(port: int, number: int) -> int:
    """One streamed reply, read to its end by a bare socket, a client that costs next to nothing: its tokens."""
    body = {"model": "demo", "messages": messages(number), "max_tokens": TOKENS, "temperature": 1, "top_p": 1}
    more = {"seed": number, "stream": True, "stream_options": {"include_usage": True}}
    raw = json.dumps({**body, **more}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    )
    told = b""
    with socket.create_connection(("127.0.0.1", port)) as peer:
        peer.sendall(f"{head}{len(raw)}\r\n\r\n".encode() + raw)
        while b"[DONE]" not in told:
            told += peer.recv(65536) or b"[DONE]"
    if not told.startswith(b"HTTP/1.1 200"):
        raise ServiceError(f"the service did not answer: {told.decode(errors='replace')}")
    return int(re.findall(rb'"completion_tokens": ?(\d+)', told)[-1])


def clients(port: int, count: int, orders: Connection) -> None:
    """A process: at each order `count` requests at once; says their tokens a second."""
    with ThreadPoolExecutor(count) as pool:
        while orders.recv():
            begin = time.perf_counter()
            tokens = sum(pool.map(partial(ask, port), range(count)))
            orders.send(tokens / (time.perf_counter() - begin))


def measure(engine: Any, port: int, count: int, rounds: int) -> dict[str, float]:
    from qwen_chat.inference.sampling import GenerationRequest

    prompts = [engine.fmt.prompt_ids(messages(number)) for number in range(count)]
    asked = [
        GenerationRequest(ids, max_tokens=TOKENS, temperature=1, seed=number)
        for number, ids in enumerate(prompts)
    ]
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=clients, args=(port, count, theirs), daemon=True)
    process.start()
    theirs.close()  # where the process fails, `recv` below does not wait for ever
    alone, served = [], []
    for _ in range(rounds + 1):  # the first pays for what is made lazily
        begin = time.perf_counter()
        tokens = sum(len(done.token_ids) for done in engine.generate(asked))
        alone.append(tokens / (time.perf_counter() - begin))
        ours.send(True)
        served.append(ours.recv())
    ours.send(False)
    process.join()
    engine_rate, served_rate = statistics.median(alone[1:]), statistics.median(served[1:])
    return {
        "engine_tokens_per_s": round(engine_rate, 1),
        "served_tokens_per_s": round(served_rate, 1),
        "share": round(1 - served_rate / engine_rate, 3),
    }


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quantize", choices=("int8", "int4"), help="whole numbers instead of float32")
    parser.add_argument("--clients", default=[1, 8], type=int, nargs="+", help="requests at once [1 8]")
    parser.add_argument("--rounds", default=7, type=int, help="[7]")
    options = parser.parse_args(words)

    from qwen_chat import demo_model
    from qwen_chat.inference.loading import load_engine
    from qwen_chat.service.app import create_app
    from qwen_chat.service.settings import ServiceSettings
    from tests.support.scripted import LiveService

    kind = options.quantize or "float32"
    rows = []
    with load_engine(demo_model.ensure(), quantize=options.quantize) as engine:
        app = create_app(engine, settings=ServiceSettings(model_name="demo"))
        with LiveService(app) as live:
            for count in options.clients:
                found = measure(engine, live.port, count, options.rounds)
                rows.append({"number_type": kind, "clients": count, **found})
                print(json.dumps(rows[-1]), flush=True)
    write(RESULT, merged(RESULT, {"rows": rows, **where(("torch",))}, ("number_type", "clients")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
