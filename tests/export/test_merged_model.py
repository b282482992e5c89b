"""A merged model is the adapter: the same logits, the same greedy tokens, for every kind of adapter."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from qwen_chat.certificate.conversations import cases
from qwen_chat.chat.encoded import Encoded
from qwen_chat.chat.format import ChatFormat
from qwen_chat.errors import ModelError
from qwen_chat.export.layerwise import LayerwiseModel
from qwen_chat.export.merged_model import Comparison, merge_model
from qwen_chat.weights import stored_tensors
from tests.support.tiny_families import tiny_conditional, tiny_family

PROMPTS = torch.randint(0, 500, (50, 9), generator=torch.Generator().manual_seed(5))
SEQUENCES = [
    Encoded(torch.randint(0, 500, (n,), generator=torch.Generator().manual_seed(n)).tolist(), [(3, n)])
    for n in (20, 33, 7)
]


@dataclass
class Made:
    base: Path
    adapter: Path
    model: Any  # base and adapter in float32


def adapted(folder: Path, family: str, dtype: torch.dtype = torch.float32, **config: Any) -> Made:
    """A tiny base, an adapter over it whose every value matters, and both in memory."""
    model = tiny_conditional(family) if family == "qwen3_5" else tiny_family(family)
    model.to(dtype).save_pretrained(folder / "base")
    wanted = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    peft = get_peft_model(model.float(), LoraConfig(**wanted)).eval()
    torch.manual_seed(1)
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    peft.peft_config["default"].base_model_name_or_path = str(folder / "base")
    peft.save_pretrained(folder / "adapter")
    return Made(folder / "base", folder / "adapter", peft)


def merged(made: Made, folder: Path, *, four_bits: bool = False) -> tuple[Comparison, Any, bool]:
    """The comparison, the merged model as transformers loads it, and whether its head was parted."""
    folder.mkdir()
    found, parted = merge_model(made.base, [made.adapter], [1.0], SEQUENCES, folder, four_bits=four_bits)
    config = json.loads((made.base / "config.json").read_text())
    config["tie_word_embeddings"] = config["tie_word_embeddings"] and not parted
    (folder / "config.json").write_text(json.dumps(config))
    loader = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
    return found, loader.from_pretrained(folder, dtype=torch.float32).eval(), parted


def difference(model: Any, made: Made) -> float:
    """Of the logits, divided by the largest; and the greedy tokens are the same."""
    with torch.no_grad():
        wanted, found = made.model(input_ids=PROMPTS).logits, model(input_ids=PROMPTS).logits
    return float((found - wanted).abs().max() / wanted.abs().max())


def greedy(model: Any) -> torch.Tensor:
    ids: torch.Tensor = model.generate(
        input_ids=PROMPTS, attention_mask=torch.ones_like(PROMPTS), max_new_tokens=6, do_sample=False
    )
    return ids


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("qwen2_slide", {}),
    "dora": ("qwen2_slide", {"use_dora": True}),
    "rslora": (
        "qwen3_slide",
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    ),
    "pissa": ("mistral", {"init_lora_weights": "pissa"}),
    "biases": ("qwen2_slide", {"bias": "all"}),
    "token_rows": ("qwen2_slide", {"trainable_token_indices": [3, 5]}),
    "experts": ("qwen3_moe", {}),
    "hybrid": ("qwen3_next", {}),
    "sees": ("qwen3_5", {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_the_adapter(kind: str, tmp_path: Path) -> None:
    family, config = KINDS[kind]
    made = adapted(tmp_path, family, **config)
    found, model, parted = merged(made, tmp_path / "merged")
    assert found.logit_difference <= 1e-4 and found.top1_agreement == 1.0
    assert found.adapter_loss == pytest.approx(found.merged_loss, abs=1e-4)
    assert difference(model, made) <= 1e-4
    assert torch.equal(greedy(model), greedy(made.model))
    assert not parted, "tied embeddings stay tied"
    assert set(stored_tensors(tmp_path / "merged")) == set(stored_tensors(made.base))


@pytest.mark.parametrize(
    "config", [{"target_modules": ["embed_tokens", "q_proj"]}, {"modules_to_save": ["lm_head"]}]
)
def test_an_adapter_over_one_of_two_that_share_a_weight_parts_them(
    config: dict[str, Any], tmp_path: Path
) -> None:
    made = adapted(tmp_path, "qwen3_slide", **config)
    found, model, parted = merged(made, tmp_path / "merged")
    assert parted and found.logit_difference <= 1e-5
    assert "lm_head.weight" in stored_tensors(tmp_path / "merged")
    rows, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert not torch.equal(rows, head)


def test_q_lora_is_compared_over_four_bits_too(tmp_path: Path) -> None:
    """bitsandbytes' own layers over the same base give the loss that is told."""
    from transformers import BitsAndBytesConfig

    made = adapted(tmp_path, "qwen3_slide")
    found, model, _ = merged(made, tmp_path / "merged", four_bits=True)
    assert difference(model, made) <= 1e-5 and torch.equal(greedy(model), greedy(made.model))
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32, quantization_config=four)
    for module in base.modules():  # as it is loaded for training
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    trained = PeftModel.from_pretrained(base, made.adapter).eval()
    total = count = 0.0
    for one in SEQUENCES:
        labels = torch.tensor([one.labels])
        with torch.no_grad():
            logits = trained(input_ids=torch.tensor([one.input_ids])).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum"))
        count += int((labels[0, 1:] != -100).sum())
    assert found.four_bit_loss == pytest.approx(total / count, abs=2e-3)
    assert abs(found.four_bit_loss - (found.merged_loss or 0)) > 0.01


