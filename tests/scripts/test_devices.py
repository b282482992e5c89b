"""Chat, service, evaluation and training take the device that was decided, and say why there is none."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qwen_chat import hardware
from qwen_chat.cli import serve
from qwen_chat.errors import OptionError, TrainingError
from qwen_chat.evaluation import run as evaluation_run
from qwen_chat.flags import parser
from qwen_chat.flags.run_problems import read_run
from qwen_chat.inference import transfer
from qwen_chat.inference.engine import Engine
from qwen_chat.inference.loading import load_engine
from qwen_chat.training import options, rehearsal, tuned_model

ROOT = Path(__file__).resolve().parents[2]
CHAT, CREATE = (ROOT / "fast_start" / f"simple_try_{name}.py" for name in ("0", "create_service"))
EVALUATE, FINETUNE, PLAN = (ROOT / "finetune" / f"{name}.py" for name in ("evaluate", "finetune", "plan"))
EXAMPLES = ROOT / "finetune" / "io_file" / "input_data"
FAKED = hardware.Device("meta", "faked")
needs_none = pytest.mark.skipif(hardware.has_accelerator(), reason="an accelerator is here")


@needs_none
@pytest.mark.parametrize("script", [CHAT, CREATE, EVALUATE, FINETUNE, PLAN], ids=lambda path: path.stem)
@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_a_device_that_is_not_there_is_refused_in_one_line(script: Path, device: str) -> None:
    """Before torch is loaded: with one that cannot be imported."""
    code = (
        "import runpy, sys\nsys.modules['torch'] = None\nsys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(script), "--device", device, "-m", "/none"]
        + ([] if script in (CHAT, CREATE) else ["-d", str(EXAMPLES / "example_data.jsonl")]),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"error: --device {device}: not there (no accelerator here); here is cpu: give one of these, or leave it out"
    ]


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's meta device at the decision: what does not take it would meet its tensors and raise."""
    monkeypatch.setattr(hardware, "choose_device", lambda asked="auto": FAKED)
    monkeypatch.setattr(transfer, "to_host", lambda found: torch.full(found.shape, 71, dtype=found.dtype))


