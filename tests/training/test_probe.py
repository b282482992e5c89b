"""The probe before the first step: every family that works passes, whatever leaks, scales or caps is refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from qwen_chat import families, models
from qwen_chat.errors import ModelError
from qwen_chat.training import attention, delta_net, probe
from tests.support.tiny_models import FAMILIES, VISION, engine, mixed_data, tiny_model

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DELTA = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MORE: dict[str, dict[str, Any]] = {
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": EXPERTS,
    "qwen3_next": EXPERTS | DELTA | {"shared_expert_intermediate_size": 16},
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": EXPERTS | DELTA | {"shared_expert_intermediate_size": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "granite": {"logits_scaling": 8.0},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
LAYOUTS = ("shared_prefix", "packed", "padded")
LEAK = "hidden states of one conversation move"
LOSS = "the loss of a row is off"


def family(name: str) -> Any:
    """As tuned_model makes it ready."""
    attention.register()
    torch.manual_seed(7)
    kind: Any = AutoModelForCausalLM
    shape = SHAPE | MORE.get(name, {})
    if name in ("qwen3_5", "qwen3_5_moe"):
        kind = AutoModelForImageTextToText
        shape = {"text_config": SHAPE | MORE[f"{name}_text"], "vision_config": VISION}
    config = AutoConfig.for_model(name, **shape)
    model = kind.from_config(config, attn_implementation="qwen_chat").float().train()
    delta_net.keep_apart(model)
    return model


def with_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear"))
    wrapped.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped.enable_input_require_grads()
    return wrapped.train()


@pytest.mark.parametrize("name", families.TRAINABLE)
def test_what_works_passes_by_far(name: str) -> None:
    """Full, and LoRA with dropout, under gradient checkpointing."""
    model = family(name)
    found = [probe.measure(model, layout) for layout in LAYOUTS[:2]]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found.append(probe.measure(model, "padded"))
    if "moe" not in name and name != "qwen3_next":  # peft: fused expert weights take no dropout
        model = with_lora(model)
    found.append(probe.measure(model, "shared_prefix"))
    has_experts = "moe" in name or name == "qwen3_next"
    for one in found:
        assert isinstance(one, probe.Difference)
        assert one.loss < probe.LOSS / 10 and one.gradient < probe.GRADIENT / 50
        assert one.moved < probe.bounds(model).moved / 5 if has_experts else one.moved == 0
    assert probe.prove(model, "shared_prefix").startswith("probe: in a row as alone (loss ")


@pytest.mark.parametrize("name", families.TRAINABLE)
def test_layouts_agree_on_the_loss_of_the_first_step(name: str) -> None:
    model = family(name)
    data = mixed_data()[:5]
    loss = [engine(model, data, layout, batch_size=len(data), accumulation=1)[0] for layout in LAYOUTS]
    assert max(loss) - min(loss) < 1e-5 * min(loss)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("lfm2", LEAK),
        ("falcon_h1", LEAK),
        ("stablelm", LEAK),
        ("bloom", LEAK),
        ("cohere", LOSS),
        ("granite", LOSS),
        ("gemma2", "'softcap'"),
        ("gpt_oss", "'s_aux'"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(name: str, what: str) -> None:
    with pytest.raises(ModelError, match=what) as caught:
        probe.prove(family(name), "packed")
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------- planted in a Qwen2


class Leaky(torch.nn.Module):
    """A layer's MLP with something beside it that goes from token to token."""

    def __init__(self, mlp: torch.nn.Module, kind: str, share: float = 1e-2) -> None:
        super().__init__()
        self.mlp, self.kind, self.share = mlp, kind, share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "convolution":
            past = torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
        else:  # a state that fades by half with each token
            at = torch.arange(x.shape[1])
            past = (0.5 ** (at[:, None] - at[None, :]).clamp_min(0)).tril().to(x.dtype) @ x
        return self.mlp(x) + self.share * past


