"""Every family that the engine serves, on tiny random models: the model's own answers, and bits that depend on the
row alone."""

from pathlib import Path

import pytest
import torch

from qwen_chat.errors import ModelError
from qwen_chat.families import ENGINE_SERVES
from qwen_chat.inference import delta_net
from qwen_chat.inference.activation import by_rows
from qwen_chat.inference.decoder import Decoder
from qwen_chat.inference.engine import Engine
from qwen_chat.inference.kv_cache import KVStore
from qwen_chat.inference.loading import load_engine
from qwen_chat.inference.lora import Lora, why_merged
from qwen_chat.inference.prefix_cache import BLOCK, PrefixCache
from qwen_chat.inference.row_state import CHUNK
from qwen_chat.inference.sampling import GenerationRequest
from qwen_chat.inference.step import Segment
from tests.support.scripted import TEMPLATE
from tests.support.tiny_families import FAMILIES, byte_tokenizer, tiny_conditional, tiny_family

DELTA = ["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"]
_made: dict[tuple[str, str | None], Decoder] = {}


def decoder_of(name: str, quantize: str | None = None) -> Decoder:
    if (name, quantize) not in _made:
        _made[name, quantize] = Decoder(tiny_family(name), quantize=quantize)
    return _made[name, quantize]


def tokens(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 512, (count,), generator=generator).tolist()


def cut_logits(decoder: Decoder, ids: list[int], cuts: list[int], company: bool = False) -> torch.Tensor:
    """The logits after the last of `cuts`, a step a cut; in company: rows of other lengths join and leave."""
    store, begin = KVStore(decoder.kv_shape), 0
    row, others = store.row(), [(store.row(), tokens(200, seed)) for seed in range(3)]
    logits = torch.empty(0)
    for number, end in enumerate(cuts):
        row.reserve(end)
        segments = [Segment(ids[begin:end], begin, row)]
        for seed, (other, own) in enumerate(others if company else []):
            start, stop = number * (seed + 3), (number + 1) * (seed + 3)
            if stop <= len(own):
                other.reserve(stop)
                segments.insert(seed % 2, Segment(own[start:stop], start, other))
        logits = decoder.step(segments)[[segment.row for segment in segments].index(row)]
        begin = end
    return logits


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_the_models_own_and_depend_on_the_row_alone(name: str) -> None:
    """1e-4 in float32; whole = in pieces = token by token = in company, to the last bit."""
    model, ids = tiny_family(name), tokens(150)
    decoder = decoder_of(name)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    for end in (1, 15, 16, 17, 64, 100, 150):
        assert torch.allclose(cut_logits(decoder, ids, [end]), expected[end - 1], rtol=0, atol=1e-4), end
    whole = cut_logits(decoder, ids, [150])
    for cuts in ([1, 2, 3, 64, 65, 150], [70, 80, 96, 97, 113, 150], [*range(120, 151)]):
        assert torch.equal(cut_logits(decoder, ids, cuts), whole), cuts
    assert torch.equal(cut_logits(decoder, ids, [31, 33, *range(130, 151)], company=True), whole)


@pytest.mark.parametrize("name", FAMILIES)
def test_twenty_prompts_get_the_models_own_greedy_answers(name: str) -> None:
    """Together with a prefix cache, and alone without. A token is the model's own where its forward over all before
    it has its largest logit there."""
    model, asked = tiny_family(name), [tokens(1 + 5 * k % 67, k) for k in range(18)]
    asked += [[*tokens(70), 1], [*tokens(70), 2, 3]]
    requests = [GenerationRequest(ids, max_tokens=6, temperature=0.0) for ids in asked]
    options = {"stop_token_ids": [], "prefill_tokens": 40}
    with Engine(decoder_of(name), byte_tokenizer(), **options) as one:
        together = [done.token_ids for done in one.generate(requests)]
    with Engine(decoder_of(name), byte_tokenizer(), cache_tokens=0, **options) as other:
        alone = [other.generate([request])[0].token_ids for request in requests]
    assert together == alone
    for ids, found in zip(asked, alone, strict=True):
        with torch.no_grad():
            best = model(torch.tensor([[*ids, *found]])).logits[0].argmax(-1)
        assert best[len(ids) - 1 : -1].tolist() == list(found)


