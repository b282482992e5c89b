"""Held-out data: which conversations the hash takes, and which training lines give them away."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from qwen_chat.conversation import Conversation, Message
from qwen_chat.data import mixture
from qwen_chat.data.held_out import Leak, Leaks, Wordings, division, leaks, prompt_of
from qwen_chat.data.held_out import parted as parted_wordings
from qwen_chat.data.records import open_records
from qwen_chat.data.token_cache import tokenise
from qwen_chat.data.tokenised import TokenisedData
from qwen_chat.errors import DataError
from qwen_chat.flags.run_options import DataArguments
from tests.support.letters import Letters


def asked(question: str, reply: str = "Yes.", *more: str, system: str | None = None) -> Conversation:
    messages = [] if system is None else [Message("system", system)]
    messages += [Message("user", question), Message("assistant", reply)]
    for number, text in enumerate(more):
        messages.append(Message("assistant" if number % 2 else "user", text))
    return Conversation(tuple(messages))


def parted(conversations: list[Conversation], share: float) -> tuple[list[int], list[int]]:
    return parted_wordings(Wordings(conversations), share)


MANY = [asked(f"How far is town number {n} from here?") for n in range(2_000)]


def test_the_share_is_kept_and_each_prompt_stays_on_one_side() -> None:
    learnt, apart = parted(MANY, 0.05)
    assert len(learnt) + len(apart) == len(MANY)
    assert 70 <= len(apart) <= 130  # five standard deviations around 100
    twice = [*MANY, *(asked(f"  HOW far is town number {n} from here", "No.") for n in range(2_000))]
    both = set(parted(twice, 0.05)[1])
    assert both == set(apart) | {2_000 + n for n in apart}
    wider = set(parted(MANY, 0.2)[1])
    assert set(apart) < wider  # a larger share only adds


def test_no_other_line_and_no_process_changes_a_side() -> None:
    assert parted(MANY[1000:], 0.05)[1] == [n - 1000 for n in parted(MANY, 0.05)[1] if n >= 1000]
    assert Wordings([asked("杭州今天天气怎么样？")]).places()[0] == pytest.approx(0.0912810, abs=1e-7)


def test_a_prompt_is_what_stands_before_the_first_reply() -> None:
    assert prompt_of(asked("Ｗho are  you?", "A", "And you?", "B")) == prompt_of(asked("who are you", "C"))
    assert prompt_of(asked("Hi", system="Be brief.")) != prompt_of(asked("Hi"))
    assert prompt_of(asked("😀")) != prompt_of(asked("🎉"))
    assert len({prompt_of(asked(text)) for text in ("1+1?", "11?", "1-1?", "1.1?", "1 1")}) == 5


@pytest.mark.parametrize(("share", "what"), [(1e-6, "holds out none"), (1 - 1e-6, "leaves none")])
def test_a_share_that_leaves_nothing_is_refused_with_one_that_does(share: float, what: str) -> None:
    with pytest.raises(DataError, match=f"--eval_share .*: {what} of 12 conversations; a share of") as error:
        parted(MANY[:12], share)
    found = re.search(r"a share of ([\d.]+)", str(error.value))
    assert found is not None
    learnt, apart = parted(MANY[:12], float(found[1]))
    assert min(len(learnt), len(apart)) == 1


def test_one_prompt_alone_cannot_be_parted() -> None:
    with pytest.raises(
        DataError, match="all have one prompt; give held-out conversations with --eval_data_path"
    ):
        parted([asked("Go."), asked("go")], 0.5)


HELD_OUT = [
    asked("Which of the two rivers in Hangzhou is the longer one, and by how much?"),
    asked("西湖边上最适合春天散步的那条路叫什么名字？"),
    asked("Who are you?"),
]
RIVERS, LAKE = HELD_OUT[0].messages[0].content, HELD_OUT[1].messages[0].content
DAM = "The dam above the old town was closed in 1931, and it has been closed ever since then."


def given_away(training: list[Conversation], held_out: list[Conversation]) -> list[Leak]:
    return leaks(
        Wordings(training), list(range(len(training))), Wordings(held_out), list(range(len(held_out)))
    )


@pytest.mark.parametrize(
    ("conversation", "leak"),
    [
        (asked(RIVERS.lower().replace("?", ""), "?"), (0, None)),
        (asked(RIVERS.replace("?", ", please?")), (0, 0.93)),
        (asked(LAKE.replace("？", "呢？")), (1, 0.95)),
        (asked("Hello", "Hi", LAKE, "白堤"), (1, 1.0)),
        (asked("Who are you?", system="Be brief."), None),  # too short to be compared
        (asked("Which of the two rivers in Ningbo is wider?"), None),
        (Conversation((), document=DAM), (3, None)),
        (Conversation((), document=f"{DAM} So they say."), (3, 0.84)),
    ],
)
def test_a_line_that_gives_a_held_out_one_away(
    conversation: Conversation, leak: tuple[int, float | None] | None
) -> None:
    found = given_away([conversation], [*HELD_OUT, Conversation((), document=DAM)])
    rounded = [(k, alike and round(alike, 2)) for _, k, alike in found]
    assert rounded == ([] if leak is None else [leak])


def test_a_frame_around_all_questions_is_no_likeness() -> None:
    frame = "Translate the following sentence from English into French, and give the translation alone: {}"
    held_out = [asked(frame.format(f"{n} cats sit on mat {n}")) for n in range(30)]
    training = [asked(frame.format(f"{n} dogs bark at tree {n}")) for n in range(30, 60)]
    assert given_away(training, held_out) == []


def tokenised(path: Path, conversations: list[Conversation]) -> TokenisedData:
    path.write_text("".join(json.dumps(one.to_openai()) + "\n" for one in conversations), encoding="utf-8")
    return tokenise(open_records(path), Letters(), max_length=5_000, cache_dir=path.parent)


def test_twenty_are_listed_and_all_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is found once: what the cache has is not looked for again, whatever the files are called."""
    monkeypatch.setenv("QWEN_CHAT_CACHE", str(tmp_path))
    held_out = tokenised(tmp_path / "held.jsonl", HELD_OUT)
    for name in ("d.jsonl", "again.jsonl"):
        data = tokenised(tmp_path / name, [HELD_OUT[0]] * 25)
        found = division(data, held_out).told(data.records, held_out.records)
        lines = found.describe()
        assert (found.total, len(found.problems)) == (25, 20)
        assert lines[0].startswith("note: 25 training lines give away what is held out")
        assert lines[1] == f"  {name}:1: has the prompt of the held-out held.jsonl:1"
        assert lines[-1] == "  ... and 5 more"
        monkeypatch.setattr("qwen_chat.data.held_out.Wordings", None)  # calling it would be a TypeError
    assert Leaks().describe() == []


