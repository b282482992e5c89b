"""A GGUF file as a model's folder: its shape, vocabulary and template written beside a link to it, its tensors by name.

In: one GGUF file of a Llama, Qwen2, Qwen3 or one of their mixtures of experts, in any type that the `gguf` package
unpacks. Out: a folder in the cache with config.json, tokenizer and template; the file's tensors under the names of
transformers and in its order, unpacked one at a time. What the file says and this does not know is refused: served all
the same, it would be another model. Format: ggml's docs/gguf.md; llama.cpp's convert_hf_to_gguf.py turns the rows of
queries and keys in its architecture `llama`.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_chat import files
from qwen_chat.errors import MissingDependency, ModelError, first_line
from qwen_chat.weights import StoredTensor

if TYPE_CHECKING:
    import torch

LINK = "model.gguf"  # the file's name in the folder that describes it
_PLACES = "tensors.json"  # where its tensors lie: a vocabulary before them takes seconds to read
# llama.cpp's architecture -> model_type.
_MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    **{f"ffn_{x}_shexp": f"mlp.shared_expert.{x}_proj" for x in ("gate", "up", "down")},
}
_FLOATS = {0: "F32", 1: "F16", 30: "BF16"}  # ggml's numbers of types -> a header's words
_UNUSED = 5  # gguf.TokenType: a place without a token
_VOCABULARY = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
# Where a tokenizer cuts text, by the pattern in its tokenizer.json: llama.cpp's name of the same.
_LETTERS, _MARKS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"
_THREES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"


def pre_tokenizer(described: Mapping[str, Any], where: Path) -> str:
    """llama.cpp's name for how a tokenizer.json cuts text; ModelError for one that it would cut otherwise."""
    if (name := _cuts(described)) is not None:
        return name
    raise ModelError(
        f"{where}: its tokenizer.json cuts text in a way that is not known here by llama.cpp's name, so prompts would"
        " become other tokens; expected the tokenizer of a Qwen, Llama 3 or SmolLM2 model"
    )


def _cuts(described: Mapping[str, Any]) -> str | None:
    if (described.get("model") or {}).get("type") != "BPE":
        return None
    text = json.dumps(described.get("pre_tokenizer"))
    patterns = {"qwen2": _LETTERS, "qwen35": _MARKS, "llama-bpe": _THREES}
    for name, pattern in patterns.items():
        if json.dumps(pattern)[1:-1] in text:
            return name
    return "smollm" if '"individual_digits": true' in text and '"ByteLevel"' in text else None


def file_of(given: Path) -> Path | None:
    """The GGUF file that is meant by a path: itself, or the only one of a folder without other weights."""
    if given.suffix == ".gguf" and given.is_file():
        return given
    found = sorted(given.glob("*.gguf")) if given.is_dir() and not (given / LINK).is_symlink() else []
    if not found or any(given.glob("*.safetensors")) or any(given.glob("*.bin")):
        return None
    if len(found) > 1:
        raise ModelError(f"{given}: {len(found)} GGUF files; give one of them: -m {found[0]}")
    return found[0]


def described(file: Path) -> Path:
    """The folder in the cache that describes a GGUF file. A tokenizer.json beside the file is used, if it is the same.

    Raises ModelError where file and tokenizer are not of one model, or the model is not one of those here.
    """
    beside, facts = file.absolute().parent / "tokenizer.json", file.stat()
    told = [str(file.absolute()), facts.st_size, facts.st_mtime_ns]
    told += [beside.stat().st_mtime_ns] if beside.is_file() else []
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]

    def build(folder: Path) -> None:
        fields, shapes = read_header(file)
        config = model_config(fields, shapes, file)
        (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        ends = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in config}
        (folder / "generation_config.json").write_text(json.dumps(ends), encoding="utf-8")
        _put_tokenizer(file, fields, folder)
        places = {name: (p.ggml, p.shape, p.stored.shape, p.stored.begin) for name, p in shapes.items()}
        (folder / _PLACES).write_text(json.dumps(places), encoding="utf-8")
        (folder / LINK).symlink_to(file.absolute())

    return files.build_once(files.cache_dir() / "gguf" / f"{file.stem}-{digest}", build)


