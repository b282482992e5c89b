"""What this machine has: cores, free memory, accelerators and what those can. Standard library only.

In: what the system tells (/proc, /sys, nvidia-smi) and the variables that a container or a launcher sets. Out: plain
numbers; None where nobody can say. torch is not imported: before it is loaded device files answer, and once it
is loaded its own word counts, so what was planned is what runs.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwen_chat.errors import OptionError

MIB = 2**20
# A test puts a machine of its own here.
ROOT = Path("/")
GPU_FILES = ("dev/nvidiactl", "dev/nvidia0", "dev/kfd")
# Windows' own driver, seen from WSL2: both must be there.
WSL_FILES = ("dev/dxg", "usr/lib/wsl/lib/libcuda.so.1")


def _loaded_torch() -> Any:
    """torch, where it is loaded already."""
    torch = sys.modules.get("torch")
    return torch if hasattr(torch, "cuda") else None  # without: it is being imported just now


def cores() -> int:
    """Cores that this process may use. macOS cannot say which, only how many there are."""
    affinity = getattr(os, "sched_getaffinity", None)
    return (os.cpu_count() or 1) if affinity is None else len(affinity(0))


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX-512 BF16 or AMX)."""
    flags = _text("proc/cpuinfo") or ""
    return "amx_bf16" in flags or "avx512_bf16" in flags


def cpu_sums_bytes() -> bool:
    """Whether this CPU sums products of bytes in 32 bits (VNNI or AMX)."""
    flags = _text("proc/cpuinfo") or ""
    return any(name in flags for name in ("avx512_vnni", "avx_vnni", "amx_int8"))


def cpu_has_tiles() -> bool:
    """Whether this CPU multiplies whole tiles of bytes (AMX)."""
    return "amx_int8" in (_text("proc/cpuinfo") or "")


