"""Linear layers of the engine: each row for itself, in float32, in int8 and in int4."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from qwen_chat import hardware
from qwen_chat.errors import OptionError
from qwen_chat.inference import int4, int8
from qwen_chat.inference.int4 import Int4Linear
from qwen_chat.inference.int8 import Int8Linear
from qwen_chat.inference.quantize import FloatLinear, linear_bytes, make_linear, ways

SHAPES = [(576, 960), (1536, 576), (896, 1152), (4864, 896), (64, 17)]


def layer(inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(inputs)
    return torch.randn(outputs, inputs, generator=generator) / inputs**0.5, torch.randn(
        outputs, generator=generator
    )


def rows(count: int, inputs: int) -> torch.Tensor:
    return torch.randn(count, inputs, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_int8_rows_are_bit_for_bit_the_same_alone_and_among_loud_neighbours(
    inputs: int, outputs: int
) -> None:
    linear = Int8Linear(*layer(inputs, outputs))
    x = rows(40, inputs)
    x[::3] *= 1000.0
    x[5] = 0.0
    whole = linear(x)
    for count in (1, 2, 8, 16, 17, 33):  # both kernels: few rows, many rows
        for first in range(0, 40 - count + 1, 7):
            assert torch.equal(linear(x[first : first + count].clone()), whole[first : first + count])


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_int8_is_near_the_float_result(inputs: int, outputs: int) -> None:
    weight, bias = layer(inputs, outputs)
    x = rows(24, inputs)
    exact = x @ weight.t() + bias
    error = (Int8Linear(weight, bias)(x) - exact).norm() / (exact - bias).norm()
    assert error < 0.03  # 63 steps a side; where the processor has VNNI 127: about 0.011


def test_int8_takes_bfloat16_and_gives_it_back() -> None:
    linear, x = Int8Linear(*layer(64, 17)), rows(3, 64).bfloat16()
    assert torch.equal(linear(x), linear(x.float()).bfloat16())


def test_int8_of_whole_numbers_is_exact() -> None:
    """Weights and activations that the scales represent exactly: only the scales' own rounding is lost."""
    weight = torch.tensor([[127.0, -64.0, 1.0], [0.0, 0.0, 127.0]])
    x = torch.tensor([[63.0, 1.0, -5.0], [0.0, 0.0, 0.0]])
    linear = Int8Linear(weight)
    levels = linear._levels
    steps = (x / 63 * levels).round() * 63 / levels
    assert torch.allclose(linear(x), steps @ weight.t(), rtol=1e-6, atol=1e-4)
    assert torch.equal(linear(x)[1], torch.zeros(2))


def test_a_zero_weight_row_gives_its_bias() -> None:
    assert torch.equal(
        Int8Linear(torch.zeros(2, 8), torch.tensor([1.0, -2.0]))(rows(3, 8)), torch.tensor([[1.0, -2.0]] * 3)
    )


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_float_is_the_linear_layer(inputs: int, outputs: int) -> None:
    weight, bias = layer(inputs, outputs)
    x = rows(9, inputs)
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert torch.allclose(FloatLinear(weight, bias)(x).double(), expected, atol=1e-4)
    assert torch.allclose(FloatLinear(weight)(x[:1]).double(), expected[:1] - bias.double(), atol=1e-4)


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="measured on processors with AVX-512 only")
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_float_rows_are_bit_for_bit_the_same_alone_and_together(inputs: int, outputs: int) -> None:
    linear = FloatLinear(*layer(inputs, outputs))
    x = rows(130, inputs)
    whole = linear(x)
    for count in (1, 2, 3, 7, 8, 16, 17, 33, 64, 129):
        assert torch.equal(linear(x[1 : 1 + count].clone()), whole[1 : 1 + count])