def gguf_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a described file by transformers' names. Raises ModelError for a file that is gone."""
    file = (folder / LINK).resolve()
    if not file.is_file():
        raise ModelError(f"{file}: missing; fetch the model again")
    config, places = (json.loads((folder / name).read_text("utf-8")) for name in ("config.json", _PLACES))
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    found: dict[str, StoredTensor] = {}
    joined: dict[str, dict[str, _Piece]] = {}
    for name, (ggml, whole, rows, begin) in places.items():
        stored = StoredTensor(file, name, _FLOATS.get(ggml, "U8"), tuple(rows), begin)
        piece = _Piece(stored, ggml, tuple(whole))
        wanted, part = _name(name, file)
        if part in ("gate", "up"):
            joined.setdefault(wanted, {})[part] = piece
            continue
        llama = config["model_type"] == "llama" and name.startswith("blk.")
        turned = heads.get(name.split(".")[2], 0) if llama else 0
        shape = (1, piece.shape[-1]) if wanted.endswith("shared_expert_gate.weight") else piece.shape
        found[wanted] = _Unpacked(file, wanted, piece.kind, shape, 0, (piece,), turned)
    for wanted, halves in joined.items():
        if len(halves) == 1:
            raise ModelError(f"{file}: half of {wanted} is missing; fetch it again")
        first = halves["gate"]
        shape = (first.shape[0], 2 * first.shape[1], first.shape[2])
        found[wanted] = _Unpacked(file, wanted, first.kind, shape, 0, (first, halves["up"]), 0)
    return found


@dataclass(frozen=True, slots=True)
class _Piece:
    """One tensor of the file: its bytes, its ggml type, its shape in torch's order."""

    stored: StoredTensor
    ggml: int
    shape: tuple[int, ...]

    @property
    def kind(self) -> str:
        return _FLOATS.get(self.ggml, "F32")

    def read(self) -> torch.Tensor:
        import gguf
        import torch

        raw = self.stored.read()
        if self.ggml not in _FLOATS:
            raw = torch.from_numpy(gguf.dequantize(raw.numpy(), gguf.GGMLQuantizationType(self.ggml)))
        return raw.reshape(self.shape)


@dataclass(frozen=True, slots=True)
class _Unpacked(StoredTensor):
    """A tensor of the model. pieces: several lie one above the other in each expert; heads: whose rows lie turned."""

    pieces: tuple[_Piece, ...]
    heads: int

    def read(self, first: int = 0, last: int | None = None) -> torch.Tensor:
        """The same as of a tensor that is stored as it is; all of it is unpacked on the way."""
        import torch

        read = [piece.read() for piece in self.pieces]
        whole = torch.cat(read, 1) if len(read) > 1 else read[0].reshape(self.shape)
        if self.heads:
            half = whole.shape[0] // self.heads // 2
            rest = whole.shape[1:]
            whole = whole.reshape(self.heads, half, 2, *rest).transpose(1, 2).reshape(self.shape)
        return whole[first:last].contiguous()

    def announce(self) -> None:
        for piece in self.pieces:
            piece.stored.announce()


