"""What a machine has, asked of machines that are folders: /proc, /sys and /dev of each, and an nvidia-smi."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen_chat import hardware
from qwen_chat.errors import OptionError
from qwen_chat.hardware import MIB

GIB = 2**30
TWO_KINDS = ("A100", "T4")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty machine with a CUDA build of torch that is not loaded, and no nvidia-smi."""
    monkeypatch.setattr(hardware, "ROOT", tmp_path)
    monkeypatch.setattr(hardware, "_loaded_torch", lambda: None)
    monkeypatch.setattr(hardware.importlib.metadata, "version", lambda name: "2.13.0")
    for name in list(os.environ):
        if name.endswith("_VISIBLE_DEVICES") or name == "CUDA_DEVICE_ORDER":
            monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def put(machine: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (machine / name).parent.mkdir(parents=True, exist_ok=True)
        (machine / name).write_text(text)


def nvidia(
    monkeypatch: pytest.MonkeyPatch, free: list[str], kinds: Any = None, cut: str = "[N/A]", able: str = "8.0"
) -> None:
    kinds = kinds or ["A100"] * len(free)
    rows = [f"{i}, GPU-{i}{i}{i}, {kinds[i]}, {free[i]}, {cut}" for i in range(len(free))]

    def answer(command: list[str], **options: Any) -> Any:
        return SimpleNamespace(stdout="\n".join([able] if "compute_cap" in command[1] else rows) + "\n")

    monkeypatch.setattr(hardware.subprocess, "run", answer)


# -------------------------------------------------------------------------------------------- accelerators


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ([], False),
        (["dev/nvidiactl"], True),
        (["dev/kfd"], True),
        (["dev/dxg"], False),  # WSL2 without a driver for CUDA
        (["dev/dxg", "usr/lib/wsl/lib/libcuda.so.1"], True),
    ],
)
def test_an_accelerator_is_seen_by_its_files(machine: Path, files: list[str], found: bool) -> None:
    put(machine, dict.fromkeys(files, ""))
    assert hardware.has_accelerator() is found


