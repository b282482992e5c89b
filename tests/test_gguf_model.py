"""A GGUF file is served as the model that it was made of: the same tensors, tokens and template, or it is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from qwen_chat import gguf_model, models
from qwen_chat.chat.format import ChatFormat
from qwen_chat.errors import ModelError
from qwen_chat.export.gguf_file import write_gguf
from qwen_chat.inference.loading import load_engine
from qwen_chat.inference.sampling import GenerationRequest
from qwen_chat.weights import stored_tensors

TEXT = "Hello 你好 12345 🙂  \n\n  it's <|im_start|>user\nfoo<|im_end|> DON'T  e\u0301x"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_model_path: Path) -> None:
    monkeypatch.setenv("QWEN_CHAT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def family(tiny_model_path: Path, tmp_path: Path) -> Callable[..., Path]:
    """A folder of two layers of a family, under a vocabulary of 300 of the demo model's tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(kind: str, **fields: Any) -> Path:
        folder = tmp_path / kind
        folder.mkdir()
        for file in tiny_model_path.glob("*"):
            if "token" in file.name or "template" in file.name:
                shutil.copyfile(file, folder / file.name)
        described = json.loads((folder / "tokenizer.json").read_text())
        kept = {token: n for token, n in described["model"]["vocab"].items() if n < 300}
        merges = [pair for pair in described["model"]["merges"] if {*pair, "".join(pair)} <= kept.keys()]
        described["model"] |= {"vocab": kept, "merges": merges}
        (folder / "tokenizer.json").write_text(json.dumps(described))
        shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 320}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, initializer_range=0.2, eos_token_id=2, **shape | fields)
        )
        for parameter in model.parameters():  # norms and biases too
            parameter.data += torch.randn_like(parameter) * 0.1
        model.float().save_pretrained(folder)
        return folder

    return make


MIXED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = [
    ("llama", {"tie_word_embeddings": False}),
    ("llama", {"head_dim": 32, "num_key_value_heads": 4}),
    ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    ("qwen2_moe", {**MIXED, "shared_expert_intermediate_size": 48}),
    ("qwen3_moe", {**MIXED, "head_dim": 32, "norm_topk_prob": True}),
]


@pytest.mark.parametrize(("kind", "fields"), FAMILIES)
def test_from_a_file_and_from_the_folder_the_same_is_served(
    kind: str, fields: dict[str, Any], family: Callable[..., Path], tmp_path: Path
) -> None:
    """Stored in float32, so to the last bit of what rounding leaves: greedy tokens and their log-probabilities."""
    folder = family(kind, **fields)
    file = tmp_path / "m.gguf"
    write_gguf(folder, file, "f32")
    found = []
    for path in (folder, file):
        with load_engine(path) as engine:
            request = GenerationRequest([5, 66, 7, 281], max_tokens=12, temperature=0, logprobs=3)
            found.append(engine.generate([request])[0])
            assert engine.fmt.prompt_ids([{"role": "user", "content": "a b"}])
    assert found[0].token_ids == found[1].token_ids


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0"])
def test_smaller_types_are_unpacked(kind: str, family: Callable[..., Path], tmp_path: Path) -> None:
    folder = family("llama")
    (tmp_path / "there").mkdir()
    write_gguf(folder, tmp_path / "there" / "m.gguf", kind)
    whole, unpacked = stored_tensors(folder), models.float_tensors(models.resolve(str(tmp_path / "there")))
    assert set(whole) == set(unpacked)
    most = {"f16": 1e-3, "bf16": 5e-3, "q8_0": 6e-3, "q4_0": 0.13}[kind]
    for name, tensor in whole.items():
        wanted, found = tensor.read(), unpacked[name].read()
        assert found.shape == unpacked[name].shape == wanted.shape
        assert float((found.float() - wanted).abs().max() / wanted.abs().max()) <= most, name
        assert torch.equal(unpacked[name].read(1, 3), found[1:3])


@pytest.mark.slow
def test_the_tokenizer_out_of_a_file_is_the_one_that_went_in(demo_model_path: Path, tmp_path: Path) -> None:
    """Of the demo model, whose cut transformers does not build."""
    _written_tokenizer(demo_model_path, tmp_path / "m.gguf")
    ours, theirs = (
        models.load_tokenizer(p) for p in (demo_model_path, gguf_model.described(tmp_path / "m.gguf"))
    )
    assert theirs.encode(TEXT) == ours.encode(TEXT)
    assert ChatFormat(theirs).template == ChatFormat(ours).template
    assert theirs.special_tokens_map == ours.special_tokens_map


