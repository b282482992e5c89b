"""Each kind of adapter learns; saved and loaded it is what it was in memory; merged it is the same."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_chat import models
from qwen_chat.errors import ModelError, OptionError
from qwen_chat.flags.run_options import LoraArguments
from qwen_chat.training import adapters

PLAIN = LoraArguments(use_lora=True, lora_r=4, lora_alpha=8, lora_dropout=0.0)
IDS = torch.arange(300, 340)[None]
KINDS = {
    "plain": PLAIN,
    "bias_all": replace(PLAIN, lora_bias="all"),
    "bias_lora_only": replace(PLAIN, lora_bias="lora_only"),
    "rslora": replace(PLAIN, use_rslora=True),
    "dora": replace(PLAIN, use_dora=True),
    "pissa": replace(PLAIN, lora_init="pissa"),
    "pissa_fast": replace(PLAIN, lora_init="pissa_niter_4"),
    "pissa_rslora": replace(PLAIN, lora_init="pissa", use_rslora=True),
    "pissa_dora": replace(PLAIN, lora_init="pissa", use_dora=True),
    "tokens": replace(PLAIN, trainable_tokens=("<|im_start|>", "<|im_end|>")),
    "qlora": replace(PLAIN, q_lora=True),
}


def load(path: Path, lora: LoraArguments) -> models.Loaded:
    return models.load_model(path, quantize="nf4" if lora.q_lora else None, for_training=True)


def wrapped(path: Path, lora: LoraArguments) -> adapters.Wrapped:
    torch.manual_seed(0)
    loaded = load(path, lora)
    return adapters.wrap(loaded.model, lora, loaded.tokenizer)


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS).logits.float()
    return out


def learn(model: Any, steps: int = 8, groups: Any = None) -> list[float]:
    """Overfit one row; the losses."""
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(groups or learnt, lr=1e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def saved_and_loaded(path: Path, wrap: adapters.Wrapped, lora: LoraArguments, folder: Path) -> Any:
    adapters.save_adapter(wrap.model, folder, base=str(path), initial=wrap.initial)
    return models.load_adapter(load(path, lora).model, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_learns_and_survives_a_save(kind: str, tiny_model_path: Path, tmp_path: Path) -> None:
    lora = KINDS[kind]
    wrap = wrapped(tiny_model_path, lora)
    before = logits(load(tiny_model_path, lora).model)
    torch.testing.assert_close(logits(wrap.model), before, atol=2e-5, rtol=1e-4)
    losses = learn(wrap.model)
    assert losses[-1] < losses[0] - 0.05, losses
    after = logits(wrap.model)
    assert float((after - before).abs().max()) > 1e-3
    loaded = saved_and_loaded(tiny_model_path, wrap, lora, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), after, atol=2e-5, rtol=1e-4)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model_path)
    assert config["init_lora_weights"] is True
    assert not (tmp_path / "adapter" / "README.md").exists()


def test_pissa_beside_an_adapter_over_the_embeddings(tiny_model_path: Path, tmp_path: Path) -> None:
    lora = replace(PLAIN, lora_init="pissa", lora_target_modules=("q_proj", "embed_tokens"))
    wrap = wrapped(tiny_model_path, lora)
    learn(wrap.model, steps=3)
    loaded = saved_and_loaded(tiny_model_path, wrap, lora, tmp_path)
    torch.testing.assert_close(logits(loaded), logits(wrap.model), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "qlora"])
def test_merged_is_the_same_model(kind: str, tiny_model_path: Path) -> None:
    wrap = wrapped(tiny_model_path, KINDS[kind])
    learn(wrap.model, steps=3)
    before = logits(wrap.model)
    merged, difference = adapters.merge(wrap.model, IDS[0].tolist())
    assert difference < 1e-5
    assert not hasattr(merged, "peft_config")
    torch.testing.assert_close(logits(merged), before, atol=1e-4, rtol=1e-4)


def test_a_merge_that_is_not_exact_is_refused(tiny_model_path: Path) -> None:
    wrap = wrapped(tiny_model_path, PLAIN)
    learn(wrap.model, steps=3)
    with pytest.raises(ModelError, match="merge over the base in float32"):
        adapters.merge(wrap.model, IDS[0].tolist(), tolerance=-1.0)


def test_which_biases_are_trained(tiny_model_path: Path) -> None:
    def biases(kind: str) -> int:
        named = wrapped(tiny_model_path, KINDS[kind]).model.named_parameters()
        return sum(p.requires_grad for name, p in named if name.endswith("bias"))

    assert (biases("plain"), biases("bias_all"), biases("bias_lora_only")) == (0, 6, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_that_is_trained_over_a_half_precision_base_is_float32(
    dtype: torch.dtype, tiny_model_path: Path, tmp_path: Path
) -> None:
    loaded = models.load_model(tiny_model_path, dtype=dtype, for_training=True)
    model = adapters.wrap(loaded.model, KINDS["bias_all"], loaded.tokenizer).model
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}
    (name, bias), *_ = ((n, p) for n, p in model.named_parameters() if n.endswith("q_proj.base_layer.bias"))
    torch.nn.init.constant_(bias, 10.0)
    optimizer = torch.optim.AdamW([bias], lr=2e-4, weight_decay=0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    optimizer.step()
    moved = 10.0 - bias.detach()[bias.grad != 0]
    assert len(moved) and torch.allclose(moved.abs(), torch.full_like(moved, 2e-4), atol=2e-6), name


MIXTURES = ("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text")
EXPERTS = replace(PLAIN, trainable_tokens=(), lora_target_modules=("all-linear", "experts"))
SHORT = torch.arange(3, 40)[None]


def mixture(kind: str) -> Any:
    """Four layers, four experts, of which each token takes two."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from qwen_chat.training import attention

    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    sizes |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "head_dim": 8}
    sizes |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    sizes |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "initializer_range": 0.2}
    torch.manual_seed(7)
    config = AutoConfig.for_model(kind, **sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention.register()).float()


