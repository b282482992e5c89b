"""The engine: what a request gets does not depend on company, cuts, caches or luck."""

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_chat import hardware, models
from qwen_chat.dialects.grammar import Grammar
from qwen_chat.dialects.hermes import Hermes
from qwen_chat.errors import FormatError, ModelError, OptionError, ServiceError, ToolError
from qwen_chat.inference import int4
from qwen_chat.inference.decoder import Decoder
from qwen_chat.inference.engine import Engine, EngineStopped, PromptTooLong
from qwen_chat.inference.events import Generation
from qwen_chat.inference.kv_cache import KVRow, KVShape, KVStore
from qwen_chat.inference.loading import load_engine
from qwen_chat.inference.lora import Lora, NotBeside, _is_harmless, why_merged
from qwen_chat.inference.prefix_cache import BLOCK, PrefixCache
from qwen_chat.inference.sampling import Choice, GenerationRequest, Sampler
from qwen_chat.inference.step import Segment
from tests.support.scripted import TEMPLATE
from tests.support.tiny_families import byte_tokenizer

FAMILIES = ["qwen2", "qwen3", "llama"]
VOCABULARY = 512


def tiny_model(family: str = "qwen2", seed: int = 0, **more: Any) -> Any:
    """Three layers with weights large enough that every token matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16 if family != "qwen3" else 32,
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
        **{"tie_word_embeddings": True, "intermediate_size": 96, **more},
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "q_norm.weight", "k_norm.weight")):
            torch.nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.3)
    return model


@pytest.fixture(scope="module")
def tiny_tokenizer() -> Any:
    return byte_tokenizer()


def prompts(count: int, longest: int = 150) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


def greedy(ids: list[int], **more: Any) -> GenerationRequest:
    return GenerationRequest(ids, **{"max_tokens": 12, "temperature": 0.0, **more})


@pytest.fixture(scope="module")
def engine(tiny_tokenizer: Any) -> Iterator[Engine]:
    with Engine(tiny_model(), tiny_tokenizer, prefill_tokens=24) as one:
        yield one


# --------------------------------------------------------------------------------------------------- decoder


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_models_own(family: str, tied: bool) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    decoder = Decoder(model)
    store = KVStore(decoder.kv_shape)
    ids = prompts(1)[0] + list(range(130))
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    for cuts in ([len(ids)], [1, 2, 3, 64, 65, len(ids)], [*range(120, len(ids) + 1)]):
        row, begin = store.row(), 0
        for end in cuts:
            row.reserve(end)
            logits = decoder.step([Segment(ids[begin:end], begin, row)])
            assert torch.allclose(logits[0], expected[end - 1], atol=1e-4)
            begin = end


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_gives_what_transformers_gives(
    family: str, quantize: str | None, tiny_tokenizer: Any
) -> None:
    """float32: the tokens of the model's own generate. int8, int4: the same batched and alone."""
    model = tiny_model(family)
    asked = prompts(12)
    with Engine(model, tiny_tokenizer, quantize=quantize, prefill_tokens=40) as one:
        together = [done.token_ids for done in one.generate([greedy(ids) for ids in asked])]
    with Engine(model, tiny_tokenizer, quantize=quantize, cache_tokens=0, prefill_tokens=512) as other:
        alone = [other.generate([greedy(ids)])[0].token_ids for ids in asked]
    assert together == alone
    if quantize is None:
        for ids, found in zip(asked, alone, strict=True):
            with torch.no_grad():
                out = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
            assert tuple(out[0, len(ids) :].tolist()) == found


@pytest.mark.skipif(not int4.takes(64, 64), reason="this torch has no int4 kernel")
def test_int4_says_which_layers_it_leaves_in_int8() -> None:
    told = Decoder(tiny_model(intermediate_size=40), quantize="int4").ways
    assert told[1].startswith("3 of 12 layers' weights in int8: int4 takes outputs in 16s and inputs in 32s")
    assert not any("layers' weights in int8" in line for line in Decoder(tiny_model(), quantize="int4").ways)


def test_a_model_of_another_kind_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16, n_positions=8))
    with pytest.raises(
        ModelError,
        match=r"this model: a model of type 'gpt2' is not served by the engine; .* qwen2, qwen2_moe, .*, mistral; for",
    ):
        Decoder(model)


# ---------------------------------------------------------------------------------------- batching and caches


def test_sampled_tokens_do_not_depend_on_neighbours(engine: Engine) -> None:
    request = GenerationRequest([1, 2, 3, 4], max_tokens=30, temperature=1.0, seed=11, top_p=0.95)
    alone = engine.generate([request])[0]
    noise = [GenerationRequest(ids, max_tokens=20, seed=i) for i, ids in enumerate(prompts(9))]
    together = engine.generate([*noise[:4], request, *noise[4:]])[4]
    assert together.token_ids == alone.token_ids
    other_seed = GenerationRequest([1, 2, 3, 4], max_tokens=30, temperature=1.0, seed=12, top_p=0.95)
    assert engine.generate([other_seed])[0].token_ids != alone.token_ids


