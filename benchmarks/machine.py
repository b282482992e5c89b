"""Where and with what a result was measured: every file in `benchmarks/results/` says so in the same words."""

import ctypes
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qwen_chat.console import rank_zero

READ = 4 * 2**30  # bytes that are read to learn the memory's bandwidth


def where(packages: Iterable[str], pinned: Iterable[str] = ()) -> dict[str, Any]:
    """Blocks `machine`, `versions`, `command`, `date`. `packages`: of this environment; `pinned`: a peer's."""
    versions = {name: importlib.metadata.version(name) for name in packages}
    theirs = {name.partition("[")[0]: version for name, version in (pin.split("==") for pin in pinned)}
    return {
        "machine": {"cpu": cpu(), "cores": len(os.sched_getaffinity(0)), "memory_gib": memory_gib()},
        "versions": {"python": platform.python_version(), **versions, **theirs},
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": time.strftime("%F"),
    }


def merged(path: Path, result: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The record at `path` with this result in it: a row takes the place of one that has the same `keys`.

    A record is of one machine and one set of versions: made with others, the old one is left behind whole.
    """
    if not path.is_file():
        return result
    record = json.loads(path.read_text(encoding="utf-8"))
    if any(record.get(name) != result[name] for name in ("machine", "versions")):
        return result
    done = {tuple(row[key] for key in keys) for row in result["rows"]}
    kept = [row for row in record["rows"] if tuple(row[key] for key in keys) not in done]
    return {**record, **result, "rows": kept + result["rows"]}


def write(path: Path, result: dict[str, Any]) -> None:
    """A result as a file of `benchmarks/results/`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    rank_zero(f"wrote {path}")


def record_ratios(
    path: Path, rows: list[dict[str, Any]], packages: Iterable[str], *, only: str
) -> dict[str, Any]:
    """Write rows that each have a `ratio` by their `run`, with the `worst` of all; `only` some: into the record."""
    result: dict[str, Any] = {"rows": rows, **where(packages)}
    if only:
        result = merged(path, result, ("run",))
    result["worst"] = round(max(abs(row["ratio"] - 1) for row in result["rows"]), 3)
    write(path, result)
    return result


def cpu() -> str:
    """The processor, as Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in lines if "model name" in line), platform.machine()
    )


def memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def bandwidth() -> float:
    """GB/s that two threads read from memory: 4 GiB, the best of 5."""
    import numpy as np

    data = np.full(READ, 1, np.uint8)
    search = ctypes.CDLL(None).memchr  # of a byte that is not there: it only reads, in vectors
    search.argtypes, search.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), ctypes.c_void_p
    best = float("inf")
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            begin = time.perf_counter()
            parts = (data.ctypes.data + part * READ // 2 for part in range(2))
            list(pool.map(lambda part: search(part, 2, READ // 2), parts))
            best = min(best, time.perf_counter() - begin)
    return READ / best / 1e9
