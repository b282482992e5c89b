"""Which library multiplies float32 matrices on a CPU: the faster one on this machine, by measurement.

In: a model on a CPU. Out: the same model; its linear layers go, forward and backward, through torch's own
path (MKL) or through oneDNN. On an AMD CPU MKL reached 82-86 GFLOP/s where oneDNN reached 139-149; on an
Intel one with AVX-512 both reach 400. Both are true float32; the order of sums differs, so a resumed run must
use the stored choice again (`Choice.to_json`).
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

TOKENS, WIDTH, INNER = 512, 896, 4864  # the shape measured: half a row through the MLP of Qwen2.5-0.5B
WORTH = 1.1  # the other route must be this much faster: below that it is noise


@dataclass(frozen=True, slots=True)
class Choice:
    """The route and why; `rates` in GFLOP/s over one forward and both backward products."""

    route: str  # "torch" | "onednn"
    reason: str
    rates: tuple[tuple[str, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"rates": dict(self.rates)}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Choice":
        return cls(str(stored["route"]), "as this run began", tuple(stored.get("rates", {}).items()))


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [N, in], weight [out, in] -> [N, out], either with any strides."""
    return cast(torch.Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))


def choose(device: str = "cpu", seconds: float = 0.5) -> Choice:
    """Measure both routes for about `seconds` and take the faster one."""
    if device != "cpu":
        return Choice("torch", f"float32 products on '{device}' are its own library's")
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return Choice("torch", "this torch has no oneDNN")
    precision = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    if precision not in ("none", "ieee"):
        return Choice(
            "torch", f"oneDNN is set to compute float32 products in {precision}; true float32 is wanted"
        )
    x, weight = torch.randn(TOKENS, WIDTH), torch.randn(INNER, WIDTH)
    gradient = torch.randn(TOKENS, INNER)
    routes: dict[str, Callable[[], Any]] = {
        "torch": lambda: (linear(x, weight), gradient @ weight, gradient.t() @ x),
        "onednn": lambda: (_onednn(x, weight), _onednn(gradient, weight.t()), _onednn(gradient.t(), x.t())),
    }
    best = dict.fromkeys(routes, float("inf"))
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 3 or time.perf_counter() < end:  # alternating, so that a neighbour's noise meets both
        for name, run in routes.items():
            begin = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - begin)
        rounds += 1
    rates = {name: round(6e-9 * TOKENS * WIDTH * INNER / spent, 1) for name, spent in best.items()}
    route = "onednn" if rates["onednn"] > WORTH * rates["torch"] else "torch"
    told = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    return Choice(route, f"measured GFLOP/s in float32: {told}", tuple(rates.items()))


class RoutedLinear(torch.nn.Linear):
    """A linear layer whose float32 products on a CPU go through oneDNN."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.dtype != torch.float32 or input.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return linear(input, self.weight, self.bias)
        return cast(torch.Tensor, _Linear.apply(input, self.weight, self.bias))  # type: ignore[no-untyped-call]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = _onednn(flat, weight.t()).view(*gradient.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[1]:
            dw = _onednn(flat.t(), x.reshape(-1, x.shape[-1]).t())
        if ctx.needs_input_grad[2]:
            db = flat.sum(0)
        return dx, dw, db


def route(model: torch.nn.Module, choice: Choice) -> int:
    """Send the model's float32 linear layers the chosen way; returns how many were changed. Call after LoRA
    wrapping."""
    if choice.route != "onednn":
        return 0
    layers = [module for module in model.modules() if type(module) is torch.nn.Linear]
    for layer in layers:
        layer.__class__ = RoutedLinear
    return len(layers)