def test_the_weight_may_change_afterwards() -> None:
    weight, _ = layer(64, 48)
    x = rows(2, 64)
    for quantize in (None, "int8", "int4"):
        linear = make_linear(weight.clone(), None, quantize)
        before = linear(x)
        copy = weight.clone()
        weight.zero_()
        assert torch.equal(linear(x), before)
        weight.copy_(copy)


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(OptionError, match="quantize: 'int3'; expected int8, int4"):
        make_linear(torch.zeros(2, 2), None, "int3")


INT4_SHAPES = [(576, 960), (1536, 576), (896, 1152), (4864, 896), (64, 48)]
with_int4 = pytest.mark.skipif(not int4.takes(64, 64), reason="this torch has no int4 kernel")


@with_int4
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), INT4_SHAPES)
def test_int4_rows_are_bit_for_bit_the_same_alone_and_among_loud_neighbours(
    inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    linear = Int4Linear(*layer(inputs, outputs))
    x = rows(40, inputs).to(dtype)
    x[::3] *= 1000.0
    whole, threads = linear(x), torch.get_num_threads()
    assert whole.dtype is dtype
    try:
        for count in range(1, 41):
            torch.set_num_threads(1 + count % 2)
            for first in (0, (40 - count) // 2, 40 - count):
                assert torch.equal(linear(x[first : first + count].clone()), whole[first : first + count])
    finally:
        torch.set_num_threads(threads)


@with_int4
@pytest.mark.parametrize(("inputs", "outputs"), INT4_SHAPES)
def test_int4_computes_what_its_whole_numbers_say(inputs: int, outputs: int) -> None:
    weight, bias = layer(inputs, outputs)
    whole, scales = int4.rounded(weight)
    scale, zero = (part.float().t().repeat_interleave(int4.GROUP, 1) for part in scales.unbind(-1))
    read = (whole - 8) * scale + zero
    groups = weight.view(outputs, -1, int4.GROUP)
    low = groups.amin(-1, keepdim=True)
    step = (groups.amax(-1, keepdim=True) - low) / 15
    plain = ((groups - low) / step).round() * step + low
    # Fitted, they lie nearer than what goes from the smallest number to the largest in 15 steps.
    assert (read - weight).norm() < 0.97 * (plain - groups).norm()
    assert ((read - weight).abs() <= scale * 2).all()
    x = rows(9, inputs).bfloat16().float()
    exact = x @ read.t() + bias
    error = (Int4Linear(weight, bias)(x) - exact).norm() / (exact - bias).norm()
    assert error < 0.004  # the result is in bfloat16


@with_int4
def test_a_shape_that_int4_does_not_take_is_in_int8() -> None:
    for outputs, inputs in ((17, 64), (48, 40)):
        weight = layer(inputs, outputs)[0]
        made = make_linear(weight, None, "int4")
        assert isinstance(made, Int8Linear)
        assert linear_bytes(outputs, inputs, "int4") == linear_bytes(outputs, inputs, "int8")
    assert isinstance(make_linear(torch.ones(48, 64), None, "int4"), Int4Linear)


@with_int4
def test_bytes_of_a_layer() -> None:
    weight, _ = layer(4864, 896)
    linear = Int4Linear(weight)
    kept = sum(tensor.nbytes for tensor in vars(linear).values() if isinstance(tensor, torch.Tensor))
    assert linear_bytes(896, 4864, "int4") == kept == 896 * 4864 * 5 // 8
    assert linear_bytes(896, 4864) == 4 * 896 * 4864
    assert linear_bytes(896, 4864, dtype=torch.bfloat16) == 2 * 896 * 4864
    assert linear_bytes(896, 4864, "int8") in (896 * 4864 + 16 * 896, 2 * 896 * 4864 + 16 * 896)


@with_int4
def test_a_weight_packed_in_pieces_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias = layer(576, 960)
    x = rows(20, 576)
    for kind, module, name, small in (
        (Int8Linear, int8, "_PACKED", 576 * 100),
        (Int4Linear, int4, "_SLICE", 64),
    ):
        expected = kind(weight, bias)(x)
        monkeypatch.setattr(module, name, small)
        monkeypatch.setattr(int8, "_ROUNDED", 7)
        assert torch.equal(kind(weight, bias)(x), expected)


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_int8_in_public_operators_gives_the_same_bits(
    inputs: int, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if int8.fused_levels(inputs) == 63:
        pytest.skip("without VNNI the public operators have more steps than fbgemm's")
    weight, bias = layer(inputs, outputs)
    x = rows(40, inputs)
    x[:20] = next_to_halves(20, inputs)
    expected = Int8Linear(weight, bias)(x)
    monkeypatch.setattr(int8, "fused_levels", lambda inputs: 0)
    for has_int_mm in {False, int8.has_int_mm(inputs)}:
        monkeypatch.setattr(int8, "has_int_mm", lambda inputs, found=has_int_mm: found)
        assert torch.equal(Int8Linear(weight, bias)(x), expected)


def next_to_halves(count: int, inputs: int) -> torch.Tensor:
    """Rows whose largest number is 127, the others an ulp beside a half: one rounding of them is not another."""
    whole = torch.randint(-125, 125, (count, inputs), generator=torch.Generator().manual_seed(count))
    x = torch.nextafter(whole + 0.5, torch.tensor([-200.0, 200.0]).repeat(count // 2)[:, None])
    x[:, 0] = 127.0
    return x


@pytest.mark.skipif(not int8.fused_levels(64), reason="this torch has no fbgemm kernel")
def test_how_the_kernel_rounds_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """fbgemm rounds before it adds the zero point, or after: releases of torch differ."""
    linear, x, fused = Int8Linear(layer(576, 96)[0]), next_to_halves(8, 576), int8._fused
    expected = linear(x)
    for early in (
        lambda steps, levels, packed: fused(steps.round(), levels, packed),
        lambda steps, levels, packed: fused(steps.add(levels + 1).round().sub(levels + 1), levels, packed),
    ):
        monkeypatch.setattr(int8, "_fused", early)
        assert torch.equal(linear(x), expected)


def saturating(steps: torch.Tensor, zero: int, weight: torch.Tensor) -> torch.Tensor:
    """Pairs of products summed in 16 bits, as AVX2 does."""
    products = (steps.long() + zero)[:, None] * weight.long()
    pairs = functional.pad(products, (0, products.shape[-1] % 2)).unflatten(-1, (-1, 2)).sum(-1)
    return pairs.clamp(-(2**15), 2**15 - 1).sum(-1) - zero * weight.long().sum(1)


def exact(steps: torch.Tensor, zero: int, weight: torch.Tensor) -> torch.Tensor:
    return steps.long() @ weight.long().t()


FAULTS: dict[str, tuple[Callable[..., torch.Tensor], int]] = {
    "none": (exact, 127),
    "16-bit sums": (saturating, 63),
    "no zero point": (lambda steps, zero, weight: exact(steps + zero, 0, weight), 0),
    "small numbers": (lambda steps, zero, weight: exact(steps * (steps.abs() > 2), zero, weight), 0),
    "a lone row": (lambda steps, zero, weight: exact(steps, zero, weight) + (len(steps) == 1), 0),
    "the last inputs": (lambda steps, zero, weight: exact(steps[:, :1024], zero, weight[:, :1024]), 0),
    "7 bits": (lambda steps, zero, weight: exact(steps.clamp(-64, 63), zero, weight), 63),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_kernel_that_sums_otherwise_is_not_chosen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sums, levels = FAULTS[fault]
    monkeypatch.setattr(int8, "_packed", lambda whole, scale: (whole, scale))
    monkeypatch.setattr(
        int8, "_fused", lambda steps, levels, packed: sums(steps, levels + 1, packed[0]) * packed[1]
    )
    assert int8.fused_levels.__wrapped__(1540) == levels


def on_processor(monkeypatch: pytest.MonkeyPatch, *, sums_bytes: bool, has_tiles: bool) -> None:
    """As on another one; nothing is known of it yet."""
    monkeypatch.setattr(hardware, "cpu_sums_bytes", lambda: sums_bytes)
    monkeypatch.setattr(hardware, "cpu_has_tiles", lambda: has_tiles)
    for name in ("has_int_mm", "holds_both"):
        monkeypatch.setattr(int8, name, getattr(int8, name).__wrapped__)


def test_int_mm_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias = layer(576, 96)
    x, rows_of, product = rows(40, 576), [], torch._int_mm
    expected = Int8Linear(weight, bias)(x)
    on_processor(monkeypatch, sums_bytes=True, has_tiles=True)
    if not int8.has_int_mm(576) or int8.fused_levels(576) == 63:
        pytest.skip("its sums are not exact on this processor, or fbgemm's have fewer steps")
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: rows_of.append(len(a)) or product(a, b))
    beside = Int8Linear(weight, bias)
    monkeypatch.setattr(int8, "fused_levels", lambda inputs: 0)
    alone = Int8Linear(weight, bias)
    rows_of.clear()
    for linear in (beside, alone):
        assert torch.equal(linear(x), expected)
        assert torch.equal(linear(x[:16]), expected[:16])
    assert rows_of == ([40] if beside.way == int8.FUSED else [40, 16]) + [40, 16]
    assert alone.way == int8.INT_MM


def test_an_int_mm_that_is_slow_gone_or_wrong_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    on_processor(monkeypatch, sums_bytes=True, has_tiles=True)
    with monkeypatch.context() as slow:
        slow.setattr(hardware, "cpu_sums_bytes", lambda: False)
        assert not int8.has_int_mm(576)
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.int() @ b.int()).clamp(-(2**15), 2**15))
    assert not int8.has_int_mm(576)
    monkeypatch.delattr(torch, "_int_mm")
    assert not int8.has_int_mm(576) and not int8.holds_both(576)
    monkeypatch.setattr(int8, "fused_levels", lambda inputs: 0)
    assert Int8Linear(layer(576, 96)[0]).way == int8.IN_FLOAT


def test_an_int4_kernel_that_is_gone_or_wrong_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Int4Linear.__call__

    def gone(self: Int4Linear, x: torch.Tensor) -> torch.Tensor:
        raise AttributeError("no such operator")

    for other in (gone, lambda self, x: call(self, x).mul(1.1), lambda self, x: call(self, x.clamp(-8, 8))):
        monkeypatch.setattr(Int4Linear, "__call__", other)
        assert not int4._has_kernel.__wrapped__()


def test_the_public_sums_are_exact_for_the_largest_numbers() -> None:
    x, weight = torch.full((2, 19_000), 127.0), torch.full((3, 19_000), 127, dtype=torch.int8)
    assert int8.exact_sums(x, weight).tolist() == [[127 * 127 * 19_000] * 3] * 2


@with_int4
def test_ways_are_said_in_one_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    head = make_linear(layer(64, 32)[0], None, "int8")
    parts = tuple(make_linear(layer(inputs, 48)[0], None, "int4") for inputs in (40, 64, 96))
    first, second, *_ = ways(parts, head, "int4", torch.float32)
    assert first == "weights in int4, groups of 32; activations in bfloat16; the head in int8"
    assert second.startswith("1 of 3 layers' weights in int8: int4 takes outputs in 16s and inputs in 32s")
    monkeypatch.setattr(int8, "fused_levels", lambda inputs: 0)
    slow = make_linear(layer(64, 32)[0], None, "int8")
    for inner, last in (((slow,), head), ((), slow)):
        assert ways(inner, last, "int8", torch.float32)[1].startswith(
            f"int8 by {slow.way}: the same bits; this"
        )
