"""An adapter merged into its base, a part at a time, and compared with the adapter while both are in memory.

In: a base's folder, adapters, some sequences of tokens. Out: the merged model's weights in a folder, and a
`Comparison` of the two models on those tokens. Both are computed in float32: the adapter over the base's stored
weights, and the merged weights as they are stored, so what differs is what rounding them cost.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qwen_chat import models
from qwen_chat.certificate.lock import forget_replies
from qwen_chat.chat.encoded import Encoded
from qwen_chat.errors import ModelError
from qwen_chat.export.layerwise import LayerwiseModel
from qwen_chat.export.source import MERGE_FILE, Exported, build_new, check_new, write_json
from qwen_chat.export.tensor_writer import TensorWriter

# The largest difference of a logit, divided by the largest logit, by the type in which the weights are stored.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_AT_ONCE = 64  # positions whose logits are in memory


@dataclass(frozen=True)
class Comparison:
    """What the merged model does differently; losses are means over supervised tokens (None: there are none).

    logit_difference: divided by the largest logit. four_bit_loss: of the adapter over NF4 weights, as it was trained.
    """

    conversations: int
    tokens: int
    supervised_tokens: int
    logit_difference: float
    tolerance: float
    top1_agreement: float
    adapter_loss: float | None
    merged_loss: float | None
    four_bit_loss: float | None
    dtype: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For a person."""
        told = [
            f"compared on {self.conversations} conversations, {self.tokens:,} tokens: logits differ by at most"
            f" {self.logit_difference:.1e} of the largest (tolerance {self.tolerance:.0e} for {self.dtype}), the"
            f" likeliest token is the same at {self.top1_agreement:.2%} of the positions"
        ]
        if self.adapter_loss is not None:
            told.append(f"loss: {self.adapter_loss:.5f} with the adapter, {self.merged_loss:.5f} merged")
        if self.four_bit_loss is not None:
            told.append(
                f"loss over the base in 4 bits, as it was trained: {self.four_bit_loss:.5f}; merged over the"
                f" unquantised base: {self.merged_loss:.5f}"
            )
        return told


def merge_model(
    base: Path,
    adapters: Sequence[Path],
    weights: Sequence[float],
    sequences: Sequence[Encoded],
    folder: Path,
    *,
    four_bits: bool = False,
    trust_remote_code: bool = False,
    tick: Callable[[str], None] = lambda _: None,
) -> tuple[Comparison, bool]:
    """Write the merged weights into `folder`; returns the comparison, and whether the head was parted from the rows.

    Raises ModelError where the adapter cannot be merged, or where the merged model is another one.
    """
    model = LayerwiseModel(base, adapters, weights, trust_remote_code=trust_remote_code)
    with torch.inference_mode(), TensorWriter(folder, model.layout()) as writer:
        comparison = _SideBySide(model, writer, sequences, four_bits).run(tick)
        if writer.missing:
            raise ModelError(
                f"{base}: {writer.missing[0]} was not written; its files and config.json do not agree"
            )
    if not comparison.logit_difference <= comparison.tolerance:
        raise ModelError(
            f"the merged model's logits differ by {comparison.logit_difference:.1e} of the largest; expected at most"
            f" {comparison.tolerance:.0e} for {comparison.dtype}: merge over the base in float32"
        )
    return comparison, model.parted


