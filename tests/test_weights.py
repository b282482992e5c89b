"""The tensors of a folder: bit for bit what was saved; a damaged or half-downloaded file is named."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwen_chat.errors import ModelError
from qwen_chat.weights import INDEX, SINGLE, stored_tensors

TENSORS = {
    "a": torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "b": torch.tensor(3.5),
    "c": torch.arange(6).view(2, 3),
    "d": torch.empty(0, 4),
    "e": torch.tensor([True, False]),
    "f": torch.tensor([[0.5], [-2.0]]).to(torch.float8_e4m3fn),
}


def sharded(folder: Path) -> Path:
    """Two shards and their index."""
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file({name: TENSORS[name] for name in "abc"}, folder / first, {"format": "pt"})
    save_file({name: TENSORS[name] for name in "def"}, folder / second)
    places = {**dict.fromkeys("abc", first), **dict.fromkeys("def", second)}
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    return folder


def test_every_tensor_is_read_as_it_was_saved(tmp_path: Path) -> None:
    found = stored_tensors(sharded(tmp_path))
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        stored = found[name]
        stored.announce()
        read = stored.read()
        assert (stored.shape, stored.dtype, stored.size) == (tensor.shape, tensor.dtype, tensor.nbytes), name
        assert (read.shape, read.dtype) == (tensor.shape, tensor.dtype), name
        assert read.flatten().view(torch.uint8).tolist() == tensor.flatten().view(torch.uint8).tolist(), name
    assert torch.equal(found["a"].read(2, 4), TENSORS["a"][2:4])
    assert torch.equal(found["c"].read(1), TENSORS["c"][1:])
    save_file({"x": TENSORS["a"]}, tmp_path / SINGLE)
    assert list(stored_tensors(tmp_path)) == ["x"]  # a single file goes before an index, as in transformers


def test_nothing_is_mapped(tmp_path: Path) -> None:
    """A tensor that was let go leaves no page of its file behind."""
    save_file({"x": torch.zeros(1000, 1000)}, tmp_path / SINGLE)
    read = stored_tensors(tmp_path)["x"].read()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert read.sum() == 0


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def test_a_folder_without_safetensors_has_none(tmp_path: Path) -> None:
    assert stored_tensors(tmp_path) == {}


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut, "has not come down whole"),
        (lambda file: file.write_bytes(file.read_bytes() + b"x"), "has not come down whole"),
        (lambda file: os.truncate(file, 5), "not a whole safetensors file"),
        (lambda file: os.truncate(file, 40), "not a whole safetensors file"),
        (lambda file: file.write_text("<html>not found, try again</html>"), "not a whole safetensors file"),
        (lambda file: file.unlink(), "missing; fetch"),
        (lambda file: save_file({"d": TENSORS["d"]}, file), "e is in none of its 2 files"),
        (
            lambda file: file.write_bytes(file.read_bytes().replace(b'"F32"', b'"X32"')),
            "a kind of number that is not known, 'X32'",
        ),
        (
            lambda file: file.write_bytes(file.read_bytes().replace(b"[0,4]", b"[1,4]")),
            "another size than its shape",
        ),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, damage: Callable[[Path], None], told: str) -> None:
    file = sharded(tmp_path) / "model-00002-of-00002.safetensors"
    damage(file)
    with pytest.raises(ModelError, match=re.escape(told)) as error:
        stored_tensors(tmp_path)
    assert ("e is in none" in told) or str(error.value).startswith(str(file))