def test_a_cached_prefix_gives_the_same_as_a_fresh_one(tiny_tokenizer: Any) -> None:
    prefix, model = prompts(1)[0] + list(range(100)), tiny_model()
    asked = [greedy(prefix + tail) for tail in ([7], [8, 9], [7, 7, 7])]
    with Engine(model, tiny_tokenizer, cache_tokens=0) as fresh_engine:
        fresh = [fresh_engine.generate([request])[0] for request in asked]
    with Engine(model, tiny_tokenizer) as cached_engine:
        cached = [cached_engine.generate([request])[0] for request in asked]
    whole = len(prefix) // BLOCK * BLOCK
    assert [done.cached_tokens for done in fresh] == [0, 0, 0]
    assert [done.cached_tokens for done in cached] == [0, whole, whole]
    assert [done.token_ids for done in cached] == [done.token_ids for done in fresh]


def test_a_conversation_finds_its_earlier_turns(engine: Engine) -> None:
    first = list(range(50))
    reply = engine.generate([greedy(first, max_tokens=60)])[0].token_ids
    second = [*first, *reply, 5, 6]
    done = engine.generate([greedy(second)])[0]
    assert done.cached_tokens == (len(first) + len(reply) - 1) // BLOCK * BLOCK
    assert (
        done.token_ids
        == Engine(tiny_model(), engine.tokenizer, cache_tokens=0).generate([greedy(second)])[0].token_ids
    )


def test_equal_prompts_at_once_are_computed_once(tiny_tokenizer: Any) -> None:
    ids = list(range(120))
    with Engine(tiny_model(), tiny_tokenizer) as one:
        done = one.generate([greedy([*ids, n]) for n in range(5)])
    assert [item.cached_tokens for item in done] == [0, 96, 96, 96, 96]


def test_the_prefix_cache_is_bounded_and_forgets_the_oldest() -> None:
    store = KVStore(KVShape(1, 1, 4, torch.float32))
    cache = PrefixCache(4 * BLOCK)

    def keep(ids: list[int]) -> KVRow:
        row = store.row()
        row.reserve(len(ids))
        row.tensor[:, :, : len(ids)] = torch.tensor(ids, dtype=torch.float32)[:, None]
        cache.store(row, 0, ids)
        return row

    first, second = list(range(3 * BLOCK)), list(range(1000, 1000 + 3 * BLOCK))
    keep(first)
    keep(second)
    assert cache.tokens == 4 * BLOCK
    row = store.row()
    assert cache.fill(row, 0, [*first, 1]) == BLOCK  # its end was dropped before its beginning
    assert cache.fill(store.row(), 1, [*second, 1]) == 0  # another adapter's
    assert cache.fill(row, 0, [*second, 1]) == 3 * BLOCK
    assert row.tensor[0, 0, : 3 * BLOCK, 0].tolist() == second
    assert cache.fill(store.row(), 0, second) == 2 * BLOCK  # one token is always left to compute


def test_a_row_that_grows_keeps_what_it_held_and_gives_room_back() -> None:
    store = KVStore(KVShape(2, 1, 4, torch.float32))
    rows = [store.row() for _ in range(20)]
    for number, row in enumerate(rows):
        row.reserve(10)
        row.tensor[:] = number
    rows[3].reserve(3000)
    assert float(rows[3].tensor[:, :, :256].mean()) == 3
    assert [float(row.tensor[0, 0, 0, 0]) for row in rows] == [float(number) for number in range(20)]
    held = store.tokens
    for row in rows:
        row.release()
    assert store.tokens < held
    assert {row.capacity for row in rows} == {0}


def test_too_little_memory_makes_requests_wait_and_changes_no_token(tiny_tokenizer: Any) -> None:
    asked = [greedy(ids, max_tokens=60) for ids in prompts(8, longest=60)]
    with Engine(tiny_model(), tiny_tokenizer) as wide:
        expected = [done.token_ids for done in wide.generate(asked)]
    with Engine(tiny_model(), tiny_tokenizer, kv_tokens=150) as narrow:
        assert [done.token_ids for done in narrow.generate(asked)] == expected
        assert narrow.stats().kv_tokens == 0


@pytest.mark.parametrize(
    ("free", "kv_tokens", "cache_tokens"),
    [(1024, 98_304, 65_536), (64, 6 * 1024, 4 * 1024), (1, 1024, 64)],
)
def test_the_memory_that_is_free_bounds_rows_and_prefix_cache(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, free: int, kv_tokens: int, cache_tokens: int
) -> None:
    """A row's capacity, at most twice its length, and the cache fit half of what is free in a container."""
    decoder = Decoder(tiny_model())
    token = decoder.kv_shape.token_bytes
    monkeypatch.setattr(hardware, "free_memory", lambda: free * 512 * token)
    one = Engine(decoder, tiny_tokenizer, stop_token_ids=[], cache_tokens=65_536)
    assert (one.kv_tokens, one._cache._max_blocks * BLOCK) == (kv_tokens, cache_tokens)