def over(kind: str, lora: LoraArguments) -> adapters.Wrapped:
    tokenizer: Any = None
    return adapters.wrap(mixture(kind), lora, tokenizer)


def parts(model: Any) -> set[str]:
    """The last names of what has an adapter in a layer; a fused tensor's is that of its wrapper."""
    names = [name for name, _ in model.named_parameters() if ".lora_A." in name]
    return {name.partition(".lora_A.")[0].removesuffix(".base_layer").rpartition(".")[2] for name in names}


ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj", "shared_expert_gate"}
LINEAR = {
    "qwen2_moe": ATTENTION | MLP,
    "qwen3_moe": ATTENTION,
    "qwen3_next": ATTENTION | {"in_proj_qkvz", "in_proj_ba", "out_proj", "shared_expert_gate"},
    "qwen3_5_moe_text": ATTENTION | MLP | {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"},
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_what_of_a_mixture_is_adapted(kind: str) -> None:
    plain = over(kind, replace(EXPERTS, lora_target_modules=("all-linear",), lora_dropout=0.05))
    assert parts(plain.model) == LINEAR[kind]
    size = 4 * 4 * (32 * 32 + 32 * 16)
    assert plain.decisions[0] == (
        f"no adapter over the experts ({size:,} parameters stay as they are);"
        " --lora_target_modules all-linear experts --lora_dropout 0 trains them too"
    )
    shared = "shared_expert.down_proj, shared_expert.gate_proj, shared_expert.up_proj"
    note = f"no adapter over {shared} (peft takes these names for the experts')"
    assert (note in plain.decisions) is (kind == "qwen3_next")
    both = over(kind, EXPERTS)
    assert parts(both.model) == LINEAR[kind] | {"experts"}
    assert not [line for line in both.decisions if "the experts (" in line]
    assert parts(over(kind, replace(EXPERTS, lora_target_modules=("q_proj,experts",))).model) == {
        "q_proj",
        "experts",
    }


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("targets", [("all-linear", "experts"), ("experts",)])
def test_an_adapter_over_experts_is_saved_loaded_and_merged(
    kind: str, targets: tuple[str, ...], tmp_path: Path
) -> None:
    def logits_of(model: Any) -> torch.Tensor:
        model.eval()
        with torch.no_grad():
            out: torch.Tensor = model(input_ids=SHORT).logits
        return out

    wrap = over(kind, replace(EXPERTS, lora_target_modules=targets))
    before = logits_of(mixture(kind))
    torch.testing.assert_close(logits_of(wrap.model), before, atol=1e-5, rtol=1e-5)
    optimizer = torch.optim.AdamW([p for p in wrap.model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = wrap.model.train()(input_ids=SHORT, labels=SHORT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05, losses
    after = logits_of(wrap.model)
    assert float((after - before).abs().max()) > 1e-2
    adapters.save_adapter(wrap.model, tmp_path, base="a/base")
    torch.testing.assert_close(logits_of(models.load_adapter(mixture(kind), tmp_path)), after)
    merged, difference = models.merge(wrap.model, SHORT[0].tolist())
    assert difference < 1e-4
    torch.testing.assert_close(logits_of(merged), after, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", MIXTURES[:2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_layouts_agree_where_experts_learn(kind: str, checkpointing: bool) -> None:
    """Loss and gradients of a step in each layout are those of each conversation alone; torch groups the experts'
    products in single precision at most."""
    from tests.support.tiny_models import engine, mixed_data, reference, relative

    model = over(kind, EXPERTS).model.train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    data = mixed_data()
    loss, gradient = reference(model, data)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    for layout in ("shared_prefix", "packed", "padded"):
        found, _, gradients = engine(model, data, layout, 4, 3)
        assert abs(found / loss - 1) < 1e-6 and relative(gradients, gradient) < 1e-4


def test_what_peft_cannot_do_with_experts_is_told() -> None:
    with pytest.raises(OptionError, match=r"^--lora_dropout 0\.05: .* give --lora_dropout 0$"):
        over("qwen3_moe", replace(EXPERTS, lora_dropout=0.05))
    with pytest.raises(OptionError, match=r"^--lora_init pissa: peft cannot take apart"):
        over("qwen3_moe", replace(EXPERTS, lora_init="pissa"))


def test_a_model_without_experts_has_none_to_adapt(tiny_model_path: Path) -> None:
    with pytest.raises(
        OptionError, match=r"^--lora_target_modules all-linear experts: this model has no exp"
    ):
        wrapped(tiny_model_path, EXPERTS)


def test_bias_of_the_adapted_layers_only(tiny_model_path: Path) -> None:
    lora = replace(PLAIN, lora_bias="lora_only", lora_target_modules=("q_proj", "up_proj"))
    named = wrapped(tiny_model_path, lora).model.named_parameters()
    trained = [name for name, p in named if p.requires_grad and name.endswith("bias")]
    assert [name.split(".")[-3] for name in trained] == ["q_proj", "q_proj"]


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [
        (("all-linear",), {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (("q_proj", "v_proj"), {"q_proj", "v_proj"}),
        (("q_proj,v_proj",), {"q_proj", "v_proj"}),
        (("o_proj",), {"o_proj"}),
        ((r".*layers\.1\.mlp\.(up|down)_proj",), {"up_proj", "down_proj"}),
    ],
)
def test_which_layers_are_adapted(targets: tuple[str, ...], adapted: set[str], tiny_model_path: Path) -> None:
    model = wrapped(tiny_model_path, replace(PLAIN, lora_target_modules=targets)).model
    names = [name for name, p in model.named_parameters() if "lora_A" in name]
    assert {name.split(".")[-4] for name in names} == adapted
    if "layers" in targets[0]:
        assert all(".layers.1." in name for name in names)


def test_targets_that_name_no_layer(tiny_model_path: Path) -> None:
    with pytest.raises(OptionError, match="--lora_target_modules nothing_here"):
        wrapped(tiny_model_path, replace(PLAIN, lora_target_modules=("nothing_here",)))


def test_a_base_model_learns_its_chat_marks(tiny_model_path: Path) -> None:
    loaded = load(tiny_model_path, PLAIN)
    assert adapters.trainable_rows(loaded.model, loaded.tokenizer, ("auto",)) == ([], "")
    loaded.model.generation_config.eos_token_id = loaded.model.config.eos_token_id = 0
    rows, reason = adapters.trainable_rows(loaded.model, loaded.tokenizer, ("auto",))
    assert rows == [1, 2]
    assert reason == (
        "embedding rows of <|im_start|> <|im_end|> are trained (a base model: it does not end on <|im_end|> yet)"
    )
    assert adapters.trainable_rows(loaded.model, loaded.tokenizer, ("none",)) == ([], "")
    with pytest.raises(
        OptionError, match=r"--trainable_tokens <\|nothing\|>: not in the tokenizer's vocabulary"
    ):
        adapters.trainable_rows(loaded.model, loaded.tokenizer, ("<|nothing|>",))


def test_only_the_named_rows_change(tiny_model_path: Path) -> None:
    wrap = wrapped(tiny_model_path, KINDS["tokens"])
    old = load(tiny_model_path, PLAIN).model.get_input_embeddings().weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in wrap.model.parameters() if p.requires_grad], lr=1.0)
    ids = torch.tensor([[1, 300, 301, 2, 1, 302, 2]])
    wrap.model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    merged, _ = adapters.merge(wrap.model, IDS[0].tolist())
    changed = (merged.get_input_embeddings().weight.detach() != old).any(dim=1).nonzero().flatten().tolist()
    assert changed == [1, 2]


def test_a_head_of_its_own_learns_the_named_rows_too(tiny_model_path: Path, tmp_path: Path) -> None:
    loaded = load(tiny_model_path, PLAIN)
    model = loaded.model
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    old = [layer.weight.detach().clone() for layer in (model.get_input_embeddings(), model.lm_head)]
    wrap = adapters.wrap(model, KINDS["tokens"], loaded.tokenizer)
    ids = torch.tensor([[1, 300, 301, 2, 1, 302, 2]])
    optimizer = torch.optim.SGD([p for p in wrap.model.parameters() if p.requires_grad], lr=1.0)
    wrap.model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    merged, _ = adapters.merge(wrap.model, IDS[0].tolist())
    for layer, before in zip((merged.get_input_embeddings(), merged.lm_head), old, strict=True):
        changed = (layer.weight.detach() != before).any(dim=1).nonzero().flatten().tolist()
        assert changed == [1, 2]


def test_an_adapter_is_continued(tiny_model_path: Path, tmp_path: Path) -> None:
    wrap = wrapped(tiny_model_path, PLAIN)
    losses = learn(wrap.model)
    after = logits(wrap.model)
    adapters.save_adapter(wrap.model, tmp_path / "first", base=str(tiny_model_path))
    again = wrapped(tiny_model_path, LoraArguments(use_lora=True, lora_weight_path=str(tmp_path / "first")))
    torch.testing.assert_close(logits(again.model), after, atol=1e-6, rtol=1e-5)
    assert again.decisions[0] == f"continues {tmp_path / 'first'}"
    assert learn(again.model, steps=1)[0] < losses[-1]


def test_layers_of_an_adapter_go_on_learning_and_are_saved(tiny_model_path: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from qwen_chat.training import fused, loss, matmul

    names = ["lm_head", "mlp"]
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=names, task_type="CAUSAL_LM")
    get_peft_model(load(tiny_model_path, PLAIN).model, config).save_pretrained(tmp_path / "first")
    again = wrapped(tiny_model_path, LoraArguments(use_lora=True, lora_weight_path=str(tmp_path / "first")))
    before = logits(again.model)
    fused.install(again.model, matmul.Route("torch", "test").product)
    head = loss.ModelLoss(again.model)
    torch.testing.assert_close(logits(again.model), before, atol=1e-5, rtol=1e-4)
    learn(again.model, steps=3)
    head.remove()
    fused.remove(again.model)
    after = logits(again.model)
    assert float((after - before).abs().max()) > 1e-2
    loaded = saved_and_loaded(tiny_model_path, again, PLAIN, tmp_path / "second")
    torch.testing.assert_close(logits(loaded), after, atol=2e-5, rtol=1e-4)


def test_a_checkpoint_over_a_base_that_chance_changed_is_refused(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    wrap = wrapped(tiny_model_path, KINDS["pissa_fast"])
    wrap.model.save_pretrained(tmp_path)  # as the Trainer writes a checkpoint, for going on only
    with pytest.raises(ModelError, match=r"a checkpoint of a run with --lora_init pissa_niter_4, whose base"):
        models.load_adapter(load(tiny_model_path, PLAIN).model, tmp_path)


def test_an_adapter_over_the_wrong_base(tiny_model_path: Path, demo_model_path: Path, tmp_path: Path) -> None:
    adapters.save_adapter(wrapped(tiny_model_path, PLAIN).model, tmp_path, base="Some/Base")
    with pytest.raises(ModelError) as caught:
        models.load_model(demo_model_path, adapter=tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: does not fit this model (")
    assert str(caught.value).endswith("its base is Some/Base: give that with -m, or copy the adapter again")
    assert models.adapter_base(tmp_path) == "Some/Base"
    loaded = models.load_model(tiny_model_path, adapter=tmp_path)
    assert loaded.decisions[-1] == f"base {tiny_model_path} (the adapter names Some/Base; its shapes fit)"


def test_lora_plus_learns_b_faster(tiny_model_path: Path) -> None:
    model = wrapped(tiny_model_path, PLAIN).model
    groups = adapters.optimizer_groups(model, rate=1e-3, ratio=16.0, weight_decay=0.1)
    assert [(group["lr"], group["weight_decay"], len(group["params"])) for group in groups] == [
        (1e-3, 0.1, 14),
        (1.6e-2, 0.1, 14),
    ]
    losses = learn(model, groups=groups)
    assert losses[-1] < losses[0] - 0.05