def _text(path: str) -> str | None:
    try:
        return (ROOT / path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _number(path: str) -> int | None:
    text = (_text(path) or "").strip()
    return int(text) if text.isdecimal() else None  # "max": no limit


# -------------------------------------------------------------------------------------------- accelerators


AskedDevice = Literal["auto", "cpu", "cuda", "mps", "xpu"]


@dataclass(frozen=True, slots=True)
class Device:
    """Where a model computes, by torch's name (`cuda` is ROCm's too), and why there; as text the line that says so."""

    kind: str
    reason: str

    def __str__(self) -> str:
        return f"device {self.kind} ({self.reason})"


def choose_device(asked: AskedDevice = "auto") -> Device:
    """The one decision: what was asked for, else the accelerator that is there, else the CPU.

    Raises OptionError for a device that is not there. Exact once torch is loaded; before, as the machine's files
    tell.
    """
    if asked == "cpu":
        return Device("cpu", "as asked")
    there = accelerators()
    if asked == "auto":
        return Device(there[0], accelerator_name(there[0])) if there else Device("cpu", _why_none())
    if asked not in there:
        raise OptionError(
            f"--device {asked}: not there ({_why_none()}); here is {', '.join([*there, 'cpu'])}: give one of these,"
            " or leave it out"
        )
    return Device(asked, f"{accelerator_name(asked)}, as asked")


def training_device(asked: AskedDevice = "auto", *, use_cpu: bool = False) -> Device:
    """The same for training, which has not been tried on MPS and goes to the CPU there. use_cpu: --use_cpu True."""
    if use_cpu:
        return Device("cpu", "as asked: --use_cpu True")
    if asked == "mps":
        raise OptionError(
            "--device mps: training has not been tried on it; leave it out: the CPU is used here"
        )
    device = choose_device(asked)
    if device.kind == "mps":
        return Device("cpu", f"training has not been tried on mps, which is there: {device.reason}")
    return device


def accelerators() -> tuple[str, ...]:
    """The accelerators that can be used, by torch's names, best first. A CPU build of torch has none.

    Nothing here starts CUDA: a process that has cannot fork workers, and each rank would hold memory of the first GPU.
    """
    torch = _loaded_torch()
    if torch is None:
        build, hidden = _torch_build(), os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        found = {
            "cuda": bool(_gpu_file()) and not hidden and not re.search(r"^$|\+(cpu|xpu)", build),
            "xpu": "+xpu" in build and (ROOT / "dev/dri").exists(),
            "mps": sys.platform == "darwin" and os.uname().machine == "arm64" and bool(build),
        }
    else:
        modules = {kind: getattr(torch, kind, None) for kind in ("cuda", "xpu")}
        modules["mps"] = getattr(getattr(torch, "backends", None), "mps", None)
        found = {kind: module is not None and module.is_available() for kind, module in modules.items()}
    return tuple(kind for kind, there in found.items() if there)


def gpus() -> int:
    """NVIDIA's GPUs that this process may use."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        return 0 if shown.strip() in ("", "-1") else len([word for word in shown.split(",") if word.strip()])
    return len(_nvidia_smi("index") or [])


def accelerator_name(kind: str) -> str:
    """What an accelerator is, for a person: its name and memory, where somebody tells."""
    rows = _nvidia_smi("name,memory.total") if kind == "cuda" else None
    names = {f"{name}, {float(size) / 1024:.0f} GiB" for name, size in rows or [] if _is_decimal(size)}
    return " or ".join(sorted(names)) or {"xpu": "Intel's GPU", "mps": "Apple's GPU"}.get(
        kind, "a GPU is here"
    )


def _gpu_file() -> str:
    """The first device file of a GPU; "" where there is none."""
    if all((ROOT / file).exists() for file in WSL_FILES):
        return WSL_FILES[0]
    return next((file for file in GPU_FILES if (ROOT / file).exists()), "")


def _torch_build() -> str:
    """torch's version, its build included ("2.13.0+cpu"); "" where it is not installed."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _why_none() -> str:
    """Why no accelerator is used; where one is there all the same, what is in its way."""
    file, hidden = _gpu_file(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if not file:
        return "no accelerator here"
    if hidden in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={hidden} hides the GPU of /{file}"
    if "+cpu" in _torch_build():
        return (
            f"/{file} is there, but torch {_torch_build()} is a CPU build: install torch's build for this GPU"
        )
    return f"/{file} is there, but torch {_torch_build()} finds no GPU: see its driver, or install a build for it"


def has_accelerator() -> bool:
    """Whether an accelerator may be there that training would use: never MPS."""
    return any(kind != "mps" for kind in accelerators())


def gpu_has_bf16() -> bool:
    """Whether the accelerator multiplies bfloat16: compute capability 8.0 or more. Yes where nobody can say."""
    torch = _loaded_torch()
    if torch and torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if any(kind != "cuda" for kind in accelerators()):
        return True
    capabilities = [float(cells[0]) for cells in _nvidia_smi("compute_cap") or [] if _is_decimal(cells[0])]
    return min(capabilities, default=8.0) >= 8.0


@dataclass(frozen=True, slots=True)
class _Gpu:
    number: str
    uuid: str
    kind: str
    free: int | None  # bytes


def gpu_free(ranks_here: int) -> tuple[int | None, str]:
    """Free bytes of the fullest GPU that this machine's ranks use, and which that is.

    None where nobody can say, with the reason. Ranks use the GPUs that CUDA shows them in CUDA's order, one each.
    """
    gpus = []  # all of the machine as nvidia-smi counts them, by PCI bus
    for number, uuid, kind, free, parts in _nvidia_smi("index,uuid,name,memory.free,mig.mode.current") or []:
        known = _is_decimal(free) and parts != "Enabled"  # of a GPU cut into parts it tells the whole
        gpus.append(_Gpu(number, uuid, kind, int(float(free)) * MIB if known else None))
    if not gpus:
        return _amd_free(ranks_here)
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    words = [gpu.number for gpu in gpus] if seen is None else [word.strip() for word in seen.split(",")]
    kinds = {gpu.kind for gpu in gpus}
    # nvidia-smi counts by PCI bus, CUDA by speed unless it is told: the same for GPUs of one kind.
    sure = len(kinds) == 1 or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    if not sure and any(word.isdecimal() for word in words):
        chosen = gpus
        where = (
            f"the fullest of {len(gpus)} GPUs (of several kinds: which of them are the run's, only"
            " CUDA_DEVICE_ORDER=PCI_BUS_ID would say)"
        )
    else:
        chosen = []
        for word in words[:ranks_here]:
            match = [g for g in gpus if g.number == word or (len(word) > 4 and g.uuid.startswith(word))]
            if len(match) != 1:
                break  # CUDA too stops at the first word that it does not know
            chosen += match
        where = f"GPU {chosen[0].number}" if len(chosen) == 1 else f"the fullest of {len(chosen)} GPUs"
    if not chosen:
        return None, f"nvidia-smi does not list CUDA_VISIBLE_DEVICES={seen}"
    left = [gpu.free for gpu in chosen if gpu.free is not None]
    if len(left) < len(chosen):
        return None, "nvidia-smi does not say what is free (a part of a GPU?)"
    return min(left), where


def _nvidia_smi(fields: str) -> list[list[str]] | None:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return rows if all(len(row) == fields.count(",") + 1 for row in rows) else None


def _is_decimal(text: str) -> bool:
    return re.fullmatch(r"\d+(\.\d+)?", text) is not None


def _amd_free(ranks_here: int) -> tuple[int | None, str]:
    """The same from the amdgpu driver's files."""
    cards = [path for path in (ROOT / "sys/class/drm").glob("card*") if path.name[4:].isdecimal()]
    found: list[tuple[int, int]] = []
    for card in sorted(cards, key=lambda path: int(path.name[4:])):
        folder = str(card.relative_to(ROOT) / "device")
        total, used = (_number(f"{folder}/mem_info_vram_{name}") for name in ("total", "used"))
        if total is not None and used is not None:
            found.append((total, total - used))
    if not found:
        return None, "neither nvidia-smi nor the amdgpu driver tells the accelerator's memory"
    names = ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
    seen = [os.environ[name] for name in names if name in os.environ]
    if len({total for total, _ in found}) > 1 or len(seen) > 1:
        return None, "GPUs of several kinds, or hidden ones: which are the run's is not known"
    try:
        chosen = [found[int(word)] for word in seen[0].split(",")] if seen else found
    except (ValueError, IndexError):
        return None, f"the GPUs that the variable names ({seen[0]}) are not known by number"
    chosen = chosen[:ranks_here]
    where = "an AMD GPU" if len(chosen) == 1 else f"the fullest of {len(chosen)} AMD GPUs"
    return min(free for _, free in chosen), where


# -------------------------------------------------------------------------------------------- main memory


def free_memory() -> int:
    """Bytes of main memory that can be had: what the page cache holds too, within the container's limit.

    In a container the groups begin at the container's own; a scheduler such as Slurm gives a group deep in the
    machine's tree, and each group above it may have a limit too (cgroup v2 and v1). File pages that can be
    dropped count as free.
    """
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if found := re.search(r"^MemAvailable:\s+(\d+) kB", _text("proc/meminfo") or "", re.MULTILINE):
        free = int(found[1]) * 1024
    for line in (_text("proc/self/cgroup") or "").splitlines() or ["0::/", "0:memory:/"]:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        one = bool(controllers)
        base = "sys/fs/cgroup/memory" if one else "sys/fs/cgroup"
        names = ("limit_in_bytes", "usage_in_bytes", "total_inactive_file")
        limit_file, used_file, cache = names if one else ("max", "current", "inactive_file")
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts), -1, -1):
            folder = "/".join([base, *parts[:depth]])
            limit, used = (_number(f"{folder}/memory.{name}") for name in (limit_file, used_file))
            if limit is not None and used is not None:
                dropped = re.search(rf"^{cache} (\d+)", _text(f"{folder}/memory.stat") or "", re.MULTILINE)
                free = min(free, limit - used + (int(dropped[1]) if dropped else 0))
    return max(0, min([free, *_left_of_limits()]))