def test_a_long_prompt_does_not_stall_the_others(tiny_tokenizer: Any) -> None:
    with Engine(tiny_model(), tiny_tokenizer, prefill_tokens=16, cache_tokens=0) as one:
        running = one.submit(greedy([1, 2, 3], max_tokens=200))
        events = iter(running)
        next(events)
        long = one.submit(greedy(list(range(256)) + list(range(200)), max_tokens=1))
        before = sum(1 for _ in range(20) if next(events))  # tokens go on while the prompt is taken in
        assert before == 20
        assert long.result().finish_reason == "length"
        running.cancel()


def test_a_long_prompt_does_not_stall_who_comes_after_it(tiny_tokenizer: Any) -> None:
    with Engine(tiny_model(), tiny_tokenizer, prefill_tokens=8, cache_tokens=0) as one:
        long = one.submit(greedy(list(range(250)) * 2, max_tokens=1))
        late = [one.submit(greedy([7, 8, 9, k], max_tokens=1)) for k in range(5)]
        assert [request.result().finish_reason for request in (*late, long)] == ["length"] * 6
        first = [request.first_token_at or 0.0 for request in (*late, long)]
        assert max(first[:-1]) < first[-1]


def test_short_prompts_that_keep_coming_do_not_starve_a_long_one(tiny_tokenizer: Any) -> None:
    with Engine(tiny_model(), tiny_tokenizer, prefill_tokens=8, cache_tokens=0, max_batch=40) as one:
        long = one.submit(greedy(list(range(100)), max_tokens=1))
        short = [one.submit(greedy(list(range(k, k + 60)), max_tokens=1)) for k in range(39)]
        long.result()
        assert sum(request.first_token_at is None for request in short) > 10


# --------------------------------------------------------------------------------------- streams and endings


def test_a_folded_stream_is_the_whole(engine: Engine) -> None:
    for ids in prompts(6):
        request = GenerationRequest(ids, max_tokens=25, seed=3, logprobs=1, stop=("a", "é"))
        events = list(engine.submit(request))
        generation = engine.submit(request)
        whole = generation.result()
        folded = generation.fold(events)
        assert (folded.text, folded.token_ids, folded.finish_reason, folded.logprobs) == (
            (whole.text, whole.token_ids, whole.finish_reason, whole.logprobs)
        )


def test_an_async_reader_gets_the_same_events(engine: Engine) -> None:
    request = greedy([5, 6, 7], max_tokens=20)

    async def read() -> list[Any]:
        many = [engine.submit(request) for _ in range(3)]
        return list(await asyncio.gather(*(one.aresult() for one in many)))

    expected = engine.generate([request])[0]
    assert {done.token_ids for done in asyncio.run(read())} == {expected.token_ids}


def forced(engine: Engine, text: str, **more: Any) -> Any:
    """A reply of exactly these bytes: a grammar allows nothing else."""
    source = "start: " + json.dumps(text, ensure_ascii=True) + "\n"
    return engine.submit(GenerationRequest([1], grammar=Grammar(source), temperature=0.0, **more))


def test_emoji_come_out_whole(engine: Engine) -> None:
    text = "a👩‍👩‍👧é你好"
    events = list(forced(engine, text))
    assert "".join(event.text for event in events) == text
    assert all("\ufffd" not in event.text for event in events)
    assert len([event for event in events if event.text]) == len(text)
    assert events[-1].finish_reason == "stop"


def test_a_character_cut_by_the_limit_is_not_shown(engine: Engine) -> None:
    done = forced(engine, "ab👍", max_tokens=4).result()
    assert (done.text, done.finish_reason, len(done.token_ids)) == ("ab", "length", 4)


def test_stop_strings_end_the_text_before_themselves(engine: Engine) -> None:
    events = list(forced(engine, "one STOP two", stop=("STOP",)))
    assert "".join(event.text for event in events) == "one "
    assert events[-1].finish_reason == "stop"
    assert forced(engine, "one STO", stop=("STOP",)).result().text == "one STO"


def test_stop_tokens_end_and_are_not_shown(engine: Engine) -> None:
    done = forced(engine, "abc", stop_token_ids=(ord("b"),)).result()
    assert (done.text, done.finish_reason, done.token_ids) == ("a", "stop", (ord("a"), ord("b")))


def test_end_tokens_end_unless_ignored(tiny_tokenizer: Any) -> None:
    ids = [1, 2, 3]
    with Engine(tiny_model(), tiny_tokenizer) as one:
        tokens = one.generate([greedy(ids)])[0].token_ids
    with Engine(tiny_model(), tiny_tokenizer, stop_token_ids=[tokens[4]]) as other:
        done = other.generate([greedy(ids), greedy(ids, ignore_eos=True)])
    first = tokens.index(tokens[4])
    assert [item.token_ids for item in done] == [tokens[: first + 1], tokens]
    assert [item.finish_reason for item in done] == ["stop", "length"]


