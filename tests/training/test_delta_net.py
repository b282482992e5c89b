"""Hybrid models in rows: each conversation is what it is alone, on a CPU by our chunks, else by the kernels."""

import itertools
from typing import Any

import pytest
import torch

from qwen_chat.errors import ModelError
from qwen_chat.training import delta_net, fused, matmul
from tests.support.tiny_models import (
    HYBRIDS,
    engine,
    in_double,
    mixed_data,
    modeling,
    reference,
    relative,
    tiny_model,
)

LAYOUTS = ("shared_prefix", "packed", "padded")


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    in_double(monkeypatch)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", HYBRIDS)
def test_rows_are_each_conversation_alone(family: str, lora: bool, double: None) -> None:
    """Loss and all gradients, to 1e-6 in float64, against transformers' own forward; LoRA on every projection."""
    model = tiny_model(family, tied=False)
    if lora:
        from peft import LoraConfig, get_peft_model

        targets = ["out_proj", "q_proj", *(n for n in ("in_proj_qkvz", "in_proj_qkv") if n in str(model))]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    data = mixed_data()
    loss, expected = reference(model, data)
    assert delta_net.keep_apart(model) == 3 == delta_net.keep_apart(model)
    for layout in LAYOUTS:
        total, _, found = engine(model, data, layout, batch_size=len(data), accumulation=1)
        assert abs(total - loss) < 1e-6 * loss
        assert found.shape == expected.shape and relative(found, expected) < 1e-6
    again, alone = reference(model, data)  # without `segments` a layer is transformers' own
    assert again == loss and torch.equal(alone, expected)


def test_gradient_checkpointing_and_several_rows(double: None) -> None:
    model = tiny_model("qwen3_5_text", lora=True, checkpointing=True)
    data = mixed_data()
    loss, expected = reference(model, data)
    delta_net.keep_apart(model)
    for layout in LAYOUTS[:2]:
        total, _, found = engine(model, data, layout, batch_size=3, accumulation=3)
        assert abs(total - loss) < 1e-6 * loss and relative(found, expected) < 1e-6


@pytest.mark.parametrize("family", HYBRIDS)
def test_in_the_numbers_of_a_run(family: str) -> None:
    """float32, with fused layers: layouts agree to 1e-5, and with transformers' forward of each alone."""
    model = tiny_model(family, dtype=torch.float32)
    data = mixed_data()
    loss, expected = reference(model, data)
    fused.install(model, matmul.Route("torch", "test").product)
    delta_net.keep_apart(model)
    for layout in LAYOUTS:
        total, _, found = engine(model, data, layout, batch_size=len(data), accumulation=1)
        assert abs(total - loss) < 1e-5 * loss and relative(found, expected) < 1e-3


def test_what_it_keeps_is_computed_again() -> None:
    """Between forward and backward a layer keeps less than its chunks work on."""
    model = tiny_model("qwen3_5_text", dtype=torch.float32)
    layer = model.model.layers[0].linear_attn
    delta_net.keep_apart(model)
    x = torch.randn(1, 400, 32, requires_grad=True)
    segments = torch.tensor([[0, 400, 400]])

    def kept() -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = layer(x, segments=segments)
        out.sum().backward()
        return sum(sizes.values())

    less = kept()
    gradient = x.grad
    assert gradient is not None
    x.grad = None
    layer._inside[0].gradient_checkpointing = True  # then the layer around it is computed again anyway
    assert 2 * less < kept()
    assert x.grad is not None and relative(x.grad, gradient) < 1e-6


# ---------------------------------------------------------------------------------------------- the kernels


