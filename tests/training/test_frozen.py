"""A base kept narrow gives the numbers of the same base in float32, and never holds it wide."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from qwen_chat.training import frozen, fused, matmul
from tests.support.tiny_models import gradients, tiny_model

PLAIN = matmul.Route("torch", "test").product


@pytest.fixture
def small_pieces(monkeypatch):
    """So small that every matrix here takes several."""
    monkeypatch.setattr(frozen, "PIECE", 2**12)


def narrow_model(kind, *, four_bits=False):
    """A tiny model as it is loaded, kept narrow; in float32 where kind is None."""
    model = tiny_model("qwen2", dtype=torch.bfloat16)
    if kind is None:
        return model.float().requires_grad_(False)
    frozen.keep(model.to(kind), four_bits=four_bits, compute=torch.float32)
    return model


def learn(model, product=PLAIN, *, checkpointing=False):
    """Logits and gradients of an adapter over the model."""
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    fused.install(model, product)
    torch.manual_seed(2)
    logits = model.train()(input_ids=torch.arange(90)[None] % 97).logits
    logits.square().sum().backward()
    return logits.detach(), gradients(model)


@pytest.mark.parametrize("route", ["torch", "onednn"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_a_base_in_16_bits_gives_what_it_gives_in_float32(small_pieces, checkpointing, route):
    product = matmul.Route(route, "test").product
    expected, expected_gradients = learn(narrow_model(None), product, checkpointing=checkpointing)
    model = narrow_model(torch.bfloat16)
    logits, found = learn(model, product, checkpointing=checkpointing)
    kinds = {p.dtype for name, p in model.named_parameters() if name.endswith("proj.base_layer.weight")}
    assert kinds == {torch.bfloat16}
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(found, expected_gradients, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("shape", [(96, 64), (200, 96), (33, 48)])
def test_four_bits_are_those_of_bitsandbytes(small_pieces, shape):
    bnb = pytest.importorskip("bitsandbytes")
    linear = torch.nn.Linear(shape[1], shape[0])
    weight, expected = linear.weight.data.clone(), linear.weight.data.bfloat16()
    packed, state = bnb.functional.quantize_4bit(
        expected, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    layer = frozen._in_four_bits(linear.requires_grad_(False).bfloat16(), torch.float32)
    assert torch.equal(layer.weight.data, packed)
    assert torch.equal(layer.quant_state.absmax, state.absmax)
    high, low = packed.view(-1) >> 4, packed.view(-1) & 15
    scales = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    values = state.code[torch.stack([high, low], 1).view(-1).long()][: weight.numel()]
    whole = (values * scales.repeat_interleave(64)[: weight.numel()]).view(shape)
    pieces = list(frozen._widened(layer.weight))
    assert len(pieces) == math.ceil(shape[0] / max(64, 2**12 // shape[1] // 64 * 64))
    assert torch.equal(torch.cat([piece for _, piece in pieces]), whole)
    assert (whole - weight).abs().max() < 0.2 * weight.abs().max()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_four_bits_learn_as_what_they_stand_for(small_pieces, checkpointing):
    pytest.importorskip("bitsandbytes")
    model, wide = narrow_model(torch.bfloat16, four_bits=True), narrow_model(None)
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            pieces = [piece.clone() for _, piece in frozen._widened(module.weight)]
            wide.get_submodule(name).weight.data = torch.cat(pieces)
    expected, expected_gradients = learn(wide, checkpointing=checkpointing)
    logits, found = learn(model, checkpointing=checkpointing)
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(found, expected_gradients, rtol=2e-5, atol=2e-5)


def test_type_of_a_folder_s_tensors(tmp_path):
    assert frozen.stored_type(tmp_path) == torch.float32
    save_file({"a": torch.zeros(2, dtype=torch.bfloat16)}, tmp_path / "one.safetensors", {"format": "pt"})
    assert frozen.stored_type(tmp_path) == torch.bfloat16
    save_file({"b": torch.zeros(2)}, tmp_path / "two.safetensors")
    assert frozen.stored_type(tmp_path) == torch.float32


def test_rows_that_are_trained_lie_in_float32():
    model = narrow_model(torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16 == model.model.embed_tokens.weight.dtype
    assert model.model.norm.weight.dtype == torch.float32
    frozen.widen_words(model)
    assert {model.lm_head.weight.dtype, model.model.embed_tokens.weight.dtype} == {torch.float32}