def test_logprobs_are_a_distribution(engine: Engine) -> None:
    done = engine.generate([greedy([4, 5], logprobs=3)])[0]
    assert len(done.logprobs) == len(done.token_ids)
    for item in done.logprobs:
        assert [top.logprob for top in item.top] == sorted((top.logprob for top in item.top), reverse=True)
        assert item.logprob == item.top[0].logprob <= 0  # greedy takes the first
        assert len(item.top) == 3


# -------------------------------------------------------------------------------------- leaving and failing


def test_cancel_stops_within_a_token(engine: Engine) -> None:
    generation = engine.submit(greedy([1, 2], max_tokens=400))
    events = iter(generation)
    next(events)
    steps = engine.stats().steps
    generation.cancel()
    rest = list(events)
    assert rest[-1].finish_reason == "cancelled"
    assert engine.stats().running == 0
    assert engine.stats().steps - steps <= 3


def test_a_waiting_request_can_be_cancelled(tiny_tokenizer: Any) -> None:
    with Engine(tiny_model(), tiny_tokenizer, max_batch=1) as one:
        running = one.submit(greedy([1], max_tokens=300))
        waiting = one.submit(greedy([2], max_tokens=300))
        waiting.cancel()
        assert waiting.result().finish_reason == "cancelled"
        running.cancel()
        assert running.result().finish_reason == "cancelled"


def test_a_deadline_ends_a_request(engine: Engine) -> None:
    done = engine.submit(
        greedy([1, 2], max_tokens=500, ignore_eos=True, deadline=time.monotonic() + 0.01)
    ).result()
    assert done.finish_reason == "deadline"
    assert len(done.token_ids) < 500


def test_a_sampler_that_breaks_fails_its_own_request_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pick = Sampler.pick

    def breaks(self: Sampler, logits: torch.Tensor) -> Choice:
        if self.request.seed == 666:
            raise RuntimeError("/secret/path")
        return pick(self, logits)

    monkeypatch.setattr(Sampler, "pick", breaks)
    bad = engine.submit(GenerationRequest([1, 2], max_tokens=8, temperature=1.0, seed=666))
    good = engine.submit(GenerationRequest([1, 2], max_tokens=8, temperature=1.0, seed=1, ignore_eos=True))
    last = list(bad)[-1]
    assert (last.finish_reason, last.error) == ("error", "the engine failed to choose the next token")
    assert last.fault == "engine"
    assert len(good.result().token_ids) == 8


def test_requests_that_cannot_be_served_are_refused(engine: Engine, tiny_tokenizer: Any) -> None:
    with pytest.raises(PromptTooLong, match="the prompt has 600 tokens; the context holds 512"):
        engine.submit(greedy([1] * 600))
    with pytest.raises(ServiceError, match="the prompt is empty"):
        engine.submit(greedy([]))
    with pytest.raises(ServiceError, match="outside the vocabulary of 512"):
        engine.submit(greedy([1, 512]))
    with pytest.raises(OptionError, match="max_tokens is 0"):
        engine.submit(greedy([1], max_tokens=0))
    with pytest.raises(ModelError, match="no adapter is called 'x'; loaded: none"):
        engine.submit(greedy([1], adapter="x"))
    with pytest.raises(ToolError, match="the schema cannot be used"):
        engine.submit(greedy([1], grammar=Grammar.json_schema({"type": "nothing"})))
    with pytest.raises(EngineStopped):
        Engine(tiny_model(), tiny_tokenizer).submit(greedy([1]))
    assert engine.generate([greedy([1] * 511, max_tokens=None)])[0].finish_reason == "length"


