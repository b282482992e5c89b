"""The gated delta rule in chunks over a tree of runs: what its definition gives token by token, on each way alone."""

import pytest
import torch
from torch import Tensor

from qwen_chat.delta_rule import CHUNK, Runs, convolve, gated_delta_rule, normalised

KEY_HEADS, HEADS, KEY, VALUE = 2, 4, 6, 10
# Longer and shorter than a chunk, just a chunk, one token; children of children, and a second root.
RUNS = Runs((CHUNK + 6, 2 * CHUNK + 2, CHUNK, 5, 3 * CHUNK + 8, 1, 33), (-1, 0, 0, 2, -1, 4, 4))


def delta_step(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, rate: Tensor, states: Tensor
) -> tuple[Tensor, Tensor]:
    """The rule as it is defined, one token of each of B rows: (outputs [B, H, V], states after it [B, H, K, V]).

    As for `gated_delta_rule` with a run of one token for each row; nothing of a row depends on another.
    """
    exact = torch.float64 if value.dtype == torch.float64 else torch.float32
    share = value.shape[1] // key.shape[1]
    q = (normalised(query.to(exact)) * query.shape[-1] ** -0.5).repeat_interleave(share, dim=1)
    k = normalised(key.to(exact)).repeat_interleave(share, dim=1)
    state = states.to(exact) * decay.to(exact).exp()[..., None, None]
    found = (state * k[..., None]).sum(-2)
    written = rate.to(exact)[..., None] * (value.to(exact) - found)
    state = state + k[..., None] * written[..., None, :]
    return (state * q[..., None]).sum(-2).to(value.dtype), state