def read_header(file: Path) -> tuple[dict[str, Any], dict[str, _Piece]]:
    """The file's fields by name and its tensors by ggml's names."""
    try:
        import gguf
    except ImportError:
        raise MissingDependency("gguf", "a GGUF file") from None
    try:
        reader = gguf.GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        pieces = {}
        for tensor in reader.tensors:
            kind, shape = int(tensor.tensor_type), tuple(int(n) for n in reversed(tensor.shape))
            plain = _FLOATS.get(kind)
            rows = (
                shape if plain else (*shape[:-1], int(tensor.n_bytes) * shape[-1] // int(tensor.n_elements))
            )
            stored = StoredTensor(file, tensor.name, plain or "U8", rows, int(tensor.data_offset))
            pieces[str(tensor.name)] = _Piece(stored, kind, shape)
        if fields.get("split.count", 0) > 1:
            raise ValueError(
                "it is one of several parts; join them with llama.cpp's llama-gguf-split --merge"
            )
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ModelError(f"{file}: not a whole GGUF file ({first_line(error)}); fetch it again") from None
    return fields, pieces


def _name(name: str, file: Path) -> tuple[str, str]:
    """transformers' name of a tensor, and which half of it this is where it is one."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if layer is None:
        place, _, last = name.rpartition(".")
        if place in _TOP:
            return f"{_TOP[place]}.{last}", ""
    else:
        number, part, last = layer.groups()
        if expert := re.fullmatch(r"ffn_(gate|up|down)_exps", part):
            owner = f"model.layers.{number}.mlp.experts"
            return f"{owner}.{'down_proj' if expert[1] == 'down' else 'gate_up_proj'}", expert[1]
        if part in _IN_LAYER:
            return f"model.layers.{number}.{_IN_LAYER[part]}.{last}", ""
    raise ModelError(
        f"{file}: holds {name}, for which there is no place here: left out, it would be another model; give"
        " the model's own folder"
    )


def model_config(fields: Mapping[str, Any], pieces: Mapping[str, _Piece], file: Path) -> dict[str, Any]:
    """config.json of the model in the file. Raises ModelError for what is not computed here."""
    arch = str(fields.get("general.architecture"))
    kind = _MODEL_TYPES.get(arch)
    if kind is None:
        raise ModelError(
            f"{file}: a GGUF file of {arch!r}; those of {', '.join(_MODEL_TYPES)} are read here: give the model's own"
            " folder"
        )
    scaling = fields.get(f"{arch}.rope.scaling.type", "none")
    if scaling != "none" or f"{arch}.attention.sliding_window" in fields:
        what = "a sliding window" if scaling == "none" else f"rope scaling {scaling!r}"
        raise ModelError(f"{file}: has {what}, which is not read from GGUF here; give the model's own folder")
    for name in pieces:
        _name(name, file)

    def said(name: str, default: Any = None) -> Any:
        value = fields.get(f"{arch}.{name}", default)
        if value is None:
            raise ModelError(f"{file}: says no {arch}.{name}; fetch it again")
        return value

    heads, hidden = said("attention.head_count"), said("embedding_length")
    config = {
        "model_type": kind,
        "hidden_size": hidden,
        "num_hidden_layers": said("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": said("attention.head_count_kv", heads),
        "head_dim": said("attention.key_length", hidden // heads),
        "max_position_embeddings": said("context_length"),
        "rms_norm_eps": said("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": said("rope.freq_base", 10000.0)},
        "vocab_size": pieces["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in pieces,
        "dtype": "float32",
    }
    if kind in ("llama", "qwen3", "qwen3_moe"):
        config["attention_bias"] = "blk.0.attn_q.bias" in pieces
    if gate := pieces.get("blk.0.ffn_gate_exps.weight"):
        config |= {"num_experts": said("expert_count"), "num_experts_per_tok": said("expert_used_count")}
        config |= {"moe_intermediate_size": gate.shape[1], "norm_topk_prob": kind == "qwen3_moe"}
    if shared := pieces.get("blk.0.ffn_gate_shexp.weight"):
        config["shared_expert_intermediate_size"] = shared.shape[0]
    config["intermediate_size"] = said("feed_forward_length", config.get("moe_intermediate_size"))
    ids = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    stated = {name: fields.get(f"tokenizer.ggml.{short}_token_id") for name, short in ids.items()}
    return config | {name: number for name, number in stated.items() if number is not None}


def _built(file: Path, cut: str | None) -> Any:
    """The tokenizer that a file describes. transformers knows all cuts that are known here but SmolLM's; and a file
    does not say that Qwen's tokenizers compose characters (NFC) first."""
    from tokenizers import normalizers, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    backend = read.backend_tokenizer
    if cut == "smollm":
        digits, bytes_ = pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    if cut in ("qwen2", "qwen35"):
        backend.normalizer = normalizers.NFC()
    special = {name: str(token) for name, token in read.special_tokens_map.items() if isinstance(token, str)}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=read.chat_template,
        clean_up_tokenization_spaces=False,
        **special,
    )


def _put_tokenizer(file: Path, fields: Mapping[str, Any], folder: Path) -> None:
    """Tokenizer and template into the folder: those beside the file, else those in it."""
    from transformers import AutoTokenizer

    beside, cut = file.absolute().parent, fields.get("tokenizer.ggml.pre")
    own = (beside / "tokenizer.json").is_file()
    cure = "put the model's own tokenizer.json and tokenizer_config.json beside it"
    try:
        if own:
            for name in _VOCABULARY:
                if (beside / name).is_file():
                    shutil.copyfile(beside / name, folder / name)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        else:
            tokenizer = _built(file, cut)
            tokenizer.save_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ModelError(f"{file}: its tokenizer cannot be built ({first_line(error)}); {cure}") from None
    text = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if fields.get("tokenizer.ggml.model") != "gpt2" or _cuts(text) != cut:
        whose = "the tokenizer beside it" if own else "what can be built of it"
        raise ModelError(
            f"{file}: says that text is cut as {cut!r}, which {whose} does not: prompts would become other tokens;"
            f" {cure}"
        )
    known = {number: token for token, number in tokenizer.get_vocab().items()}
    for number, token in enumerate(fields["tokenizer.ggml.tokens"]):
        used = fields["tokenizer.ggml.token_type"][number] != _UNUSED
        if used and known.get(number) != token:
            raise ModelError(
                f"{file}: its token {number} is {token!r}, its tokenizer's {known.get(number)!r}: prompts would become"
                f" other tokens; {cure}"
            )
    inside = fields.get("tokenizer.chat_template")
    # An exported file has the template with what writes tools before it.
    if inside and tokenizer.chat_template and tokenizer.chat_template not in inside:
        raise ModelError(
            f"{file}: its chat template is not the one beside it ({beside}), and only one can be the model's; take away"
            " the wrong one's folder or give the model as it was before"
        )
    if inside:
        (folder / "chat_template.jinja").write_text(inside, encoding="utf-8")
