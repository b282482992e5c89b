"""Which library multiplies float32 matrices on a CPU: the faster one on this machine, by measurement.

In: nothing. Out: a Route, whose `product` the linear layers use forward and backward (fused.py): torch's own
path (MKL) or oneDNN. On an AMD CPU MKL reached 82-86 GFLOP/s where oneDNN reached 139-149; on an Intel one
with AVX-512 both reach 400. Both are true float32; the order of sums differs, so a resumed run must use the
stored choice again (`Route.to_json`).
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch.nn.functional import linear

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
ROWS, IN, OUT = 512, 896, 4864  # the shape measured: half a row through the MLP of Qwen2.5-0.5B
WORTH = 1.1  # the other route must be this much faster: below that it is noise


@dataclass(frozen=True, slots=True)
class Route:
    """The route and why; `rates` in GFLOP/s over one forward and both backward products."""

    route: str  # "torch" | "onednn"
    reason: str
    rates: tuple[tuple[str, float], ...] = ()

    @property
    def product(self) -> Product:
        """x [N, in], weight [out, in], bias [out] or None -> [N, out]; any strides."""
        return _onednn if self.route == "onednn" else linear

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"rates": dict(self.rates)}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Route":
        return cls(str(stored["route"]), "as this run began", tuple(stored.get("rates", {}).items()))


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [N, in], weight [out, in] -> [N, out], either with any strides."""
    return cast(torch.Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))


def fastest(device: str = "cpu", seconds: float = 0.5) -> Route:
    """Measure both routes for about `seconds` and take the faster one."""
    if device != "cpu":
        return Route("torch", f"float32 products on '{device}' are its own library's")
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return Route("torch", "this torch has no oneDNN")
    precision = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    if precision not in ("none", "ieee"):
        return Route(
            "torch", f"oneDNN is set to compute float32 products in {precision}; true float32 is wanted"
        )
    x, weight = torch.randn(ROWS, IN), torch.randn(OUT, IN)
    gradient = torch.randn(ROWS, OUT)
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
    rates = {name: round(6e-9 * ROWS * IN * OUT / spent, 1) for name, spent in best.items()}
    route = "onednn" if rates["onednn"] > WORTH * rates["torch"] else "torch"
    told = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    return Route(route, f"measured GFLOP/s in float32: {told}", tuple(rates.items()))
