"""The native step: the same answers as torch's, a row's bits its own, and a line that says why where there is none."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qwen_chat.inference import int4
from qwen_chat.inference.decoder import Decoder
from qwen_chat.inference.kv_cache import KVStore
from qwen_chat.inference.native import library
from qwen_chat.inference.native.library import NATIVE_SWITCH, Library, native_library
from qwen_chat.inference.native.linear import NativeLinear
from qwen_chat.inference.quantize import Int8Linear
from qwen_chat.inference.step import Segment
from tests.support.tiny_families import tiny_family

KNOWN = ["qwen2_slide", "qwen3_slide", "mistral", "mistral_full"]


@pytest.fixture
def native() -> Library:
    found = native_library()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is loaded yet, nor is afterwards what the test made."""
    monkeypatch.delenv(NATIVE_SWITCH, raising=False)
    library._made.cache_clear()
    yield
    library._made.cache_clear()


def tokens(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 512, (count,), generator=generator).tolist()


def logits_of(decoder: Decoder, ids: list[int], *cuts: int) -> torch.Tensor:
    """After the last of `ids`, a step for each piece."""
    row, begin = KVStore(decoder.kv_shape).row(), 0
    found = torch.empty(0)
    for end in (*cuts, len(ids)):
        row.reserve(end)
        found = decoder.step([Segment(ids[begin:end], begin, row)])
        begin = end
    return found[0]


@pytest.mark.parametrize("name", KNOWN)
def test_float32_is_torchs_to_1e_4(name: str, native: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(tiny_family(name))
    monkeypatch.setenv(NATIVE_SWITCH, "0")
    reference, ids = Decoder(tiny_family(name)), tokens(150)
    assert (decoder.ways[-1], reference.ways[-1]) == (
        f"steps in native code ({native.name})",
        f"steps in torch; the native step is off: {NATIVE_SWITCH}=0",
    )
    for end in (1, 16, 63, 64, 65, 150):
        found, expected = logits_of(decoder, ids[:end]), logits_of(reference, ids[:end])
        assert torch.allclose(found, expected, rtol=0, atol=1e-4), end


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_whole_numbers_stay_nearer_to_torchs_than_rounding_took_them(
    quantize: str, native: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same products but for a number that falls to the other side of a half, or int4's rounded activations."""
    decoder = Decoder(tiny_family("mistral_full"), quantize=quantize)
    monkeypatch.setenv(NATIVE_SWITCH, "0")
    reference = Decoder(tiny_family("mistral_full"), quantize=quantize)
    exact = Decoder(tiny_family("mistral_full"))
    for end in (1, 64, 150):
        found, expected, unrounded = (logits_of(one, tokens(end)) for one in (decoder, reference, exact))
        assert (found - expected).abs().max() < 0.5 * (expected - unrounded).abs().max(), end


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("name", ["qwen2_slide", "mistral_full"])
def test_bits_depend_on_neither_threads_nor_pieces(name: str, quantize: str | None, native: Library) -> None:
    decoder, ids, threads = (
        Decoder(tiny_family(name), quantize=quantize),
        tokens(150),
        torch.get_num_threads(),
    )
    whole = logits_of(decoder, ids)
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            assert torch.equal(logits_of(decoder, ids), whole), count
            assert torch.equal(logits_of(decoder, ids, 1, 2, 9, 22, 64, 65, 149), whole), count
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["qwen3_slide", "mistral_full"])
def test_threads_share_a_long_rows_keys_and_change_no_bit(name: str, native: Library) -> None:
    """A few tokens behind 1,300 are summed range by range in all threads, in one thread else."""
    decoder, ids = Decoder(tiny_family(name)), tokens(1300)
    whole = logits_of(decoder, ids)
    assert torch.equal(logits_of(decoder, ids, 1299), whole)
    assert torch.equal(logits_of(decoder, ids, 600, 1293), whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(NATIVE_SWITCH, "0")
        reference = logits_of(Decoder(tiny_family(name)), ids)
    assert torch.allclose(whole, reference, rtol=0, atol=1e-4)


def test_threads_of_its_own_give_the_same_bits(native: Library) -> None:
    """Where torch's OpenMP cannot be shared."""
    alone = Library(native.functions, native.panel, None, native.name)
    weight, x = torch.randn(200, 96), torch.randn(70, 96)
    shared = NativeLinear(native, weight, None, None)(x)
    assert torch.equal(NativeLinear(alone, weight, None, None)(x), shared)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (65, 30), (7, 1), (200, 1537)])
def test_int8_products_are_torchs_own_bits(
    outputs: int, inputs: int, stored: torch.dtype, native: Library
) -> None:
    """Weights are rounded alike, whole numbers are summed, and scaled in the same order."""
    torch.manual_seed(outputs)
    weight, bias = torch.randn(outputs, inputs).to(stored), torch.randn(outputs)
    weight[3] = 0
    mine, reference = NativeLinear(native, weight, bias, "int8"), Int8Linear(weight, bias)
    for rows in (1, 2, 12, 13, 100):
        x = torch.randn(rows, inputs) * torch.rand(rows, 1) * 10
        x[0, 0] = 0
        assert torch.equal(mine(x), reference(x)), rows
    assert torch.equal(mine(torch.zeros(3, inputs)), reference(torch.zeros(3, inputs)))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (65, 32), (200, 1536)])
