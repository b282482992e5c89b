"""Tokenised conversations: on disk, built once by all cores, memory-mapped, keyed by everything that matters.

In: `Records`, an Encoder and the length policy. Out: `TokenisedData` (tokenised.py), here or lazy (lazy.py).

A cache is a folder `<cache dir>/tokens/<key>`. The key covers the content of the data files, the format's
fingerprint (template, style, vocabulary), the options, the source of the modules that tokenise, and the
versions of the packages beneath them. It is written aside, flushed, and renamed: a folder of that name is
whole. A file lock lets the ranks of a run share one build.

    ids.i32            all sequences, one after another
    sequences.u64      where each begins in ids, and the end
    spans.i32          pairs (begin, end), positions within a sequence that are learnt
    span_starts.u64    each sequence's first span, and the end
    conversations.u64  each kept conversation's first sequence, and the end
    kept.u64           which record each kept conversation is
    lengths.i32        tokens of every record's longest sequence before the length policy
    meta.json          sizes and summary
"""

import hashlib
import importlib.metadata
import itertools
import json
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_chat import files
from qwen_chat.chat.encoded import Encoder, TrainOn
from qwen_chat.data.blocks import Block, Sequence32, TokenOptions, TooLong, encode_blocks
from qwen_chat.data.lazy import LazyData
from qwen_chat.data.records import Records
from qwen_chat.data.tokenised import Counts, TokenisedData, TokenSummary
from qwen_chat.errors import OutputError

Progress = Callable[[int, int], None]

AUDITED = 64  # conversations at most on which a format's quick way is compared with its template
PREFIX_SAMPLE = 2_000  # conversations that the share of common prefixes is estimated from
_FILES: dict[str, type[np.generic]] = {
    "ids.i32": np.int32,
    "sequences.u64": np.uint64,
    "spans.i32": np.int32,
    "span_starts.u64": np.uint64,
    "conversations.u64": np.uint64,
    "kept.u64": np.uint64,
    "lengths.i32": np.int32,
}
# What decides which tokens come out: these files and folders of the package, by content.
_CODE = ("conversation.py", "chat", "data", "dialects", "tools")
_PACKAGES = ("tokenizers", "transformers", "jinja2")