class _SideBySide:
    """Hidden states of the adapter, the merged model and, for Q-LoRA, the adapter over 4 bits."""

    def __init__(
        self, model: LayerwiseModel, writer: TensorWriter, sequences: Sequence[Encoded], four_bits: bool
    ) -> None:
        self.model, self.writer, self.sequences = model, writer, sequences
        longest = max(len(sequence.input_ids) for sequence in sequences)
        # Padded at the end: no earlier position sees it.
        self.ids = torch.zeros(len(sequences), longest, dtype=torch.long)
        for row, sequence in enumerate(sequences):
            self.ids[row, : len(sequence.input_ids)] = torch.tensor(sequence.input_ids)
        rows = len(model.core.get_submodule(model.rows).weight)
        if int(self.ids.max()) >= rows:
            raise ModelError(
                f"{model.base}: its tokenizer writes token {int(self.ids.max())}, its model has {rows} rows; give the"
                " base that the adapter was trained over with -m"
            )
        self.four: torch.Tensor | None = torch.empty(0) if four_bits else None
        self.merged = torch.empty(0)

    def run(self, tick: Callable[[str], None]) -> Comparison:
        model = self.model
        model.copy_rest(self.writer)

        def embed(hidden: torch.Tensor) -> torch.Tensor:
            rows: torch.Tensor = model.core.get_submodule(model.rows)(self.ids)
            return rows

        hidden = self._part(model.rows, embed, torch.empty(0))
        if self.four is not None:
            self.four = hidden.clone()
        dtypes = [stored.dtype for stored in model.stored.values()]
        dtype = max(set(dtypes), key=dtypes.count)

        def layer(part: str, forward: Callable[..., Any], states: torch.Tensor) -> Any:
            tick(part)
            return self._part(part, forward, states)

        model.fill(model.norm)
        with model.around_layers(layer):
            hidden = model.decoder(inputs_embeds=hidden, use_cache=False).last_hidden_state

        norm = model.core.get_submodule(model.norm)
        self.four = None if self.four is None else norm(self.four)
        model.merge(model.norm)
        self.merged = model.core.get_submodule(model.norm)(self.merged)
        model.write(model.norm, self.writer)
        return self._compare(hidden, dtype)

    def _part(self, part: str, forward: Callable[..., Any], hidden: torch.Tensor) -> torch.Tensor:
        model = self.model
        model.fill(part)
        if self.four is not None and part != model.rows:
            with model.four_bits(part):
                self.four = forward(self.four)
        adapter: torch.Tensor = forward(hidden)
        model.merge(part)
        self.merged = forward(self.merged)
        model.write(part, self.writer)
        model.empty(part)
        return adapter

    def _compare(self, hidden: torch.Tensor, dtype: torch.dtype) -> Comparison:
        """The head, over positions that hold tokens; the adapter's logits are kept until it is merged."""
        model = self.model
        places = torch.cat(
            [torch.arange(len(s.input_ids)) + k * self.ids.shape[1] for k, s in enumerate(self.sequences)]
        )
        labels = torch.cat([torch.tensor([*s.labels[1:], -100]) for s in self.sequences])

        def logits(states: torch.Tensor) -> Iterator[torch.Tensor]:
            head, flat = model.core.get_submodule(model.head), states.flatten(0, 1)[places]
            return (head(some) for some in torch.split(flat, _AT_ONCE))

        def loss(some: torch.Tensor, k: int) -> float:
            wanted = labels[k * _AT_ONCE : (k + 1) * _AT_ONCE]
            return float(torch.nn.functional.cross_entropy(some, wanted, ignore_index=-100, reduction="sum"))

        model.fill(model.head)
        losses = torch.zeros(3, dtype=torch.float64)
        if self.four is not None:
            losses[2] = sum(loss(some, k) for k, some in enumerate(logits(self.four)))
        before = list(logits(hidden))
        model.merge(model.head)
        model.write(model.head, self.writer)
        sizes: list[torch.Tensor] = []
        same = 0
        for k, (old, new) in enumerate(zip(before, logits(self.merged), strict=True)):
            sizes.append(torch.stack([old.abs().max(), (new - old).abs().max()]))
            same += int((new.argmax(-1) == old.argmax(-1)).sum())
            losses += torch.tensor([loss(old, k), loss(new, k), 0.0])
        supervised = int((labels != -100).sum())
        largest, moved = (float(size) for size in torch.stack(sizes).amax(0))
        means = [float(total) / supervised for total in losses] if supervised else [None, None, None]
        return Comparison(
            conversations=len(self.sequences),
            tokens=len(places),
            supervised_tokens=supervised,
            logit_difference=moved / max(largest, 1e-12),
            tolerance=TOLERANCES.get(dtype, TOLERANCES[torch.float32]),
            top1_agreement=same / len(places),
            adapter_loss=means[0],
            merged_loss=means[1],
            four_bit_loss=None if self.four is None else means[2],
            dtype=str(dtype).removeprefix("torch."),
        )


def merged_folder(
    source: Exported,
    weights: Sequence[float],
    paths: Sequence[str],
    folder: Path,
    *,
    tokens: int = 1024,
    trust_remote_code: bool = False,
    tick: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """A plain model folder, compared with the adapter before it appears: weights, config, tokenizer, template,
    generation config, certificate, and `merge.json` with what the comparison found."""
    check_new(folder)
    tokenizer = models.load_tokenizer(source.folder, trust_remote_code=trust_remote_code)
    fmt = source.chat_format(tokenizer)
    sequences = source.sequences(fmt, paths, tokens)
    found: list[Comparison] = []

    def build(aside: Path) -> None:
        comparison, parted = merge_model(
            source.base,
            source.adapters,
            weights,
            sequences,
            aside,
            four_bits=source.in_four_bits,
            trust_remote_code=trust_remote_code,
            tick=tick,
        )
        found.append(comparison)
        for name in ("config.json", *models.PROCESSORS):
            if (source.base / name).is_file():
                shutil.copyfile(source.base / name, aside / name)
        for code in source.base.glob("*.py"):
            shutil.copyfile(code, aside / code.name)
        if parted:
            config = models.read_config(aside)
            for part in (config, config.get("text_config")):
                if isinstance(part, dict):
                    part["tie_word_embeddings"] = False
            write_json(aside / "config.json", config)
        source.copy_speech(aside)
        if tuple(weights) != (1.0,):
            forget_replies(
                aside, "none: merged with other adapters or at another strength than it was trained"
            )
        write_json(
            aside / MERGE_FILE,
            {
                "base": str(source.base),
                "adapters": [str(adapter) for adapter in source.adapters],
                "weights": list(weights),
                "data": list(paths),
                "embeddings_parted": parted,
                "comparison": comparison.to_json(),
            },
        )

    build_new(folder, build)
    return found[0]