def test_a_failed_step_fails_who_was_in_it_and_the_engine_starts_again(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[BaseException] = []
    failed = threading.Event()

    def on_failure(error: BaseException) -> None:
        heard.append(error)
        failed.set()

    one = Engine(tiny_model(), tiny_tokenizer, max_batch=1, on_failure=on_failure).start()
    expected = one.generate([greedy([9, 9])])[0]
    real = one.decoder.step

    def broken(segments: Any) -> Any:
        raise RuntimeError("no more memory")

    monkeypatch.setattr(one.decoder, "step", broken)
    lost = one.submit(greedy([9, 9]))
    done = lost.result()
    assert failed.wait(5)
    assert (done.finish_reason, done.error) == ("error", "the engine failed: RuntimeError")
    assert done.fault == "engine"
    assert [str(error) for error in heard] == ["no more memory"]
    assert not one.is_running
    with pytest.raises(EngineStopped, match="no more memory"):
        one.submit(greedy([1]))
    monkeypatch.setattr(one.decoder, "step", real)
    one.start()
    assert one.generate([greedy([9, 9])])[0].token_ids == expected.token_ids
    one.stop()


def test_stopping_ends_what_is_in_flight(tiny_tokenizer: Any) -> None:
    one = Engine(tiny_model(), tiny_tokenizer, max_batch=1).start()
    running, waiting = one.submit(greedy([1], max_tokens=500)), one.submit(greedy([2]))
    one.stop()
    assert {running.result().finish_reason, waiting.result().finish_reason} == {"cancelled"}
    assert not one.is_running


# -------------------------------------------------------------------------------------------------- adapters


def save_adapter(folder: Path, seed: int, **more: Any) -> Any:
    """A LoRA over the tiny model with weights that change its answers; returns PEFT's own model."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny_model(), LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **more})
    )
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"trainable_token_indices": [3, 5]},
        {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"down_proj": 2}},
    ],
    ids=["plain", "rslora", "bias-all", "bias-lora", "token-rows", "patterns"],
)
def test_an_adapter_beside_the_base_is_pefts(kind: dict[str, Any], tmp_path: Path) -> None:
    model = save_adapter(tmp_path, 1, **kind)
    decoder = Decoder(tiny_model())
    lora = Lora(tmp_path, decoder.places)
    ids = [3, 9, 5, 200, 3, 77]
    row = KVStore(decoder.kv_shape).row()
    row.reserve(len(ids))
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1]
    assert torch.allclose(decoder.step([Segment(ids, 0, row, lora)])[0], expected, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_adapters_share_a_batch_and_not_a_cache(
    quantize: str | None, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    folders = {name: tmp_path / name for name in ("one", "two")}
    for seed, folder in enumerate(folders.values()):
        save_adapter(folder, seed)
    names = [None, "one", "two", None, "two", "one", None]
    asked = [greedy(list(range(70)), adapter=name) for name in names]
    with Engine(tiny_model(), tiny_tokenizer, adapters=folders, quantize=quantize, cache_tokens=0) as one:
        alone = [one.generate([request])[0].token_ids for request in asked]
    with Engine(tiny_model(), tiny_tokenizer, adapters=folders, quantize=quantize) as other:
        together = [done.token_ids for done in other.generate(asked)]
    assert together == alone
    assert len(set(alone)) == 3


def test_adapters_come_and_go_and_a_new_one_of_the_old_name_is_new(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    for seed in (1, 2):
        save_adapter(tmp_path / str(seed), seed)
    request = greedy(list(range(70)), adapter="mine")
    with Engine(tiny_model(), tiny_tokenizer) as one:
        one.load_adapter("mine", tmp_path / "1")
        first = one.generate([request])[0]
        one.load_adapter("mine", tmp_path / "2")
        second = one.generate([request])[0]
        assert (second.cached_tokens, one.adapters) == (0, ("mine",))
        assert second.token_ids != first.token_ids
        one.unload_adapter("mine")
        with pytest.raises(ModelError, match="no adapter is called 'mine'"):
            one.submit(request)
        with pytest.raises(ModelError, match="no adapter is called 'mine'; loaded: none"):
            one.unload_adapter("mine")


def test_a_merged_adapter_stays(tiny_tokenizer: Any) -> None:
    one = Engine(tiny_model(), tiny_tokenizer)
    one.name_merged("mine")
    with pytest.raises(ModelError, match="cannot be unloaded"):
        one.unload_adapter("mine")
    assert one.adapters == ("mine",)


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    places = Decoder(tiny_model()).places
    with pytest.raises(ModelError, match="no adapter there"):
        Lora(tmp_path / "nothing", places)
    save_adapter(tmp_path / "whole", 0, modules_to_save=["lm_head"])
    with pytest.raises(NotBeside, match="modules_to_save cannot run beside a shared base"):
        Lora(tmp_path / "whole", places)
    save_adapter(tmp_path / "plain", 0)
    with pytest.raises(ModelError, match="the adapter belongs to another model"):
        Lora(tmp_path / "plain", Decoder(tiny_model("qwen3")).places)
    tensors = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    down = next(name for name in tensors if "down_proj.lora_A" in name)
    for wrong, told in (
        ({**tensors, down: torch.zeros(8, 200)}, "has 200 inputs"),
        ({**tensors, down: torch.zeros(3, 96)}, "no other half of its rank"),
        ({name: tensor for name, tensor in tensors.items() if name != down}, "no other half of its rank"),
    ):
        save_file(wrong, tmp_path / "plain" / "adapter_model.safetensors")
        with pytest.raises(ModelError, match=told):
            Lora(tmp_path / "plain", places)
    (tmp_path / "plain" / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors cannot be read"):
        Lora(tmp_path / "plain", places)


BESIDE = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "alpha by layer name": {"alpha_pattern": {"q_proj": 24}},
    "alpha by path": {"alpha_pattern": {"layers.0.self_attn.q_proj": 24}},
    "alpha by part of path": {"alpha_pattern": {"self_attn.q_proj": 24}},
    "alpha by expression": {"alpha_pattern": {r".*mlp\..*": 24}},
    "alpha by anchored expression": {"alpha_pattern": {r"^model\.layers\.1\..*": 24}},
    "alpha, first of two": {"alpha_pattern": {"down_proj": 24, "mlp.down_proj": 2}},
    "alpha by half a name": {"alpha_pattern": {"proj": 24}},
    "rank by path": {"rank_pattern": {"layers.1.mlp.down_proj": 2, "q_proj": 7}, "use_rslora": True},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "trained tokens": {"trainable_token_indices": [3, 300]},
    "one layer": {"layers_to_transform": [1], "target_modules": ["v_proj", "up_proj"]},
}
MERGED = {
    "dora": {"use_dora": True},
    "dora by path": {"use_dora": True, "alpha_pattern": {"layers.0.self_attn.q_proj": 24}},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "whole module": {"modules_to_save": ["norm"], "target_modules": ["q_proj"]},
    "bias of other layers": {"bias": "all", "target_modules": ["up_proj"]},
    "lora_bias": {"lora_bias": True, "target_modules": ["v_proj"]},
    "embedding that the head shares": {"target_modules": ["embed_tokens", "q_proj"]},
    "head that the embedding shares": {"target_modules": ["lm_head", "up_proj"]},
    "tokens of the head": {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [3]}},
}
SHOWN = [3, 9, 5, 300, 3, 77, 4000]


def foreign_adapter(
    base: Path, folder: Path, *, dtype: torch.dtype = torch.float32, **kind: Any
) -> torch.Tensor:
    """What PEFT itself saves after a training; the last logits of its own reload over the base."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            last: torch.Tensor = model.eval()(torch.tensor([SHOWN])).logits[0, -1]
        return last

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    before = logits(model)
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **kind}
    model = get_peft_model(model, LoraConfig(**config))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.15
    model.save_pretrained(folder)
    reloaded = logits(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), folder)
    )
    assert float((logits(model) - reloaded).abs().max()) < 1e-5
    assert float((reloaded - before).abs().max()) > 0.03
    return reloaded


