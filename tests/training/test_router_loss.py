"""The router's loss of a row is that of its sequences alone, as transformers has it, and is learnt once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, TrainingArguments
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from qwen_chat import families
from qwen_chat.training import attention, delta_net, step_log
from qwen_chat.training.batches import Collator, RowDataset, WindowSampler
from qwen_chat.training.loss import ModelLoss
from qwen_chat.training.packing import LAYOUTS
from qwen_chat.training.router_loss import RouterLoss
from qwen_chat.training.trainer import ChatTrainer
from tests.support.tiny_models import (
    DELTA_NETS,
    VISION,
    VOCABULARY,
    gradients,
    in_double,
    mixed_data,
    relative,
)

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
COEFFICIENT = 0.5
DATA = mixed_data()
SEQUENCES = [sequence for sequences in DATA for sequence in sequences]


def mixture(name: str, *, on: bool = True, checkpointing: bool = False, lora: bool = False) -> Any:
    """In float64, the same weights for the same arguments."""
    attention.register()
    torch.manual_seed(7)
    shape = (DELTA_NETS if name in families.HYBRIDS else {}) | SHAPE
    if name in families.HYBRIDS:
        shape["num_hidden_layers"] = 4
    shape |= {"output_router_logits": on, "router_aux_loss_coef": COEFFICIENT}
    kind: Any = AutoModelForCausalLM
    if name == "qwen3_5_moe":
        kind, shape = AutoModelForImageTextToText, {"text_config": shape, "vision_config": VISION}
    config = AutoConfig.for_model(name, **shape)
    model = kind.from_config(
        config, attn_implementation="qwen_chat", experts_implementation="eager", dtype=torch.float64
    )
    delta_net.keep_apart(model)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        for weight_name, weight in model.named_parameters():
            if "lora_B" in weight_name:
                torch.nn.init.normal_(weight, std=0.1)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if lora:
            model.enable_input_require_grads()
    return model.train()


def rows(layout: str, batch_size: int, accumulation: int) -> list[dict[str, torch.Tensor]]:
    sampler = WindowSampler(
        DATA, batch_size=batch_size, accumulation=accumulation, max_length=200, layout=layout
    )
    data = RowDataset(DATA)
    return [Collator(balanced=True)([data[row] for row in batch]) for batch in sampler]


def learnt(model: Any, batches: list[dict[str, torch.Tensor]]) -> tuple[float, float, torch.Tensor]:
    """(sum of losses, mean of the router's losses, gradient of their sum) of one optimizer step."""
    model.zero_grad()
    loss = ModelLoss(model, router=RouterLoss.of(model.config))
    words = router = 0.0
    for batch in batches:
        found = loss(model, batch)
        assert found.router_sum is not None
        mean = found.router_sum / batch["step_sequences"][0]
        (found.loss_sum / 100 + COEFFICIENT * mean).backward()
        words, router = words + found.loss_sum.item(), router + mean.item()
    loss.remove()
    return words, router, gradients(model)


def alone(model: Any) -> tuple[float, torch.Tensor]:
    """Mean of transformers' auxiliary losses of each sequence by itself, and the gradient of that mean."""
    model.zero_grad()
    mean, text = 0.0, model.config.get_text_config()
    for sequence in SEQUENCES:
        logits = model(input_ids=torch.tensor([sequence.input_ids]), use_cache=False).router_logits
        loss = load_balancing_loss_func(logits, text.num_experts, text.num_experts_per_tok)
        assert isinstance(loss, torch.Tensor)
        (loss / len(SEQUENCES)).backward()
        mean += loss.item() / len(SEQUENCES)
    return mean, gradients(model)


@pytest.mark.parametrize("name", families.BALANCED)
def test_a_row_is_each_alone_as_transformers_has_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_double(monkeypatch)
    model = mixture(name)
    expected, expected_gradient = alone(model)
    [batch] = rows("shared_prefix", len(DATA), 1)
    loss = ModelLoss(model, router=RouterLoss.of(model.config))
    model.zero_grad()
    found = loss(model, batch).router_sum
    assert found is not None
    (found / len(SEQUENCES)).backward()
    assert found.item() / len(SEQUENCES) == pytest.approx(expected, rel=1e-6)
    assert relative(gradients(model), expected_gradient) < 1e-6
    # Of the row as one text it would be another number.
    row = {key: batch[key] for key in ("input_ids", "position_ids", "segments")}
    as_one = model(**row, use_cache=False).aux_loss
    assert abs(as_one.item() - expected) > 1e-3 * expected


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_next"])
def test_layouts_and_accumulation_agree(name: str) -> None:
    model = mixture(name)
    words, router, gradient = learnt(model, rows("packed", 1, len(DATA)))
    for layout in LAYOUTS:
        for batch_size, accumulation in ((len(DATA), 1), (3, 3), (1, 12)):
            if (batch_size, accumulation) == (1, 12) and layout != "shared_prefix":
                continue  # it has rows of nothing
            found = learnt(model, rows(layout, batch_size, accumulation))
            assert found[:2] == pytest.approx((words, router), rel=1e-6)
            assert relative(found[2], gradient) < 1e-6


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_5_moe"])
def test_layers_that_are_computed_again_are_learnt_once(name: str, lora: bool) -> None:
    batches = rows("shared_prefix", 5, 2)
    words, router, gradient = learnt(mixture(name, lora=lora), batches)
    again = learnt(mixture(name, lora=lora, checkpointing=True), batches)
    assert again[:2] == (words, router)
    assert relative(again[2], gradient) < 1e-12


def test_where_it_is_off_nothing_changes() -> None:
    [batch] = rows("shared_prefix", len(DATA), 1)
    off, on = mixture("qwen3_moe", on=False), mixture("qwen3_moe")
    assert RouterLoss.of(off.config) is None
    off.config.output_router_logits, off.config.router_aux_loss_coef = True, 0.0
    assert RouterLoss.of(off.config) is None
    off.config.output_router_logits = False
    [plain] = [
        Collator()([RowDataset(DATA)[row] for row in rows])
        for rows in WindowSampler(DATA, batch_size=len(DATA), max_length=200)
    ]
    assert set(batch) - set(plain) == {"last_tokens", "step_sequences"}
    found, learning = (
        ModelLoss(off)(off, plain),
        ModelLoss(on, router=RouterLoss.of(on.config))(on, batch),
    )
    assert found.router_sum is None and learning.router_sum is not None
    assert torch.equal(found.loss_sum, learning.loss_sum)
    found.loss_sum.backward()
    learning.loss_sum.backward()
    assert torch.equal(gradients(off), gradients(on))
    assert not any(module._forward_hooks for module in off.modules())
    with torch.no_grad():  # held-out data
        assert ModelLoss(on, router=RouterLoss.of(on.config))(on, batch).router_sum is None


def test_the_router_of_padding_and_of_a_filler_row_learns_nothing() -> None:
    loss = RouterLoss(experts=3, chosen=1, coefficient=1.0)
    logits = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    batch = {
        "segments": torch.tensor([[0, 4, 4], [4, 8, 8]]),
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]),
        "last_tokens": torch.tensor([1, 7]),
    }
    found = loss([logits], batch)
    parts = (logits.detach()[:2], logits.detach()[4:])
    expected = sum(float(load_balancing_loss_func((part,), 3, 1)) for part in parts)
    assert found.item() == pytest.approx(expected, rel=1e-6)
    (gradient,) = torch.autograd.grad(found, logits)
    assert gradient[2:4].abs().max() == 0 and gradient[[0, 1, 4, 5, 6, 7]].abs().min() > 0
    nothing = {"segments": torch.tensor([[0, 1, 1]]), "last_tokens": torch.zeros(0, dtype=torch.int64)}
    assert loss([logits[:1]], nothing | {"position_ids": torch.zeros(1, 1, dtype=torch.int64)}).item() == 0