class Kernels:
    """Stand-ins for fla and causal-conv1d that note what they are given and keep the row's parts apart."""

    def __init__(self, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bounds: list[torch.Tensor] = []
        self.numbers: list[torch.Tensor] = []
        module = modeling(family)
        self.rule, self.convolution = module.torch_chunk_gated_delta_rule, module.causal_conv1d_fn
        monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", self.chunks)
        monkeypatch.setattr(module, "causal_conv1d_fn", self.convolve)
        monkeypatch.setattr(delta_net, "_has_kernels", lambda device: True)

    def chunks(
        self, q: Any, k: Any, v: Any, *, g: Any, beta: Any, cu_seqlens: Any = None, **rest: Any
    ) -> Any:
        if cu_seqlens is None:
            return self.rule(q, k, v, g=g, beta=beta, **rest)
        self.bounds.append(cu_seqlens)
        cuts = cu_seqlens.tolist()
        rest = {name: rest[name] for name in ("use_qk_l2norm_in_kernel",)}
        parts = [
            self.rule(
                *(x[:, start:stop] for x in (q, k, v)), g=g[:, start:stop], beta=beta[:, start:stop], **rest
            )
            for start, stop in itertools.pairwise(cuts)
        ]
        return torch.cat([out for out, _ in parts], 1), None

    def convolve(self, x: Any, *arguments: Any, seq_idx: Any = None, **rest: Any) -> Any:
        if seq_idx is None:
            return self.convolution(x, *arguments, **rest)
        self.numbers.append(seq_idx)
        parts = [x[:, :, seq_idx[0] == number] for number in seq_idx.unique()]
        return torch.cat(
            [self.convolution(part, *arguments, activation=rest["activation"]) for part in parts], -1
        )


@pytest.mark.parametrize("family", HYBRIDS)
def test_the_rows_boundaries_reach_the_kernels(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    data = mixed_data()
    loss, expected = reference(model, data)
    delta_net.keep_apart(model)
    kernels = Kernels(family, monkeypatch)
    total, _, found = engine(model, data, "packed", batch_size=len(data), accumulation=1)
    assert abs(total - loss) < 1e-6 * loss and relative(found, expected) < 1e-4
    lengths = [len(sequence.input_ids) for sequences in data for sequence in sequences]
    assert len(kernels.bounds) == len(kernels.numbers) == 3
    for bounds, numbers in zip(kernels.bounds, kernels.numbers, strict=True):
        assert bounds.dtype == numbers.dtype == torch.int32
        assert bounds[0] == 0 and sorted(bounds.diff().tolist()) == sorted(lengths)
        assert torch.equal(numbers[0], torch.arange(len(lengths)).repeat_interleave(bounds.diff()).int())


def test_a_row_with_shared_prefixes_goes_through_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3_5_text")
    data = mixed_data()
    loss, _ = reference(model, data)
    delta_net.keep_apart(model)
    kernels = Kernels("qwen3_5_text", monkeypatch)
    total, _, _ = engine(model, data, "shared_prefix", batch_size=len(data), accumulation=1)
    assert abs(total - loss) < 1e-6 * loss and kernels.bounds == []


def test_which_way_is_taken_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    start = "18 gated delta-net layers: "
    own = "our own chunks keep a row's conversations apart"
    assert delta_net.decision(18, "cpu", "packed") == (
        f"{start}{own} (no kernels of fla and causal-conv1d on 'cpu')"
    )
    assert delta_net.decision(18, "cuda", "shared_prefix") == (
        f"{start}{own}, a shared prefix hands its state on (no kernels of fla and causal-conv1d)"
    )
    monkeypatch.setattr(delta_net, "find_spec", lambda name: object())
    assert delta_net.decision(18, "cuda", "packed") == (
        f"{start}fla and causal-conv1d, which are given the row's boundaries"
    )
    assert delta_net.decision(18, "cuda", "shared_prefix").endswith("(--layout packed: the kernels alone)")
    assert delta_net.decision(18, "cpu", "packed").endswith("on 'cpu')")


def test_other_models_are_left_alone() -> None:
    model = tiny_model("qwen3")
    assert delta_net.keep_apart(model) == 0
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_adapter_over_the_convolution_is_refused() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("qwen3_5_text"), LoraConfig(r=80, target_modules=["conv1d"]))
    with pytest.raises(ModelError, match="leave it out of --lora_target_modules"):
        delta_net.keep_apart(model)