def served_logits(decoder: Decoder, lora: Lora | None) -> torch.Tensor:
    row = KVStore(decoder.kv_shape).row()
    row.reserve(len(SHOWN))
    return decoder.step([Segment(SHOWN, 0, row, lora)])[0]


@pytest.fixture(scope="module")
def tiny_decoder(tiny_model_path: Path) -> Decoder:
    from transformers import AutoModelForCausalLM

    return Decoder(AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32))


@pytest.mark.parametrize("name", BESIDE)
def test_an_adapter_that_is_accepted_is_served_as_peft_serves_it(
    name: str, tiny_model_path: Path, tiny_decoder: Decoder, tmp_path: Path
) -> None:
    expected = foreign_adapter(tiny_model_path, tmp_path, **BESIDE[name])
    assert why_merged(tmp_path) is None
    served = served_logits(tiny_decoder, Lora(tmp_path, tiny_decoder.places))
    assert float((served - expected).abs().max()) < 1e-4


@pytest.mark.parametrize("name", MERGED)
def test_an_adapter_that_has_no_place_beside_its_base_is_merged_by_peft(
    name: str, tiny_model_path: Path, tiny_decoder: Decoder, tmp_path: Path
) -> None:
    expected = foreign_adapter(tiny_model_path, tmp_path, **MERGED[name])
    engine = load_engine(tiny_model_path, adapters={"mine": tmp_path})
    assert not engine.serves_base
    assert float((served_logits(engine.decoder, None) - expected).abs().max()) < 1e-4
    with pytest.raises(NotBeside, match=r"cannot run beside a shared base|has no place beside this base"):
        Lora(tmp_path, tiny_decoder.places)


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"alora_invocation_tokens": [3, 9]}, "begins to work in the middle of a prompt"),
        ({"scaling_of_tomorrow": 2}, "peft here does not know scaling_of_tomorrow"),
        ({"peft_type": "TOMORROW"}, "peft_type 'TOMORROW' is unknown"),
        ({"peft_type": ["LORA"]}, "peft_type .* is unknown"),
        ({"lora_alpha": ...}, "lora_alpha is 'None'; expected a number above 0"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'; expected a number above 0"),
        ({"r": 0}, "r is '0'; expected a number above 0"),
        ({"r": 5}, "has rank 4; adapter_config.json gives it 5"),
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern is '.'; expected regular expressions"),
        ({"alpha_pattern": [3]}, "alpha_pattern is .*; expected an object of names and numbers"),
        ({"rank_pattern": {"q_proj": None}}, "rank_pattern is .*; expected an object of names and numbers"),
        ({"use_rslora": "no"}, "use_rslora is 'no'; expected true or false"),
        ({"bias": 3}, "bias is '3'; expected none, all or lora_only"),
        ({"trainable_token_indices": "3"}, "trainable_token_indices is '3'; expected lists of token ids"),
        ({"trainable_token_indices": [10**6]}, "the adapter belongs to another model"),
        ({"init_lora_weights": "tomorrow"}, "does not fit this model"),
    ],
)  # fmt: skip
def test_a_config_that_is_damaged_or_unknown_is_refused_in_one_line(
    values: dict[str, Any],
    said: str,
    tiny_model_path: Path,
    tiny_decoder: Decoder,
    plain_adapter: Path,
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(plain_adapter, tmp_path / "mine"))
    change_config(folder, **values)
    with pytest.raises(ModelError, match=said) as caught:
        if why_merged(folder) is None:
            Lora(folder, tiny_decoder.places)
        else:
            models.load_adapter(None, folder)
    assert "\n" not in str(caught.value)
    (folder / "adapter_config.json").write_text("[1]")
    with pytest.raises(ModelError, match="holds list; expected an object"):
        why_merged(folder)