@pytest.mark.slow
def test_so_is_that_of_qwen(qwen2_5_tokenizer: Any, tmp_path: Path) -> None:
    qwen2_5_tokenizer.save_pretrained(tmp_path / "qwen")
    _written_tokenizer(tmp_path / "qwen", tmp_path / "m.gguf")
    theirs = models.load_tokenizer(gguf_model.described(tmp_path / "m.gguf"))
    assert theirs.encode(TEXT) == qwen2_5_tokenizer.encode(TEXT)
    assert theirs.get_vocab() == qwen2_5_tokenizer.get_vocab()
    assert ChatFormat(theirs).template == ChatFormat(qwen2_5_tokenizer).template


def _written_tokenizer(tokenizer: Path, file: Path) -> None:
    """A file with this tokenizer and a model of one small layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = file.parent / "small"
    shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
    shutil.copyfile(tokenizer / "tokenizer_config.json", folder / "tokenizer_config.json")
    words = max(models.load_tokenizer(tokenizer).get_vocab().values()) + 1
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=words, **shape)).save_pretrained(folder)
    write_gguf(folder, file, "f32")


def change(file: Path, **fields: Any) -> None:
    """The same file, short of tensors' bytes, with other values of some fields (no longer than before)."""
    reader = gguf.GGUFReader(file, "r+")
    for name, value in fields.items():
        field = reader.fields[name.replace("__", ".")]
        part = field.parts[field.data[0]]
        if isinstance(value, str):
            part[:] = list(value.encode().ljust(len(part)))
        else:
            part[0] = value


def test_what_is_another_model_is_refused(family: Callable[..., Path], tmp_path: Path) -> None:
    folder = family("qwen2")
    there = tmp_path / "there"
    there.mkdir()
    write_gguf(folder, there / "m.gguf", "f32")

    def refused(name: str = "there") -> str:
        with pytest.raises(ModelError) as error:
            models.resolve(str(tmp_path / name))
        return str(error.value)

    shutil.copyfile(there / "m.gguf", there / "n.gguf")
    assert "2 GGUF files; give one of them: -m" in refused()
    (there / "n.gguf").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(folder / name, there / name)
    assert models.resolve(str(there)).name.startswith("m-")
    (there / "chat_template.jinja").write_text("another")
    (there / "tokenizer.json").touch()
    assert "its chat template is not the one beside it" in refused()
    text = (folder / "tokenizer.json").read_text()
    (there / "tokenizer.json").write_text(
        text.replace('"individual_digits": true', '"individual_digits": false')
    )
    assert "text is cut as 'smollm', which the tokenizer beside it does not" in refused()
    described = json.loads(text)
    vocab = described["model"]["vocab"]
    one, other = (next(t for t, n in vocab.items() if n == wanted) for wanted in (250, 251))
    vocab[one], vocab[other] = 251, 250
    (there / "tokenizer.json").write_text(json.dumps(described))
    assert "its token 250 is " in refused() and "put the model's own tokenizer.json" in refused()
    (there / "tokenizer.json").unlink()
    change(there / "m.gguf", general__architecture="qwenX")
    assert "a GGUF file of 'qwenX'; those of llama, qwen2" in refused()
    with (there / "m.gguf").open("r+b") as opened:
        opened.truncate(1000)
    assert "m.gguf: not a whole GGUF file (" in refused()


def test_what_a_file_holds_and_nobody_knows_here_is_refused(
    family: Callable[..., Path], tmp_path: Path
) -> None:
    write_gguf(family("llama"), tmp_path / "m.gguf", "f32")
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data.replace(b"output_norm.weight", b"output_nice.weight"))
    with pytest.raises(ModelError, match=r"holds output_nice.weight, for which there is no place here"):
        models.resolve(str(tmp_path / "m.gguf"))
    with pytest.raises(ModelError, match="a GGUF file is served, not trained"):
        models.resolve(str(tmp_path / "m.gguf"), for_training=True)


def test_a_file_that_is_gone_is_said(family: Callable[..., Path], tmp_path: Path) -> None:
    write_gguf(family("qwen3"), tmp_path / "m.gguf", "f32")
    folder = models.resolve(str(tmp_path / "m.gguf"))
    (tmp_path / "m.gguf").unlink()
    with pytest.raises(ModelError, match=r"m\.gguf: missing; fetch the model again"):
        models.float_tensors(folder)
