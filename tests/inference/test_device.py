"""The engine on a device that is not the CPU: torch's `meta`, whose operators raise where they meet a CPU's tensor."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_chat.inference import transfer
from qwen_chat.inference.decoder import Decoder
from qwen_chat.inference.engine import Engine
from qwen_chat.inference.feed_forward import ExpertByExpert, GroupedExperts
from qwen_chat.inference.kv_cache import KVStore
from qwen_chat.inference.lora import Lora
from qwen_chat.inference.quantize import FloatLinear
from qwen_chat.inference.sampling import GenerationRequest, Sampler, _drawn, choose
from qwen_chat.inference.step import Segment
from tests.support.tiny_families import FAMILIES, byte_tokenizer, tiny_family


class HostTensors(TorchDispatchMode):
    """The operators that take or give a tensor of the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = func(*args, **(kwargs or {}))
        flat = torch.utils._pytree.tree_leaves((args, kwargs, given))
        if any(isinstance(one, torch.Tensor) and one.device.type == "cpu" for one in flat):
            self.found.append(str(func))
        return given


def on_meta(name: str) -> Decoder:
    return Decoder(tiny_family(name).bfloat16().to("meta"))


def adapter(folder: Path, name: str) -> Path:
    targets = ["q_proj", "o_proj", "in_proj_qkv", "in_proj_qkvz", "out_proj"]
    config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", trainable_token_indices=[3, 5])
    get_peft_model(tiny_family(name), config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_makes_every_tensor_on_the_device(name: str, tmp_path: Path) -> None:
    """Prefill over several chunks, decoding neighbours and an adapter: no operator of a step meets a host's tensor."""
    decoder = on_meta(name)
    lora, store = Lora(adapter(tmp_path, name), decoder.places), KVStore(decoder.kv_shape)
    rows = [store.row() for _ in range(4)]
    for row in rows:
        row.reserve(200)
    keep = (64,) if decoder.kv_shape.state else ()
    prefill = [Segment(range(70), 0, rows[0], keep=keep), Segment(range(9), 0, rows[1], lora, False)]
    decode = [Segment([1], 70, rows[0]), Segment([2], 9, rows[1], lora), Segment([3], 0, rows[2])]
    for segments, wanted in ((prefill, 1), ([*decode, Segment([4], 0, rows[3])], 4)):
        with HostTensors() as seen:
            logits = decoder.step(segments)
        assert logits.shape == (wanted, decoder.vocabulary)
        assert (logits.device.type, logits.dtype) == ("meta", torch.float32)
        assert seen.found == []
    with HostTensors() as seen:
        torch.arange(2)
    assert seen.found == ["aten.arange.default"]  # it would have been seen


def test_the_engine_fetches_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy, drawn, and log probabilities side by side; the second turn finds the first's blocks."""
    fetched = []

    def stand_in(found: torch.Tensor) -> torch.Tensor:
        fetched.append(found.shape)
        return torch.zeros(found.shape, dtype=found.dtype)

    monkeypatch.setattr(transfer, "to_host", stand_in)
    asked = [
        GenerationRequest(range(80), max_tokens=3, temperature=0.0),
        GenerationRequest(range(40), max_tokens=3, temperature=0.7, top_p=0.9, seed=1),
        GenerationRequest(range(20), max_tokens=3, temperature=0.0, logprobs=2),
        GenerationRequest(range(20), max_tokens=3, repetition_penalty=1.2, seed=1),
    ]
    with Engine(on_meta("qwen3_5_text"), byte_tokenizer(), stop_token_ids=[]) as engine:
        done = engine.generate(asked) + engine.generate(asked[:1])
        steps = engine.stats().steps
    assert [one.token_ids for one in done[:3]] == [(0, 0, 0)] * 3
    assert (done[4].token_ids, done[4].cached_tokens) == ((0, 0, 0), 64)
    assert len(fetched) <= steps
    assert max(fetched) == (4 + 2 * 512,)  # four tokens, and the logits of the two rows that need them


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"top_k": 1},
        {"top_k": 7},
        {"top_p": 0.5},
        {"min_p": 0.2},
        {"top_k": 40, "top_p": 0.8, "min_p": 0.01, "temperature": 1.7},
        {"top_p": 1e-9},
        {"temperature": 0.0},
        {"temperature": 1e-4},
    ],
)
def test_a_row_is_drawn_on_the_device_as_on_the_host(more: dict[str, float]) -> None:
    """The same tokens from the same random numbers, 60 of each of four rows, whoever is beside."""
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(4, 3000, generator=generator)
    requests = [GenerationRequest([1], seed=seed, **more) for seed in range(3)]
    requests.append(GenerationRequest([1], temperature=0.5, seed=9))
    alone, together = ([Sampler(request) for request in requests] for _ in range(2))
    for _ in range(60):
        expected = [sampler.pick(row.numpy()).token_id for sampler, row in zip(alone, logits, strict=True)]
        assert _drawn(together, logits).tolist() == expected
        logits = logits.roll(1, 1)