@pytest.fixture(scope="module")
def plain_adapter(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "plain"
    foreign_adapter(tiny_model_path, folder)
    return folder


def test_every_key_of_the_installed_peft_is_judged() -> None:
    """A key that a newer PEFT brings is no surprise: off it does nothing, on the adapter is merged by PEFT."""
    from peft import LoraConfig

    for key, value in LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM").to_dict().items():
        assert _is_harmless(key, value), key
    for key in ("use_dora", "use_qalora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying", "tomorrow"):
        assert not _is_harmless(key, True), key
    for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "eva", "lora_ga", 1, None):
        assert not _is_harmless("init_lora_weights", init), init


def test_peft_passes_over_no_tensor(tiny_model_path: Path, plain_adapter: Path, tmp_path: Path) -> None:
    """A file of other names, which peft would load without a word and serve as the bare base."""
    folder = Path(shutil.copytree(plain_adapter, tmp_path / "mine"))
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name.replace("model.model.model", "model.model"): tensors[name] for name in tensors}, file)
    with pytest.raises(ModelError, match=r"lora_A\.weight is missing \(28 such\)"):
        load_engine(tiny_model_path, adapters={"mine": folder})


TOLD = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a pirate.<|im_end|>\n{% endif %}"


def with_own_format(base: Path, adapter: Path, folder: Path, style: str = "hermes") -> Path:
    """A copy of an adapter, saved with a template that is not the base's."""
    from transformers import AutoTokenizer

    from qwen_chat.chat.format import ChatFormat

    shutil.copytree(adapter, folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TOLD + TEMPLATE
    ChatFormat(tokenizer, tool_style=style).complete_tokenizer()  # type: ignore[arg-type]
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("count", [1, 2])
def test_the_base_keeps_its_own_format(
    count: int, tiny_model_path: Path, plain_adapter: Path, tmp_path: Path
) -> None:
    own = with_own_format(tiny_model_path, plain_adapter, tmp_path / "own", "qwen_agent")
    adapters = {"own": own, "other": plain_adapter} if count == 2 else {"own": own}
    engine, alone = load_engine(tiny_model_path, adapters=adapters), load_engine(tiny_model_path)
    question = [{"role": "user", "content": "Hi"}]
    assert (
        engine.fmt.prompt(question) == alone.fmt.prompt(question) == engine.format_of(None).prompt(question)
    )
    assert (
        engine.format_of("own").prompt(question).startswith("<|im_start|>system\nYou are a pirate.<|im_end|>")
    )
    assert (engine.fmt.tool_style, engine.format_of("own").tool_style) == ("hermes", "qwen_agent")
    if count == 2:
        assert engine.format_of("other") is engine.fmt
    rows = {name: engine._row(Generation(greedy([1], adapter=name), lambda: None)) for name in (None, "own")}
    assert [rows[name].text._stop for name in rows] == [(), ("✿RESULT✿", "✿RETURN✿")]


def test_a_merged_model_answers_under_one_name(tiny_model_path: Path, tmp_path: Path) -> None:
    foreign_adapter(tiny_model_path, tmp_path / "dora", use_dora=True)
    own = with_own_format(tiny_model_path, tmp_path / "dora", tmp_path / "own")
    engine = load_engine(tiny_model_path, adapters={"mine": own})
    assert (engine.serves_base, engine.adapters) == (False, ("mine",))
    merged = "adapter merged into its base, which is not served itself; logits moved by "
    assert any(line.startswith(merged) for line in engine.decisions)
    assert "pirate" in engine.format_of("mine").prompt([{"role": "user", "content": "Hi"}])
    assert "pirate" not in engine.fmt.prompt([{"role": "user", "content": "Hi"}])
    with pytest.raises(ModelError, match="the base is not served here; ask for mine"):
        engine.submit(greedy([1]))
    with pytest.raises(ModelError, match="mine is merged into this engine's base, which serves no other"):
        engine.load_adapter("second", tmp_path / "dora")
    with engine:
        assert engine.generate([greedy([1], adapter="mine", max_tokens=2)])[0].finish_reason == "length"


def test_a_base_without_a_template_serves_only_its_adapters(
    tiny_model_path: Path, plain_adapter: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_model_path, tmp_path / "base"))
    (base / "chat_template.jinja").unlink()
    own = with_own_format(tiny_model_path, plain_adapter, tmp_path / "own")
    engine = load_engine(base, adapters={"own": own})
    assert not engine.serves_base
    with pytest.raises(ModelError, match="the base is not served here; ask for own"):
        engine.submit(greedy([1]))
    for adapters in ({}, {"plain": plain_adapter}):
        with pytest.raises(FormatError, match="no chat template"):
            load_engine(base, adapters=adapters)