@pytest.mark.parametrize("name", ["qwen2_moe", *DELTA])
def test_int8_stays_near_float(name: str) -> None:
    """Logits within a fifth of their norm (random weights, and rounding may choose another expert; hybrids without
    experts: a tenth); the same bits alone and in company."""
    ids = tokens(90)
    exact, rough = (cut_logits(decoder_of(name, kind), ids, [90]) for kind in (None, "int8"))
    assert 1e-3 < float((rough - exact).norm() / exact.norm()) < (0.1 if name == "qwen3_5_text" else 0.2)
    assert torch.equal(
        cut_logits(decoder_of(name, "int8"), ids, [17, 50, *range(80, 91)], company=True), rough
    )


@pytest.mark.parametrize("name", DELTA)
def test_a_cached_prefix_goes_on_from_a_snapshot(name: str) -> None:
    """A second prompt that leaves the first in its middle finds the snapshot before that; a third finds the one that
    the second took where it left."""
    shared = tokens(3 * BLOCK + 5)
    asked = [[*shared, *tokens(70, 1)], [*shared, *tokens(60, 2)], [*shared, *tokens(50, 3)]]
    requests = [GenerationRequest(ids, max_tokens=40, temperature=0.0) for ids in asked]
    with Engine(decoder_of(name), byte_tokenizer(), stop_token_ids=[], cache_tokens=0) as one:
        fresh = [one.generate([request])[0].token_ids for request in requests]
    with Engine(decoder_of(name), byte_tokenizer(), stop_token_ids=[], prefill_tokens=BLOCK // 2) as other:
        cached = [other.generate([request])[0] for request in requests]
        again = [*asked[0], *fresh[0], 7]
        turn = other.generate([GenerationRequest(again, max_tokens=5, temperature=0.0)])[0]
    assert [done.token_ids for done in cached] == fresh
    # Pieces of 4 x 16 tokens end at 64 and 128 of the first prompt.
    assert [done.cached_tokens for done in cached] == [0, 2 * BLOCK, 3 * BLOCK]
    # The last block end that the first reply passed (its last token was never computed).
    assert turn.cached_tokens == (len(again) - 2) // BLOCK * BLOCK
    with Engine(decoder_of(name), byte_tokenizer(), stop_token_ids=[], cache_tokens=0) as one:
        request = GenerationRequest(again, max_tokens=5, temperature=0.0)
        assert one.generate([request])[0].token_ids == turn.token_ids


def test_memory_counts_states() -> None:
    """A snapshot weighs what it weighs in tokens' keys and values; a row: two of them and its open chunk."""
    shape = decoder_of("qwen3_5_text").kv_shape
    state, token = shape.state, 2 * 2 * 32 * 4  # one layer with attention, two heads
    assert state is not None
    assert shape.token_bytes == token
    numbers = 4 * 16 * 24 + 3 * 160  # states of four heads, three inputs of the convolution
    assert state.snapshot_bytes == 2 * 4 * numbers
    assert state.row_bytes == 2 * 4 * (2 * numbers + 4 * CHUNK * (2 * 16 + 24 + 2))
    assert (shape.snapshot_tokens, shape.state_tokens) == (
        -(-state.snapshot_bytes // token),
        -(-state.row_bytes // token),
    )
    store, cache = KVStore(shape), PrefixCache(4 * BLOCK, shape.snapshot_tokens)  # a snapshot weighs a block
    assert shape.snapshot_tokens == BLOCK
    rows = [store.row() for _ in range(2)]
    for seed, row in enumerate(rows):
        row.reserve(2 * BLOCK)
        assert row.state is not None
        for end in (BLOCK, 2 * BLOCK):
            for layer in range(2):
                row.state.keep(end, layer, row.state.history[layer])
        cache.store(row, 0, tokens(2 * BLOCK, seed))
    assert cache.tokens == 2 * BLOCK
    assert cache.fill(store.row(), 0, [*tokens(2 * BLOCK, 0), 1]) == 0
    assert cache.fill(store.row(), 0, [*tokens(2 * BLOCK, 1), 1]) == 2 * BLOCK


def test_rows_that_outgrow_the_memory_wait_and_lose_nothing() -> None:
    requests = [GenerationRequest(tokens(40, k), max_tokens=30, temperature=0.0) for k in range(4)]
    decoder = decoder_of("qwen3_next")
    with Engine(decoder, byte_tokenizer(), stop_token_ids=[]) as wide:
        expected = [done.token_ids for done in wide.generate(requests)]
    room = 2 * decoder.kv_shape.state_tokens + 150  # two rows and their states
    with Engine(decoder, byte_tokenizer(), stop_token_ids=[], kv_tokens=room) as narrow:
        assert [done.token_ids for done in narrow.generate(requests)] == expected
        assert narrow.stats().steps >= 60  # 4 x 30 tokens, two rows at a time


def test_a_prompt_takes_a_call_a_chunk_and_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    chunk = delta_net.delta_chunk
    monkeypatch.setattr(delta_net, "delta_chunk", lambda *a, **k: (calls.append(1), chunk(*a, **k))[1])
    cut_logits(decoder_of("qwen3_5_text"), tokens(10 * CHUNK + 1), [10 * CHUNK + 1])
    assert len(calls) == 2 * 11


def test_threads_cut_between_rows() -> None:
    """Where five threads share 101 rows of 1,536, torch's own cut falls into rows."""
    wide = torch.randn(101, 2 * 1536, generator=torch.Generator().manual_seed(0))
    gate, threads = wide[:, :1536], torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        together = by_rows(torch.nn.functional.silu, gate)
        alone = torch.cat([by_rows(torch.nn.functional.silu, gate[k : k + 1]) for k in range(101)])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_the_text_part_of_a_multimodal_model_is_served(name: str) -> None:
    model, ids = tiny_conditional(name), tokens(60)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0, -1]
    assert torch.allclose(cut_logits(Decoder(model), ids, [60]), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_a_multimodal_folder_is_loaded(name: str, tmp_path: Path) -> None:
    """Whatever class transformers makes of it, the tokens are the whole model's."""
    model, tokenizer = tiny_conditional(name), byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    request = GenerationRequest(tokens(50), max_tokens=5, temperature=0.0, ignore_eos=True)
    with load_engine(tmp_path) as loaded, Engine(Decoder(model), tokenizer, stop_token_ids=[]) as made:
        assert loaded.generate([request])[0].token_ids == made.generate([request])[0].token_ids


def test_a_folder_of_another_type_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba2"}')
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(
        ModelError,
        match=f"'mamba2' is not served by the engine; .* {', '.join(ENGINE_SERVES)}; for others use",
    ):
        load_engine(tmp_path)


def test_rotations_that_depend_on_company_are_refused() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    with pytest.raises(
        ModelError, match="rope_type 'dynamic': a position would turn by the longest row of a step"
    ):
        Decoder(tiny_family("mistral_full", rope_parameters=rope))


@pytest.mark.parametrize("name", ["qwen2_moe", "mistral", *DELTA, "conditional"])
def test_adapters_give_what_peft_gives(name: str, tmp_path: Path) -> None:
    """On attention, delta nets, dense networks and the shared expert: every linear layer but the head."""
    from peft import LoraConfig, get_peft_model

    model = tiny_conditional() if name == "conditional" else tiny_family(name)
    decoder = Decoder(model)
    linear = [
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers" in path and "visual" not in path
    ]
    if name == "qwen3_next":  # there peft takes networks of these names for the experts
        linear = [path for path in linear if not path.endswith(("gate_proj", "up_proj", "down_proj"))]
    config = LoraConfig(r=3, lora_alpha=7, target_modules=linear)
    peft = get_peft_model(model, config).eval()
    torch.manual_seed(3)
    for path, parameter in peft.named_parameters():
        if "lora_B" in path:
            torch.nn.init.normal_(parameter, std=0.2)
    peft.save_pretrained(tmp_path)
    assert why_merged(tmp_path) is None
    ids = tokens(40)
    with torch.no_grad():
        expected = peft(input_ids=torch.tensor([ids])).logits[0, -1]
    row = KVStore(decoder.kv_shape).row()
    row.reserve(40)
    found = decoder.step([Segment(ids, 0, row, Lora(tmp_path, decoder.places))])[0]
    assert torch.allclose(found, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(found, cut_logits(decoder, ids, [40]), atol=0.1)


def test_an_adapter_over_experts_can_only_be_merged(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets)
    get_peft_model(tiny_family("qwen3_moe"), config).save_pretrained(tmp_path)
    reason = why_merged(tmp_path)
    assert reason is not None
    assert "an adapter with target_parameters cannot run beside a shared base; serve it alone" in reason