def trained(folder: Path, batch_size: int, accumulation: int, *, on: bool = True) -> tuple[Any, list[Any]]:
    """Two optimizer steps of the trainer itself: (trainer, lines of train_log.jsonl)."""
    folder.mkdir()
    model = mixture("qwen3_moe", on=on)
    windows = WindowSampler(DATA, batch_size=batch_size, accumulation=accumulation, max_length=200)
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=2,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
    )
    with step_log.StepLog(folder) as log:
        trainer = ChatTrainer(
            model=model, args=args, windows=windows, held_out=windows, on_step=log.step, callbacks=[log]
        )
        trainer.train()
    lines = [json.loads(line) for line in log.path.read_text("utf-8").splitlines()]
    return trainer, lines


def test_a_run_learns_it_and_logs_it_beside_the_loss(tmp_path: Path) -> None:
    trainer, lines = trained(tmp_path / "1x8", 1, 8)
    _, other_lines = trained(tmp_path / "8x1", 8, 1)
    off, off_lines = trained(tmp_path / "off", 8, 1, on=False)
    assert len(lines) == len(other_lines) == 2
    for name in ("loss", "router_loss", "grad_norm"):
        found = [line[name] for line in other_lines]
        assert found == pytest.approx([line[name] for line in lines], rel=1e-6)
    # The first step's loss is the plain one, what is learnt from it is not.
    assert other_lines[0]["loss"] == off_lines[0]["loss"] and "router_loss" not in off_lines[0]
    assert other_lines[0]["grad_norm"] != pytest.approx(off_lines[0]["grad_norm"], rel=1e-3)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in logged] == pytest.approx([line["loss"] for line in lines], abs=1e-4)
    assert [entry["router_loss"] for entry in logged] == [line["router_loss"] for line in lines]
    # Held-out loss is the plain one, of the same weights.
    off.model.load_state_dict(trainer.model.state_dict())
    assert trainer.evaluate()["eval_loss"] == off.evaluate()["eval_loss"]