def test_a_merge_in_less_than_float32_is_made_in_float32(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen_chat.inference import quantize

    monkeypatch.setattr(
        quantize, "FloatLinear", lambda weight, bias=None: weight
    )  # not every CPU has bfloat16
    monkeypatch.setattr(quantize, "check_dtype", lambda dtype: None)
    monkeypatch.setattr("qwen_chat.inference.loading.check_dtype", lambda dtype: None)
    foreign_adapter(tiny_model_path, tmp_path, use_dora=True)
    engine = load_engine(tiny_model_path, adapters={"mine": tmp_path}, dtype="bfloat16")
    assert (engine.decoder.dtype, engine.decisions[1]) == (torch.bfloat16, "dtype float32 (as asked)")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_number_type_that_the_cpu_lacks_is_refused_in_one_line(
    dtype: str, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("fp16", "bf16"):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda: False, raising=False)
    with pytest.raises(OptionError, match=f"--dtype {dtype}: this CPU does not multiply in it; give float32"):
        load_engine(tiny_model_path, dtype=dtype)


# --------------------------------------------------------------------------------------- the real small model

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "book_table",
            "parameters": {
                "type": "object",
                "properties": {
                    "people": {"type": "integer", "minimum": 1, "maximum": 20},
                    "when": {"enum": ["noon", "evening"]},
                    "smoking": {"type": "boolean"},
                },
                "required": ["people", "when"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"day": {"enum": ["今天"]}}},
        },
    },
]


@pytest.fixture(scope="module")
def demo_engine(demo_model_path: Path) -> Iterator[Engine]:
    from qwen_chat.inference.loading import load_engine

    with load_engine(demo_model_path, quantize="int8") as one:
        yield one


def ask(engine: Engine, text: str, **more: Any) -> GenerationRequest:
    return GenerationRequest(
        engine.fmt.prompt_ids([{"role": "user", "content": text}]), **{"max_tokens": 48, **more}
    )


def test_every_forced_call_of_the_untuned_model_is_valid(demo_engine: Engine) -> None:
    questions = ["Book a table for five.", "你好", "Will it rain?", "Tell me a joke.", "{", "1 + 1?"]
    grammar = Hermes().call_grammar(TOOLS)
    asked = [ask(demo_engine, q, grammar=grammar, temperature=t) for q in questions for t in (0.0, 1.5)]
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    for done in demo_engine.generate(asked):
        assert done.finish_reason == "stop", done
        head, body, tail = done.text.split("\n")
        assert (head, tail) == ("<tool_call>", "</tool_call>")
        call = json.loads(body)
        jsonschema.validate(call["arguments"], schemas[call["name"]])


def test_a_call_cut_by_the_limit_says_so(demo_engine: Engine) -> None:
    done = demo_engine.generate(
        [ask(demo_engine, "Book!", grammar=Hermes().call_grammar(TOOLS), max_tokens=5)]
    )[0]
    assert (done.finish_reason, len(done.token_ids)) == ("length", 5)


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="measured on processors with AVX-512 only")
def test_a_row_of_the_real_model_has_the_same_bits_in_company(demo_engine: Engine) -> None:
    """Three queries a key-value head, and more rows than threads: whoever computes a row."""
    decoder, store = demo_engine.decoder, KVStore(demo_engine.decoder.kv_shape)
    prompts = [ask(demo_engine, question).prompt_ids for question in ("Hi", "Who?", "Name a colour.", "你好")]

    def step(rows: list[KVRow], tokens: list[list[int]], starts: list[int]) -> torch.Tensor:
        for row, ids, start in zip(rows, tokens, starts, strict=True):
            row.reserve(start + len(ids))
        return decoder.step([Segment(*one) for one in zip(tokens, starts, rows, strict=True)])

    alone, together = ([store.row() for _ in prompts] for _ in range(2))
    starts = [0] * len(prompts)
    tokens = [list(ids) for ids in prompts]
    for _ in range(12):
        whole = step(together, tokens, starts)
        apart = [step([r], [t], [s]) for r, t, s in zip(alone, tokens, starts, strict=True)]
        assert torch.equal(whole, torch.cat(apart))
        starts = [s + len(t) for s, t in zip(starts, tokens, strict=True)]
        tokens = [[token] for token in whole.argmax(-1).tolist()]


def test_the_real_model_answers_alike_alone_and_in_company(demo_engine: Engine) -> None:
    questions = ["What is the capital of France?", "Name a colour.", "Who wrote Hamlet?", "Count to five."]
    asked = [ask(demo_engine, q, temperature=0.0, max_tokens=16) for q in questions]
    together = demo_engine.generate(asked)
    assert [demo_engine.generate([request])[0].text for request in asked] == [done.text for done in together]
    assert together[0].text == "The capital of France is Paris."
