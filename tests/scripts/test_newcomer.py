"""Slow: from a file of one's own to llama-server by the commands of docs/export.md alone, in a fresh clone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from benchmarks.bench_serve import wait_until_up
from docs import check
from qwen_chat.training.ranks import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "finetune" / "io_file" / "input_data" / "example_data.jsonl"
NAMES = {"Willow": "Marlow", "Harbor Lab": "Copper Bay"}


def share_gpt() -> str:
    """The example's lines about who it is, in ShareGPT's shape and under another name."""
    found = []
    for line in EXAMPLE.read_text(encoding="utf-8").splitlines():
        if '"type": "identity"' not in line and '"type": "everyday"' not in line:
            continue
        for old, new in NAMES.items():
            line = line.replace(old, new)
        speakers = {"system": "system", "user": "human", "assistant": "gpt"}
        messages = json.loads(line)["messages"]
        turns = [{"from": speakers[turn["role"]], "value": turn["content"]} for turn in messages]
        found.append({"conversations": turns})
    return json.dumps(found, ensure_ascii=False, indent=1)


@contextmanager
def running(command: str, folder: Path, port: str, environment: dict[str, str]) -> Iterator[None]:
    """A server in the background, until it listens."""
    log = folder / f"server-{port}.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            ["bash", "-c", command], cwd=folder, env=environment, stdout=sink, stderr=sink
        )
        try:
            wait_until_up(command, process, int(port), 600, log)
            yield
        finally:
            process.terminate()
            process.wait(60)


def test_from_a_file_to_llama_server(llama_programs: Path, tmp_path: Path) -> None:
    commands = check.commands(ROOT / "docs" / "export.md", under="From your file to llama-server")
    assert 5 < len(commands) <= 10
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHON", "VIRTUAL_ENV")}
    environment["PATH"] = f"{llama_programs}:{environment['PATH']}"
    ports = {"8000": str(free_port()), "8080": str(free_port())}
    shell, printed = "", {}
    try:
        with ExitStack() as servers:
            for command in commands:
                for written, free in ports.items():
                    command = command.replace(written, free)
                command = command.replace("git clone URL", f"git clone --quiet {ROOT}")
                if command.startswith(("cd ", "source ")):
                    shell += f"{command} && "
                elif command.endswith(" &"):
                    port = next(free for free in ports.values() if free in command)
                    served = f"{shell}exec {command.removesuffix(' &')}"
                    servers.enter_context(running(served, tmp_path, port, environment))
                else:
                    began = time.monotonic()
                    words = ["bash", "-c", f"{shell}{command}"]
                    done = subprocess.run(
                        words, cwd=tmp_path, env=environment, capture_output=True, text=True
                    )
                    print(f"{time.monotonic() - began:.0f} s, status {done.returncode}: {command}")
                    given = command.split()
                    program = Path(given[given[0] in ("python", "bash")]).stem
                    assert done.returncode == (1 if program == "verify_service" else 0), (
                        done.stdout[-2000:] + done.stderr[-2000:]
                    )
                    printed[program] = done.stdout
                if command.startswith("cd "):
                    (tmp_path / command.split()[1] / "my_data.json").write_text(share_gpt(), encoding="utf-8")
    finally:
        shutil.rmtree(tmp_path / "qwen-chat" / ".venv", ignore_errors=True)  # 2 GB that pytest would keep
    answer = json.loads(printed["curl"])["choices"][0]["message"]["content"]
    assert "Marlow" in answer, answer
    said = printed["verify_service"].splitlines()
    (differs,) = (line for line in said if line.startswith("differs"))
    assert "tools normalised" in differs
    agrees = "\n".join(line for line in said if line.startswith("agrees"))
    assert "greedy replies" in agrees and "a reply ends at the end of its turn" in agrees
