"""Drafts and jumps: no reply changes, whatever is asked for, and they are tried where they come true."""

import dataclasses
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from qwen_chat.dialects.grammar import Grammar
from qwen_chat.dialects.hermes import Hermes
from qwen_chat.inference.decoder import Decoder
from qwen_chat.inference.draft import MOST, Drafter, StepCost
from qwen_chat.inference.engine import Engine
from qwen_chat.inference.events import Completion
from qwen_chat.inference.native.library import NATIVE_SWITCH
from qwen_chat.inference.prefix_cache import BLOCK
from qwen_chat.inference.sampling import GenerationRequest
from tests.support.scripted import make_engine
from tests.support.tiny_families import byte_tokenizer, tiny_family

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "parameters": {
                "type": "object",
                "properties": {
                    "when": {"enum": ["noon", "night"]},
                    "word": {"type": "string", "maxLength": 9},
                },
                "required": ["when", "word"],
            },
        },
    }
]
GRAMMARS = [
    Hermes().call_grammar(TOOLS),
    Grammar.json_schema(
        {"type": "array", "items": {"enum": ["a fine day", "a fine night"]}, "minItems": 3, "maxItems": 6}
    ),
]


@pytest.fixture(autouse=True)
def steady() -> Iterator[None]:
    """One thread, as other processes compute beside; no bit depends on their number (test_native.py)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def an_eighth(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token more costs an eighth of a step, whatever the clock says."""
    monkeypatch.setattr(StepCost, "_line", lambda self: (8.0, 1.0))


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every guess is tried, the wrong ones too."""
    monkeypatch.setattr(StepCost, "bet", lambda self, rows: lambda chance: True)


def random_request(chance: random.Random) -> GenerationRequest:
    """Prompts repeat themselves in part; every setting is at its default half of the time."""

    def sometimes(*values: Any, otherwise: Any) -> Any:
        return chance.choice(values) if chance.random() < 0.5 else otherwise

    words = [[chance.randrange(97, 107) for _ in range(chance.randrange(2, 7))] for _ in range(4)]
    prompt = [byte for _ in range(chance.randrange(1, 25)) for byte in chance.choice(words)]
    return GenerationRequest(
        prompt[: chance.randrange(1, 120)],
        max_tokens=chance.choice([1, 9, 40, 90]),
        temperature=chance.choice([0.0, 0.0, 0.05, 0.7, 1.3]),
        top_p=sometimes(0.3, 0.9, otherwise=1.0),
        top_k=sometimes(1, 3, 40, otherwise=0),
        min_p=sometimes(0.05, otherwise=0.0),
        seed=chance.randrange(1000),
        stop=sometimes(("abca",), ("ments", "night"), otherwise=()),
        stop_token_ids=sometimes((98,), (32, 111), otherwise=()),
        presence_penalty=sometimes(0.5, 1.5, otherwise=0.0),
        frequency_penalty=sometimes(0.3, otherwise=0.0),
        repetition_penalty=sometimes(1.2, 0.8, otherwise=1.0),
        logit_bias=sometimes(
            {97: 14.0, 98: 13.0, 99: 14.0}, {97: 30.0}, otherwise={}
        ),  # few tokens: some repeat
        logprobs=sometimes(0, 2, otherwise=None),
        grammar=sometimes(*GRAMMARS, otherwise=None),
    )


def told(done: Completion) -> Completion:
    return dataclasses.replace(done, cached_tokens=0)


def held(name: str, quantize: str | None, requests: list[GenerationRequest]) -> None:
    """The same completions alone without, alone with, and in company with drafts."""
    decoder = Decoder(tiny_family(name, vocab_size=257), quantize=quantize)
    options = {"stop_token_ids": [256], "prefill_tokens": 40}
    requests = [*requests, GenerationRequest([1, 2], max_tokens=60, seed=1, grammar=GRAMMARS[0])]
    with Engine(decoder, byte_tokenizer(), drafts=False, cache_tokens=0, **options) as plain:
        expected = [told(plain.generate([request])[0]) for request in requests]
        assert plain.stats().drafted_tokens == plain.stats().forced_tokens == 0
    with Engine(decoder, byte_tokenizer(), **options) as drafting:
        assert [told(drafting.generate([request])[0]) for request in requests] == expected
        assert [told(done) for done in drafting.generate(requests)] == expected
        stats = drafting.stats()
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    assert stats.forced_tokens


@pytest.mark.parametrize(
    ("name", "native"), [("qwen2_slide", "1"), ("qwen2_slide", "0"), ("qwen3_5_text", "0")]
)
def test_no_reply_changes(name: str, native: str, always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Native and torch; a hybrid's state is taken back."""
    monkeypatch.setenv(NATIVE_SWITCH, native)
    chance = random.Random(name)
    held(name, None, [random_request(chance) for _ in range(16)])


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize(
    ("name", "native"),
    [(name, "1") for name in ("qwen2_slide", "qwen3_slide", "mistral")]
    + [(name, "0") for name in ("qwen2_slide", "mistral", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text")],
)
def test_no_reply_of_any_family_changes(
    name: str, native: str, quantize: str | None, always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NATIVE_SWITCH, native)
    chance = random.Random(f"{name} {quantize} {native}")
    held(name, quantize, [random_request(chance) for _ in range(24)])


# ------------------------------------------------------------------------------------------------- the engine


def say(engine: Engine, text: str, **more: Any) -> GenerationRequest:
    """The scripted model answers with `text`, of which the prompt is the first half of a repetition."""
    ids = engine.fmt.prompt_ids([{"role": "user", "content": f"say {text}"}])
    return GenerationRequest(ids, **{"max_tokens": 400, "temperature": 0.0, **more})


TEXT = "The tide is the slow rise and fall of the sea, twice a day, on every coast."


@pytest.fixture
def scripted(an_eighth: None) -> Iterator[Engine]:
    with make_engine() as engine:
        yield engine


def test_an_answer_that_repeats_its_prompt_takes_few_steps(scripted: Engine) -> None:
    done = scripted.generate([say(scripted, TEXT)])[0]
    assert (done.text, done.finish_reason) == (TEXT, "stop")
    stats = scripted.stats()
    assert stats.steps < len(TEXT) / 4
    assert stats.generated_tokens == len(done.token_ids) == len(TEXT) + 1


def test_a_stream_is_the_same_events(scripted: Engine) -> None:
    with make_engine(drafts=False) as plain:
        expected = list(plain.submit(say(plain, TEXT)))
    assert list(scripted.submit(say(scripted, TEXT))) == expected


def test_no_token_past_the_limit(scripted: Engine) -> None:
    limits = range(1, 40)
    for most, done in zip(
        limits, scripted.generate([say(scripted, TEXT, max_tokens=most) for most in limits]), strict=True
    ):
        assert (done.text, done.finish_reason, len(done.token_ids)) == (TEXT[:most], "length", most)


def test_no_token_past_the_context(scripted: Engine) -> None:
    request = say(scripted, TEXT * 40, max_tokens=None)
    scripted.decoder.context = len(request.prompt_ids) + 500
    done = scripted.generate([request])[0]
    assert (done.text, done.finish_reason) == ((TEXT * 40)[:500], "length")


def test_a_stop_string_in_a_draft_ends_the_text(scripted: Engine) -> None:
    done = scripted.generate([say(scripted, TEXT, stop=("day, o",))])[0]
    assert (done.text, done.finish_reason) == (TEXT[: TEXT.index("day, o")], "stop")


def test_the_prefix_cache_holds_what_was_said_and_no_draft(always: None) -> None:
    with make_engine(cache_tokens=100_000) as engine:
        first = say(engine, "abcdef" * 10 + "zzz", stop=("zz",))
        said = engine.generate([first])[0].token_ids
        assert engine.stats().drafted_tokens > engine.stats().accepted_tokens
        following = [*first.prompt_ids, *said, 10, 11]
        done = engine.generate([GenerationRequest(following, max_tokens=1)])[0]
    assert done.cached_tokens == (len(first.prompt_ids) + len(said) - 1) // BLOCK * BLOCK


def test_a_client_that_leaves_gets_nothing_more(scripted: Engine) -> None:
    """It leaves while a step with drafts runs: the token chosen first is the last."""
    entered, left = threading.Event(), threading.Event()
    step: Callable[..., torch.Tensor] = scripted.decoder.step

    def waits(segments: Any) -> torch.Tensor:
        if segments[0].drafts:
            entered.set()
            left.wait(10)
        return step(segments)

    scripted.decoder.step = waits  # type: ignore[method-assign]
    generation = scripted.submit(say(scripted, TEXT))
    assert entered.wait(10)
    known = len(generation._events)
    generation.cancel()
    left.set()
    events = list(generation)
    assert events[-1].finish_reason == "cancelled"
    assert len(events) <= known + 2


def test_a_schema_costs_no_step_for_what_it_forces(scripted: Engine) -> None:
    grammar = Grammar.json_schema({"const": {"name": "a rather long constant", "value": None}})
    done = scripted.generate([say(scripted, "x", grammar=grammar)])[0]
    assert done.text == '{"name": "a rather long constant", "value": null}'
    assert scripted.stats().steps <= 2
    with_them = scripted.generate([say(scripted, "x", grammar=grammar, logprobs=0)])[0]
    assert (with_them.text, len(with_them.logprobs)) == (done.text, len(done.token_ids))


def test_an_accelerator_gets_no_drafts(scripted: Engine) -> None:
    """There bits may depend on how many tokens a step has."""
    scripted.decoder.device = torch.device("meta")
    row = scripted._row(scripted.submit(say(scripted, TEXT)))
    row.kv.reserve(len(row.tokens))
    assert scripted._drafts(row, lambda chance: True) == []


# ------------------------------------------------------------------------------------------ guesses and costs


def guesses(text: bytes, chance: float = 0.0) -> bytes:
    tokens: list[int] = []
    drafter = Drafter(tokens)
    for byte in text:
        tokens.append(byte)
        drafter.see()
    return bytes(drafter.guess(MOST, lambda likely: likely > chance))


def test_a_guess_is_what_followed_the_last_time() -> None:
    assert guesses(b"one two three, one two three, one t") == b"wo three, one tw"
    assert guesses(b"one two, one ten, one ") == b"ten, one ten, on"
    assert guesses(b"abcd") == guesses(b"a") == guesses(b"") == b""
    assert guesses(b"aaa") == b"a" * MOST  # it goes on into itself


def test_a_prompt_is_read_like_a_reply() -> None:
    tokens = list(b"one two three; one t")
    assert bytes(Drafter(tokens).guess(6, lambda likely: True)) == b"wo thr"


def test_a_long_repetition_is_believed_and_a_broken_one_no_more() -> None:
    assert len(guesses(b"the same words again; the same words", 0.3)) >= 4
    noise = random.Random(0)
    broken = b"".join(b"ab" + bytes([noise.randrange(256)]) for _ in range(60)) + b"ab"
    assert guesses(broken, 0.05) == b""


def test_what_pays_follows_the_cost_of_a_token() -> None:
    cheap, dear = StepCost(), StepCost()
    for tokens in (1, 2, 4, 8) * 20:
        cheap.observe(tokens, 0.010 + 0.0002 * tokens)
        dear.observe(tokens, 0.010 * tokens)
        dear.observe(500, 0.1)  # a prompt
    assert cheap.bet(1)(0.1)
    assert not cheap.bet(1)(0.01)
    assert not dear.bet(1)(0.8)
    # In company a step is worth more, so a token must be likelier; each that is taken makes the next one less welcome.
    assert not cheap.bet(32)(0.3)
    pays, taken = StepCost().bet(1), 0
    while pays(0.5):
        taken += 1
    assert 0 < taken < 30
