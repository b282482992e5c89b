"""Fused layers give the numbers of the layers that they replace, and step aside where they do not fit."""

import pytest
import torch

from qwen_chat.training import fused, matmul
from tests.support.tiny_models import engine, gradients, mixed_data, reference, relative, tiny_model

ROUTES = ["torch", "onednn"]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_fused_equals_the_model_s_own_layers(family, lora, checkpointing):
    data = mixed_data()
    model = tiny_model(family, lora=lora, checkpointing=checkpointing)
    expected_loss, expected = reference(model, data)
    counts = fused.install(model, matmul.Route("torch", "test").product)
    assert counts == {"linear": 15, "mlp": 2, "norm": 9 if family == "qwen3" else 5}
    loss, _, found = engine(model, data, "shared_prefix", 3, 3)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert relative(found, expected) < 1e-6
    fused.remove(model)
    _, again = reference(model, data)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_both_routes_in_single_precision(route, lora):
    data = mixed_data()
    expected_loss, expected = reference(tiny_model("qwen2", lora=lora), data)
    model = tiny_model("qwen2", lora=lora).float()
    fused.install(model, matmul.Route(route, "test").product)
    loss, _, found = engine(model, data, "shared_prefix", 9, 1)
    assert loss == pytest.approx(expected_loss, rel=2e-5)
    assert relative(found.double(), expected) < 2e-5


def test_dropout_keeps_its_statistics_and_its_gradients():
    """With dropout the adapter sees the dropped input, the base the whole one: as peft computes it."""
    from peft import LoraConfig, get_peft_model

    model = tiny_model("qwen2")
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(40)[None] % 97

    def run():
        torch.manual_seed(3)
        model.zero_grad()
        logits = model(input_ids=ids).logits
        logits.square().sum().backward()
        return logits.detach(), gradients(model)

    own_logits, own = run()
    fused.install(model, matmul.Route("torch", "test").product)
    logits, found = run()
    assert relative(logits, own_logits) < 1e-6
    assert relative(found, own) < 1e-6


@pytest.mark.parametrize("change", ["dora", "two adapters", "disabled", "bfloat16", "autocast"])
def test_what_does_not_fit_runs_its_own_forward(change):
    from peft import LoraConfig, get_peft_model

    model = tiny_model("qwen2", dtype=torch.bfloat16 if change == "bfloat16" else torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", use_dora=change == "dora"))
    if change == "two adapters":
        model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
        model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(40)[None] % 97

    def run():
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=change == "autocast"):
            if change == "disabled":
                with model.disable_adapter():
                    return model(input_ids=ids).logits.detach(), None
            logits = model(input_ids=ids).logits
        logits.float().square().sum().backward()
        return logits.detach(), gradients(model)

    own_logits, own = run()
    fused.install(model, matmul.Route("torch", "test").product)
    logits, found = run()
    assert relative(logits.float(), own_logits.float()) < 1e-4
    if own is not None:
        assert relative(found, own) < 1e-4


def test_product_routes_agree_and_are_true_single_precision():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(70, 300), torch.randn(50, 300), torch.randn(50)
    exact = x.double() @ weight.double().t() + bias.double()
    for route in ROUTES:
        product = matmul.Route(route, "test").product
        assert (product(x, weight, bias) - exact).abs().max() < 1e-4  # bfloat16 or TF32 would miss by 0.05
        strided = product(weight.t().contiguous().t(), x.t().contiguous().t(), None)
        assert (strided - (exact - bias.double()).t()).abs().max() < 1e-4


def test_choice_is_measured_stored_and_used_again():
    choice = matmul.fastest(seconds=0.05)
    assert choice.route in ROUTES
    assert set(dict(choice.rates)) == set(ROUTES) and min(dict(choice.rates).values()) > 0
    stored = matmul.Route.from_json(choice.to_json())
    assert (stored.route, stored.reason) == (choice.route, "as this run began")
    assert matmul.fastest("cuda").route == "torch"