def tokenise(
    records: Records,
    fmt: Encoder,
    *,
    max_length: int,
    too_long: TooLong = "drop",
    train_on: TrainOn = "all",
    cache_dir: str | os.PathLike[str] | None = None,
    lazy: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> TokenisedData:
    """Tokenise every conversation, or open what was tokenised before.

    `workers` defaults to the cores this process may use; `progress(done, all)` is called now and then.
    Raises DataError where nothing is left to learn, where too_long="error" meets a longer conversation, or
    where the template cannot carry one (records opened with on_error="skip": left out and counted).
    """
    options = TokenOptions(max_length, too_long, train_on)
    parts = {
        "data": records.fingerprint,
        "format": fmt.fingerprint,
        "options": asdict(options),
        "code": [files.sha256(file) for file in code_files()],
        "packages": [importlib.metadata.version(name) for name in _PACKAGES],
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    sample = (records[i] for i in range(0, len(records), len(records) // AUDITED + 1))
    if lazy:
        fmt.audit(sample)
        return LazyData(records, fmt, options, key, workers)
    folder = Path(cache_dir or files.cache_dir()) / "tokens" / key

    def build(aside: Path) -> None:
        fmt.audit(sample)
        blocks = encode_blocks(records, fmt, options, range(len(records)), workers)
        CachedData.write(aside, blocks, records, options, progress)

    files.build_once(folder, build)
    return CachedData(records, folder)


def code_files() -> list[Path]:
    """The modules of ours that stand in the key."""
    package = Path(__file__).resolve().parents[1]
    return [
        file
        for name in _CODE
        for file in sorted([package / name, *(package / name).glob("*.py")])
        if file.is_file()
    ]


class CachedData(TokenisedData):
    """A folder of the cache, memory-mapped: opening it reads nothing but `meta.json`."""

    def __init__(self, records: Records, folder: Path) -> None:
        super().__init__(records)
        self.folder = folder
        self.fingerprint = folder.name
        found: dict[str, npt.NDArray[Any]] = {}
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            self._budget, self._personal = TokenSummary(**meta["summary"]), meta["personal"]
            for name, kind in _FILES.items():
                size, expected = (folder / name).stat().st_size, meta["sizes"][name]
                if size != expected:
                    raise ValueError(f"{name} has {size:,} bytes instead of {expected:,}")
                found[name] = np.empty(0, dtype=kind)
                if size:  # as plain views: memmap's are slow to slice
                    found[name] = np.memmap(folder / name, dtype=kind, mode="r").view(np.ndarray)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{folder}: a damaged token cache ({error}); delete this folder") from None
        self._ids, self._sequences = found["ids.i32"], found["sequences.u64"]
        self._spans, self._span_starts = found["spans.i32"].reshape(-1, 2), found["span_starts.u64"]
        self._conversations, self.kept = found["conversations.u64"], found["kept.u64"]
        self.full_lengths = found["lengths.i32"]

    def __reduce__(self) -> tuple[type["CachedData"], tuple[Records, Path]]:
        return CachedData, (self.records, self.folder)

    def _range(self, i: int) -> range:
        """The numbers of its sequences."""
        i = range(len(self))[i]
        return range(int(self._conversations[i]), int(self._conversations[i + 1]))

    def __getitem__(self, i: int) -> tuple[Sequence32, ...]:
        return tuple(
            Sequence32(
                self._ids[int(self._sequences[s]) : int(self._sequences[s + 1])],
                self._spans[int(self._span_starts[s]) : int(self._span_starts[s + 1])],
            )
            for s in self._range(i)
        )

    def lengths(self, i: int) -> tuple[int, ...]:
        return tuple(int(self._sequences[s + 1]) - int(self._sequences[s]) for s in self._range(i))

    @property
    def summary(self) -> TokenSummary:
        return self.with_places(self._budget, self._personal)

    def common_prefix_share(self) -> float:
        """Share of the tokens that begin some other sequence too: what storing each prefix once would save.

        Sorted sequences share their longest prefix with a neighbour, so one pass over an evenly spaced sample of
        the conversations finds it.
        """
        sample = range(0, len(self), max(1, len(self) // PREFIX_SAMPLE))
        keys = sorted(one.input_ids.astype(">i4").tobytes() for i in sample for one in self[i])
        common = 0
        for pair in itertools.pairwise(keys):
            size = min(map(len, pair))
            left, right = (np.frombuffer(key[:size], dtype=np.int32) for key in pair)
            differ = left != right
            common += int(differ.argmax()) if differ.any() else size // 4
        return common / max(1, sum(len(key) // 4 for key in keys))

    @staticmethod
    def write(
        folder: Path,
        blocks: Iterable[Block],
        records: Records,
        options: TokenOptions,
        progress: Progress | None,
    ) -> None:
        """Write all blocks and `meta.json` into `folder`; raise DataError where they must not be used."""
        counts, done = Counts(), 0
        with ExitStack() as stack:
            opened = {name: stack.enter_context((folder / name).open("wb")) for name in _FILES}
            for name in ("sequences.u64", "span_starts.u64", "conversations.u64"):
                opened[name].write(np.uint64(0).tobytes())
            for block in blocks:
                for name, before, steps in (
                    ("sequences.u64", counts.tokens, block.sequence_lengths),
                    ("span_starts.u64", counts.spans, block.span_counts),
                    ("conversations.u64", counts.sequences, block.sequence_counts),
                ):
                    ends = np.cumsum(steps, dtype=np.uint64) + np.uint64(before)
                    opened[name].write(ends.tobytes())
                opened["ids.i32"].write(block.ids.tobytes())
                opened["spans.i32"].write(block.spans.tobytes())
                opened["kept.u64"].write(block.kept.tobytes())
                opened["lengths.i32"].write(block.full_lengths.tobytes())
                counts.add(block)
                done += len(block.full_lengths)
                if progress is not None:
                    progress(done, len(records))
        records.ensure_unchanged()
        lengths = np.fromfile(folder / "lengths.i32", dtype=np.int32)
        counts.ensure_usable(lengths, records, options)
        summary = counts.budget(lengths, options).to_json()
        sizes = {name: (folder / name).stat().st_size for name in _FILES}
        meta = {"sizes": sizes, "summary": summary, "personal": counts.personal.first}
        (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        summary["common_prefix_share"] = CachedData(records, folder).common_prefix_share()
        (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