def test_weights_stay_in_the_bases_type_and_the_rest_bit_for_bit(tmp_path: Path) -> None:
    made = adapted(tmp_path, "qwen3_slide", torch.bfloat16, target_modules=["q_proj"])
    found, model, _ = merged(made, tmp_path / "merged")
    assert (found.dtype, found.tolerance) == ("bfloat16", 5e-2)
    assert 0 < found.logit_difference <= 2e-2
    assert difference(model, made) <= 2e-2
    before, after = stored_tensors(made.base), stored_tensors(tmp_path / "merged")
    changed = {name for name in before if not torch.equal(before[name].read(), after[name].read())}
    assert changed == {f"model.layers.{k}.self_attn.q_proj.weight" for k in range(3)}
    assert {stored.dtype for stored in after.values()} == {torch.bfloat16}


def test_adapters_add_up_by_their_weights(tmp_path: Path) -> None:
    made = adapted(tmp_path, "qwen3_slide")
    (tmp_path / "merged").mkdir()
    merge_model(made.base, [made.adapter, made.adapter], [0.7, 0.3], SEQUENCES, tmp_path / "merged")
    (tmp_path / "merged" / "config.json").write_bytes((made.base / "config.json").read_bytes())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert difference(model, made) <= 1e-5
    dora = adapted(tmp_path / "dora", "qwen3_slide", use_dora=True)
    with pytest.raises(ModelError, match="use_dora in its config; only plain LoRA adapters add up"):
        LayerwiseModel(dora.base, [dora.adapter, dora.adapter], [1.0, 1.0])


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    made = adapted(tmp_path / "a", "qwen3_slide")
    other = adapted(tmp_path / "b", "qwen2_slide")
    with pytest.raises(ModelError, match=r"does not fit this model|has no place in this model"):
        LayerwiseModel(other.base, [made.adapter], [1.0])
    file = made.base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="it has not come down whole"):
        stored_tensors(made.base)


