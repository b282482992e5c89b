"""The base under an adapter on a CPU: matrices as narrow as they are stored, or in 4 bits, read a piece at a time.

In: a model whose weights are mapped from its files. Out: the same model; its matrices stay in 16 bits or are put into
4, one after the other, all else becomes float32. `product` and `product_back` multiply by such a matrix in float32:
a piece of it is widened, used and forgotten, so no more than a piece ever exists wide. A number of 16 bits is a number
of float32 too: nothing is rounded, and the sums are those over a float32 base.
"""

import ctypes
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from qwen_chat.errors import MissingDependency
from qwen_chat.training.matmul import Product

# Values that are widened at once: 16 MiB of float32, which stay in the last cache until they are multiplied. Measured
# at 512 tokens: 3 % slower than a product with a float32 matrix, where widening it whole first takes 30 %.
PIECE = 2**22
NF4_BLOCK = 64  # weights under one scale in NF4


def stored_type(folder: Path) -> torch.dtype:
    """bfloat16 or float16 where every tensor of a model's folder is stored so, else float32."""
    kinds: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        kinds |= {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    one = kinds.pop() if len(kinds) == 1 else ""
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(one, torch.float32)


def keep(model: PreTrainedModel, *, four_bits: bool, compute: torch.dtype) -> None:
    """Freeze a model and keep its matrices narrow. compute: what 4-bit layers multiply in outside of fused.py.

    Raises MissingDependency where bitsandbytes is wanted and not there.
    """
    head, rows = model.get_output_embeddings(), model.get_input_embeddings()
    model.requires_grad_(False)
    if four_bits:
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if type(child) is torch.nn.Linear and child is not head:
                    setattr(module, name, _in_four_bits(child, compute))
        cast(Any, model).is_loaded_in_4bit = True  # peft asks
    for module in model.modules():
        narrow = (
            type(module) is torch.nn.Linear or module is rows or is_narrow(getattr(module, "weight", None))
        )
        for name, parameter in module._parameters.items():
            if parameter is not None and not (narrow and name == "weight"):
                parameter.data = parameter.data.float()
    rows.register_forward_hook(lambda module, inputs, output: output.float())


def how_kept(model: PreTrainedModel, *, four_bits: bool) -> str:
    """How the base lies in memory, for the person who started the run."""
    kind = str(model.get_output_embeddings().weight.dtype).removeprefix("torch.")
    if four_bits:
        return f"base in 4 bits (NF4, double quantisation), embedding and head in {kind} as stored; adapter float32"
    if kind == "float32":
        return "dtype float32 (as the base is stored)"
    return f"base in {kind} as stored, widened a piece at a time: exact; adapter float32"


def widen_words(model: PreTrainedModel) -> None:
    """Embedding and head in float32: rows of them are to be trained."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.weight.data = module.weight.data.float()


def _in_four_bits(linear: torch.nn.Linear, compute: torch.dtype) -> torch.nn.Module:
    """The layer in NF4 with double quantisation, as bitsandbytes packs a whole matrix; its memory is given back."""
    try:
        from bitsandbytes import functional, nn
    except ImportError:
        raise MissingDependency("bitsandbytes", "a model in 4 bits", extra="qlora") from None
    weight = linear.weight.data.contiguous()
    flat = weight.view(-1)
    parts = [
        torch.ops.bitsandbytes.quantize_4bit.default(part, NF4_BLOCK, "nf4", torch.uint8)
        for part in torch.split(flat, PIECE // 4)
    ]
    packed, scales = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    offset = scales.mean()
    small, second = functional.quantize_blockwise(scales - offset, blocksize=256)
    state = functional.QuantState(
        absmax=small,
        shape=weight.shape,
        dtype=torch.float32,
        blocksize=NF4_BLOCK,
        code=functional.get_4bit_type("nf4", device=weight.device),
        quant_type="nf4",
        offset=offset,
        state2=second,
    )
    with torch.device("meta"):
        layer: Any = nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=compute,
            compress_statistics=True,
            quant_type="nf4",
        )
    layer.weight = nn.Params4bit(
        packed, quant_state=state, blocksize=NF4_BLOCK, quant_type="nf4", module=layer, bnb_quantized=True
    )
    layer.quant_state, layer.bias = state, linear.bias
    # Else a layer is packed anew in its first evaluation: other rounding, in training after it too.
    layer.support_avx512bf16_for_cpu = False
    linear.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)
    _give_back(weight)
    return cast(torch.nn.Module, layer)


def _give_back(tensor: torch.Tensor) -> None:
    """Let go of the whole pages of a tensor that nobody reads again: those of a mapped file count as memory held."""
    page, dont_need = 4096, 4  # <sys/mman.h>
    begin = -(-tensor.data_ptr() // page) * page
    size = (tensor.data_ptr() + tensor.nbytes) // page * page - begin
    try:
        madvise = ctypes.CDLL(None).madvise
    except (AttributeError, OSError):  # not Linux
        return
    if size > 0:
        madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), dont_need)


# -------------------------------------------------------------------------------------------------- products


def is_narrow(weight: torch.Tensor | None) -> bool:
    """Whether a matrix is frozen in 16 bits, or in NF4 with double quantisation."""
    if weight is None or weight.requires_grad or weight.dim() != 2 or weight.device.type != "cpu":
        return False
    if weight.dtype in (torch.bfloat16, torch.float16):
        return not hasattr(weight, "ds_id")
    state = getattr(weight, "quant_state", None)
    return state is not None and state.nested and state.quant_type == "nf4" and state.blocksize == NF4_BLOCK


def product(
    multiply: Product, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x [N, in] times weight [out, in], narrow or not -> [N, out]."""
    if not is_narrow(weight):
        return multiply(x, weight, bias)
    y: torch.Tensor | None = None
    for rows, piece in _widened(weight):
        part = multiply(x, piece, None if bias is None else bias[rows])
        if y is None:
            y = x.new_empty(len(x), _shape(weight)[0])
        y[:, rows] = part
    return cast(torch.Tensor, y)


def product_back(multiply: Product, gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The gradient [N, in] of what was multiplied, from that of the product [N, out]."""
    if not is_narrow(weight):
        return multiply(gradient, weight.t(), None)
    total: torch.Tensor | None = None
    for rows, piece in _widened(weight):
        part = multiply(gradient[:, rows], piece.t(), None)
        total = part if total is None else total.add_(part)
    return cast(torch.Tensor, total)


def _shape(weight: torch.Tensor) -> torch.Size:
    state = getattr(weight, "quant_state", None)
    return weight.shape if state is None else torch.Size(state.shape)


def _widened(weight: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of a narrow matrix, and these rows in float32. A piece may be overwritten by the next."""
    height, width = _shape(weight)
    step = min(height, max(1, PIECE // width // NF4_BLOCK) * NF4_BLOCK)  # whole blocks, whatever the width
    state: Any = getattr(weight, "quant_state", None)
    if state is None:
        wide = torch.empty(step, width)
        for start in range(0, height, step):
            rows = slice(start, min(start + step, height))
            yield rows, wide[: rows.stop - start].copy_(weight[rows])
        return
    from bitsandbytes.functional import dequantize_blockwise

    scales = dequantize_blockwise(state.absmax, state.state2).add_(state.offset)
    packed = weight.data.view(-1)
    for start in range(0, height, step):
        rows = slice(start, min(start + step, height))
        first, last = start * width, rows.stop * width
        # A block a row: the kernel gives wrong scales to rows that are no whole number of blocks.
        lying = (1, last - first) if (last - first) % NF4_BLOCK else ((last - first) // NF4_BLOCK, NF4_BLOCK)
        piece = torch.ops.bitsandbytes.dequantize_4bit.default(
            packed[first // 2 : -(-last // 2)],
            scales[first // NF4_BLOCK : -(-last // NF4_BLOCK)],
            NF4_BLOCK,
            "nf4",
            lying,
            torch.float32,
        )
        yield rows, piece.view(rows.stop - start, width)