def test_what_rules_an_accelerator_out(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(machine, {"dev/nvidiactl": ""})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert not hardware.has_accelerator()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(hardware.importlib.metadata, "version", lambda name: "2.13.0+cpu")
    assert not hardware.has_accelerator()


def test_torch_has_the_last_word_once_it_is_loaded(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(machine, {"dev/nvidiactl": ""})
    cuda = SimpleNamespace(is_available=lambda: False)
    monkeypatch.setattr(hardware, "_loaded_torch", lambda: SimpleNamespace(cuda=cuda))
    assert not hardware.has_accelerator()  # a driver too old for this torch, say
    cuda.is_available = lambda: True
    cuda.is_bf16_supported = lambda including_emulation: False
    cuda.max_memory_allocated = lambda: 7 * GIB
    assert hardware.has_accelerator()
    assert not hardware.gpu_has_bf16()
    assert hardware.peak_memory() == 7 * GIB


def test_the_decision_and_its_reason(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An accelerator is never passed over in silence: what is in its way is named."""

    def said(asked: Any = "auto") -> str:
        try:
            return str(hardware.choose_device(asked))
        except OptionError as error:
            return str(error)

    assert (said(), said("cpu")) == ("device cpu (no accelerator here)", "device cpu (as asked)")
    put(machine, {"dev/nvidiactl": ""})
    assert said() == "device cuda (a GPU is here)"
    monkeypatch.setattr(
        hardware,
        "_nvidia_smi",
        lambda fields: [["NVIDIA H200", "143771"]] if fields == "name,memory.total" else [],
    )
    assert said() == "device cuda (NVIDIA H200, 140 GiB)"
    assert said("cuda") == "device cuda (NVIDIA H200, 140 GiB, as asked)"
    assert said("mps").startswith("--device mps: not there (")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert said() == "device cpu (CUDA_VISIBLE_DEVICES=-1 hides the GPU of /dev/nvidiactl)"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(hardware.importlib.metadata, "version", lambda name: "2.13.0+cpu")
    build = "/dev/nvidiactl is there, but torch 2.13.0+cpu is a CPU build: install torch's build for this GPU"
    assert said() == f"device cpu ({build})"
    assert (
        said("cuda") == f"--device cuda: not there ({build}); here is cpu: give one of these, or leave it out"
    )
    monkeypatch.setattr(hardware.importlib.metadata, "version", lambda name: "2.13.0+xpu")
    put(machine, {"dev/dri/card0": ""})
    assert said() == "device xpu (Intel's GPU)"


def test_what_torch_sees_is_what_there_is(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no, yes = SimpleNamespace(is_available=lambda: False), SimpleNamespace(is_available=lambda: True)
    for cuda, xpu, mps, device, trains in (
        (no, no, no, "cpu", "cpu"),
        (yes, no, no, "cuda", "cuda"),
        (no, yes, no, "xpu", "xpu"),
        (no, no, yes, "mps", "cpu"),
        (yes, yes, no, "cuda", "cuda"),
    ):
        torch = SimpleNamespace(cuda=cuda, xpu=xpu, backends=SimpleNamespace(mps=mps))
        monkeypatch.setattr(hardware, "_loaded_torch", lambda torch=torch: torch)
        assert (hardware.choose_device().kind, hardware.training_device().kind) == (device, trains)
        assert hardware.has_accelerator() is (trains != "cpu")
        assert hardware.training_device(use_cpu=True).reason == "as asked: --use_cpu True"
    put(machine, {"dev/nvidiactl": ""})
    monkeypatch.setattr(hardware, "_loaded_torch", lambda: SimpleNamespace(cuda=no))
    assert hardware.choose_device().reason == (
        "/dev/nvidiactl is there, but torch 2.13.0 finds no GPU: see its driver, or install a build for it"
    )


@pytest.mark.parametrize(
    ("visible", "ranks", "expected"),
    [
        (None, 1, (80 * GIB, "GPU 0")),
        (None, 2, (79 * GIB, "the fullest of 2 GPUs")),
        (None, 4, (1 * GIB, "the fullest of 4 GPUs")),
        ("1,3", 1, (79 * GIB, "GPU 1")),
        ("3,1", 1, (1 * GIB, "GPU 3")),
        ("GPU-111, GPU-222", 2, (78 * GIB, "the fullest of 2 GPUs")),
        ("0,9,3", 3, (80 * GIB, "GPU 0")),  # CUDA too stops at a number that there is not
        ("MIG-1f", 1, (None, "nvidia-smi does not list CUDA_VISIBLE_DEVICES=MIG-1f")),
    ],
)
def test_only_the_gpus_that_the_ranks_use_are_planned(
    machine: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, ranks: int, expected: Any
) -> None:
    """Somebody else fills GPU 3."""
    nvidia(monkeypatch, [str(n * 1024) for n in (80, 79, 78, 1)])
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert hardware.gpu_free(ranks) == expected


def test_gpus_of_several_kinds_have_an_order_that_only_cuda_knows(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia(monkeypatch, ["81920", "15360"], TWO_KINDS)
    free, where = hardware.gpu_free(1)
    assert free == 15 * GIB
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID would say" in where
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert hardware.gpu_free(1) == (80 * GIB, "GPU 0")
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-111")
    assert hardware.gpu_free(1) == (15 * GIB, "GPU 1")


@pytest.mark.parametrize(("free", "cut"), [("[Insufficient Permissions]", "[N/A]"), ("81920", "Enabled")])
def test_what_nvidia_smi_cannot_say_is_not_known(
    machine: Path, monkeypatch: pytest.MonkeyPatch, free: str, cut: str
) -> None:
    nvidia(monkeypatch, [free], cut=cut)
    assert hardware.gpu_free(1)[0] is None


@pytest.mark.parametrize(("able", "found"), [("7.5", False), ("7.0", False), ("8.0", True), ("[N/A]", True)])
def test_bfloat16_begins_at_compute_capability_8(
    machine: Path, monkeypatch: pytest.MonkeyPatch, able: str, found: bool
) -> None:
    nvidia(monkeypatch, ["15360"], able=able)
    assert hardware.gpu_has_bf16() is found


def test_without_nvidia_smi_main_memory_is_not_taken_for_a_gpu_s(machine: Path) -> None:
    put(machine, {"dev/nvidiactl": "", "proc/meminfo": "MemAvailable: 1000 kB\n"})
    free, why = hardware.gpu_free(1)
    assert free is None
    assert "neither nvidia-smi nor the amdgpu driver" in why


def test_amd_gpus_are_asked_of_their_driver(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, used in enumerate((2, 60)):
        folder = f"sys/class/drm/card{number}/device"
        put(machine, {f"{folder}/mem_info_vram_total": f"{64 * GIB}\n"})
        put(machine, {f"{folder}/mem_info_vram_used": f"{used * GIB}\n"})
    put(machine, {"sys/class/drm/card0-DP-1/status": "connected\n"})
    assert hardware.gpu_free(1) == (62 * GIB, "an AMD GPU")
    assert hardware.gpu_free(2) == (4 * GIB, "the fullest of 2 AMD GPUs")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "1")
    assert hardware.gpu_free(1) == (4 * GIB, "an AMD GPU")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "GPU-x")
    assert hardware.gpu_free(1)[0] is None
    put(machine, {"sys/class/drm/card1/device/mem_info_vram_total": f"{GIB // 2}\n"})  # in the processor
    monkeypatch.delenv("HIP_VISIBLE_DEVICES")
    assert hardware.gpu_free(1)[0] is None


# ---------------------------------------------------------------------------------------------- cores, memory


def test_macos_cannot_say_which_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hardware.cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert hardware.cores() == os.cpu_count()


def test_training_on_macos_goes_to_the_cpu(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not hardware.has_accelerator()


@pytest.mark.parametrize("script", ["finetune/finetune.py", "fast_start/simple_try_create_service.py"])
def test_windows_is_told_in_one_line(script: str) -> None:
    program = f"import runpy, sys; sys.platform = 'win32'; runpy.run_path({script!r}, run_name='__main__')"
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: Windows: expected Linux, macOS or WSL")


MEMINFO = {"proc/meminfo": f"MemTotal: {256 * 2**20} kB\nMemAvailable: {200 * 2**20} kB\n"}
V1 = "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 200 * GIB),
        # a container, cgroup v2: file pages that can be dropped are free
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
                "sys/fs/cgroup/memory.current": f"{3 * GIB}\n",
                "sys/fs/cgroup/memory.stat": f"anon 7\ninactive_file {2 * GIB}\nactive_file 9\n",
            },
            3 * GIB,
        ),
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "max\n",
                "sys/fs/cgroup/memory.current": "1\n",
            },
            200 * GIB,
        ),
        # a container, v1: /proc names the group on the host, which is not to be seen inside
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/docker/ab\n3:memory:/docker/ab\n0::/\n",
                f"{V1}/memory.limit_in_bytes": f"{8 * GIB}\n",
                f"{V1}/memory.usage_in_bytes": f"{GIB}\n",
                f"{V1}/memory.stat": f"total_inactive_file {GIB // 2}\n",
            },
            7 * GIB + GIB // 2,
        ),
        # a job of a scheduler: its limit stands above the step that this process is in
        (
            {
                "proc/self/cgroup": "0::/slurm/job_1/step_0\n",
                "sys/fs/cgroup/slurm/job_1/memory.max": f"{16 * GIB}\n",
                "sys/fs/cgroup/slurm/job_1/memory.current": f"{10 * GIB}\n",
                "sys/fs/cgroup/slurm/job_1/step_0/memory.max": "max\n",
                "sys/fs/cgroup/slurm/job_1/step_0/memory.current": f"{10 * GIB}\n",
            },
            6 * GIB,
        ),
    ],
)
def test_free_memory_is_the_container_s(machine: Path, files: dict[str, str], free: int) -> None:
    put(machine, MEMINFO | files)
    assert hardware.free_memory() == free


def test_peak_memory_of_a_process() -> None:
    assert 10 * MIB < hardware.peak_memory() < 100 * GIB


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ("fma avx2 avx512f avx512_bf16 avx512_vnni", True),
        ("avx512f amx_tile amx_bf16 amx_int8", True),
        ("fma avx2 avx512f avx512bw avx512_vnni", False),
        (None, False),
    ],
)
def test_bfloat16_by_the_cpus_flags(flags, found, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "ROOT", tmp_path)
    if flags is not None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc" / "cpuinfo").write_text(f"model name\t: a test\nflags\t\t: {flags}\n", "utf-8")
    assert hardware.cpu_has_bf16() is found