def test_logits_cross_with_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row with log probabilities gets to the host bit for bit; another's penalty is its own affair."""
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    requests = [
        GenerationRequest([1], temperature=0.0),
        GenerationRequest([1], temperature=0.0, logprobs=3),
        GenerationRequest([1, 2], temperature=0.0, repetition_penalty=1.5),
    ]
    expected = choose([Sampler(request) for request in requests], logits)

    class Elsewhere(torch.Tensor):
        device = torch.device("meta")

    monkeypatch.setattr(transfer, "to_host", lambda found: found.as_subclass(torch.Tensor))
    assert choose([Sampler(request) for request in requests], logits.as_subclass(Elsewhere)) == expected


def test_grouped_experts_give_what_each_gives_alone() -> None:
    """1e-5 in float32: the sums run in another order; an expert without tokens changes nothing."""
    generator = torch.Generator().manual_seed(2)
    gate_up, down, x, scores = (
        torch.randn(*shape, generator=generator) / 4
        for shape in ((6, 96, 64), (6, 64, 48), (33, 64), (33, 3))
    )
    experts = torch.stack([torch.randperm(5, generator=generator)[:3] for _ in range(33)])
    linears = [tuple(FloatLinear(one) for one in some) for some in (gate_up, down)]
    expected = ExpertByExpert(*linears, torch.nn.functional.silu)(x, experts, scores)
    found = GroupedExperts(gate_up, down, torch.nn.functional.silu)(x, experts, scores)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    assert float(expected.abs().max()) > 0.5


@pytest.mark.parametrize("name", ["qwen2_slide", "qwen3_next"])
def test_compiled_layers_give_what_plain_ones_give(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, without a compiler behind; where compiling fails one line says so, and all is as it was."""
    decoder = Decoder(tiny_family(name))

    def logits() -> torch.Tensor:
        row = KVStore(decoder.kv_shape).row()
        row.reserve(9)
        decoder.step([Segment(range(7), 0, row)])
        return decoder.step([Segment([8], 7, row)])

    plain, compile_function = logits(), torch.compile

    def refuse(*given: object, **more: object) -> None:
        raise RuntimeError("no compiler\nis here")

    monkeypatch.setattr(torch, "compile", refuse)
    assert decoder.compile() == ("compile: not possible here (no compiler); everything runs as without it")
    assert torch.equal(logits(), plain)
    monkeypatch.setattr(
        torch, "compile", lambda part, **more: compile_function(part, backend="eager", **more)
    )
    torch._dynamo.config.suppress_errors = False
    assert decoder.compile() == "compile: the feed-forward parts (as asked)"
    assert torch.allclose(logits(), plain, rtol=0, atol=1e-6)
    torch._dynamo.config.suppress_errors = False