def layer(tokens: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """Queries, keys, values, decays, rates."""
    torch.manual_seed(seed)
    shapes = [(KEY_HEADS, KEY), (KEY_HEADS, KEY), (HEADS, VALUE), (HEADS,), (HEADS,)]
    q, k, v, decay, rate = (torch.randn(tokens, *shape, dtype=torch.float64) for shape in shapes)
    inputs = [q, k, v, -0.3 * decay.abs(), rate.sigmoid()]
    return [x.to(dtype).requires_grad_() for x in inputs]


def way(runs: Runs, run: int) -> list[int]:
    """The places of all tokens on the way to a run's end."""
    before = way(runs, runs.parents[run]) if runs.parents[run] >= 0 else []
    return before + list(range(runs.starts[run], runs.starts[run] + runs.lengths[run]))


def token_by_token(inputs: list[Tensor], state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    state = torch.zeros(1, HEADS, KEY, VALUE, dtype=inputs[0].dtype) if state is None else state
    outputs = []
    for at in range(len(inputs[0])):
        out, state = delta_step(*(x[at : at + 1] for x in inputs), state)
        outputs.append(out)
    return torch.cat(outputs), state[0]


def by_definition(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, rate: Tensor) -> Tensor:
    """The module's head, written out for one head of one run."""
    state = torch.zeros(KEY, VALUE, dtype=v.dtype)
    outputs = []
    for at in range(len(v)):
        query = q[at] / (q[at] @ q[at] + 1e-6).sqrt() / KEY**0.5
        key = k[at] / (k[at] @ k[at] + 1e-6).sqrt()
        state = decay[at].exp() * state
        state = state + torch.outer(key, rate[at] * (v[at] - state.T @ key))
        outputs.append(state.T @ query)
    return torch.stack(outputs)


def test_one_run_is_the_definition() -> None:
    q, k, v, decay, rate = layer(CHUNK + 9)
    out, _ = gated_delta_rule(q, k, v, decay, rate, Runs((CHUNK + 9,), (-1,)))
    for head in range(HEADS):
        shared = head // (HEADS // KEY_HEADS)
        alone = by_definition(q[:, shared], k[:, shared], v[:, head], decay[:, head], rate[:, head])
        torch.testing.assert_close(out[:, head], alone, rtol=0, atol=1e-14)


def test_each_run_is_what_it_is_alone_with_gradients() -> None:
    """Outputs, states and the gradients of both; every run has its own weights, so that none can stand for another."""
    inputs = layer(sum(RUNS.lengths))
    out, states = gated_delta_rule(*inputs, RUNS, keep=True)
    assert states is not None
    weight, state_weight = torch.randn_like(out), torch.randn_like(states)
    total = torch.zeros((), dtype=torch.float64)
    for run, length in enumerate(RUNS.lengths):
        own = slice(RUNS.starts[run], RUNS.starts[run] + length)
        alone, state = token_by_token([x[way(RUNS, run)] for x in inputs])
        torch.testing.assert_close(out[own], alone[-length:], rtol=0, atol=1e-13)
        torch.testing.assert_close(states[run], state, rtol=0, atol=1e-13)
        total = total + (alone[-length:] * weight[own]).sum() + (state * state_weight[run]).sum()
    expected = torch.autograd.grad(total, inputs)
    found = torch.autograd.grad((out * weight).sum() + (states * state_weight).sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-13 * other.norm()


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5", "qwen3_5_moe"])
def test_it_is_what_transformers_computes(name: str) -> None:
    import importlib

    theirs = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    inputs = layer(3 * CHUNK + 5, torch.float32)
    out, states = gated_delta_rule(*inputs, Runs((3 * CHUNK + 5,), (-1,)), keep=True)
    q, k, v, decay, rate = (x[None] for x in inputs)
    expected, state = theirs.torch_chunk_gated_delta_rule(
        q, k, v, g=decay, beta=rate, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    torch.testing.assert_close(out, expected[0], rtol=0, atol=2e-6)
    assert states is not None
    torch.testing.assert_close(states, state, rtol=0, atol=2e-6)


def test_a_state_is_gone_on_from() -> None:
    """In pieces as at once, for rows side by side: what serving does."""
    inputs = layer(200)
    whole, last = gated_delta_rule(*inputs, Runs((120, 80), (-1, -1)), keep=True)
    first = [torch.cat([x[:70], x[120:150]]) for x in inputs]
    rest = [torch.cat([x[70:120], x[150:]]) for x in inputs]
    one, states = gated_delta_rule(*first, Runs((70, 30), (-1, -1)), keep=True)
    two, states = gated_delta_rule(*rest, Runs((50, 50), (-1, -1)), states, keep=True)
    torch.testing.assert_close(torch.cat([one[:70], two[:50], one[70:], two[50:]]), whole, rtol=0, atol=1e-13)
    torch.testing.assert_close(states, last, rtol=0, atol=1e-13)


def test_the_convolution_follows_the_way_of_each_run() -> None:
    torch.manual_seed(0)
    x = torch.randn(sum(RUNS.lengths), 5, dtype=torch.float64)
    weight = torch.randn(5, 4, dtype=torch.float64)
    sums, states = convolve(x, weight, RUNS, keep=True)
    assert states is not None
    for run, length in enumerate(RUNS.lengths):
        padded = torch.nn.functional.pad(x[way(RUNS, run)], (0, 0, 3, 0))
        alone = torch.nn.functional.conv1d(padded.T[None], weight[:, None], groups=5)[0].T
        own = slice(RUNS.starts[run], RUNS.starts[run] + length)
        torch.testing.assert_close(sums[own], alone[-length:], rtol=0, atol=1e-14)
        assert torch.equal(states[run], padded[-3:])
    one, kept = convolve(x[:2], weight, Runs((2,), (-1,)), keep=True)
    two, kept = convolve(x[2:9], weight, Runs((7,), (-1,)), kept, keep=True)
    whole, last = convolve(x[:9], weight, Runs((9,), (-1,)), keep=True)
    torch.testing.assert_close(torch.cat([one, two]), whole, rtol=0, atol=1e-14)
    assert last is not None and kept is not None and torch.equal(last, kept)


def test_the_convolution_has_the_right_gradient() -> None:
    x = torch.randn(14, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    runs = Runs((4, 7, 1, 2), (-1, 0, 0, 2))
    assert torch.autograd.gradcheck(lambda x, weight: convolve(x, weight, runs)[0], (x, weight))
