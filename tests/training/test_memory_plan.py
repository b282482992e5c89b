"""The memory plan: sizes are exact, the rest follows the table that was measured; verdicts and cures."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen_chat import hardware, models
from qwen_chat.errors import ModelError
from qwen_chat.flags import run_options, run_problems
from qwen_chat.training import memory_plan
from qwen_chat.training.memory_plan import GIB, Setup, Shape
from tests.support.shapes import PUBLISHED, QWEN2_5_SEVEN_BILLION
from tests.support.shapes import QWEN2_5_HALF_BILLION as CONFIG

ROOT = Path(__file__).resolve().parents[2]
HALF_BILLION = Shape.of(CONFIG)
SEVEN_BILLION = Shape.of(QWEN2_5_SEVEN_BILLION)


def run_of(*words: str) -> run_options.Run:
    return run_problems.read_run(["-d", "data.jsonl", *words])


def test_bfloat16_that_the_cpu_lacks_is_not_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    for able in (True, False):
        monkeypatch.setattr(hardware, "cpu_has_bf16", lambda able=able: able)
        assert memory_plan.setup_of(run_of("--bf16", "True"), 100, 50).half is able


@pytest.mark.parametrize(
    ("words", "able", "kind", "said"),
    [
        ([], False, "float32", []),
        ([], True, "float32", []),
        (
            ["--bf16"],
            False,
            "float32",
            ["computes in float32 (bf16 was asked for; this CPU has no bfloat16 instructions)"],
        ),
        (["--bf16"], True, "bfloat16", ["computes in bfloat16, weights stay float32 (as asked)"]),
        (["--bf16", "False"], True, "float32", []),
        (
            ["--bf16", "--deepspeed", str(ROOT / "finetune" / "ds_config_zero2.json")],
            True,
            "float32",
            ["computes in float32 (bf16 was asked for; DeepSpeed on a CPU trains in float32)"],
        ),
    ],
)
def test_the_number_type_on_a_cpu(
    words: list[str], able: bool, kind: str, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "cpu_has_bf16", lambda: able)
    assert memory_plan.number_type(run_of(*words)) == (kind, said)


@pytest.mark.parametrize(
    ("words", "able", "kind", "said"),
    [
        ([], True, "bfloat16", ""),
        (["--bf16", "False"], True, "float32", ""),
        (["--fp16", "True"], True, "float16", "as asked"),
        (["--use_lora"], False, "float16", "this accelerator has no bfloat16"),
        (["--q_lora", "--bf16"], False, "float16", "this accelerator has no bfloat16"),
        (["--use_lora", "--bf16", "False"], False, "float32", "--fp16 True takes less memory and time"),
        ([], False, "float32", "--fp16 True takes less memory and time"),
        (["--bf16"], False, "float32", "bf16 was asked for; this accelerator has none"),
        (["--use_cpu", "True", "--use_lora"], True, "float32", ""),
    ],
)
def test_the_number_type_on_a_gpu_is_the_plan_s(
    words: list[str], able: bool, kind: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "has_accelerator", lambda: True)
    monkeypatch.setattr(hardware, "gpu_has_bf16", lambda: able)
    run = run_of(*words)
    found, decisions = memory_plan.number_type(run)
    assert found == kind
    assert said in "".join(decisions) and bool(said) == bool(decisions)
    assert memory_plan.setup_of(run, 100, 50).half == (kind != "float32")


def test_what_a_gpu_has_free_may_not_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """No guess from main memory, no refusal; the way that takes less."""
    monkeypatch.setattr(hardware, "has_accelerator", lambda: True)
    monkeypatch.setattr(hardware, "gpu_free", lambda ranks: (None, "a test"))
    monkeypatch.setattr(hardware, "free_memory", lambda: 64 * GIB)  # each process loads the model there first
    verdict = memory_plan.decide(run_of("--use_lora"), SEVEN_BILLION, row=8192, supervised=8192, longest=2048)
    assert verdict.refusal is None
    assert verdict.checkpointing
    assert "what is free is not known (a test)" in verdict.line


def test_the_rank_of_a_continued_adapter_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 4}', "utf-8")
    run = run_of("--use_lora", "--lora_weight_path", str(tmp_path))
    assert memory_plan.setup_of(run, 100, 50).lora_r == 4


def test_parameters_are_the_published_counts() -> None:
    assert HALF_BILLION.parameters == 494_032_768  # Qwen2.5-0.5B
    assert SEVEN_BILLION.parameters == 7_615_616_512  # Qwen2.5-7B
    qwen3 = CONFIG | {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
    }
    qwen3 |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "attention_bias": False}
    assert Shape.of(qwen3).parameters == 596_049_920  # Qwen3-0.6B
    smol = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    smol |= {
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    }
    assert Shape.of(smol).parameters == 134_515_008  # SmolLM2-135M


def model_of(config: dict[str, Any]) -> Any:
    """What transformers makes of a config.json, without its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    fields = {k: v for k, v in config.items() if k not in ("model_type", "torch_dtype")}
    kind: Any = AutoModelForImageTextToText if "architectures" in config else AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(AutoConfig.for_model(config["model_type"], **fields))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_shape_is_counted_exactly(name: str) -> None:
    config, published = PUBLISHED[name]
    assert Shape.of(config).parameters == published
    assert sum(p.numel() for p in model_of(config).parameters()) == published


