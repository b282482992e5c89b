"""The token cache: built whole or not at all, once, by any number of processes; eager and lazy give the same."""

import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_chat.chat.encoded import Encoded
from qwen_chat.chat.format import ChatFormat
from qwen_chat.conversation import Conversation
from qwen_chat.data import blocks, token_cache
from qwen_chat.data import lazy as lazy_data
from qwen_chat.data.records import Records, open_records
from qwen_chat.data.token_cache import CachedData, tokenise
from qwen_chat.data.tokenised import TokenisedData, TokenSummary
from qwen_chat.errors import DataError, OutputError
from tests.support.letters import Letters

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "qwen_chat"


def chat(*texts: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[k % 2], "content": text} for k, text in enumerate(texts)], **more}


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def many(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        chat(*(f"{i} " + "x" * rng.randrange(40) for _ in range(2 * rng.randrange(1, 4))))
        for i in range(count)
    ]


def everything(data: TokenisedData) -> list[tuple[str, list[tuple[list[int], list[int]]]]]:
    return [
        (data.where(i), [(one.input_ids.tolist(), one.labels.tolist()) for one in data[i]])
        for i in range(len(data))
    ]


def documents(*lengths: int) -> list[dict[str, Any]]:
    return [{"text": "".join(chr(97 + k % 26) for k in range(length))} for length in lengths]


@pytest.fixture
def data(tmp_path: Path) -> Records:
    return open_records(write(tmp_path / "data.jsonl", many(700)))


# ---------------------------------------------------------------- what is in it


def test_ids_and_labels_are_the_formats_own(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [chat("a", "bc"), chat("", "d", "e", "fg")])
    data = tokenise(open_records(path), Letters(), max_length=100, cache_dir=tmp_path)
    assert everything(data) == [
        ("data.jsonl:1", [([1, 97, 2, 1, 98, 99, 2], [-100, -100, -100, -100, 98, 99, 2])]),
        (
            "data.jsonl:2",
            [
                (
                    [1, 2, 1, 100, 2, 1, 101, 2, 1, 102, 103, 2],
                    [-100, -100, -100, 100, 2, -100, -100, -100, -100, 102, 103, 2],
                )
            ],
        ),
    ]
    assert data[1][0].spans.tolist() == [[3, 5], [9, 12]]
    assert data[0][0].input_ids.dtype == data[0][0].labels.dtype == np.int32
    assert [data.lengths(0), data.lengths(1)] == [(7,), (12,)]
    assert data.full_lengths.tolist() == [7, 12]
    assert data.summary == TokenSummary(
        records=2,
        conversations=2,
        sequences=2,
        tokens=19,
        supervised=8,
        dropped=0,
        truncated=0,
        failed=0,
        unsupervised=0,
        max_length=100,
        too_long="drop",
        lossless_max_length=12,
        quantiles={"min": 7, "p50": 7, "p90": 12, "p95": 12, "p99": 12, "max": 12},
        common_prefix_share=1 / 19,
        histogram={str(n): int(n in (7, 12)) for n in range(1, 13)},
    )
    with pytest.raises(IndexError):
        data[2]


def test_one_sequence_a_turn(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [chat("a", "b", "c", "d"), chat("e", "f")])
    data = tokenise(open_records(path), Letters(turns=True), max_length=100, cache_dir=tmp_path)
    assert [data.lengths(0), data.lengths(1)] == [(6, 12), (6,)]
    assert [one.labels.tolist() for one in data[0]] == [
        [-100] * 4 + [98, 2],
        [-100] * 10 + [100, 2],
    ]
    assert (data.summary.sequences, data.summary.supervised) == (3, 6)
    assert data.summary.common_prefix_share == (6 + 1) / 24  # a turn begins the next; all begin with 1


def test_everything_is_learnt_up_to_the_ends(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [chat("a", "b"), chat("c", "d")])
    data = tokenise(open_records(path), Letters(), max_length=9, train_on="everything", cache_dir=tmp_path)
    assert data[1][0].spans.tolist() == [[1, 3], [4, 6]]
    assert data.summary.supervised == 8


