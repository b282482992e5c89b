"""Linear layers of the engine: each row for itself, in float32 and in int8."""

import pytest
import torch

from qwen_chat.errors import OptionError
from qwen_chat.inference.quantize import FloatLinear, Int8Linear, make_linear

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
    weight, _ = layer(64, 17)
    x = rows(2, 64)
    for quantize in (None, "int8"):
        linear = make_linear(weight.clone(), None, quantize)
        before = linear(x)
        copy = weight.clone()
        weight.zero_()
        assert torch.equal(linear(x), before)
        weight.copy_(copy)


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(OptionError, match="quantize: 'int3'; expected int8"):
        make_linear(torch.zeros(2, 2), None, "int3")
