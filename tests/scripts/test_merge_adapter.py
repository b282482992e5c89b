"""merge_adapter.py as a user runs it, and what it refuses: one line, and nothing half-made."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_chat.export.tensor_writer import TensorWriter
from tests.support.scripts import runner

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "finetune" / "io_file" / "input_data" / "example_eval_data.jsonl"


@pytest.fixture
def merge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """(exit status, what was said, what was printed) of merge_adapter.py."""

    return runner("finetune/merge_adapter.py", monkeypatch, capsys)


@pytest.fixture
def adapter(tiny_model_path: Path, tmp_path: Path) -> Path:
    """Over the tiny model, with a run.json as training leaves it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.peft_config["default"].base_model_name_or_path = str(tiny_model_path)
    model.save_pretrained(tmp_path / "adapter")
    run = {"state": "finished", "method": "lora", "options": {"data_path": [str(DATA)]}}
    (tmp_path / "adapter" / "run.json").write_text(json.dumps(run))
    (tmp_path / "adapter" / "format.lock").write_text("{}\n")
    return tmp_path / "adapter"


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"adapter"}


def test_a_merged_folder_is_whole(merge: Any, adapter: Path, tiny_model_path: Path) -> None:
    folder = adapter.parent / "merged"
    status, said, printed = merge(
        "--adapter", str(adapter), "-o", str(folder), "--compare_tokens", "300", "--json"
    )
    assert status == 0, said
    found = json.loads(printed)
    assert found["logit_difference"] <= 1e-5 and found["top1_agreement"] == 1.0
    assert json.loads((folder / "merge.json").read_text())["comparison"]["tokens"] == found["tokens"]
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "config.json"):
        assert (folder / name).read_bytes() == (tiny_model_path / name).read_bytes()
    assert (folder / "format.lock").read_text() == "{}\n"
    assert left(adapter.parent) == {"merged"}

    from qwen_chat import models
    from qwen_chat.hardware import Device

    assert models.load_model(folder, device=Device("cpu", "the test asks")).model.config.tie_word_embeddings


def test_a_q_lora_run_is_told(merge: Any, adapter: Path) -> None:
    run = json.loads((adapter / "run.json").read_text())
    (adapter / "run.json").write_text(json.dumps(run | {"method": "qlora"}))
    folder = adapter.parent / "merged"
    status, said, _ = merge("--adapter", str(adapter), "-o", str(folder), "--compare_tokens", "200")
    assert status == 0, said
    assert (
        "trained over the base in 4 bits" in said
        and "loss over the base in 4 bits, as it was trained" in said
    )


def test_what_stands_in_the_way_is_one_line(
    merge: Any, adapter: Path, demo_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = adapter.parent / "merged"
    words = ["--adapter", str(adapter), "-o", str(folder)]

    def refused(*more: str) -> str:
        status, said, _ = merge(*words, *more)
        assert status == 2 and left(adapter.parent) <= {"there"}, said
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        return str(line)

    assert "does not fit this model" in refused("-m", str(demo_model_path), "--any_base", "True")
    for weight in ("nan", "inf", "-inf"):
        assert f"--weights: {weight}; expected finite numbers" in refused("--weights", weight)
    run = json.loads((adapter / "run.json").read_text())
    (adapter / "run.json").write_text(json.dumps(run | {"shaped_by": {"model": "0" * 32}}))
    assert "not the weights that" in refused()
    (adapter / "run.json").write_text(json.dumps(run | {"options": {"data_path": ["gone.jsonl"]}}))
    assert "gone.jsonl is not there any more; give conversations to compare on" in refused()
    (adapter / "run.json").write_text(json.dumps(run | {"state": "running"}))
    assert "its run has not finished" in refused()
    (adapter / "run.json").write_text(json.dumps(run))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(TensorWriter, "write", full)
        assert "No space left on device); nothing was left there" in refused()
    (adapter.parent / "there").mkdir()
    assert "there is something already" in refused("-o", str(adapter.parent / "there"))
    (adapter / "adapter_model.safetensors").rename(adapter / "elsewhere")
    assert "the adapter is half-written" in refused()


def test_the_lock_of_a_mixture_has_no_replies(
    merge: Any, adapter: Path, tiny_model_path: Path, demo_tokenizer: Any
) -> None:
    from qwen_chat.certificate.lock import FormatLock, GreedyReply, Replies
    from qwen_chat.chat.format import ChatFormat

    reply = GreedyReply((1,), (-1.0,), (-2.0,))
    FormatLock.make(
        ChatFormat(demo_tokenizer), base={}, longest=100, greedy=lambda *_: Replies((reply,), "1")
    ).write(adapter)
    folder = adapter.parent / "merged"
    words = ("--adapter", str(adapter), str(adapter), "--weights", "0.5", "-0.5", "--compare_tokens", "200")
    status, said, _ = merge(*words, "-o", str(folder))
    assert status == 0, said
    before, after = FormatLock.read(adapter), FormatLock.read(folder)
    assert before.greedy.replies and not after.greedy.replies and "merged with other" in after.greedy.note
    assert after.entries == before.entries