def test_several_processes_give_what_one_gives(data: Records, tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    one = tokenise(data, Letters(), max_length=120, cache_dir=tmp_path / "a", workers=1)
    two = tokenise(
        data,
        Letters(),
        max_length=120,
        cache_dir=tmp_path / "b",
        workers=3,
        progress=lambda *at: done.append(at),
    )
    assert everything(one) == everything(two)
    assert one.summary == two.summary
    assert one.summary.dropped > 0
    assert done == [(min(k * blocks.CHUNK, 700), 700) for k in range(1, 7)]
    assert isinstance(two, CachedData)
    assert everything(pickle.loads(pickle.dumps(two))) == everything(two)


# ---------------------------------------------------------------- the length policy


def turns_of(tmp_path: Path, max_length: int, record: dict[str, Any]) -> list[str] | None:
    """What is left of a conversation, as texts, or None."""
    name = f"{max_length}.jsonl"
    records = open_records(write(tmp_path / name, [chat("a", "b"), record]))
    data = tokenise(records, Letters(), max_length=max_length, too_long="truncate", cache_dir=tmp_path)
    assert data.summary.truncated + data.summary.dropped == 1
    assert data.summary.lossless_max_length == data.full_lengths[1]
    if len(data) == 1:
        return None
    ids = data[1][0].input_ids.tolist()
    assert len(ids) <= max_length
    assert ids[-1] == 2
    return "".join(map(chr, ids)).replace("\x01", "").replace("\t", "T,").split("\x02")[:-1]


def test_the_oldest_turns_go_first(tmp_path: Path) -> None:
    system = {"role": "system", "content": "S"}
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    record = {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "messages": [
            system,
            *chat("u1", "a1", "u2", "a2", "u3")["messages"],
            {"role": "assistant", "content": "call", "tool_calls": [call]},
            {"role": "tool", "content": "result"},
            {"role": "assistant", "content": "end"},
        ],
    }
    last = ["T,S", "u3", "call", "result", "end"]
    whole = (
        len("TS")
        + 1
        + 1
        + sum(len(text) + 2 for text in ("u1", "a1", "u2", "a2", "u3", "call", "result", "end"))
    )
    assert turns_of(tmp_path, whole - 1, record) == ["T,S", "u2", "a2", *last[1:]]
    assert turns_of(tmp_path, whole - 8, record) == ["T,S", "u2", "a2", *last[1:]]
    assert turns_of(tmp_path, whole - 9, record) == last
    assert turns_of(tmp_path, whole - 16, record) == last
    assert turns_of(tmp_path, whole - 17, record) is None


def test_too_long_drop_and_error(tmp_path: Path) -> None:
    records = open_records(
        write(tmp_path / "data.jsonl", [chat("a", "b"), chat("a", "bcd"), chat("a", "bcde")])
    )
    data = tokenise(records, Letters(), max_length=7, cache_dir=tmp_path)
    assert [data.where(i) for i in range(len(data))] == ["data.jsonl:1"]
    assert (data.summary.dropped, data.summary.lossless_max_length) == (2, 9)
    assert "--model_max_length 9 would lose nothing" in data.summary.describe()
    with pytest.raises(DataError) as caught:
        tokenise(records, Letters(), max_length=7, too_long="error", cache_dir=tmp_path)
    assert str(caught.value).splitlines() == [
        "conversations longer than --model_max_length 7: 2 of 3; --model_max_length 9 would lose nothing, "
        "or choose --too_long drop or truncate",
        "  data.jsonl:2: 8 tokens",
        "  data.jsonl:3: 9 tokens",
    ]
    assert len(tokenise(records, Letters(), max_length=9, too_long="error", cache_dir=tmp_path)) == 3


@pytest.mark.parametrize("lazy", [False, True])
def test_a_summary_counts_and_names_all_that_was_left_out(tmp_path: Path, lazy: bool) -> None:
    """Bad lines, what is too long, what the template refuses: each by file and line, in every run."""
    good, long, refused = chat("a", "b"), chat("a", "b" * 200), chat("bad", "b" * 200)
    path = write(tmp_path / "data.jsonl", [good, {"x": 1}, long, refused, *[{}] * 6, *[long] * 5])
    for _ in range(2):  # built, then opened again
        records = open_records(path, on_error="skip")
        summary = tokenise(records, Letters(), max_length=50, cache_dir=tmp_path, lazy=lazy).summary
        assert (summary.records, summary.conversations) == (8, 1)
        assert (summary.skipped, summary.dropped, summary.failed) == (7, 6, 1)
        assert [line for line in summary.describe().splitlines() if "data.jsonl" in line] == [
            "bad lines left out, of 15: 7 "
            "(data.jsonl:2, data.jsonl:5, data.jsonl:6, data.jsonl:7, data.jsonl:8, ...)",
            "dropped, longer than --model_max_length 50: 6 "
            "(data.jsonl:3, data.jsonl:11, data.jsonl:12, data.jsonl:13, data.jsonl:14, ...)",
            "left out, the chat template cannot write them: 1 (data.jsonl:4)",
        ]
        plain = json.loads(json.dumps(summary.to_json()))
        assert plain["skipped_at"][0] == "data.jsonl:2"
        assert (plain["dropped_at"][0], plain["failed_at"]) == ("data.jsonl:3", ["data.jsonl:4"])


# ---------------------------------------------------------------- nothing to learn, nothing to write


@pytest.mark.parametrize("lazy", [False, True])
def test_nothing_to_learn_is_an_error(tmp_path: Path, lazy: bool) -> None:
    record = chat("a", "b")
    record["messages"][1]["train"] = False
    records = open_records(write(tmp_path / "data.jsonl", [record] * 3))
    with pytest.raises(
        DataError, match=r"^no token is learnt: 'train' or 'weight' excludes every reply; allow"
    ):
        tokenise(records, Letters(), max_length=9, cache_dir=tmp_path, lazy=lazy)
    with pytest.raises(
        DataError, match=r"^no conversation fits into --model_max_length 3; --model_max_length 6"
    ):
        tokenise(records, Letters(), max_length=3, cache_dir=tmp_path, lazy=lazy)
    mixed = open_records(write(tmp_path / "mixed.jsonl", [record, chat("a", "b")]))
    data = tokenise(mixed, Letters(), max_length=9, cache_dir=tmp_path, lazy=lazy)
    assert everything(data)[0][1][0][1] == [-100] * 6
    assert data.summary.unsupervised == 1


def test_what_the_template_refuses(tmp_path: Path) -> None:
    path = write(
        tmp_path / "data.jsonl", [chat("a", "b"), chat("bad", "b"), chat("a", "c"), chat("a", "bad")]
    )
    with pytest.raises(DataError) as caught:
        tokenise(open_records(path), Letters(), max_length=9, cache_dir=tmp_path)
    assert str(caught.value).splitlines() == [
        "conversations that the chat template cannot write: 2 of 4; correct them, "
        "or leave them out with --on_error skip",
        "  data.jsonl:2: message 0: bad",
        "  data.jsonl:4: message 1: bad",
    ]
    data = tokenise(open_records(path, on_error="skip"), Letters(), max_length=9, cache_dir=tmp_path)
    assert [data.where(i) for i in range(len(data))] == ["data.jsonl:1", "data.jsonl:3"]
    assert data.summary.failed == 2
    assert not list((tmp_path / "tokens").glob("*partial*"))


# ---------------------------------------------------------------- the key


def test_every_change_gives_a_new_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "data.jsonl", [chat("a", "b")])

    def key(fmt: Letters | None = None, **options: Any) -> str:
        chosen: dict[str, Any] = {"max_length": 50, "cache_dir": tmp_path, **options}
        return tokenise(open_records(path), fmt or Letters(), **chosen).fingerprint

    first = key()
    assert key() == key(lazy=True) == first
    path.rename(tmp_path / "renamed.jsonl")
    path = tmp_path / "renamed.jsonl"
    assert key() == first  # the content counts, not the name
    keys = {
        first,
        key(Letters("other")),
        key(max_length=51),
        key(too_long="truncate"),
        key(train_on="everything"),
    }
    write(path, [chat("a", "c")])
    keys.add(key())
    monkeypatch.setattr(token_cache, "_CODE", token_cache._CODE[:-1])
    keys.add(key())
    assert len(keys) == 7