@pytest.mark.parametrize("kind", memory_plan.MIXTURES)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"decoder_sparse_step": 2, "mlp_only_layers": [3]},
        {"attention_bias": True, "qkv_bias": False},
        {"num_experts": 0, "mlp_only_layers": None},
    ],
)
def test_which_layers_have_experts(kind: str, more: dict[str, Any]) -> None:
    if kind == "mixtral" and "num_experts" in more:
        return  # it has no dense layers
    config = small(kind) | more
    if "num_experts" in more:
        del config["num_local_experts"]  # the same field for Qwen3's mixture
    shape = Shape.of(config)
    assert shape.parameters == sum(p.numel() for p in model_of(config).parameters())
    passed = [n for n in range(4) if n in shape.sparse]
    assert shape.active == shape.parameters - len(passed) * (4 - 2) * 3 * 64 * shape.expert


MIXTURE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 100,
}


DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 24,
}


def small(kind: str) -> dict[str, Any]:
    """Four layers of a family's config, with experts and recurrent layers where it has them."""
    return MIXTURE | (DELTA if kind in memory_plan.DELTA_NETS else {}) | {"model_type": kind}


@pytest.mark.parametrize("kind", memory_plan.DELTA_NETS)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"tie_word_embeddings": True, "attention_bias": True},
        {"layer_types": ["full_attention", "linear_attention", "full_attention", "linear_attention"]},
        {"full_attention_interval": 2, "linear_conv_kernel_dim": 3},
        {"decoder_sparse_step": 2, "mlp_only_layers": [3]},
    ],
)
def test_hybrids_are_counted_exactly(kind: str, more: dict[str, Any]) -> None:
    config = small(kind) | more
    assert Shape.of(config).parameters == sum(p.numel() for p in model_of(config).parameters())


@pytest.mark.parametrize("kind", memory_plan.DELTA_NETS)
def test_what_a_hybrid_s_config_leaves_out_is_transformers_default(kind: str) -> None:
    left_out = {"head_dim", "num_key_value_heads", *DELTA}
    config = {name: value for name, value in small(kind).items() if name not in left_out}
    config |= {"hidden_size": 128}
    assert Shape.of(config).parameters == sum(p.numel() for p in model_of(config).parameters())


def test_the_part_that_sees_is_frozen_weights() -> None:
    config, published = PUBLISHED["Qwen3.5-27B"]
    shape, text = Shape.of(config), Shape.of(config["text_config"])
    sees = [(name, p.numel()) for name, p in model_of(config).named_parameters() if "visual" in name]
    assert shape.vision == sum(size for _, size in sees) == published - text.parameters
    assert shape.active == shape.text == text.parameters
    assert {**vars(shape), "vision": 0, "vision_linears": 0} == vars(text)
    for method in ("full", "lora"):
        setup = Setup(method=method, half=True, device="cuda", zero=2)  # type: ignore[arg-type]
        assert memory_plan.trainable(shape, setup) == memory_plan.trainable(text, setup)
        added = memory_plan.need(shape, setup).weights - memory_plan.need(text, setup).weights
        assert added == 2 * shape.vision
    again = Setup(method="qlora", half=True, device="cuda")
    four_bits = memory_plan.need(shape, again).weights - memory_plan.need(text, again).weights
    assert four_bits < shape.vision  # its linear layers are in 4 bits too


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("outer", [True, False])
def test_whose_word_on_tied_embeddings_counts(whole: bool, inner: bool, outer: bool) -> None:
    """The outer config's where the folder is loaded whole, else its text part's."""
    text = small("qwen3_5_text") | {"tie_word_embeddings": inner}
    config = {"model_type": "qwen3_5", "tie_word_embeddings": outer, "text_config": text}
    config["vision_config"] = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 64}
    if whole:
        config["architectures"] = ["Qwen3_5ForConditionalGeneration"]
    shape = Shape.of(config)
    assert shape.parameters == sum(p.numel() for p in model_of(config).parameters())
    assert (shape.vision > 0) is whole and shape.tied is (outer if whole else inner)


