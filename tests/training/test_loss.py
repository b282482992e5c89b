"""Exactness of the whole engine (layout, attention, loss) and of the chunked loss by itself."""

from types import SimpleNamespace

import pytest
import torch

from qwen_chat.errors import ModelError
from qwen_chat.training.batches import Collator, RowDataset, WindowSampler
from qwen_chat.training.loss import ModelLoss, chunked_loss
from tests.support.tiny_models import (
    SEVEN_TOKENS,
    engine,
    mixed_data,
    reference,
    relative,
    tiny_model,
)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_layouts_equal_separate(family, lora, checkpointing):
    """Packed = unpacked, shared = separate, chunked = whole: 1e-6 relative in double precision."""
    data = mixed_data()
    model = tiny_model(family, lora=lora, checkpointing=checkpointing)
    expected_loss, expected = reference(model, data)
    expected_tokens = sum(label != -100 for sequences in data for s in sequences for label in s.labels)
    for layout, batch_size, accumulation in [
        ("shared_prefix", 9, 1),
        ("shared_prefix", 3, 3),
        ("shared_prefix", 1, 12),
        ("packed", 9, 1),
        ("padded", 3, 3),
    ]:
        loss, tokens, found = engine(model, data, layout, batch_size, accumulation)
        assert tokens == expected_tokens
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert relative(found, expected) < 1e-6


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 4e-2)])
def test_single_precision_and_bfloat16(dtype, tolerance):
    data = mixed_data()
    model = tiny_model("qwen2", dtype=dtype)
    loss, _, found = engine(model, data, "shared_prefix", 9, 1)
    expected_loss, expected = reference(tiny_model("qwen2"), data)
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    assert relative(found.double(), expected) < tolerance


def test_untied_head_trained_alone_and_in_chunks_of_one():
    data = mixed_data()
    model = tiny_model("qwen2", tied=False)
    expected_loss, expected = reference(model, data)
    loss, _, found = engine(model, data, "shared_prefix", 9, 1, chunk_bytes=1)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert relative(found, expected) < 1e-6


def test_lora_on_the_head_keeps_working():
    from peft import LoraConfig, get_peft_model

    data = mixed_data()
    model = tiny_model("qwen2", tied=False)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    expected_loss, expected = reference(model, data)
    loss, _, found = engine(model, data, "shared_prefix", 9, 1)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert relative(found, expected) < 1e-6


def test_chunked_equals_whole_and_counts_hits():
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=True, dtype=torch.float64)
    hidden = torch.randn(23, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(50, (23,))
    logits = head(hidden)
    targets[:5] = logits[:5].argmax(-1)
    whole = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    wanted = torch.autograd.grad(whole, [hidden, head.weight, head.bias])
    loss, hits, each = chunked_loss(
        head, hidden, targets, trainable=[head.weight, head.bias], vocabulary=50, chunk_bytes=4 * 50 * 4
    )
    found = torch.autograd.grad(loss * 3, [hidden, head.weight, head.bias])
    assert loss.item() == pytest.approx(whole.item(), rel=1e-12)
    assert int(hits) == int((logits.argmax(-1) == targets).sum()) >= 5
    apart = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(each, apart, rtol=1e-12) and not each.requires_grad
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, 3 * other, rtol=1e-10, atol=1e-12)


def test_evaluation_needs_no_gradient_and_no_whole_logits():
    data = mixed_data()
    model = tiny_model("qwen2").eval()
    loss = ModelLoss(model, chunk_bytes=SEVEN_TOKENS)
    sampler = WindowSampler(data, batch_size=9, max_length=200, shuffle=False)
    rows = RowDataset(data)
    with torch.no_grad():
        batches = [Collator()([rows[row] for row in batch]) for batch in sampler]
        results = [loss(model, batch) for batch in batches]
    assert all(not result.loss_sum.requires_grad for result in results)
    loss.remove()
    hits, apart = 0, [0.0] * len(data)
    for number, sequence in ((n, sequence) for n, sequences in enumerate(data) for sequence in sequences):
        logits = model(input_ids=torch.tensor([sequence.input_ids])).logits[0, :-1]
        labels = torch.tensor(sequence.labels[1:])
        kept = labels != -100
        apart[number] += float(torch.nn.functional.cross_entropy(logits[kept], labels[kept], reduction="sum"))
        hits += int((logits[kept].argmax(-1) == labels[kept]).sum())
    expected = sum(apart)
    assert sum(float(result.loss_sum) for result in results) == pytest.approx(expected, rel=1e-6)
    found = torch.zeros(len(data), dtype=torch.float64)
    for batch, result in zip(batches, results, strict=True):
        found.index_add_(0, batch["owners"], result.losses.double())
    assert found.tolist() == pytest.approx(apart, rel=1e-6)
    assert sum(int(result.correct) for result in results) == hits


def test_row_with_nothing_to_learn_gives_zero_and_zero_gradients():
    data = [mixed_data()[7]]
    model = tiny_model("qwen2", lora=True)
    loss, tokens, found = engine(model, data, "shared_prefix", 1, 2)  # and a filler row
    assert (loss, tokens) == (0.0, 0)
    assert found.abs().max() == 0


def test_outside_a_call_the_head_is_as_before():
    model = tiny_model("qwen2").eval()
    ids = torch.arange(10)[None]
    before = model(input_ids=ids).logits
    loss = ModelLoss(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    loss.remove()
    assert torch.equal(model(input_ids=ids).logits, before)
    assert "forward" not in vars(model.lm_head)


def test_a_model_that_goes_past_its_head_is_refused():
    model = tiny_model("qwen2").eval()
    loss = ModelLoss(model)
    weight = model.lm_head.weight

    def past_the_head(input_ids, logits_to_keep, **kwargs):
        hidden = model.model(input_ids, **(kwargs | {"use_cache": False}))[0][:, logits_to_keep]
        return SimpleNamespace(logits=hidden @ weight.T)

    sampler = WindowSampler(mixed_data(), batch_size=9, max_length=200, shuffle=False)
    batch = Collator()([RowDataset(mixed_data())[row] for row in next(iter(sampler))])
    with pytest.raises(ModelError, match="does not call its output head as a module"):
        loss(past_the_head, batch)


def test_autocast_bfloat16_computes_the_loss_in_single_precision():
    data = mixed_data()
    model = tiny_model("qwen2", dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _, found = engine(model, data, "shared_prefix", 9, 1)
    expected_loss, expected = reference(tiny_model("qwen2"), data)
    assert found.dtype == torch.float32
    assert loss == pytest.approx(expected_loss, rel=1e-2)
    assert relative(found.double(), expected) < 4e-2