def test_a_share_is_divided_as_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every piece of a document that is cut stays on its side."""
    monkeypatch.setenv("QWEN_CHAT_CACHE", str(tmp_path))
    documents = [Conversation((), document=f"{n} " + DAM * 100) for n in range(20)]
    data = tokenised(tmp_path / "d.jsonl", [*MANY[:50], *documents])
    assert data.summary.cut == 20
    found = division(data, 0.3)
    assert found.apart == parted([*MANY[:50], *documents], 0.3)[1]
    asked_for = DataArguments(data_path=("d.jsonl",), eval_share=0.3)
    parts = mixture.divided(data, asked_for, lambda paths: data, seed=1)
    sides = [{one.data.record_of(int(i)) for i in one.index} for one in (parts.train, parts.held_out)]
    assert sides[1] == set(found.apart) and sides[0] == set(range(70)) - sides[1]
    assert len(parts.train) + len(parts.held_out) == len(data)


def tokenise_nothing(paths: object) -> TokenisedData:
    raise AssertionError(paths)


def test_a_side_with_no_token_to_learn_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data with `"train": false` may be good as a whole, and a side of it, or what weights leave of it, not."""
    monkeypatch.setenv("QWEN_CHAT_CACHE", str(tmp_path))
    sides = parted(MANY[:20], 0.5)
    for context, words in zip(
        sides, ("what is left to train on has no", "what is held out has no"), strict=True
    ):
        some = [
            replace(one, messages=(one.messages[0], replace(one.messages[1], train=False)))
            if number in context
            else one
            for number, one in enumerate(MANY[:20])
        ]
        data = tokenised(tmp_path / f"{len(words)}.jsonl", some)
        with pytest.raises(DataError, match=f"^{words}"):
            mixture.divided(data, DataArguments(eval_share=0.5), tokenise_nothing, seed=1)