def test_another_folder_that_sees_is_not_counted() -> None:
    text = CONFIG | {"model_type": "mistral"}
    config = {"model_type": "mistral3", "text_config": text, "vision_config": {"hidden_size": 1024}}
    assert Shape.of(config).parameters > 0
    whole = Shape.of(config | {"architectures": ["Mistral3ForConditionalGeneration"]})
    assert (whole.kind, whole.counted) == ("mistral3", False)
    damaged = PUBLISHED["Qwen3.5-27B"][0] | {"vision_config": {"patch_size": [16, 16]}}
    with pytest.raises(ModelError, match=r"^config\.json: "):
        Shape.of(damaged)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        *((kind, "all-linear") for kind in memory_plan.COUNTED if kind not in ("qwen3_5", "qwen3_5_moe")),
        *((kind, "all-linear experts") for kind in memory_plan.WITH_EXPERTS),
        ("qwen2_moe", "experts"),
        ("qwen2_moe", "q_proj,experts"),
        ("qwen2_moe", "q_proj gate_proj"),
        ("qwen2_moe", r".*mlp\..*_proj"),
        ("qwen3_moe", "q_proj v_proj"),
        ("qwen3_moe", "gate_proj up_proj down_proj"),
        ("qwen3_5_text", "in_proj_qkv out_proj o_proj"),
    ],
)
def test_an_adapter_is_counted_as_peft_makes_it(kind: str, targets: str) -> None:
    from qwen_chat.training import adapters

    config, words = small(kind), tuple(targets.split())
    lora = run_options.LoraArguments(
        use_lora=True, lora_r=8, lora_dropout=0, lora_target_modules=words, trainable_tokens=()
    )
    tokenizer: Any = None
    wrapped = adapters.wrap(model_of(config), lora, tokenizer).model
    learnt = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    setup = Setup(method="lora", lora_r=8, lora_targets=words)
    assert memory_plan.trainable(Shape.of(config), setup) == learnt


def test_a_mixture_needs_memory_and_disk_for_all_its_experts() -> None:
    """Of Qwen3-30B-A3B 3.35 in 30.5 thousand million weights are used for one token; all of them lie in memory."""
    shape = Shape.of(PUBLISHED["Qwen3-30B-A3B"][0])
    attention = 2 * 2048 * 4096 + 2 * 2048 * 512 + 2 * 128
    layer = attention + 2 * 2048 + 128 * 2048 + 8 * 3 * 2048 * 768
    assert shape.active == 48 * layer + 2 * 151936 * 2048 + 2048
    lora = Setup(method="lora", device="cuda", half=True, row=2048, checkpointing=True)
    assert memory_plan.need(shape, lora).weights > 2 * shape.parameters
    four_bits = memory_plan.need(shape, replace(lora, method="qlora"))
    assert four_bits.weights > 4 * 0.9 * shape.parameters  # no linear layers: experts stay float32 in 4 bits
    assert memory_plan.disk_needed(shape, run_of()) > 4 * shape.parameters
    # A router's loss keeps 6 bytes of each expert's share, for every token and layer, and sums four matrices of them.
    balanced = Shape.of(PUBLISHED["Qwen3-30B-A3B"][0] | {"output_router_logits": True})
    more = memory_plan.activations(balanced, lora) - memory_plan.activations(shape, lora)
    assert more == 2048 * 128 * (48 * 6 + 4 * 4)


