"""What the service counts, in Prometheus' text format.

In: what happens to requests, and at each scrape what the engine says of itself.
Out: GET /metrics. Names follow the habits of the field's servers: base units, `_total` on counters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Upper bounds of the histograms' buckets, in seconds.
_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_PER_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

# The engine's own figures: name -> (kind, help). A figure that an engine does not give is left out.
ENGINE_FIGURES: Mapping[str, tuple[str, str]] = {
    "num_requests_running": ("gauge", "Sequences in the batch."),
    "num_requests_waiting": ("gauge", "Sequences that wait for a place in the batch."),
    "batch_size": ("gauge", "Sequences that the last forward pass advanced; 0 where none runs."),
    "cache_usage_ratio": ("gauge", "Tokens that running requests hold, as a share of what fits, 0 to 1."),
    "prefix_cache_queries": ("counter", "Prompt tokens of requests that began."),
    "prefix_cache_hits": ("counter", "Prompt tokens found in the prefix cache."),
    "engine_steps": ("counter", "Forward passes."),
    "forced_tokens": ("counter", "Tokens that a grammar forced, added without a forward pass of their own."),
    "draft_tokens": ("counter", "Tokens computed as drafts."),
    "accepted_draft_tokens": ("counter", "Drafts that were said."),
    "engine_restarts": ("counter", "Times that the engine was started again after a failure."),
    "engine_ready": ("gauge", "1 where the engine takes requests."),
    "log_lines_lost": ("counter", "Lines of the service log that could not be written."),
    "log_lines_withheld": (
        "counter",
        "Lines of requests without a key beyond their share of the service log.",
    ),
}


class Metrics(Collector):
    """Counters and histograms of one service, in a registry of their own."""

    def __init__(self, figures: Callable[[], Mapping[str, float]]) -> None:
        """`figures` is asked at each scrape; see ENGINE_FIGURES for the names."""
        # A series for when each counter began doubles the text and tells nothing.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._figures = figures
        self.registry.register(self)
        self.requests = Counter(
            "qwen_chat_requests",
            "Requests that ended, by status; 499: the client left.",
            ("endpoint", "status"),
            registry=self.registry,
        )
        self.finished = Counter(
            "qwen_chat_request_success",
            "Choices that ended, by reason.",
            ("model", "finish_reason"),
            registry=self.registry,
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.cached_tokens = self._counter("cached_prompt_tokens", "Tokens of prompts not computed again.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self.first_token = self._seconds("time_to_first_token", "Arrival to first token.", _FIRST_TOKEN)
        self.per_token = self._seconds(
            "time_per_output_token", "From one token to the next of the same choice.", _PER_TOKEN
        )
        self.whole = self._seconds(
            "e2e_request_latency", "Arrival to the end of the answer, those broken off too.", _WHOLE
        )

    def count_request(self, endpoint: str, status: int) -> None:
        """One request that ended."""
        self.requests.labels(endpoint, str(status)).inc()

    def text(self) -> bytes:
        """Prometheus' text format, version 0.0.4."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"qwen_chat_{name}", text, ("model",), registry=self.registry)

    def _seconds(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"qwen_chat_{name}_seconds", text, ("model",), buckets=buckets, registry=self.registry
        )

    def collect(self) -> Iterable[Metric]:
        """The engine's figures, which are asked for at each scrape."""
        for name, value in self._figures().items():
            sort, text = ENGINE_FIGURES[name]
            family = CounterMetricFamily if sort == "counter" else GaugeMetricFamily
            yield family(f"qwen_chat_{name}", text, value=value)
