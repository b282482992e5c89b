"""One request's choices, on logits small enough to work out by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from qwen_chat.dialects.grammar import Grammar
from qwen_chat.dialects.hermes import Hermes
from qwen_chat.errors import ToolError
from qwen_chat.inference.grammar import GrammarTokenizer
from qwen_chat.inference.sampling import GenerationRequest, Logits, Sampler
from qwen_chat.inference.text import StopText, TokenText

LOGITS = np.array([2.0, 1.0, 0.5, -1.0, -3.0], np.float32)


def sampler(**options: Any) -> Sampler:
    return Sampler(GenerationRequest(options.pop("prompt_ids", [4]), **options))


def frequencies(draws: int = 4000, **options: Any) -> list[float]:
    one = sampler(seed=7, **options)
    counts = [0] * 5
    for _ in range(draws):
        counts[one.pick(LOGITS).token_id] += 1
    return [count / draws for count in counts]


def test_greedy_takes_the_largest() -> None:
    assert sampler(temperature=0).pick(LOGITS).token_id == 0


def test_the_request_is_not_changed_by_picking() -> None:
    before = LOGITS.copy()
    one = sampler(temperature=0, frequency_penalty=1, repetition_penalty=1.5, logit_bias={1: 5})
    one.pick(LOGITS)
    one.pick(LOGITS)
    assert np.array_equal(LOGITS, before)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    expected = torch.softmax(torch.from_numpy(LOGITS) / temperature, 0).tolist()
    found = frequencies(temperature=temperature)
    assert all(abs(a - b) < 4 * math.sqrt(b * (1 - b) / 4000) for a, b in zip(found, expected, strict=True))


def kept(**options: Any) -> set[int]:
    return {token for token, share in enumerate(frequencies(1500, temperature=3.0, **options)) if share}


def test_top_k_keeps_the_k_largest() -> None:
    assert kept(top_k=1) == {0}
    assert kept(top_k=3) == {0, 1, 2}
    assert kept(top_k=99) == {0, 1, 2, 3, 4}


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    # softmax of LOGITS / 3: 0.397, 0.284, 0.241, 0.146 (sums before each: 0, .37, .64, .86, .95 rounded)
    shares = torch.softmax(torch.from_numpy(LOGITS) / 3, 0)
    before = (shares.cumsum(0) - shares).tolist()
    for count in range(1, 6):
        top_p = before[count - 1] + 1e-4
        assert kept(top_p=top_p) == set(range(count))
    assert kept(top_p=0.0) == {0}  # never empty


def test_top_p_is_measured_on_what_top_k_left() -> None:
    shares = torch.softmax(torch.from_numpy(LOGITS[:2]) / 3, 0)
    assert kept(top_k=2, top_p=float(shares[0]) - 1e-4) == {0}
    assert kept(top_k=2, top_p=float(shares[0]) + 1e-4) == {0, 1}


def test_min_p_is_relative_to_the_most_likely() -> None:
    ratio = math.exp((1.0 - 2.0) / 3)  # token 1 to token 0 at temperature 3
    assert kept(min_p=ratio + 1e-4) == {0}
    assert kept(min_p=ratio - 1e-4) == {0, 1}
    assert kept(min_p=ratio - 1e-4, top_k=3) == {0, 1}


def test_a_wide_nucleus_is_found_in_a_large_vocabulary() -> None:
    logits = np.zeros(5000, np.float32)  # flat: the first thousand candidates are not enough
    one = Sampler(GenerationRequest([0], top_p=0.9, seed=1))
    drawn = {one.pick(logits).token_id for _ in range(300)}
    assert len(drawn) > 250


def test_a_nucleus_of_a_wide_top_k_is_not_cut_short() -> None:
    logits = np.zeros(5000, np.float32)
    one = Sampler(GenerationRequest([0], top_k=4000, top_p=0.9, seed=1))
    drawn = {one.pick(logits).token_id for _ in range(300)}
    assert len(drawn) > 250
    few = Sampler(GenerationRequest([0], top_k=2000, seed=1))
    assert len({few.pick(logits).token_id for _ in range(6000)}) > 1500


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-9])
def test_a_temperature_next_to_nothing_is_greedy(temperature: float) -> None:
    one = Sampler(GenerationRequest([0], temperature=temperature, seed=1))
    assert [one.pick(np.array([3.0, 5.0, 4.0, 5.0 - 1e-3], np.float32)).token_id for _ in range(20)] == [
        1
    ] * 20


def test_a_seed_repeats_and_two_differ() -> None:
    def draw(seed: int) -> list[int]:
        one = sampler(seed=seed, temperature=2.0)
        return [one.pick(LOGITS).token_id for _ in range(40)]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)


def test_a_rounding_that_swaps_two_candidates_does_not_change_the_draw() -> None:
    close = np.array([1.0, 1.0 + 1e-7, 1.0, 0.0], np.float32)
    swapped = np.array([1.0 + 1e-7, 1.0, 1.0, 0.0], np.float32)

    def draw(logits: Logits) -> list[int]:
        one = Sampler(GenerationRequest([0], seed=3, top_p=0.99))
        return [one.pick(logits).token_id for _ in range(50)]

    assert draw(close) == draw(swapped)


def test_presence_and_frequency_count_what_was_generated() -> None:
    one = sampler(prompt_ids=[0, 0, 1], presence_penalty=0.5, frequency_penalty=0.25)
    for token in (2, 2, 3):
        one.note(token)
    expected = LOGITS - np.array([0, 0, 0.5 + 2 * 0.25, 0.5 + 0.25, 0], np.float32)
    assert np.array_equal(one._biased(LOGITS), expected)


def test_repetition_counts_the_prompt_too() -> None:
    one = sampler(prompt_ids=[0, 3, 3], repetition_penalty=2.0)
    one.note(1)
    assert np.allclose(one._biased(LOGITS), [1.0, 0.5, 0.5, -2.0, -3.0], rtol=1e-6)


def test_logit_bias_is_added() -> None:
    one = sampler(temperature=0, logit_bias={4: 100.0, 0: -100.0})
    assert np.allclose(one._biased(LOGITS), [-98.0, 1.0, 0.5, -1.0, 97.0], rtol=1e-6)
    assert one.pick(LOGITS).token_id == 4


def test_logprobs_are_the_models_own() -> None:
    choice = sampler(temperature=0, logprobs=2, logit_bias={4: 100.0}).pick(LOGITS)
    expected = torch.from_numpy(LOGITS).log_softmax(0).tolist()
    assert choice.token_id == 4
    assert choice.logprob == pytest.approx(expected[4], abs=1e-6)
    assert [token for token, _ in choice.top] == [0, 1]
    assert [value for _, value in choice.top] == pytest.approx(expected[:2], abs=1e-6)
    assert sampler(temperature=0, logprobs=0).pick(LOGITS).top == ()


# ------------------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize(
    "text", ["Hello, world!", "你好，世界", "👩‍👩‍👧 family 🇨🇳", "a\n\n  b\t\u3000c", "é\u0301 ﷽ \u200b"]
)
def test_the_bytes_of_tokens_are_the_bytes_of_the_text(
    text: str, qwen2_5_tokenizer: Any, demo_tokenizer: Any
) -> None:
    for tokenizer in (qwen2_5_tokenizer, demo_tokenizer):
        ids = tokenizer.encode(text, add_special_tokens=False)
        tokens = TokenText(tokenizer)
        assert b"".join(tokens.bytes_of(token) for token in ids) == text.encode()


def test_special_tokens_have_no_text_and_tool_tags_do(qwen2_5_tokenizer: Any) -> None:
    tokens = TokenText(qwen2_5_tokenizer)
    assert tokens.bytes_of(151645) == b""
    assert tokens.name_of(151645) == ("<|im_end|>", b"<|im_end|>")
    assert tokens.bytes_of(151657) == b"<tool_call>"
    assert tokens.bytes_of(151930) == b""  # an id that the vocabulary leaves unused


def test_half_a_character_is_never_shown() -> None:
    raw = "a👍b".encode()
    text = StopText()
    assert [text.feed(bytes([byte]))[0] for byte in raw] == ["a", "", "", "", "👍", "b"]
    cut = StopText()
    assert cut.feed(raw[:3]) == ("a", False)
    assert cut.finish() == ""


def show(stop: tuple[str, ...], pieces: list[str]) -> tuple[list[str], str | None]:
    """What is shown piece by piece, and what comes at the end (None: a stop string ended it)."""
    text, shown = StopText(stop), []
    for piece in pieces:
        part, stopped = text.feed(piece.encode())
        shown.append(part)
        if stopped:
            return shown, None
    return shown, text.finish()


def test_a_stop_string_and_its_beginning_are_held_back() -> None:
    assert show(("END",), ["one E", "N", "D two"]) == (["one ", "", ""], None)
    assert show(("END",), ["one E", "N", "V two"]) == (["one ", "", "ENV two"], "")
    assert show(("END",), ["one EN"]) == (["one "], "EN")


def test_the_earliest_stop_string_wins() -> None:
    assert show(("yy", "x"), ["a x yy"]) == (["a "], None)
    assert show(("aab",), list("aaab")) == (["", "", "a", ""], None)
    assert show(("\n\n", "停"), ["你好", "\n", "停下"]) == (["你好", "", "\n"], None)


def test_every_cut_of_a_text_shows_the_same() -> None:
    whole = "x<sto 👍 <stop> after"
    for first in range(1, len(whole)):
        for second in range(first, len(whole)):
            pieces = [whole[:first], whole[first:second], whole[second:]]
            shown, rest = show(("<stop>",), pieces)
            assert "".join(shown) + (rest or "") == "x<sto 👍 "


# --------------------------------------------------------------------------------------------------- grammar

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
            "required": ["city"],
        },
    },
}
TIME = {"type": "function", "function": {"name": "时间"}}


@pytest.fixture(scope="module", params=["text", "token"])
def tags(request: pytest.FixtureRequest) -> tuple[Any, GrammarTokenizer]:
    """A vocabulary where <tool_call> is text (SmolLM2) and one where it is a token (Qwen2.5)."""
    name = "demo_tokenizer" if request.param == "text" else "qwen2_5_tokenizer"
    tokenizer = request.getfixturevalue(name)
    return tokenizer, GrammarTokenizer(tokenizer, len(tokenizer), [tokenizer.eos_token_id])


def accepts(tags: tuple[Any, GrammarTokenizer], grammar: Grammar, text: str) -> bool:
    """Every token is allowed by the mask before it, and the text may end there."""
    tokenizer, grammars = tags
    matcher = grammars.matcher(grammar)
    for token in tokenizer.encode(text, add_special_tokens=False):
        scores = matcher.mask(np.zeros(len(tokenizer), np.float32))
        if scores[token] == float("-inf"):
            return False
        matcher.consume(token)
    return (
        matcher.is_complete or matcher.mask(np.zeros(len(tokenizer), np.float32))[tokenizer.eos_token_id] == 0
    )


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def test_a_required_call_is_one_of_the_tools_under_its_schema(tags: Any) -> None:
    grammar = Hermes().call_grammar([WEATHER, TIME])
    assert accepts(tags, grammar, call("get_weather", '{"city": "巴黎", "unit": "C"}'))
    assert accepts(tags, grammar, call("时间", "{}"))
    assert not accepts(tags, grammar, "I would rather not.")
    assert not accepts(tags, grammar, call("get_weather", "{}"))
    assert not accepts(tags, grammar, call("get_weather", '{"city": "x", "unit": "K"}'))
    assert not accepts(tags, grammar, call("get_time", "{}"))
    two = call("时间", "{}") + "\n" + call("时间", "{}")
    assert not accepts(tags, grammar, two)
    assert accepts(tags, Hermes().call_grammar([WEATHER, TIME], parallel=True), two)


def test_a_named_call_is_that_tool(tags: Any) -> None:
    grammar = Hermes().call_grammar([WEATHER, TIME], name="时间")
    assert accepts(tags, grammar, call("时间", "{}"))
    assert not accepts(tags, grammar, call("get_weather", '{"city": "x"}'))


def test_strict_tools_bind_a_call_and_leave_text_free(tags: Any) -> None:
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
    grammar = Hermes().text_grammar([strict, TIME])
    assert accepts(tags, grammar, "It is < warm, I think.")
    assert accepts(tags, grammar, "I look.\n" + call("get_weather", '{"city": "x"}'))
    assert accepts(
        tags, grammar, call("时间", '{"any": [1]}') + " and\n" + call("get_weather", '{"city": "y"}')
    )
    assert not accepts(tags, grammar, "I look.\n" + call("get_weather", '{"town": "x"}'))


def test_json_objects_and_schemas(tags: Any) -> None:
    assert accepts(tags, Grammar.json_object(), '{"a": [1, {"b": null}]}')
    assert not accepts(tags, Grammar.json_object(), "[1]")
    schema = {
        "type": "object",
        "properties": {"{OPEN} open": {"type": "integer"}},
        "required": ["{OPEN} open"],
    }
    assert accepts(tags, Grammar.json_schema(schema), '{"{OPEN} open": 12}')
    assert not accepts(tags, Grammar.json_schema(schema), '{"{OPEN} open": "12"}')


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "objekt"}, "Invalid type: objekt"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "Unsatisfiable schema"),
        ({"$ref": "#/nowhere"}, "does not exist"),
        ({"not": {}}, 'Unimplemented keys: ["not"]'),
        ({"type": "string", "pattern": "("}, "regex parse error"),
    ],
)
def test_a_schema_that_cannot_be_used_is_one_line(schema: Any, says: str, tags: Any) -> None:
    with pytest.raises(ToolError) as error:
        tags[1].matcher(Grammar.json_schema(schema))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_schemas_without_bounds_are_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(3000):
        deep = {"items": deep}
    with pytest.raises(ToolError, match="cannot be written as JSON"):
        Grammar.json_schema(deep)
    with pytest.raises(ToolError, match="the limit is 65,536"):
        Grammar.json_schema({"enum": ["x" * 70_000]})
    with pytest.raises(ToolError, match="no tool is called 'nothing'; the tools are: get_weather"):
        Hermes().call_grammar([WEATHER], name="nothing")
