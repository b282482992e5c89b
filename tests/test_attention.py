"""Attention over rows: no cross-talk, equal to a dense mask, chosen by a rule that needs no device."""

import pytest
import torch
from engine_models import VOCABULARY, tiny_model

from qwen_chat import attention
from qwen_chat.errors import OptionError

SEGMENTS = torch.tensor([(0, 20, 48), (20, 26, 26), (26, 40, 46), (40, 46, 46), (46, 48, 48), (48, 61, 61)])


def inputs(dtype=torch.float64, heads=6, groups=2, tokens=61):
    torch.manual_seed(0)
    query = torch.randn(1, heads, tokens, 8, dtype=dtype, requires_grad=True)
    key = torch.randn(1, groups, tokens, 8, dtype=dtype, requires_grad=True)
    value = torch.randn(1, groups, tokens, 8, dtype=dtype, requires_grad=True)
    return query, key, value


@pytest.mark.parametrize(
    "dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_blocks_equal_dense_mask_forward_and_backward(dtype, tolerance):
    found_in, wanted_in = inputs(dtype), inputs(torch.float64)
    if dtype == torch.bfloat16:
        wanted_in = [t.detach().double().requires_grad_() for t in found_in]
    else:
        found_in = [t.detach().to(dtype).requires_grad_() for t in wanted_in]
    gradient = torch.randn(1, 61, 6, 8, dtype=torch.float64)
    found, _ = attention.attention(torch.nn.Module(), *found_in, None, segments=SEGMENTS)
    mask = attention.visible(SEGMENTS, 61)[None, None]
    wanted = torch.nn.functional.scaled_dot_product_attention(*wanted_in, attn_mask=mask, enable_gqa=True)
    wanted = wanted.transpose(1, 2)
    found_grads = torch.autograd.grad(found.view(1, 61, 6, 8), found_in, gradient.to(dtype))
    wanted_grads = torch.autograd.grad(wanted, wanted_in, gradient)
    assert (found.view(1, 61, 6, 8).double() - wanted).abs().max() < tolerance
    for one, other in zip(found_grads, wanted_grads, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).abs().max() < 10 * tolerance


def test_visible_is_the_tree():
    mask = attention.visible(torch.tensor([(0, 2, 5), (2, 3, 3), (3, 5, 5), (5, 6, 6)]), 6)
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_no_cross_talk(family):
    """One conversation of the row is changed: every other's logits stay as they were, bit for bit."""
    model = tiny_model(family, dtype=torch.float32).eval()
    torch.manual_seed(1)
    ids = torch.randint(VOCABULARY, (1, 61))
    positions = torch.cat([torch.arange(26), torch.arange(20, 40), torch.arange(20, 22), torch.arange(13)])
    changed = ids.clone()
    changed[0, 26:46] = (changed[0, 26:46] + 1) % VOCABULARY  # the second continuation and its own branch
    with torch.no_grad():
        before, after = (
            model(input_ids=row, position_ids=positions[None], segments=SEGMENTS).logits
            for row in (ids, changed)
        )
    others = [*range(26), *range(46, 61)]
    assert torch.equal(before[0, others], after[0, others])
    assert (before[0, 26:46] - after[0, 26:46]).abs().min(dim=-1).values.max() > 0


@pytest.mark.parametrize("padding", [False, True])
def test_without_segments_it_is_ordinary_attention(padding):
    ours, theirs = tiny_model("qwen2").eval(), tiny_model("qwen2", attention="sdpa").eval()
    ids = torch.randint(VOCABULARY, (2, 12))
    mask = torch.ones_like(ids)
    if padding:
        mask[0, :5] = 0
    arguments = {"input_ids": ids, "attention_mask": mask if padding else None}
    with torch.no_grad():
        assert torch.allclose(ours(**arguments).logits, theirs(**arguments).logits, rtol=1e-9, atol=1e-9)
        generated = [
            model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
            for model in (ours, theirs)
        ]
    assert torch.equal(*generated)


def test_dropout_and_sliding_windows_take_the_mask():
    query, key, value = (t.detach() for t in inputs())
    positions = torch.cat([torch.arange(26), torch.arange(20, 40), torch.arange(20, 22), torch.arange(13)])[
        None
    ]
    found, _ = attention.attention(
        torch.nn.Module(),
        query,
        key,
        value,
        None,
        segments=SEGMENTS,
        sliding_window=8,
        position_ids=positions,
    )
    near = (positions[0][:, None] - positions[0][None, :]) < 8
    mask = (attention.visible(SEGMENTS, 61) & near)[None, None]
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=True
    )
    assert torch.allclose(found, wanted.transpose(1, 2))


def test_a_row_is_a_batch_of_one():
    query, key, value = (torch.cat([t, t]) for t in inputs())
    with pytest.raises(OptionError, match="batch of 2"):
        attention.attention(torch.nn.Module(), query, key, value, None, segments=SEGMENTS)


@pytest.mark.parametrize(
    "device,layout,dtype,flex,kernel",
    [
        ("cpu", "shared_prefix", "float32", False, "blocks"),
        ("cpu", "packed", "bfloat16", True, "blocks"),
        ("cuda", "packed", "bfloat16", True, "varlen"),
        ("cuda", "padded", "float16", False, "varlen"),
        ("cuda", "packed", "float32", True, "flex"),
        ("cuda", "shared_prefix", "bfloat16", True, "flex"),
        ("cuda", "shared_prefix", "bfloat16", False, "mask"),
        ("mps", "packed", "float16", True, "mask"),
    ],
)
def test_choice_is_a_rule(device, layout, dtype, flex, kernel):
    chosen, reason = attention.choose(device, layout, dtype, flex=flex)
    assert chosen == kernel
    assert reason