def test_int4_products_are_what_the_whole_numbers_say(
    outputs: int, inputs: int, stored: torch.dtype, native: Library
) -> None:
    torch.manual_seed(outputs)
    weight, bias, x = torch.randn(outputs, inputs).to(stored), torch.randn(outputs), torch.randn(21, inputs)
    weight[3] = 0
    x[3] *= 1000  # a loud neighbour
    whole, scales = int4.rounded(weight)
    scale, zero = (one.t().double().repeat_interleave(int4.GROUP, 1) for one in scales.unbind(-1))
    groups = x.view(len(x), -1, int4.GROUP)
    step = groups.abs().amax(-1, keepdim=True) / 127
    rounded = ((groups / step).round() * step).view(x.shape).double()
    expected = rounded @ ((whole.double() - 8) * scale + zero).T + bias
    linear = NativeLinear(native, weight, bias, "int4")
    found = linear(x)
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(linear(torch.zeros(1, inputs))[0], bias)
    assert all(
        torch.equal(linear(x[row : row + count]), found[row : row + count])
        for row, count in ((0, 1), (3, 1), (2, 3), (4, 9), (20, 1))
    )


@pytest.mark.parametrize(("outputs", "inputs"), [(65, 30), (7, 1), (200, 1537)])
def test_float_products_are_a_rows_own(outputs: int, inputs: int, native: Library) -> None:
    torch.manual_seed(outputs)
    weight, bias, x = torch.randn(outputs, inputs), torch.randn(outputs), torch.randn(100, inputs)
    linear = NativeLinear(native, weight, bias, None)
    whole = linear(x)
    expected = x.double() @ weight.double().T + bias
    assert torch.allclose(whole.double(), expected, rtol=0, atol=2e-6 * inputs)
    assert all(
        torch.equal(linear(x[row : row + count]), whole[row : row + count])
        for row, count in ((0, 1), (3, 2), (40, 13), (99, 1))
    )


def test_without_a_compiler_torch_computes(
    fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("QWEN_CHAT_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    decoder = Decoder(tiny_family("mistral"))
    assert decoder.ways[-1] == (
        "steps in torch; the native step is off: no C++ compiler was found (g++, c++, $CXX)"
    )
    assert logits_of(decoder, tokens(5)).shape == (512,)


def test_a_compiler_that_fails_is_named_and_leaves_nothing(
    fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\n[ $1 = --version ] || { echo 'x.cpp:1: error: no' >&2; exit 1; }\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("QWEN_CHAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))
    assert native_library() == f"{compiler} failed: x.cpp:1: error: no"
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_a_cache_that_cannot_be_written_is_named(
    fresh: None, native: Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QWEN_CHAT_CACHE", str(tmp_path / "file"))
    library._made.cache_clear()
    assert re.match(rf"{tmp_path}/file/native-[0-9a-f]{{16}}: cannot be written", str(native_library()))


def test_without_avx2_torch_computes(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_instructions", lambda: ["sse2"])
    assert native_library() == "this CPU has no AVX2"


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("qwen3_moe", torch.float32, "it does not know qwen3_moe"),
        (
            "mistral",
            torch.bfloat16,
            "it computes in float32 on a CPU, and this model is torch.bfloat16 on cpu",
        ),
    ],
)
def test_what_it_does_not_know_goes_through_torch(name: str, kind: torch.dtype, reason: str) -> None:
    decoder = Decoder(tiny_family(name).to(kind))
    assert decoder.ways[-1] == f"steps in torch; the native step is off: {reason}"


@pytest.mark.slow
@pytest.mark.parametrize("checks", ["address,undefined", "thread"])
def test_the_step_alone_is_clean_under_sanitizers(checks: str, native: Library, tmp_path: Path) -> None:
    """Random rows in pieces and in company, an adapter, one thread and three: the same bits, and nothing to report."""
    compiler = shutil.which("g++") or pytest.skip("no g++")
    source, program = Path(__file__).with_name("native_driver.cpp"), tmp_path / "driver"
    options = [
        "-std=c++17",
        "-O1",
        "-g",
        "-march=native",
        "-ffp-contract=off",
        "-pthread",
        "-fno-sanitize-recover=all",
    ]
    include = f"-I{library._SOURCE.parent}"
    subprocess.run(
        [compiler, *options, f"-fsanitize={checks}", include, str(source), "-o", str(program)], check=True
    )
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["x86-64", "haswell", "skylake-avx512", "icelake-server"])
def test_every_kind_of_vector_keeps_a_rows_bits(machine: str, native: Library, tmp_path: Path) -> None:
    compiler = shutil.which("g++") or pytest.skip("no g++")
    source, program = Path(__file__).with_name("native_driver.cpp"), tmp_path / "driver"
    options = ["-std=c++17", "-O3", f"-march={machine}", "-ffp-contract=off", "-pthread"]
    subprocess.run(
        [compiler, *options, f"-I{library._SOURCE.parent}", str(source), "-o", str(program)], check=True
    )
    if machine == "x86-64" or native.name.startswith("AVX-512 with VNNI"):
        assert subprocess.run([str(program)]).returncode == 0


def test_the_source_is_part_of_the_package() -> None:
    assert os.path.getsize(library._SOURCE) > 0
    assert '"qwen_chat.inference.native" = ["*.cpp"]' in Path("pyproject.toml").read_text(encoding="utf-8")