@pytest.mark.parametrize(
    ("words", "ranks", "fits"),
    [
        (["--use_lora"], 1, True),
        (["--use_lora"], 8, False),  # 8 x 14.2 GiB in 64
        (["--use_lora", "--deepspeed", str(ROOT / "finetune" / "ds_config_zero3.json")], 8, True),
        (["--q_lora"], 8, True),
        (["--bf16", "False"], 3, False),  # 28.4 GiB each
    ],
)
def test_ranks_that_load_the_model_in_main_memory_are_planned(
    words: list[str], ranks: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "has_accelerator", lambda: True)
    monkeypatch.setattr(hardware, "gpu_has_bf16", lambda: True)
    monkeypatch.setattr(hardware, "gpu_free", lambda ranks: (400 * GIB, "a test"))
    monkeypatch.setattr(hardware, "free_memory", lambda: 64 * GIB)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, str(ranks))
    verdict = memory_plan.decide(run_of(*words), SEVEN_BILLION, row=1024, supervised=512, longest=512)
    assert (verdict.refusal is None) is fits
    assert fits or "of main memory a process (each loads the model there" in str(verdict.refusal)


def test_zero_1_splits_the_optimizer_alone() -> None:
    eight = Setup(method="full", device="cuda", half=True, ranks=8, row=1024)
    p = SEVEN_BILLION.parameters
    one, two = (memory_plan.need(SEVEN_BILLION, replace(eight, zero=stage)) for stage in (1, 2))
    assert one.optimizer == two.optimizer == 8 * p // 8 + 4 * p // 8
    assert (one.weights, one.gradients) == (2 * p, 2 * p)
    assert two.gradients == 2 * p // 8


def test_of_a_type_that_is_not_counted_nothing_is_guessed(tmp_path: Path) -> None:
    shape = Shape.of({"model_type": "phi3", "hidden_size": 64})
    assert not shape.counted
    verdict = memory_plan.decide(run_of(), shape, row=512, supervised=512, longest=512)
    assert verdict.refusal is None
    assert verdict.checkpointing
    assert "plan: none for a model of type 'phi3'" in verdict.line
    off = memory_plan.decide(
        run_of("--gradient_checkpointing", "False"), shape, row=1, supervised=1, longest=1
    )
    assert not off.checkpointing
    assert memory_plan.disk_needed(shape, run_of()) == 0


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_counts_agree_with_transformers_and_peft(kind: str, tied: bool) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    small = CONFIG | {"model_type": kind, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    small |= {"num_attention_heads": 4, "vocab_size": 100, "tie_word_embeddings": tied, "head_dim": 16}
    with torch.device("meta"):
        config = {k: v for k, v in small.items() if k not in ("model_type", "torch_dtype")}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))
        shape = Shape.of(small)
        assert sum(p.numel() for p in model.parameters()) == shape.parameters
        for targets, bias in (
            (("all-linear",), "none"),
            (("q_proj", "v_proj"), "none"),
            ((r".*mlp\..*_proj",), "none"),
        ):
            chosen: Any = targets[0] if len(targets) == 1 else list(targets)
            base = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))
            wrapped = get_peft_model(
                base, LoraConfig(r=8, target_modules=chosen, bias=bias, task_type="CAUSAL_LM")
            )
            learnt = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
            assert (
                memory_plan.trainable(shape, Setup(method="lora", lora_r=8, lora_targets=targets)) == learnt
            )


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize(("method", "dropout"), [("full", 0.0), ("lora", 0.0), ("lora", 0.1)])
def test_a_layer_keeps_what_autograd_saves(method: str, dropout: float, lean: bool) -> None:
    """Two models that differ by one layer: the difference of what they save, to the byte."""
    sizes = [_saved(layers, method, dropout, lean) for layers in (2, 3)]
    shape = Shape.of(_tiny(2))
    setup = Setup(method=method, lora_r=8, lora_dropout=dropout, lean=lean)  # type: ignore[arg-type]
    assert sizes[1] - sizes[0] == 64 * memory_plan.layer_bytes(shape, setup)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("qwen2_moe", {}),
        ("qwen3_moe", {}),
        ("mixtral", {}),
        ("qwen3_5_text", {"layer_types": ["full_attention"] * 4}),
        ("qwen3_next", {"layer_types": ["full_attention"] * 4}),
        ("qwen3_5_moe_text", {"layer_types": ["full_attention"] * 4}),
    ],
)
@pytest.mark.parametrize(
    ("method", "targets"), [("full", "all-linear"), ("lora", "all-linear"), ("lora", "all-linear,experts")]
)
def test_a_layer_keeps_about_what_is_planned(
    kind: str, more: dict[str, Any], method: str, targets: str
) -> None:
    """Within 2 % for each token (the loop over the experts is transformers'), and the experts made anew once."""
    config = small(kind) | more
    shape = Shape.of(config)
    if "experts" in targets and not shape.sparse:
        return
    setup = Setup(method=method, lora_r=8, lora_dropout=0, lora_targets=(targets,))  # type: ignore[arg-type]
    few, many = (
        _saved(3, method, 0.0, False, config, tokens, targets)
        - _saved(2, method, 0.0, False, config, tokens, targets)
        for tokens in (64, 96)
    )
    token = (many - few) / 32
    assert token == pytest.approx(memory_plan.layer_bytes(shape, setup), rel=0.02)
    once = memory_plan._remade(shape, setup)
    once += 4 * 2 * (shape.hidden + shape.head) if shape.gated else 0  # their norms' weights plus one
    assert few - 64 * token == pytest.approx(once, rel=0.02, abs=16)