def test_the_key_covers_all_code_that_tokenises() -> None:
    """Every module of ours that comes along with the chat format and the records stands in the key."""
    program = (
        "import sys, qwen_chat.chat.format, qwen_chat.data.records\n"
        "print(*(m.__file__ for n, m in sys.modules.items() if n.startswith('qwen_chat.') and m.__file__))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {Path(file) for file in found.stdout.split()} - {PACKAGE / "errors.py", PACKAGE / "place.py"}
    assert loaded and loaded <= set(token_cache.code_files())


def test_a_second_time_nothing_is_tokenised(data: Records, tmp_path: Path) -> None:
    fmt = Letters()
    first = tokenise(data, fmt, max_length=120, cache_dir=tmp_path, workers=1)
    asked, fmt.asked = fmt.asked, 0
    second = tokenise(data, fmt, max_length=120, cache_dir=tmp_path)
    assert (asked, fmt.asked, fmt.audited) == (700, 0, 64)
    assert everything(first) == everything(second)


# ---------------------------------------------------------------- interrupted, concurrent, damaged

BUILD = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import tests.data.test_token_cache as t
class Slow(t.Letters):
    def encode_many(self, conversations, train_on="all"):
        open(sys.argv[3], "a").write("x")
        time.sleep(float(sys.argv[4]))
        return super().encode_many(conversations, train_on)
data = t.tokenise(t.open_records(sys.argv[1]), Slow(), max_length=120, cache_dir=sys.argv[2], workers=int(sys.argv[5]))
print(len(data), data.summary.tokens)
"""


def start(tmp_path: Path, pause: float, workers: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", BUILD, str(tmp_path / "data.jsonl"), str(tmp_path / "cache")]
    command += [str(tmp_path / "log"), str(pause), str(workers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "nothing happened for 60 seconds"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_build_is_never_used(data: Records, tmp_path: Path, workers: int) -> None:
    log = tmp_path / "log"
    process = start(tmp_path, 0.5, workers)
    wait_for(lambda: log.exists() and len(log.read_text()) >= 2)
    helpers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    folder = tmp_path / "cache" / "tokens"
    assert [path.name for path in folder.iterdir() if not path.name.startswith(".")] == []
    found = tokenise(data, Letters(), max_length=120, cache_dir=tmp_path / "cache")
    assert everything(found) == everything(
        tokenise(data, Letters(), max_length=120, cache_dir=tmp_path / "other")
    )
    assert [path.name for path in folder.iterdir() if "partial" in path.name] == []
    assert len(helpers) == (workers if workers > 1 else 0)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() and alive(pid) for pid in helpers))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_processes_share_one_build(data: Records, tmp_path: Path) -> None:
    ranks = [start(tmp_path, 0.1, 1) for _ in range(3)]
    said = {rank.communicate(timeout=120)[0] for rank in ranks}
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    assert len(said) == 1
    assert len((tmp_path / "log").read_text()) == -(-700 // blocks.CHUNK)  # each block once, not three times


def test_a_worker_that_dies_is_told(data: Records, tmp_path: Path) -> None:
    class Deadly(Letters):
        def encode_many(
            self, conversations: Sequence[Conversation], train_on: str = "all"
        ) -> list[list[Encoded]]:
            if multiprocessing.parent_process() is not None:
                os._exit(9)
            return super().encode_many(conversations, train_on)

    with pytest.raises(
        OutputError, match=r"^a tokenising process was killed \(out of memory\?\); free some memory"
    ):
        tokenise(data, Deadly(), max_length=120, cache_dir=tmp_path, workers=2)
    assert [path.name for path in (tmp_path / "tokens").iterdir() if not path.name.endswith(".lock")] == []


def test_a_damaged_cache_is_told(data: Records, tmp_path: Path) -> None:
    found = tokenise(data, Letters(), max_length=120, cache_dir=tmp_path)
    assert isinstance(found, CachedData)
    with (found.folder / "ids.i32").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(OutputError) as caught:
        tokenise(data, Letters(), max_length=120, cache_dir=tmp_path)
    assert str(caught.value) == (
        f"{found.folder}: a damaged token cache (ids.i32 has 100 bytes instead of {4 * found.summary.tokens:,}); "
        "delete this folder"
    )


def test_data_that_changes_while_it_is_tokenised(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", many(10))
    records = open_records(path)

    class Changing(Letters):
        def encode_many(
            self, conversations: Sequence[Conversation], train_on: str = "all"
        ) -> list[list[Encoded]]:
            with path.open("a") as file:
                file.write("\n")
            return super().encode_many(conversations, train_on)

    with pytest.raises(DataError, match=r"^data.jsonl: was written to while it was being read; start again$"):
        tokenise(records, Changing(), max_length=1000, cache_dir=tmp_path)


@pytest.mark.parametrize("too_long", ["drop", "truncate", "error"])
def test_a_long_document_is_cut_and_nothing_of_it_is_left_out(tmp_path: Path, too_long: Any) -> None:
    records = open_records(write(tmp_path / "data.jsonl", [*documents(9, 10, 24), chat("a", "b")]))
    data = tokenise(records, Letters(), max_length=10, too_long=too_long, cache_dir=tmp_path)
    assert [data.lengths(i) for i in range(len(data))] == [(10,), (6,), (5,), (9,), (9,), (7,), (6,)]
    names = ["1", "2", "2 (part 2)", "3", "3 (part 2)", "3 (part 3)", "4"]
    assert [data.where(i) for i in range(len(data))] == [f"data.jsonl:{name}" for name in names]
    whole = [token for i in (3, 4, 5) for token in data[i][0].input_ids.tolist()]
    assert whole == [*map(ord, documents(24)[0]["text"]), 3]
    assert all(data[i][0].supervised == len(data[i][0].input_ids) for i in range(6))
    summary = data.summary
    assert (summary.records, summary.conversations, summary.cut, summary.pieces) == (4, 7, 2, 5)
    assert "conversations 4 of 4, sequences 7" in summary.describe()
    assert "documents longer than 10 tokens, in 5 pieces: 2" in summary.describe()
    assert data.full_lengths.tolist() == [10, 6, 9, 6] and summary.dropped == 0


# ---------------------------------------------------------------- lazy


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
@pytest.mark.parametrize("max_length", [60, 120, 5000])
def test_lazy_gives_the_same(tmp_path: Path, too_long: Any, max_length: int) -> None:
    data = open_records(write(tmp_path / "data.jsonl", [*many(600), *documents(30, 800, 59, 60), *many(96)]))
    eager = tokenise(data, Letters(), max_length=max_length, too_long=too_long, cache_dir=tmp_path)
    lazy = tokenise(data, Letters(), max_length=max_length, too_long=too_long, lazy=True)
    assert len(lazy) == len(eager)
    order = random.Random(0).sample(range(len(eager)), len(eager))
    for i in order:
        assert lazy.lengths(i) == eager.lengths(i)
        assert (lazy.where(i), lazy.record_of(i)) == (eager.where(i), eager.record_of(i))
    assert everything(lazy) == everything(eager)
    counted, summary = lazy.summary.to_json(), eager.summary.to_json()
    assert counted.pop("complete") and summary.pop("complete")
    assert (counted.pop("common_prefix_share"), summary.pop("common_prefix_share")) != (None, None)
    assert counted == summary
    assert lazy.full_lengths.tolist() == eager.full_lengths.tolist()


def test_lazy_begins_at_once(data: Records) -> None:
    fmt = Letters()
    lazy = tokenise(data, fmt, max_length=5000, lazy=True)
    assert (len(lazy), fmt.asked) == (700, 2)  # the smallest conversation, and the first
    assert not lazy.summary.complete
    with pytest.raises(DataError, match="conversations longer than --model_max_length 7: 2 of 3;"):
        records = open_records(
            write(Path(data._sources[0].path).with_name("x.jsonl"), [chat("a", "b"), *[chat("abc", "d")] * 2])
        )
        tokenise(records, Letters(), max_length=7, too_long="error", lazy=True)


def test_lazy_forgets(data: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_data, "REMEMBERED", 10)
    lazy = tokenise(data, Letters(), max_length=5000, lazy=True)
    twice = [everything(lazy), everything(lazy)]
    assert twice[0] == twice[1]
    assert isinstance(lazy, lazy_data.LazyData)
    assert len(lazy._remembered) == 10
    assert lazy.summary.tokens == sum(len(ids) for _, sequences in twice[0] for ids, _ in sequences)


# ---------------------------------------------------------------- with the real format


def test_the_example_data_under_the_real_vocabulary(qwen2_5_tokenizer: Any, tmp_path: Path) -> None:
    records = open_records(ROOT / "finetune" / "io_file" / "input_data" / "example_data.jsonl")
    fmt = ChatFormat(qwen2_5_tokenizer)
    data = tokenise(records, fmt, max_length=4096, cache_dir=tmp_path, workers=2)
    lazy = tokenise(records, fmt, max_length=4096, lazy=True)
    assert len(data) == len(lazy) == len(records)
    for i, conversation in enumerate(records):
        expected = fmt.encode_conversation(conversation)
        for found in (data[i], lazy[i]):
            assert [one.input_ids.tolist() for one in found] == [one.input_ids for one in expected]
            assert [one.labels.tolist() for one in found] == [one.labels for one in expected]


def test_memory_stays_flat(tmp_path: Path) -> None:
    """Ten times the conversations take no more memory in the process that tokenises (at most 40 bytes each)."""

    def peak(count: int) -> int:
        path = write(tmp_path / f"{count}.jsonl", many(count))
        program = (
            f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
            "import tests.data.test_token_cache as t, re\n"
            f"records = t.open_records({str(path)!r})\n"
            "def anonymous(): return int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
            "most = []\n"
            f"data = t.tokenise(records, t.Letters(), max_length=1000, cache_dir={str(tmp_path)!r}, workers=1,\n"
            "    progress=lambda *_: most.append(anonymous()))\n"
            "print(max(most))\n"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        return int(done.stdout) * 1024

    small, large = peak(2_000), peak(22_000)
    assert large - small <= 40 * 20_000 + 2**20  # what the allocator keeps varies by less than a megabyte
