"""A model read a part at a time: the bits of one that was loaded whole."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from qwen_chat.errors import ModelError
from qwen_chat.inference import decoder
from qwen_chat.inference.decoder import Decoder
from qwen_chat.inference.kv_cache import KVStore
from qwen_chat.inference.skeleton import NotByParts, Skeleton
from qwen_chat.inference.step import Segment
from tests.support.tiny_families import FAMILIES, tiny_conditional, tiny_family


def logits(decoder: Decoder) -> torch.Tensor:
    """After 90 tokens, three pieces."""
    ids = torch.randint(0, 512, (90,), generator=torch.Generator().manual_seed(0)).tolist()
    row, found = KVStore(decoder.kv_shape).row(), torch.empty(0)
    row.reserve(90)
    for begin, end in ((0, 17), (17, 80), (80, 90)):
        found = decoder.step([Segment(ids[begin:end], begin, row)])
    return found


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("name", FAMILIES)
def test_read_by_parts_it_has_the_bits_of_one_loaded_whole(
    name: str, quantize: str | None, tmp_path: Path
) -> None:
    """Stored in bfloat16, in shards, computed in float32; experts lie one by one in the files."""
    tiny_family(name).bfloat16().save_pretrained(tmp_path, max_shard_size="100KB")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    skeleton = Skeleton(tmp_path, torch.float32, narrow=quantize is not None)
    by_parts = Decoder(skeleton, quantize=quantize)
    assert torch.equal(logits(by_parts), logits(Decoder(whole, quantize=quantize)))
    assert by_parts._embedding.dtype is torch.bfloat16
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


@pytest.mark.parametrize(("dtype", "more"), [("bfloat16", {}), ("float32", {"tie_word_embeddings": False})])
def test_other_types_and_a_head_of_its_own(dtype: str, more: dict[str, bool], tmp_path: Path) -> None:
    kind = getattr(torch, dtype)
    tiny_family("qwen2_slide", **more).save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=kind).eval()
    by_parts = Decoder(Skeleton(tmp_path, kind))
    assert torch.equal(logits(by_parts), logits(Decoder(whole)))
    assert by_parts.places.tied is not bool(more)


def test_the_head_is_gone_before_the_layers_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 it is the largest matrix there is."""
    tiny_family("qwen2_slide", tie_word_embeddings=False).bfloat16().save_pretrained(tmp_path)
    skeleton, make, alive = Skeleton(tmp_path, torch.float32, narrow=True), decoder._layer, []
    shape = skeleton.model.lm_head.weight.shape

    def layer(*arguments: Any) -> Any:
        tensors = (one for one in gc.get_objects() if type(one) is torch.nn.Parameter)
        alive.extend(one for one in tensors if one.shape == shape and not one.is_meta)
        return make(*arguments)

    monkeypatch.setattr(decoder, "_layer", layer)
    Decoder(skeleton, quantize="int8")
    assert alive == []


def test_a_multimodal_folder_gives_its_text_part(tmp_path: Path) -> None:
    tiny_conditional().bfloat16().save_pretrained(tmp_path)
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(Decoder(Skeleton(tmp_path, torch.float32))), logits(Decoder(whole)))


def test_a_weight_that_is_not_there_or_does_not_fit_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = tmp_path / "model.safetensors"
    tiny_family("mistral").save_pretrained(tmp_path)
    tensors = load_file(file)
    taken = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(
        ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing or does not fit"
    ):
        Decoder(Skeleton(tmp_path, torch.float32))
    save_file({**tensors, "model.layers.1.mlp.up_proj.weight": taken[:5].clone()}, file, {"format": "pt"})
    with pytest.raises(
        ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing or does not fit"
    ):
        Decoder(Skeleton(tmp_path, torch.float32))


def test_what_only_transformers_can_load_is_said(tmp_path: Path) -> None:
    model = tiny_family("mistral")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(NotByParts, match="its weights are in no safetensors file"):
        Skeleton(tmp_path, torch.float32)
