"""The native step's code on this machine: compiled once, kept in the cache, loaded.

In: step.cpp, a C++ compiler. Out: a `Library`, or the reason why there is none: then torch computes every step.

It is compiled for the very processor that it runs on, so its folder in the cache is named after the source, the
compiler and the processor's instructions. Set QWEN_CHAT_NATIVE=0 to do without.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import threading
from ctypes import c_char_p, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qwen_chat.errors import ModelError
from qwen_chat.files import build_once, cache_dir

NATIVE_SWITCH = "QWEN_CHAT_NATIVE"
_SOURCE = Path(__file__).with_name("step.cpp")
_OPTIONS = ("-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-pthread")
_SECONDS = 300  # that a compiler may take
_SHARED_BYTES = 32 << 20  # bytes of memory from which several weights are cut


class LinearPart(ctypes.Structure):
    """Linear of step.cpp."""

    _fields_ = (
        ("outputs", c_int64),
        ("inputs", c_int64),
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("sums", c_void_p),
        ("bias", c_void_p),
        ("group", c_int64),
    )


class ThinPart(ctypes.Structure):
    """Thin of step.cpp."""

    _fields_ = (("down", LinearPart), ("up", LinearPart), ("bias", c_void_p))


class LayerPart(ctypes.Structure):
    """Layer of step.cpp."""

    _fields_ = (
        ("mixer_norm", c_void_p),
        ("heads_norm", c_void_p),
        ("feed_norm", c_void_p),
        ("window", c_int64),
        ("inputs", LinearPart),
        ("output", LinearPart),
        ("gate_up", LinearPart),
        ("down", LinearPart),
    )


class ModelPart(ctypes.Structure):
    """Model of step.cpp."""

    _fields_ = (
        ("hidden", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("rotary", c_int64),
        ("inner", c_int64),
        ("layer_count", c_int64),
        ("vocabulary", c_int64),
        ("eps", c_float),
        ("levels", c_int32),
        ("zero", c_int32),
        ("layers", ctypes.POINTER(LayerPart)),
        ("norm", c_void_p),
        ("head", LinearPart),
    )


class SegmentPart(ctypes.Structure):
    """Segment of step.cpp."""

    _fields_ = (
        ("start", c_int64),
        ("count", c_int64),
        ("kv", c_void_p),
        ("stride", c_int64),
        ("capacity", c_int64),
    )


class GroupPart(ctypes.Structure):
    """Group of step.cpp."""

    _fields_ = (("begin", c_int64), ("end", c_int64), ("thin", ctypes.POINTER(ThinPart)))


class BatchPart(ctypes.Structure):
    """Batch of step.cpp."""

    _fields_ = (
        ("tokens", c_int64),
        ("segment_count", c_int64),
        ("group_count", c_int64),
        ("wanted_count", c_int64),
        ("x", c_void_p),
        ("wanted", c_void_p),
        ("segments", ctypes.POINTER(SegmentPart)),
        ("groups", ctypes.POINTER(GroupPart)),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("last", c_void_p),
        ("logits", c_void_p),
        ("scratch", c_void_p),
    )


class RuntimePart(ctypes.Structure):
    """Runtime of step.cpp."""

    _fields_ = (("parallel", c_void_p), ("count", c_void_p))


@dataclass(frozen=True)
class Library:
    """The loaded code. `panel`: outputs that lie together in a weight; `runtime`: torch's threads, where they can be
    shared; `name`: what was made of it, for people."""

    functions: ctypes.CDLL
    panel: int
    runtime: RuntimePart | None
    name: str
    _pieces: list[torch.Tensor] = field(default_factory=list)  # what is left of the last

    def call(self, function: str, *arguments: Any) -> int:
        """A function of step.cpp, with pointers and numbers as its argument types tell."""
        found: int = getattr(self.functions, function)(*arguments)
        return found

    def room(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory for a weight, in large pages where the system has them: a step looks up each page of all weights.
        A small weight is cut from a piece that it shares with others, and keeps it."""
        size = rows * columns * dtype.itemsize
        if size > _SHARED_BYTES // 4:
            found = self._memory(size)
        else:
            left = self._pieces.pop() if self._pieces else torch.empty(0, dtype=torch.uint8)
            left = left if size <= len(left) else self._memory(_SHARED_BYTES)
            found, rest = left[:size], left[-(-size // 64) * 64 :]
            self._pieces.append(rest)
        return found.view(dtype).view(rows, columns)

    def _memory(self, count: int) -> torch.Tensor:
        made = torch.empty(count, dtype=torch.uint8)
        self.call("native_large_pages", made.data_ptr(), count)
        return made

    @property
    def levels(self) -> int:
        """Steps each side of an int8 activation: without VNNI two products of 7 and 8 bits fit the 16 bits that they
        are summed in."""
        return 127 if "VNNI" in self.name else 63

    @property
    def threads(self) -> tuple[int, object]:
        """How many threads a call gets, and whose."""
        return torch.get_num_threads(), None if self.runtime is None else ctypes.byref(self.runtime)


def compile_ahead() -> None:
    """Begin to compile, where that was not done yet, while the caller reads a model."""
    threading.Thread(target=native_library, name="native", daemon=True).start()


def native_library() -> Library | str:
    """The library, or why there is none; made at the first call, which others wait for."""
    if os.environ.get(NATIVE_SWITCH) == "0":
        return f"{NATIVE_SWITCH}=0"
    with _MAKING:
        return _made()


_MAKING = threading.Lock()


@functools.cache
def _made() -> Library | str:
    try:
        instructions = _instructions()
        if not {"avx2", "fma"} <= set(instructions):
            return "this CPU has no AVX2"
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
        if compiler is None:
            return "no C++ compiler was found (g++, c++, $CXX)"
        known = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=_SECONDS)
        version = known.stdout.partition("\n")[0].strip()
        key = "\0".join((_SOURCE.read_text(encoding="utf-8"), version, *_OPTIONS, *instructions))
        folder = cache_dir() / f"native-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        build_once(folder, functools.partial(_compile, compiler))
        return _load(folder / "step.so", version)
    except subprocess.TimeoutExpired:
        return f"the C++ compiler took more than {_SECONDS} seconds"
    except (ModelError, OSError, AttributeError) as error:
        return str(error)


def _instructions() -> list[str]:
    """The processor's name and flags, sorted."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    found = {name.strip(): value for name, _, value in (line.partition(":") for line in reversed(lines))}
    return [found.get("model name", "").strip(), *sorted(found.get("flags", "").split())]


def _compile(compiler: str, folder: Path) -> None:
    """step.so in `folder`. Raises ModelError with the compiler's first line."""
    command = [compiler, *_OPTIONS, "-o", str(folder / "step.so"), str(_SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), f"exit {done.returncode}")
        raise ModelError(f"{compiler} failed: {said.strip()[:200]}")


def _load(path: Path, version: str) -> Library:
    functions = ctypes.CDLL(str(path))
    pointer, number, whole = c_void_p, c_int64, c_int32
    for name, result, arguments in (
        ("native_panel", number, ()),
        ("native_instructions", c_char_p, ()),
        ("native_large_pages", None, (pointer, number)),
        ("native_pack_int8", None, (pointer, whole, number, number, *[pointer] * 3)),
        ("native_pack_int4", None, (pointer, pointer, number, number, number, pointer)),
        ("native_pack_float", None, (pointer, whole, number, number, pointer)),
        ("native_linear", None, (*[pointer, whole, whole, pointer, number], *[pointer] * 3, whole, pointer)),
        ("native_scratch", number, (pointer, number, number, number)),
        ("native_step", None, (pointer, pointer, number, number, whole, pointer)),
    ):
        function = getattr(functions, name)
        function.restype, function.argtypes = result, arguments
    runtime = None
    try:  # torch's own OpenMP, loaded before: its threads and ours would take each other's cores
        openmp = ctypes.CDLL("libgomp.so.1")
        parallel, count = (
            ctypes.cast(getattr(openmp, n), c_void_p) for n in ("GOMP_parallel", "omp_get_num_threads")
        )
        runtime = RuntimePart(parallel, count)
    except (OSError, AttributeError):
        pass
    instructions = functions.native_instructions().decode()
    return Library(functions, functions.native_panel(), runtime, f"{instructions}; {version}")
