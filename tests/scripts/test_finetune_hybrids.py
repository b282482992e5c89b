"""finetune.py on tiny folders of hybrid models, as a person uses it: it ends well, and what it leaves is what it says.

The folders have Qwen's real vocabulary; those of Qwen3.5 are for pictures and text, as its own checkpoints are.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qwen_chat import models
from qwen_chat.chat.format import ChatFormat
from tests.scripts.test_finetune_sh import shell
from tests.support import runs
from tests.support.scripts import Finetune
from tests.support.tiny_models import hybrid_folder

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "finetune" / "io_file" / "input_data" / "example_data.jsonl"
RATE = ["--learning_rate", "1e-2", "--warmup_steps", "0"]
LORA = ["--use_lora", "True", "--lora_dropout", "0"]
# Where vLLM keeps a layer of the language model, and the names of LoRA's layers in it.
VLLM = re.compile(
    r"language_model\.model\.layers\.\d+\.("
    r"self_attn\.(q|k|v|o)_proj|linear_attn\.(in_proj_(qkv|z|b|a)|out_proj)|mlp\.(gate|up|down)_proj)"
)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight short conversations without tools."""
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    file = tmp_path_factory.mktemp("data") / "short.jsonl"
    file.write_text("\n".join([line for line in lines if '"type": "tool"' not in line][:8]) + "\n")
    return file


def loss_alone(loaded: models.Loaded, file: Path) -> float:
    """Mean over all supervised tokens, each conversation by itself through the model's own forward."""
    fmt = ChatFormat(loaded.tokenizer)
    total, count = 0.0, 0
    for line in file.read_text(encoding="utf-8").splitlines():
        for sequence in fmt.encode(json.loads(line)["messages"]):
            labels = torch.tensor(sequence.labels)[1:]
            with torch.no_grad():
                logits = loaded.model(input_ids=torch.tensor([sequence.input_ids])).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            count += int((labels != -100).sum())
    return total / count


def tuned(
    finetune: Finetune, name: str, short: Path, folder: Path, *words: str
) -> tuple[Path, Path, dict[str, Any], str]:
    """(base, what was made of it, its run.json, what was said)"""
    base, out = hybrid_folder(name, folder / name), folder / "out"
    given = ["-m", str(base), "-d", str(short), "--eval_data_path", str(short), *RATE, *words]
    given += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    status, said = finetune(*given, "--num_train_epochs", "3", "-o", str(out))
    assert status == 0, said
    log = runs.curve(out)
    assert len(log) == 3 and log[2] < log[1] < log[0]
    return base, out, json.loads((out / "run.json").read_text()), said


@pytest.mark.parametrize(
    "name",
    [
        "qwen3_5",
        pytest.param("qwen3_next", marks=pytest.mark.slow),
        pytest.param("qwen3_5_text", marks=pytest.mark.slow),
        pytest.param("qwen3_5_moe", marks=pytest.mark.slow),
        pytest.param("qwen3_5_moe_text", marks=pytest.mark.slow),
    ],
)
def test_an_adapter_is_trained_and_loads_to_the_same_loss(
    name: str, finetune: Finetune, short: Path, tmp_path: Path
) -> None:
    base, out, run, said = tuned(finetune, name, short, tmp_path, *LORA)
    assert "3 gated delta-net layers: our own chunks keep a row's conversations apart" in said
    assert "probe: in a row as alone" in said and "falling back" not in said
    loaded = models.load_model(base, adapter=out)
    assert abs(loss_alone(loaded, short) - run["evaluation"]["eval_loss"]) < 1e-5
    if name != "qwen3_5":
        return
    # The names are those of the whole model: peft finds them in it, and vLLM by its own.
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    tensors = load_file(out / "adapter_model.safetensors")
    for key in tensors:
        place = re.sub(r"^base_model\.model\.", "", key)
        place = re.sub(r"\.lora_[AB]\.weight$", "", place)
        assert VLLM.fullmatch(re.sub(r"^model\.language_model\.", "language_model.model.", place)), key
    assert len(tensors) == 2 * (3 * 5 + 4 + 4 * 3)
    whole = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), out)
    again = models.Loaded(whole.eval(), loaded.tokenizer, ())
    assert loss_alone(again, short) == loss_alone(loaded, short)
    assert any("text alone is trained: model.visual (" in line for line in run["decisions"])


@pytest.mark.slow
def test_a_full_fine_tune_leaves_the_sight_as_it_was(finetune: Finetune, short: Path, tmp_path: Path) -> None:
    base, out, run, _ = tuned(finetune, "qwen3_5", short, tmp_path)
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if not name.startswith("model.visual.")}
    loaded = models.load_model(out)
    assert type(loaded.model).__name__ == "Qwen3_5ForConditionalGeneration"
    assert json.loads((out / "config.json").read_text())["architectures"] == [type(loaded.model).__name__]
    assert (out / "preprocessor_config.json").read_text() == (base / "preprocessor_config.json").read_text()
    assert abs(loss_alone(loaded, short) - run["evaluation"]["eval_loss"]) < 1e-5


@pytest.mark.slow
def test_zero_3_has_the_curve_of_one_process(short: Path, tmp_path: Path) -> None:
    """Also where no weight is small enough to be left whole: a convolution's is gathered when it is needed."""
    base = hybrid_folder("qwen3_5", tmp_path / "base")
    file = tmp_path / "zero3.json"
    config = json.loads((ROOT / "finetune" / "ds_config_zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    file.write_text(json.dumps(config))
    words = ["-m", str(base), "-d", str(short), *RATE, "--max_steps", "2", "--save_strategy", "no"]
    words += ["--gradient_accumulation_steps", "1", "--per_device_train_batch_size"]
    runs.finish([*words, "4"], tmp_path / "one")
    runs.finish([*words, "2", "--deepspeed", str(file)], tmp_path / "two", ranks=2)
    assert runs.curve(tmp_path / "two") == pytest.approx(runs.curve(tmp_path / "one"), abs=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5", "qwen3_5_moe"])
def test_the_layouts_agree_on_the_first_step(name: str, short: Path, tmp_path: Path) -> None:
    """Through finetune.sh, to 1e-5."""
    base = hybrid_folder(name, tmp_path / name)
    first = []
    for layout in ("shared_prefix", "packed", "padded"):
        out = tmp_path / layout
        words = ["-m", str(base), "-d", str(short), "-o", str(out), *LORA, *RATE]
        done = shell(*words, "--layout", layout, "--max_steps", "1", GPUS_PER_NODE="1")
        assert done.returncode == 0, done.stderr
        first.append(runs.curve(out)[0])
    assert max(first) - min(first) < 1e-5 * min(first)
