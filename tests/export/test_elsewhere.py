"""Other projects' libraries: their settings, what is refused before anything runs, and what comes back."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qwen_chat.chat.encoded import Encoded
from qwen_chat.errors import OptionError, OutputError
from qwen_chat.export import elsewhere
from qwen_chat.export.elsewhere import check_environment, group_size, settings, write_elsewhere

DATA = [Encoded([k, 5, 6, 7], [(2, 4)]) for k in range(4)]


def test_settings() -> None:
    assert settings("gptq", None) == {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    assert settings("gptq", "int8")["bits"] == 8
    four_bits = settings("compressed", None, 64)["config_groups"]["group_0"]["weights"]
    assert (four_bits["num_bits"], four_bits["group_size"]) == (4, 64)
    assert settings("compressed", "int8")["scheme"] == "W8A8"
    assert settings("openvino", None) == {"bits": 8, "sym": False}
    assert settings("openvino", "int4")["bits"] == 4
    with pytest.raises(OptionError, match=r"--type q8_0: expected int8 or int4 with --to openvino"):
        settings("openvino", "q8_0")


def test_a_group_divides_every_layer(demo_model_path: Path, tiny_model_path: Path, tmp_path: Path) -> None:
    assert (group_size(demo_model_path), group_size(tiny_model_path)) == (64, 32)  # of 576, and of 32 columns
    odd = {"model.layers.0.mlp.up_proj.weight": torch.zeros(4, 48)}
    save_file(odd, tmp_path / "model.safetensors")
    with pytest.raises(OptionError, match="48 columns cannot be cut into groups of 32"):
        group_size(tmp_path)


@pytest.mark.parametrize("to", ["gptq", "compressed", "openvino"])
def test_an_environment_that_has_not_what_is_needed(to: str, tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match=f"--to {to}: runs in an environment of its own; make one: python3 -m venv"
    ):
        check_environment(to, None)
    with pytest.raises(OptionError, match="no program there"):
        check_environment(to, str(tmp_path / "python"))
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(OptionError, match=f"has no {elsewhere.NEEDS[to][0][0]}; make one"):
        check_environment(to, str(bare))


def test_what_the_worker_says_is_told(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "worker.py"
    monkeypatch.setattr(elsewhere, "WORKER", worker)
    worker.write_text(
        "import json, sys\njob = json.load(open(sys.argv[1]))\nopen(job['folder'] + '/made', 'w')"
        '.write(json.dumps(job))\nprint(\'words\')\nprint(\'{"before": 1.0, "after": 1.5, "tokens": 4}\')\n'
    )
    facts = write_elsewhere("openvino", tiny_model_path, tmp_path / "out", None, sys.executable, DATA)
    assert (facts["perplexity_before"], facts["perplexity_after"]) == (
        round(math.e, 4),
        round(math.e**1.5, 4),
    )
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == facts
    job: dict[str, Any] = json.loads((tmp_path / "out" / "made").read_text())
    assert job["calibration"] == [[2, 5, 6, 7], [3, 5, 6, 7]], "what measures is not what calibrates"
    assert job["held_out"][0] == {"ids": [0, 5, 6, 7], "labels": [-100, -100, 6, 7]}
    assert (tmp_path / "out" / "chat_template.jinja").is_file()
    worker.write_text("raise SystemExit('this CPU has no kernels')")
    with pytest.raises(OutputError, match=r"--to gptq: .* ended with status 1 \(this CPU has no kernels\)"):
        write_elsewhere("gptq", tiny_model_path, tmp_path / "other", None, sys.executable, DATA)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "said", ["", "words", "[1]", '{"before": 1.0}', '{"before": 1, "after": 1, "tokens": "x"}']
)
def test_a_worker_that_ends_without_its_measure_leaves_nothing(
    said: str, tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elsewhere, "WORKER", tmp_path / "worker.py")
    (tmp_path / "worker.py").write_text(f"print({said!r})")
    with pytest.raises(OutputError, match="ended without what it measured"):
        write_elsewhere("openvino", tiny_model_path, tmp_path / "out", None, sys.executable, DATA)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_or_beyond_all_is_no_perplexity(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elsewhere, "WORKER", tmp_path / "worker.py")
    (tmp_path / "worker.py").write_text("""print('{"before": NaN, "after": 1e4, "tokens": 0}')""")
    facts = write_elsewhere("openvino", tiny_model_path, tmp_path / "out", None, sys.executable, DATA)
    assert facts["perplexity_before"] is facts["perplexity_after"] is None


def test_an_interpreter_that_cannot_be_run_is_told(tmp_path: Path) -> None:
    (tmp_path / "python").write_text("no program")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(OptionError, match=r"--python .*: cannot be run \(.*\); make one"):
        check_environment("gptq", str(tmp_path / "python"))