def test_a_merge_that_moves_the_logits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = adapted(tmp_path, "qwen3_slide")
    honest = LayerwiseModel.merge

    def slips(self: LayerwiseModel, part: str) -> None:
        honest(self, part)
        if part == self.layers[1]:
            list(self.core.get_submodule(part).parameters())[-1].data *= 1.01

    monkeypatch.setattr(LayerwiseModel, "merge", slips)
    (tmp_path / "merged").mkdir()
    with pytest.raises(ModelError, match=r"logits differ by .*expected at most 1e-04 for float32"):
        merge_model(made.base, [made.adapter], [1.0], SEQUENCES, tmp_path / "merged")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["lora", "dora", "rslora", "pissa", "q_lora"])
def test_the_demo_model_merged_is_the_adapter(
    kind: str, demo_model_path: Path, demo_tokenizer: Any, tmp_path: Path
) -> None:
    """Logits and greedy tokens after 50 real prompts. For Q-LoRA the adapter is over the unquantised base."""
    model = AutoModelForCausalLM.from_pretrained(demo_model_path, dtype=torch.float32)
    config: dict[str, Any] = {} if kind == "q_lora" else KINDS[kind][1]
    config = {**config, "rank_pattern": {}, "alpha_pattern": {}, "target_modules": "all-linear"}
    peft = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **config)).eval()
    torch.manual_seed(1)
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn_like(parameter)
    peft.save_pretrained(tmp_path / "adapter")
    made = Made(demo_model_path, tmp_path / "adapter", peft)
    found, after, parted = merged(made, tmp_path / "merged", four_bits=kind == "q_lora")
    assert found.logit_difference <= found.tolerance and not parted
    assert (found.four_bit_loss is not None) == (kind == "q_lora")
    fmt = ChatFormat(demo_tokenizer)
    asked = [
        fmt.prompt_ids(case.messages) for case in cases(fmt) if not case.tools and len(case.messages) < 4
    ]
    answers = []
    for prompt in (torch.tensor([ids]) for ids in asked[:50]):
        with torch.no_grad():
            wanted, got = (each(input_ids=prompt).logits for each in (peft, after))
        assert float((got - wanted).abs().max() / wanted.abs().max()) <= found.tolerance
        ends = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
        first, second = (each.generate(input_ids=prompt, **ends) for each in (peft, after))
        assert torch.equal(first, second)
        answers.append(first[0, prompt.shape[1] :].tolist())
    assert len({tuple(answer) for answer in answers}) > 25, (
        "the answers would be the same whatever was merged"
    )


def test_each_of_several_adapters_is_held_to_the_same(tmp_path: Path) -> None:
    made = adapted(tmp_path, "qwen3_slide")
    broken = Path(shutil.copytree(made.adapter, tmp_path / "broken"))
    file = broken / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(dict(list(tensors.items())[2:]), file)
    with pytest.raises(ModelError, match=r"broken/adapter_model.safetensors: .* is missing \(2 such\)"):
        LayerwiseModel(made.base, [made.adapter, broken], [1.0, 1.0])
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="it has not come down whole"):
        LayerwiseModel(made.base, [made.adapter, broken], [1.0, 1.0])
    config = json.loads((broken / "adapter_config.json").read_text())
    for start, told in (("pissa", "only plain LoRA adapters add up"), ("loftq", "which changed its base")):
        (broken / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": start}))
        with pytest.raises(ModelError, match=told):
            LayerwiseModel(made.base, [made.adapter, broken], [1.0, 1.0])


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    made = adapted(tmp_path, "qwen3_slide")
    file = made.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, file)
    (tmp_path / "merged").mkdir()
    with pytest.raises(ModelError, match="not finite after merging; the adapter or its base is damaged"):
        merge_model(made.base, [made.adapter], [1.0], SEQUENCES, tmp_path / "merged")


def test_tokens_beyond_the_rows_are_told(tmp_path: Path) -> None:
    made = adapted(tmp_path, "qwen3_slide")
    (tmp_path / "merged").mkdir()
    with pytest.raises(ModelError, match="writes token 600, its model has 512 rows"):
        merge_model(made.base, [made.adapter], [1.0], [Encoded([1, 600], [(1, 2)])], tmp_path / "merged")
