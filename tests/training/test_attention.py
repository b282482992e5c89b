"""Attention over rows: no cross-talk, equal to a dense mask, chosen by a rule that needs no device."""

import pytest
import torch

from qwen_chat.errors import ModelError, OptionError
from qwen_chat.training import attention
from tests.support.tiny_models import VOCABULARY, tiny_model

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
    chosen, reason = attention.kernel_for(device, layout, dtype, flex=flex)
    assert chosen == kernel
    assert reason


@pytest.mark.parametrize(
    "capability,head,layout,dtype,flex,kernel",
    [
        ((8, 0), 128, "packed", "bfloat16", True, "varlen"),
        ((9, 0), 256, "padded", "float16", False, "varlen"),
        ((7, 5), 128, "packed", "float16", True, "flex"),  # T4
        ((7, 0), 128, "packed", "float16", False, "mask"),  # V100 without Triton
        ((9, 0), 288, "packed", "bfloat16", True, "flex"),
        ((9, 0), 128, "packed", "float32", True, "flex"),
        ((7, 5), 64, "shared_prefix", "float16", True, "flex"),
    ],
)
def test_the_card_and_the_head_size_decide(capability, head, layout, dtype, flex, kernel, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(attention, "has_triton", lambda: flex)
    chosen, reason = attention.kernel_here("cuda", layout, dtype, head)
    assert chosen == kernel
    assert ("no flash attention" in reason) == (
        chosen == "flex" and layout == "packed" and dtype != "float32"
    )
    monkeypatch.setattr(attention, "_flex_failed", True)
    assert attention.kernel_here("cuda", layout, dtype, head)[0] == (
        "varlen" if kernel == "varlen" else "mask"
    )


def test_the_size_of_a_head_by_config():
    assert attention.head_size({"hidden_size": 896, "num_attention_heads": 14}) == 64
    assert attention.head_size({"hidden_size": 896, "num_attention_heads": 14, "head_dim": 128}) == 128
    assert attention.head_size({"text_config": {"hidden_size": 64, "num_attention_heads": 2}}) == 32
    assert attention.head_size({"model_type": "other"}) == 128


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_kernel_that_does_not_compile_falls_back_to_the_mask_once(where, monkeypatch, capsys):
    calls = []

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query):
            calls.append(where)
            if where == "forward":
                raise RuntimeError("No valid triton configs. OutOfMemoryError: out of resource\nmore")
            return query.transpose(1, 2).clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("No valid triton configs. OutOfMemoryError: out of resource\nmore")

    monkeypatch.setattr(attention, "_flex_failed", False)
    monkeypatch.setattr(attention, "_flex_tried", set())
    monkeypatch.setattr(attention, "_kernel", lambda query, layout: "flex")
    monkeypatch.setattr(attention, "_flex", lambda query, *rest: Fails.apply(query))
    for _ in range(2):
        found, _ = attention.attention(torch.nn.Module(), *inputs(), None, segments=SEGMENTS)
    monkeypatch.setattr(attention, "_kernel", lambda query, layout: "mask")
    wanted, _ = attention.attention(torch.nn.Module(), *inputs(), None, segments=SEGMENTS)
    assert torch.equal(found, wanted) and len(calls) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "attention: FlexAttention cannot be compiled here (No valid triton configs. OutOfMemoryError: out of"
        " resource); SDPA with a mask instead"
    )


def test_a_kernel_that_compiles_is_tried_once(monkeypatch):
    calls = []

    def flex(query, *rest):
        calls.append(query.shape)
        return query.transpose(1, 2) + 0 * sum(t.sum() for t in rest[:2])

    monkeypatch.setattr(attention, "_flex_failed", False)
    monkeypatch.setattr(attention, "_flex_tried", set())
    monkeypatch.setattr(attention, "_kernel", lambda query, layout: "flex")
    monkeypatch.setattr(attention, "_flex", flex)
    for _ in range(3):
        attention.attention(torch.nn.Module(), *inputs(), None, segments=SEGMENTS)
    assert len(calls) == 4


def test_a_rows_layout_is_read_once_for_all_layers(monkeypatch):
    reads = []
    model = tiny_model("qwen2", dtype=torch.float32).eval()
    own = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(tensor) or own(tensor))
    segments = SEGMENTS.clone()
    model(input_ids=torch.arange(61)[None], segments=segments)
    assert len([tensor for tensor in reads if tensor is segments]) == 1


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "generation"])
@pytest.mark.parametrize(
    "name,value", [("softcap", 50.0), ("s_aux", torch.zeros(6)), ("is_causal", False), ("position_bias", 1)]
)
def test_a_keyword_that_no_kernel_knows_is_refused_not_swallowed(name, value, rows):
    query, key, value_ = inputs()
    segments = SEGMENTS if rows else None
    with pytest.raises(ModelError, match=f"asks its attention for '{name}'"):
        attention.attention(torch.nn.Module(), query, key, value_, None, segments=segments, **{name: value})
    attention.attention(torch.nn.Module(), query, key, value_, None, segments=SEGMENTS, **{name: None})


def test_a_window_that_is_only_in_the_mask_is_refused():
    """Qwen2-MoE with a sliding window, Llama 4's chunks: the layer says nothing to its attention function."""
    query, key, value = inputs()
    mask = torch.ones(1, 1, 61, 61, dtype=torch.bool).tril()
    with pytest.raises(ModelError, match="limited to a window or chunk"):
        attention.attention(torch.nn.Module(), query, key, value, mask, segments=SEGMENTS)
    with pytest.raises(ModelError, match="limited to a window or chunk"):
        attention.attention(torch.nn.Module(), query, key, value, None, segments=SEGMENTS, sliding_window=8)
