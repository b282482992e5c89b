"""The package as a wheel: what `pip install .` takes, what it asks for, and `qwen-chat` as a user gets it."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from qwen_chat.cli.main import COMMANDS
from qwen_chat.place import SCRIPTS

ROOT = Path(__file__).resolve().parents[1]
BUILD = "from setuptools import build_meta; build_meta.build_wheel('wheel')"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MIB = 2**20


def copy_of_the_checkout(folder: Path) -> None:
    """What a wheel is built from; the scripts lie beside it, as in a checkout."""
    ignored = shutil.ignore_patterns("__pycache__", "output_data")
    for name in ("qwen_chat", "finetune", "fast_start"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.txt"):
        shutil.copy(ROOT / name, folder)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    copy_of_the_checkout(folder)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = (folder / "wheel").glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment's programs: the wheel, over the packages of this one."""
    folder = tmp_path_factory.mktemp("installed") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", wheel], check=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "beside.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin"


def test_the_wheel_holds_the_package_alone_and_what_it_reads_by_path(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = (path for path in (ROOT / "qwen_chat").rglob("*.*") if path.is_file())
    assert held == {str(path.relative_to(ROOT)) for path in package if "__pycache__" not in path.parts}
    assert {"qwen_chat/inference/native/step.cpp", "qwen_chat/flags/zero2.json"} <= held


def test_what_deepspeed_s_words_stand_for_is_what_the_checkout_ships() -> None:
    for name in ("zero2", "zero3"):
        ours = (ROOT / "qwen_chat" / "flags" / f"{name}.json").read_bytes()
        assert ours == (ROOT / "finetune" / f"ds_config_{name}.json").read_bytes()


def test_every_pin_lies_within_a_range_of_the_wheel_and_in_the_lock() -> None:
    extras = PROJECT["optional-dependencies"]
    ranges = {
        need.name: need.specifier
        for line in [*PROJECT["dependencies"], *(line for lines in extras.values() for line in lines)]
        if (need := Requirement(line)).name != "qwen-chat"
    }
    pins = {}
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if pinned := line.partition("#")[0].strip():
            name, _, version = pinned.partition("==")
            pins[name] = version
            assert Version(version) in ranges[name], line
    lock = (ROOT / "requirements-lock.txt").read_text(encoding="utf-8")
    locked = dict(re.findall(r"^([\w.-]+)==([\w.]+)", lock, re.M))
    assert {name: locked.get(name) for name in pins} == pins
    assert set(ranges) <= set(locked)
    assert len(re.findall(r"^[\w.-]+==", lock, re.M)) <= lock.count("--hash=sha256:")
    assert "://" not in lock  # neither an index nor a file of somebody's machine
    heavy = {"deepspeed", "bitsandbytes", "tensorboard", "gradio", "ninja", "pyarrow", "matplotlib"}
    assert not heavy & {Requirement(line).name for line in PROJECT["dependencies"]}
    assert set(extras) == {"deepspeed", "qlora", "page", "track", "parquet", "export", "all"}
    assert set(Requirement(extras["all"][0]).extras) == set(extras) - {"all"}


def test_each_command_is_a_script_of_the_checkout() -> None:
    assert set(COMMANDS) == set(SCRIPTS)
    for name, script in SCRIPTS.items():
        assert f"from qwen_chat.cli import {name}\n" in (ROOT / script).read_text(encoding="utf-8")


def test_the_installed_wheel_is_used(installed: Path, tmp_path: Path, tiny_model_path: Path) -> None:
    """Away from the checkout: its own package, its own names for things."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "QWEN_CHAT_CACHE": str(tmp_path / "cache")}
        command = [str(installed / "qwen-chat"), *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        listed = run("--help")
        seconds.append(time.perf_counter() - start)
    assert listed.returncode == 0
    assert [line.split()[0] for line in listed.stdout.splitlines() if line.startswith("  ")] == list(COMMANDS)
    assert min(seconds) < 0.3
    wrong = run("srve")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "error: qwen-chat srve: no such command; did you mean serve?\n"
    refused = run("call", "--url", "http://127.0.0.1:9")
    assert refused.returncode == 1
    assert refused.stderr.endswith("start the service with qwen-chat serve\n")
    data = tmp_path / "data.jsonl"
    messages = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "Tidepool."}]
    data.write_text(json.dumps({"messages": messages}) + "\n")
    checked = run("check", "-m", str(tiny_model_path), "-d", str(data), "--json")
    assert checked.returncode == 0, checked.stderr
    assert json.loads(checked.stdout)["good"] is True
    assert "⟦Tidepool.<|im_end|>⟧" in checked.stderr


@pytest.mark.parametrize(
    ("package", "words", "says"),
    [
        ("gradio", ["page"], "the chat page needs the package 'gradio'; run: pip install 'qwen-chat[page]'"),
        (
            "deepspeed",
            ["tune", "-d", "data.jsonl", "--deepspeed", "zero2"],
            "--deepspeed zero2 needs the package 'deepspeed'; run: pip install 'qwen-chat[deepspeed]'",
        ),
        (
            "bitsandbytes",
            ["tune", "-d", "data.jsonl", "--q_lora"],
            "--q_lora needs the package 'bitsandbytes'; run: pip install 'qwen-chat[qlora]'",
        ),
        (
            "matplotlib",
            ["check", "-d", "data.jsonl", "--histogram", "x.png"],
            "--histogram needs the package 'matplotlib'; run: pip install 'qwen-chat[track]'",
        ),
        (
            "tensorboard",
            ["tune", "-d", "data.jsonl", "--report_to", "tensorboard"],
            "--report_to tensorboard needs the package 'tensorboard'; run: pip install 'qwen-chat[track]'",
        ),
    ],
)
def test_a_missing_extra_is_one_line_that_names_the_pip_command(
    package: str, words: list[str], says: str, installed: Path, tmp_path: Path
) -> None:
    """The package is hidden in the process that is asked."""
    (tmp_path / "data.jsonl").write_text("{}\n")
    code = (
        f"import sys\nsys.modules[{package!r}] = None\nsys.argv = ['qwen-chat', *{words!r}]\n"
        "from qwen_chat.cli.main import main\nsys.exit(main())"
    )
    command = [str(installed / "python"), "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == f"error: {says}"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_bare_environment_answers(tmp_path: Path) -> None:
    """The Containerfile's steps. What torch alone asks for is there first; the rest is measured."""
    copy_of_the_checkout(tmp_path / "src")
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    environment["QWEN_CHAT_CACHE"] = str(tmp_path / "cache")
    lines = (ROOT / "Containerfile").read_text(encoding="utf-8").splitlines()
    steps = [line.removeprefix("RUN ") for line in lines if line.startswith("RUN ")]
    places = {"/src": str(tmp_path / "src"), "/opt/qwen-chat": str(tmp_path / "env")}
    places |= {"--no-cache-dir ": ""}  # so that the second time nothing is downloaded
    for old, new in places.items():
        steps = [step.replace(old, new) for step in steps]
    steps[0] = steps[0].replace("python", sys.executable, 1)

    def install() -> list[int]:
        """Bytes on disk after each step."""
        shutil.rmtree(tmp_path / "env", ignore_errors=True)
        sizes = []
        for step in steps:
            subprocess.run(step, shell=True, check=True, env=environment, cwd=tmp_path, timeout=900)
            files = (tmp_path / "env").rglob("*")
            sizes.append(sum(file.lstat().st_size for file in files if not file.is_dir()))
        return sizes

    def ask() -> str:
        chat = [
            str(tmp_path / "env" / "bin" / "qwen-chat"),
            "chat",
            "--prompt",
            "What is the capital of France?",
        ]
        done = subprocess.run(
            chat, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    install()
    ask()
    (tmp_path / "cache").rename(tmp_path / "first")
    (tmp_path / "cache").mkdir()
    (tmp_path / "first" / "wheels").rename(tmp_path / "cache" / "wheels")  # the model as it was downloaded
    start = time.perf_counter()
    sizes = install()
    assert "Paris" in ask()
    seconds = time.perf_counter() - start
    beside = (sizes[-1] - sizes[-2]) / MIB
    print(f"beside torch {beside:.0f} MiB; to the first answer {seconds:.1f} s")
    assert beside * MIB <= 900e6
    assert seconds <= 90