def _left_of_limits() -> Iterator[int]:
    """What `ulimit -d` and `ulimit -v` leave this process, where they are set."""
    try:
        import resource
    except ImportError:  # Windows
        return
    held = _text("proc/self/status") or ""
    for limit, name in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        most, found = resource.getrlimit(limit)[0], re.search(rf"^{name}:\s+(\d+) kB", held, re.MULTILINE)
        if most != resource.RLIM_INFINITY:
            yield most - (int(found[1]) * 1024 if found else 0)


def device_free(kind: str) -> int:
    """Bytes that can be had where a model computes: on an accelerator that tells, else of main memory."""
    torch = _loaded_torch()
    if kind == "mps" and torch:
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    if kind in ("cuda", "xpu") and torch:
        device = getattr(torch, kind)
        # What torch has taken from the driver and does not use is free too.
        return int(device.mem_get_info()[0] + device.memory_reserved() - device.memory_allocated())
    return free_memory()


def peak_memory() -> int:
    """The most bytes this process has held: on its accelerator, else in main memory."""
    torch = _loaded_torch()
    if torch and torch.cuda.is_available() and (held := int(torch.cuda.max_memory_allocated())):
        return held
    if found := re.search(r"^VmHWM:\s+(\d+) kB", _text("proc/self/status") or "", re.MULTILINE):
        return int(found[1]) * 1024
    return 0