def planted(kind: str) -> Any:
    model = tiny_model("qwen2", dtype=torch.float32)
    layer = model.model.layers[1]
    own = {"layer": layer.forward, "model": model.forward}

    def logits_through(change: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = own["model"](*args, **kwargs)
            output.logits = change(output.logits)
            return output

        return forward

    if kind in ("convolution", "recurrent state"):
        layer.mlp = Leaky(layer.mlp, kind)
    elif kind == "keywords not passed on":
        layer.forward = lambda *args, segments=None, **kwargs: own["layer"](*args, **kwargs)
    elif kind == "scaled":
        model.forward = logits_through(lambda logits: logits / 8)
    elif kind == "capped":
        model.forward = logits_through(lambda logits: 30 * torch.tanh(logits / 30))
    elif kind == "head not called":
        model.forward = lambda input_ids, logits_to_keep=0, **kwargs: SimpleNamespace(
            logits=model.model(input_ids, use_cache=False)[0] @ model.lm_head.weight.T
        )
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("convolution", LEAK),
        ("recurrent state", LEAK),
        ("keywords not passed on", LEAK),
        ("scaled", LOSS),
        ("capped", LOSS),
        ("head not called", "does not call its output head"),
    ],
)
def test_a_planted_fault_is_refused(kind: str, what: str, layout: str) -> None:
    with pytest.raises(ModelError, match=what):
        probe.prove(planted(kind), layout)
    probe.prove(planted("none"), layout)


def test_the_faintest_leak_is_seen() -> None:
    """Where nothing but rounding is at work nothing moves at all: a millionth part of a state is a leak."""
    model = tiny_model("qwen3", dtype=torch.float32)
    layer = model.model.layers[1]
    layer.mlp = Leaky(layer.mlp, "recurrent state", 1e-6)
    found = probe.measure(model, "packed")
    assert isinstance(found, probe.Difference)
    assert 0 < found.moved < 1e-5 and found.loss < probe.LOSS
    with pytest.raises(ModelError, match=LEAK):
        probe.prove(model, "packed")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"])
def test_one_delta_net_that_runs_over_the_row_is_refused(name: str, layout: str) -> None:
    model = family(name)
    layer = model.model.layers[1].linear_attn
    layer.forward = layer._without_rows
    with pytest.raises(ModelError, match=LEAK):
        probe.prove(model, layout)


def test_kernels_that_run_over_the_row_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel of an older release may not take the boundaries, and transformers drops what one does not take."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

    def forgetful(kernel: Any) -> Any:
        def call(*args: Any, cu_seqlens: Any = None, seq_idx: Any = None, **kwargs: Any) -> Any:
            return kernel(*args, **kwargs)

        return call

    model = family("qwen3_5_text").bfloat16()
    line = probe.prove(model, "shared_prefix")
    assert "; a float32 copy of 2 layers, " in line
    monkeypatch.setattr(delta_net, "_has_kernels", lambda device: True)
    for name in ("torch_chunk_gated_delta_rule", "causal_conv1d_fn"):
        monkeypatch.setattr(modeling, name, forgetful(getattr(modeling, name)))
    with pytest.raises(ModelError, match=LEAK) as caught:
        probe.prove(model, "shared_prefix")
    assert "(at most 2e-02, 2e-02, 2e-02)" in str(caught.value)


def test_the_line_names_the_type_the_figures_and_what_works() -> None:
    with pytest.raises(ModelError) as caught:
        probe.prove(planted("scaled"), "packed")
    text = str(caught.value)
    assert text.startswith("model type 'qwen2' cannot be trained in rows of several conversations (packed): ")
    assert text.endswith(
        "(at most 0e+00, 1e-05, 1e-03); model types that work: " + ", ".join(families.TRAINABLE)
    )


