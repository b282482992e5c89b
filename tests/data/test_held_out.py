"""Held-out data: which conversations the hash takes, and which training lines give them away."""

import re

import pytest

from qwen_chat.conversation import Conversation, Message
from qwen_chat.data.held_out import Leaks, leaks, parted, place_of, prompt_of
from qwen_chat.errors import DataError


def asked(question: str, reply: str = "Yes.", *more: str, system: str | None = None) -> Conversation:
    messages = [] if system is None else [Message("system", system)]
    messages += [Message("user", question), Message("assistant", reply)]
    for number, text in enumerate(more):
        messages.append(Message("assistant" if number % 2 else "user", text))
    return Conversation(tuple(messages))


MANY = [asked(f"How far is town number {n} from here?") for n in range(2_000)]


def test_the_share_is_kept_and_each_prompt_stays_on_one_side() -> None:
    learnt, apart = parted(MANY, 0.05)
    assert len(learnt) + len(apart) == len(MANY)
    assert 70 <= len(apart) <= 130  # five standard deviations around 100
    twice = [*MANY, *(asked(f"  HOW far is town number {n} from here", "No.") for n in range(2_000))]
    both = set(parted(twice, 0.05)[1].tolist())
    assert both == set(apart.tolist()) | {2_000 + n for n in apart.tolist()}
    wider = set(parted(MANY, 0.2)[1].tolist())
    assert set(apart.tolist()) < wider  # a larger share only adds


def test_no_other_line_and_no_process_changes_a_side() -> None:
    assert parted(MANY[1000:], 0.05)[1].tolist() == [n - 1000 for n in parted(MANY, 0.05)[1] if n >= 1000]
    assert place_of(asked("杭州今天天气怎么样？")) == pytest.approx(0.0912810, abs=1e-7)


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
    ("held.jsonl:1", asked("Which of the two rivers in Hangzhou is the longer one, and by how much?")),
    ("held.jsonl:2", asked("西湖边上最适合春天散步的那条路叫什么名字？")),
    ("held.jsonl:3", asked("Who are you?")),
]


RIVERS, LAKE = HELD_OUT[0][1].messages[0].content, HELD_OUT[1][1].messages[0].content
NEARLY = "asks nearly what the held-out held.jsonl"


@pytest.mark.parametrize(
    ("conversation", "says"),
    [
        (asked(RIVERS.lower().replace("?", ""), "?"), "has the prompt of the held-out held.jsonl:1"),
        (asked(RIVERS.replace("?", ", please?")), f"{NEARLY}:1 asks (93% alike)"),
        (asked(LAKE.replace("？", "呢？")), f"{NEARLY}:2 asks (95% alike)"),
        (asked("Hello", "Hi", LAKE, "白堤"), f"{NEARLY}:2 asks (100% alike)"),
        (asked("Who are you?", system="Be brief."), None),  # too short to be compared
        (asked("Which of the two rivers in Ningbo is wider?"), None),
    ],
)
def test_a_line_that_gives_a_held_out_one_away(conversation: Conversation, says: str | None) -> None:
    found = leaks([("data.jsonl:7", conversation)], HELD_OUT)
    assert [str(problem) for problem in found.problems] == ([] if says is None else [f"data.jsonl:7: {says}"])


def test_a_frame_around_all_questions_is_no_likeness() -> None:
    frame = "Translate the following sentence from English into French, and give the translation alone: {}"
    held_out = [(f"h:{n}", asked(frame.format(f"{n} cats sit on mat {n}"))) for n in range(30)]
    training = [(f"t:{n}", asked(frame.format(f"{n} dogs bark at tree {n}"))) for n in range(30, 60)]
    assert leaks(training, held_out) == Leaks()


def test_twenty_are_listed_and_all_are_counted() -> None:
    found = leaks([(f"d:{n}", HELD_OUT[0][1]) for n in range(25)], HELD_OUT)
    lines = found.describe()
    assert (found.total, len(found.problems)) == (25, 20)
    assert lines[0].startswith("note: 25 training lines give away what is held out")
    assert lines[1] == "  d:0: has the prompt of the held-out held.jsonl:1"
    assert lines[-1] == "  ... and 5 more"
    assert Leaks().describe() == []