def script_of(path: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    """A script as a module of this process, with words to read."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    spec.loader.exec_module(module)
    return module


def test_a_chat_takes_it(
    faked: None, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("-m", str(tiny_model_path), "-p", "hi", "--max_new_tokens", "3")
    assert script_of(CHAT, monkeypatch, *words).main() == 0
    said = capsys.readouterr()
    assert said.out == "WWW\n"
    assert said.err.splitlines()[0] == "device meta (faked)"


def test_a_service_takes_it(
    faked: None,
    tiny_model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    engines: list[Engine] = []
    from qwen_chat.service import app, server

    create = app.create_app
    monkeypatch.setattr(
        app, "create_app", lambda engine, **more: (engines.append(engine), create(engine, **more))[1]
    )
    monkeypatch.setattr("faulthandler.enable", lambda: None)  # pytest's standard error is no file
    monkeypatch.setattr(server, "serve", lambda app, listener, **more: listener.close())
    words = ("-m", str(tiny_model_path), "--port", "0", "--log_file", str(tmp_path / "log"))
    assert script_of(CREATE, monkeypatch, *words).main() == 0
    assert str(engines[0].decoder.device) == "meta"
    said = capsys.readouterr().out.splitlines()
    assert said[1:3] == ["engine transformers (--log_file is its own)", "device meta (faked)"]


def test_an_evaluation_takes_it(
    faked: None,
    demo_model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Losses and replies on one model; its results are kept apart from a CPU's."""
    devices = []
    monkeypatch.setattr(
        evaluation_run,
        "sequence_losses",
        lambda model, *more: devices.append(next(model.parameters()).device.type) or [],
    )
    monkeypatch.setenv("QWEN_CHAT_CACHE", str(tmp_path))
    data = tmp_path / "one.jsonl"
    lines = (EXAMPLES / "example_eval_data.jsonl").read_text("utf-8").splitlines()
    data.write_text(lines[13] + "\n", "utf-8")
    words = ("-m", str(demo_model_path), "-d", str(data), "--max_new_tokens", "2", "--json")
    assert script_of(EVALUATE, monkeypatch, *words).main() == 0
    said = capsys.readouterr()
    assert devices == ["meta"]
    assert json.loads(said.out)["model"]["tools"]["turns"] == 2
    assert "device meta (faked); dtype" in said.err


def test_training_takes_it(tmp_path: Path, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers is told to use it; the model is loaded in the number type of that device."""
    from transformers import TrainingArguments

    monkeypatch.setattr(hardware, "accelerators", lambda: ("cuda",))
    monkeypatch.setattr(hardware, "accelerator_name", lambda kind: "faked")
    monkeypatch.setattr(hardware, "gpu_has_bf16", lambda: True)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    run = read_run(
        ["-d", "x", "--use_lora", "--device", "cuda", "--attn_implementation", "sdpa", "--layout", "packed"]
    )
    with pytest.raises(TrainingError, match=r"device cuda \(faked, as asked\) was decided, but transformers"):
        options.training_arguments(run, tmp_path, checkpointing=False)
    monkeypatch.setattr(TrainingArguments, "device", property(lambda args: torch.device("cuda", 0)))
    args, decisions = options.training_arguments(run, tmp_path, checkpointing=False)
    assert (args.use_cpu, args.bf16, decisions[0]) == (False, True, "device cuda (faked, as asked)")
    loaded = tuned_model.load(run, tiny_model_path, args)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}


@needs_none
def test_training_says_that_there_is_none(tmp_path: Path) -> None:
    for words, said in (
        ([], "device cpu (no accelerator here)"),
        (["--device", "cpu"], "device cpu (as asked)"),
        (["--use_cpu", "True"], "device cpu (as asked: --use_cpu True)"),
        (["--use_cpu", "True", "--device", "cpu"], "device cpu (as asked: --use_cpu True)"),
    ):
        run = read_run(["-d", "x", *words])
        args, decisions = options.training_arguments(run, tmp_path, checkpointing=False)
        assert (decisions[0], args.use_cpu) == (said, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "cuda", "--use_cpu", "True"], "--device cuda and --use_cpu True: they contradict each"),
        (["--device", "cpu", "--use_cpu", "False"], "--device cpu and --use_cpu False: they contradict each"),
        (["--device", "mps"], "--device mps: training has not been tried on it"),
        (["--device", "tpu"], "--device: 'tpu'; expected auto or cpu or cuda or mps or xpu"),
    ],
)
def test_a_device_for_training_that_cannot_be(words: list[str], said: str) -> None:
    with pytest.raises(OptionError) as raised:
        read_run(["-d", "x", *words])
    assert str(raised.value).startswith(said)


def test_torch_may_find_none_where_its_files_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen by its files the flag is taken; once torch is loaded and finds none, it is refused before the data."""
    there: list[tuple[str, ...]] = [("cuda",), ()]
    monkeypatch.setattr(hardware, "accelerators", lambda: there[0])
    run = read_run(["-d", "x", "--device", "cuda"])
    there.pop(0)
    with pytest.raises(OptionError, match="--device cuda: not there"):
        rehearsal.rehearse(run)


def test_int8_on_an_accelerator_is_refused_with_its_cure(faked: None, tiny_model_path: Path) -> None:
    with pytest.raises(OptionError) as raised:
        load_engine(tiny_model_path, quantize="int8")
    assert str(raised.value) == (
        "--quantize int8: its kernels are the CPU's, and this is device meta (faked); give --dtype bfloat16,"
        " --engine vllm or --device cpu"
    )


@pytest.mark.parametrize(
    ("words", "device", "installed", "engine", "why"),
    [
        ([], "cpu", True, "transformers", "vLLM would be slower on cpu"),
        ([], "mps", True, "transformers", "vLLM would be slower on mps"),
        ([], "cuda", False, "transformers", f"vLLM is not installed in {sys.executable}"),
        ([], "cuda", True, "vllm", f"it is installed in {sys.executable}; device cuda (faked)"),
        (["--device", "cuda"], "cuda", True, "transformers", "--device is its own"),
        (["--quantize", "int8"], "cuda", True, "transformers", "--quantize is its own"),
        (["--log_prompts"], "cuda", True, "transformers", "--log_prompts is its own"),
        (["--compile"], "cuda", True, "transformers", "--compile is its own"),
        (["--cache_tokens", "5"], "cuda", True, "transformers", "--cache_tokens is its own"),
        (["--engine", "vllm"], "cpu", False, "vllm", "as asked"),
        (["--engine", "transformers"], "cuda", True, "transformers", "as asked"),
    ],
)
def test_the_engine_is_chosen_with_its_reason(
    words: list[str], device: str, installed: bool, engine: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_chat.service.vllm.is_installed", lambda python: installed)
    groups = [serve.ServeModelArguments, serve.ServiceArguments, serve.LimitArguments, serve.VllmArguments]
    values = parser.read(words, groups)
    found = serve.choose_engine(*(values[group] for group in groups), hardware.Device(device, "faked"))
    assert found == (engine, why)


def test_a_model_that_vllm_cannot_serve_stays_here(
    tmp_path: Path, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM is there, and a flag of its alone would be in vain: told; without one the toolkit's engine takes over."""
    from qwen_chat.service import vllm

    def refuse(*model: Any, **more: Any) -> None:
        raise OptionError("a template that vLLM cannot render")

    monkeypatch.setattr(hardware, "choose_device", lambda asked="auto": hardware.Device("cuda", "faked"))
    monkeypatch.setattr(vllm, "is_installed", lambda python: True)
    monkeypatch.setattr(vllm, "command", refuse)
    served: list[str] = []
    script = script_of(CREATE, monkeypatch, "-m", str(tiny_model_path))
    monkeypatch.setattr(serve, "serve_here", lambda asked, why: served.append(why) or 0)
    assert script.main() == 0
    assert served == ["vLLM is installed, but: a template that vLLM cannot render"]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--tensor_parallel_size", "2"])
    with pytest.raises(OptionError, match="a template that vLLM cannot render"):
        script.main()


def test_where_memory_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator its own: what the driver has, and what torch holds without using it."""
    cuda = SimpleNamespace(
        is_available=lambda: True,
        mem_get_info=lambda: (5 * 2**30, 80 * 2**30),
        memory_reserved=lambda: 3 * 2**30,
        memory_allocated=lambda: 2**30,
    )
    monkeypatch.setattr(hardware, "_loaded_torch", lambda: SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(hardware, "free_memory", lambda: 11)
    assert hardware.device_free("cuda") == 7 * 2**30
    assert hardware.device_free("cpu") == hardware.device_free("meta") == 11


@needs_none
def test_compiling_is_for_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError) as raised:
        script_of(CREATE, monkeypatch, "--compile").main()
    assert str(raised.value) == (
        "--compile: for accelerators, and this is device cpu (no accelerator here), whose layers are packed;"
        " leave it out"
    )