def test_a_branch_that_reaches_its_sibling_is_refused() -> None:
    """Under a shared prefix: the state after one branch goes into the next, and nothing else is wrong."""
    model = planted("none")
    mlp = model.model.layers[0].mlp
    own = mlp.forward
    start = 2 * probe.LENGTH  # where the last sequence's own tokens begin

    def forward(x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 1:
            return own(x)
        return own(torch.cat([x[:, :start], x[:, start:] + 1e-2 * x[:, start - 1 : start]], 1))

    mlp.forward = forward
    with pytest.raises(ModelError, match=LEAK):
        probe.prove(model, "shared_prefix")


# ------------------------------------------------------------------------------------------------ the copy


@pytest.mark.parametrize("why", ["half precision", "cut up by ZeRO-3"])
def test_a_copy_stands_in_where_the_model_cannot_be_judged_itself(why: str) -> None:
    def stand_in(name: str) -> Any:
        model = family(name)
        if why == "half precision":
            return model.bfloat16()
        for parameter in model.parameters():  # as deepspeed.zero.Init leaves it
            parameter.ds_id, parameter.data = 0, torch.empty(0)
        return model

    assert "; a float32 copy of 2 layers, " in probe.prove(stand_in("qwen3"), "shared_prefix")
    for name in ("qwen3_5_text", "qwen3_5_moe"):
        assert "; a float32 copy of 2 layers, " in probe.prove(stand_in(name), "shared_prefix")
    for name in ("lfm2", "cohere"):
        with pytest.raises(ModelError, match="cannot be trained in rows"):
            probe.prove(stand_in(name), "packed")


def test_a_copy_of_four_bits(tmp_path: Any) -> None:
    family("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=models._four_bits(torch.float32), attn_implementation="qwen_chat"
    )
    assert "; a float32 copy of 2 layers, " in probe.prove(with_lora(model), "shared_prefix")


def test_a_copy_has_every_kind_of_layer() -> None:
    config = AutoConfig.for_model(
        "qwen3_next", **(SHAPE | MORE["qwen3_next"] | {"num_hidden_layers": 8, "intermediate_size": 512})
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="qwen_chat").bfloat16()
    small = probe._small_copy(model)
    assert sorted(small.config.layer_types) == ["full_attention", "linear_attention"]
    assert small.config.hidden_size == 32 and small.dtype == torch.float32
    assert small.config.intermediate_size == probe.NARROW < model.config.intermediate_size
    assert model.config.num_hidden_layers == 8 and len(model.config.layer_types) == 8


def test_where_it_cannot_run_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("qwen2").bfloat16()
    monkeypatch.setattr(type(model), "__init__", lambda self, config: 1 / 0)
    said = probe.prove(model, "packed")
    assert said == (
        "not probed: no small copy of 'qwen2' can be made (division by zero); rows are taken on trust"
    )
    model = tiny_model("llama", dtype=torch.float32)
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    assert probe.prove(model, "packed").startswith(
        "not probed: 'llama' alone gives nothing to compare with (loss nan, gradient nan)"
    )


# ----------------------------------------------------------------------------------------------- no trace


@pytest.mark.parametrize("exact", [True, False], ids=["itself", "copy"])
def test_it_leaves_no_trace(exact: bool) -> None:
    model = with_lora(family("qwen3"))
    model = model if exact else model.bfloat16()
    model.config._attn_implementation = "qwen_chat"

    def state() -> list[Any]:
        return [
            {name: tensor.clone() for name, tensor in model.state_dict().items()},
            [buffer.clone() for buffer in model.buffers()],
            [(p.requires_grad, p.grad) for p in model.parameters()],
            [module.training for module in model.modules()],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
            [vars(m).get("forward") for m in model.modules()],
            [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")],
            torch.get_rng_state(),
        ]

    before = state()
    probe.prove(model, "shared_prefix")
    torch.testing.assert_close(state()[0], before[0], rtol=0, atol=0)
    torch.testing.assert_close(state()[1], before[1], rtol=0, atol=0)
    assert state()[2:7] == before[2:7]
    assert torch.equal(state()[7], before[7])


def test_it_is_the_same_on_every_rank() -> None:
    """No collective is called, and every rank finds the same figures: none waits for another."""
    found = [probe.measure(tiny_model(name), "shared_prefix") for name in FAMILIES for _ in range(2)]
    assert found[::2] == found[1::2]