@pytest.mark.parametrize("kind", memory_plan.DELTA_NETS)
@pytest.mark.parametrize(("method", "dropout"), [("full", 0.0), ("lora", 0.0), ("lora", 0.1)])
@pytest.mark.parametrize("lean", [True, False])
def test_a_recurrent_layer_keeps_what_is_planned(
    kind: str, method: str, dropout: float, lean: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With our own chunks, to 0.2 % for each token."""
    from qwen_chat.training import delta_net, loss

    own = loss.ModelLoss
    monkeypatch.setattr(loss, "ModelLoss", lambda model: delta_net.keep_apart(model) and own(model))
    config = small(kind) | {"layer_types": ["linear_attention"] * 4}
    setup = Setup(method=method, lora_r=8, lora_dropout=dropout, lean=lean)  # type: ignore[arg-type]
    few, many = (
        _saved(3, method, dropout, lean, config, tokens) - _saved(2, method, dropout, lean, config, tokens)
        for tokens in (64, 96)
    )
    assert (many - few) / 32 == pytest.approx(memory_plan.layer_bytes(Shape.of(config), setup), rel=0.002)


def _tiny(layers: int) -> dict[str, Any]:
    small = CONFIG | {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": layers}
    return small | {"num_attention_heads": 4, "vocab_size": 100}


def _saved(
    layers: int,
    method: str,
    dropout: float,
    lean: bool,
    config: dict[str, Any] | None = None,
    tokens: int = 64,
    targets: str = "all-linear",
) -> int:
    """Bytes that autograd keeps of one row, weights left out."""
    import torch
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from qwen_chat.training import adapters, attention, fused, matmul
    from qwen_chat.training.loss import ModelLoss

    config = (config or _tiny(layers)) | {"num_hidden_layers": layers}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:layers]
    fields = {k: v for k, v in config.items() if k not in ("model_type", "torch_dtype")}
    name = attention.register()
    model: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config["model_type"], **fields), attn_implementation=name, dtype=torch.float32
    )
    if method == "lora":
        lora = run_options.LoraArguments(lora_r=8, lora_dropout=dropout, lora_target_modules=(targets,))
        model = get_peft_model(model, adapters.lora_config(model, lora))
    if lean:
        fused.install(model, matmul.Route("torch", "").product)
    model.train()
    loss = ModelLoss(model)
    ids = torch.arange(tokens)[None] % 100
    batch = {"input_ids": ids, "position_ids": ids, "segments": torch.tensor([[0, tokens, tokens]])}
    batch |= {"logits_to_keep": torch.arange(4), "labels": ids[:, :4], "shift_labels": ids[:, :4]}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(model, batch)
    return sum(size for size, _ in kept.values())


def test_engines_share_what_they_share() -> None:
    eight = Setup(method="full", device="cuda", half=True, ranks=8, row=1024)
    p = HALF_BILLION.parameters
    two, three = (memory_plan.need(HALF_BILLION, replace(eight, zero=stage)) for stage in (2, 3))
    assert two.weights == 2 * p
    assert two.gradients == three.gradients == 2 * p // 8
    assert two.optimizer == 8 * p // 8 + 4 * p // 8
    assert three.weights > two.weights  # fewer than 10^9 weights all stay gathered once they were used
    large_two, large_three = (memory_plan.need(SEVEN_BILLION, replace(eight, zero=stage)) for stage in (2, 3))
    assert large_three.weights < large_two.weights / 3
    offloaded = memory_plan.need(HALF_BILLION, replace(eight, zero=2, offload_optimizer=True))
    assert offloaded.optimizer == 0
    assert offloaded.host > 0
    on, off = (memory_plan.need(HALF_BILLION, replace(eight, checkpointing=again)) for again in (True, False))
    assert on.activations < off.activations / 4
    assert on.total < off.total


def test_the_recorded_table_is_within_fifteen_percent() -> None:
    """What benchmarks/bench_memory.py measured: each plan against the peak of its run."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "memory.json").read_text(encoding="utf-8"))["rows"]
    assert len(rows) >= 12
    assert {row["run"]: row["ratio"] for row in rows if abs(row["ratio"] - 1) > 0.15} == {}


def test_a_run_that_cannot_fit_is_told_the_same_step_in_smaller_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(
        *("--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2", "--use_lora"),
        *("--lora_dropout", "0.05"),
    )
    monkeypatch.setattr(memory_plan, "room", lambda here=1: memory_plan.Room(int(6 * GIB), "a test"))
    verdict = memory_plan.decide(run, HALF_BILLION, row=16384, supervised=16384, longest=1024)
    assert verdict.checkpointing
    assert verdict.refusal is not None
    assert "--per_device_train_batch_size 4 --gradient_accumulation_steps 4" in verdict.refusal
    assert "--plan_anyway" in verdict.refusal

    roomy = memory_plan.Room(int(200 * GIB), "a test")
    monkeypatch.setattr(memory_plan, "room", lambda here=1: roomy)
    verdict = memory_plan.decide(run, HALF_BILLION, row=16384, supervised=16384, longest=1024)
    assert not verdict.checkpointing
    assert verdict.refusal is None
    assert verdict.line.startswith("plan: ")

    monkeypatch.setattr(memory_plan, "room", lambda here=1: memory_plan.Room(GIB // 2, "a test"))
    verdict = memory_plan.decide(run, HALF_BILLION, row=16384, supervised=16384, longest=1024)
    assert verdict.refusal is not None
    assert "smaller model" in verdict.refusal


def test_long_rows_in_passes_are_planned_by_what_is_held_at_once() -> None:
    lora = Setup(method="lora", row=4200, held=1900, supervised=4200, lean=True)
    held = memory_plan.need(HALF_BILLION, replace(lora, row=1900, supervised=1900, held=0))
    whole, cut = (memory_plan.need(HALF_BILLION, replace(lora, held=held)) for held in (0, 1900))
    assert (cut.activations, cut.loss) == (held.activations, held.loss)
    assert cut.gradients == whole.gradients + 4 * cut.trainable  # formed before the row's backward
    assert cut.total < 0.6 * whole.total
    full = replace(lora, method="full")
    for setup, wanted in [
        (lora, True),
        (replace(lora, held=4200), True),
        (full, True),
        (replace(full, held=4000), False),  # a gradient more than the passes save
        (replace(lora, device="cuda"), False),
        (replace(lora, zero=2), False),
        (replace(lora, held=0), False),
    ]:
        assert memory_plan.in_passes(HALF_BILLION, setup) is wanted, setup
    balanced = Shape.of(PUBLISHED["Qwen3-30B-A3B"][0] | {"output_router_logits": True})
    hybrid = Shape.of(PUBLISHED["Qwen3-Next-80B-A3B"][0])
    assert not memory_plan.in_passes(balanced, lora) and not memory_plan.in_passes(hybrid, lora)


def test_a_run_chooses_passes_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "room", lambda here=1: memory_plan.Room(int(200 * GIB), "a test"))
    rows = {"row": 4200, "held": 1900, "supervised": 4200, "longest": 1100}
    for words, cut in (
        (["--use_lora"], True),
        (["--use_lora", "--gradient_checkpointing", "False"], True),
        (["--use_lora", "--deepspeed", str(ROOT / "finetune" / "ds_config_zero2.json")], False),
    ):
        verdict = memory_plan.decide(run_of(*words), HALF_BILLION, **rows)
        assert verdict.in_passes is cut
        assert not verdict.checkpointing
    assert (
        "a row of 4,200 tokens, 1,900 of them at once, keeps"
        in memory_plan.decide(run_of("--use_lora"), HALF_BILLION, **rows).line
    )


@pytest.mark.parametrize(
    ("gib", "row", "cure"),
    [
        (7.4, 512, "it fits with --per_device_train_batch_size 1 --lora_r 32, or --plan_anyway"),
        (6.0, 8192, "it fits with --per_device_train_batch_size 1 --lora_r 8 --model_max_length 256, or"),
        (4.0, 512, "; use a smaller model, or --plan_anyway"),
    ],
)
def test_q_lora_of_a_7b_that_does_not_fit_is_told_what_would(
    gib: float, row: int, cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A laptop of 8 GiB: an adapter of a lower rank, shorter conversations; never ZeRO-3, which 4 bits cannot have."""
    monkeypatch.setattr(memory_plan, "room", lambda here=1: memory_plan.Room(int(gib * GIB), "a test"))
    run = run_of("--q_lora", "--per_device_train_batch_size", "1")
    verdict = memory_plan.decide(run, replace(SEVEN_BILLION, stored=2), row=row, supervised=row, longest=row)
    assert verdict.refusal is not None and cure in verdict.refusal
    assert "ZeRO-3" not in verdict.refusal


def test_true_and_false_are_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "room", lambda here=1: memory_plan.Room(int(200 * GIB), "a test"))
    for word in (True, False):
        run = run_of("--gradient_checkpointing", str(word))
        verdict = memory_plan.decide(run, HALF_BILLION, row=512, supervised=512, longest=512)
        assert verdict.checkpointing is word
        assert "as asked" in verdict.line


def test_disk_and_steps() -> None:
    full, lora = run_of(), run_of("--use_lora")
    p, learnt = HALF_BILLION.parameters, memory_plan.trainable(HALF_BILLION, Setup(method="lora"))
    assert memory_plan.disk_needed(HALF_BILLION, full) == 4 * p + 3 * 12 * p + 4 * 20 * hardware.MIB
    assert memory_plan.disk_needed(HALF_BILLION, lora) == 4 * learnt + 3 * 12 * learnt + 4 * 20 * hardware.MIB
    assert memory_plan.disk_needed(HALF_BILLION, run_of("--save_strategy", "no")) == 4 * p + 20 * hardware.MIB
    assert memory_plan.steps_of(full, 81, 1) == 33  # 11 windows of 8, three times
    assert memory_plan.steps_of(full, 81, 2) == 18
    assert memory_plan.steps_of(run_of("--max_steps", "7"), 81, 1) == 7


def test_a_config_without_sizes_is_named() -> None:
    with pytest.raises(ModelError, match="hidden_size"):
        Shape.of({"model_type": "qwen2"})
    with pytest.raises(ModelError, match=r"config\.json"):
        models.read_config(ROOT / "nowhere")


def test_weights_that_zero_3_keeps_gathered_are_those_of_the_file(tmp_path: Path) -> None:
    def live(**block: object) -> int:
        file = tmp_path / "zero3.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": 3, **block}}))
        run = run_problems.read_run(["-d", "x", "--use_lora", "--deepspeed", str(file)])
        return memory_plan.setup_of(run, 1, 1).live

    assert live(stage3_max_live_parameters=5e8) == 500_000_000
    shipped = json.loads((ROOT / "finetune" / "ds_config_zero3.json").read_text(encoding="utf-8"))
    default = shipped["zero_optimization"]["stage3_max_live_parameters"]
    assert live() == live(stage3_max_live_parameters="auto") == memory_plan.Setup().live == default


@pytest.mark.parametrize(("words", "least", "most"), [(["--use_lora"], 16.0, 18.0), (["--q_lora"], 7.6, 8.6)])
def test_seven_billion_on_a_cpu(words: list[str], least: float, most: float) -> None:
    """A base of 15.2 GB in bfloat16 is not widened; 4 bits keep embedding and head as they are stored."""
    stored = replace(SEVEN_BILLION, stored=2)
    run = run_of(*words)
    assert memory_plan.keeps_stored(run, stored)
    setup = memory_plan.setup_of(run, 512, 256, checkpointing=True)
    assert least < memory_plan.need(stored, setup).total / GIB < most
    for other in (["--use_lora", "--use_dora"], ["--use_lora", "--lora_init", "pissa"]):
        assert not memory_plan.keeps_stored(run_of(*other), stored)
    assert not memory_plan.keeps_stored(run_of(), stored)
    assert not memory_plan.keeps_stored(run, Shape.of({"model_type": "phi3"}))
