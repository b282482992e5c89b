"""A row in passes: the loss and gradients of the whole row, with a part of its activations."""

import random
from collections.abc import Iterator

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from qwen_chat.training import loss as loss_module
from qwen_chat.training.attention import register
from qwen_chat.training.batches import Collator, RowDataset, WindowSampler
from qwen_chat.training.loss import ModelLoss
from qwen_chat.training.packing import PASS_TOKENS, passes
from qwen_chat.training.pulse import Pulse, StepPlace
from tests.support.stand_in import counted
from tests.support.tiny_families import family_config
from tests.support.tiny_models import (
    VOCABULARY,
    conversation,
    engine,
    gradients,
    mixed_data,
    reference,
    relative,
    tiny_model,
)


@pytest.fixture
def short_passes(monkeypatch):
    """Passes of about 40 tokens, so that tiny rows have several; returns those that were made."""
    made = []

    def cut(layout):
        made.append(passes(layout, 40))
        return made[-1]

    monkeypatch.setattr(loss_module, "passes", cut)
    return made


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_passes_equal_separate(family, lora, checkpointing, short_passes):
    """1e-6 relative in double precision, as whole rows."""
    data = mixed_data()
    model = tiny_model(family, lora=lora, checkpointing=checkpointing)
    expected_loss, expected = reference(model, data)
    for layout, batch_size, accumulation in [
        ("shared_prefix", 9, 1),
        ("shared_prefix", 3, 3),
        ("packed", 9, 1),
        ("padded", 3, 3),
    ]:
        loss, _, found = engine(model, data, layout, batch_size, accumulation, in_passes=True)
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert relative(found, expected) < 1e-6
    assert any(part.branches for parts in short_passes for part in parts)
    assert any(len(parts) > 2 for parts in short_passes)


def one_row(data):
    """All of them in one row, collated."""
    sampler = WindowSampler(data, batch_size=len(data), max_length=2000, shuffle=False)
    [[row]] = list(sampler)
    return row, Collator()([RowDataset(data)[row]])


def under_one_prompt(count=16, prompt=400, own=100):
    rng = random.Random(0)
    system = [rng.randrange(VOCABULARY) for _ in range(prompt)]
    return [(conversation(rng, system, own),) for _ in range(count)]


def peak(model, batch, in_passes):
    """Bytes of tensors beside the model's at the peak of a row, forward and backward."""
    loss = ModelLoss(model, in_passes=in_passes)
    model.zero_grad()
    with counted("cpu") as seen:
        loss(model, batch).loss_sum.backward()
    loss.remove()
    return seen.peak


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_a_trunk_and_one_pass_are_all_that_is_held(checkpointing):
    row, batch = one_row(under_one_prompt())
    assert (row.tokens, row.held) == (2000, 400 + 1000)
    longer, large = one_row(under_one_prompt(32))
    assert (longer.tokens, longer.held) == (3600, 400 + 1000)
    model = tiny_model("qwen2", lora=True, checkpointing=checkpointing, dtype=torch.float32)
    whole, cut, cut_large = peak(model, batch, False), peak(model, batch, True), peak(model, large, True)
    assert cut < 0.75 * whole
    assert cut_large < 1.05 * cut  # however many continue the prompt


def test_short_rows_and_evaluation_are_computed_whole(short_passes):
    row, batch = one_row(mixed_data())
    assert row.tokens < PASS_TOKENS
    assert row.held == row.tokens
    model = tiny_model("qwen2")
    loss = ModelLoss(model, in_passes=True)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        whole = loss(model, batch)
    assert (len(calls), len(short_passes)) == (1, 0)
    cut = loss(model, batch)
    assert len(calls) > 3
    assert float(cut.loss_sum.detach()) == pytest.approx(float(whole.loss_sum), rel=1e-12)
    assert (int(cut.correct), cut.tokens) == (int(whole.correct), whole.tokens)
    loss.remove()


@pytest.mark.parametrize(
    ("family", "cut"),
    [("mistral_full", True), ("qwen2_moe", True), ("qwen3_moe", True), ("qwen3_slide", False)],
)
def test_other_families_agree_with_their_whole_rows(family, cut, short_passes):
    """Mixtures, too; rows longer than the model's window of attention are computed whole."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(
        family_config(family),
        attn_implementation=register(),
        experts_implementation="eager",
        dtype=torch.float64,
    ).train()
    whole, _, expected = engine(model, mixed_data(), "shared_prefix", 9, 1)
    loss, _, found = engine(model, mixed_data(), "shared_prefix", 9, 1, in_passes=True)
    assert bool(short_passes) is cut
    assert loss == pytest.approx(whole, rel=1e-6)
    assert relative(found, expected) < 1e-6


def test_a_pass_under_autocast_keeps_its_gradients_in_float32(short_passes):
    """As near to double precision as the whole row."""
    data = mixed_data()
    expected_loss, expected = reference(tiny_model("qwen2"), data)
    far = []
    for in_passes in (False, True):
        model = tiny_model("qwen2", dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, _, found = engine(model, data, "shared_prefix", 9, 1, in_passes=in_passes)
        assert found.dtype == torch.float32
        assert loss == pytest.approx(expected_loss, rel=1e-2)
        far.append(relative(found.double(), expected))
    assert far[1] < 1.1 * far[0] < 4e-2


@pytest.fixture
def group() -> Iterator[None]:
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_ddp_reduces_a_row_in_passes_once(group, short_passes):
    """A second row would be refused if any weight had not been reduced, or one twice."""
    data = mixed_data()
    model = tiny_model("qwen2", lora=True)
    _, expected = reference(model, data)
    _, batch = one_row(data)
    loss = ModelLoss(model, in_passes=True)
    wrapped = DistributedDataParallel(model)
    for _ in range(2):
        model.zero_grad()
        loss(wrapped, batch).loss_sum.backward()
        assert relative(gradients(model), expected) < 1e-6
    loss.remove()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_passes_are_told_in_their_order(checkpointing, short_passes):
    model = tiny_model("qwen2", lora=True, checkpointing=checkpointing)
    places: list[StepPlace] = []
    pulse = Pulse(model, 1, places.append)
    loss = ModelLoss(model, in_passes=True, on_pass=pulse.begin_pass)
    pulse.begin_row()
    loss(model, one_row(under_one_prompt(4, prompt=60, own=30))[1]).loss_sum.backward()
    loss.remove()
    assert [(p.part, p.layer, p.back) for p in places] == [
        *((1, layer, False) for layer in (1, 2)),
        *((part, layer, back) for part in (2, 3, 4, 5) for layer, back in ((1, 0), (2, 0), (2, 1), (1, 1))),
        *((6, layer, True) for layer in (2, 1)),
    ]
    shares = [place.share for place in places]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    assert str(places[-1]) == "row 1 of 1, pass 6 of 6, backward, layer 1 of 2"
