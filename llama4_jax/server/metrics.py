"""What Prometheus reads: the tails of the names are those of vLLM, so that dashboards port."""

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from llama4_jax.serve.answers import Event
from llama4_jax.serve.engine import Engine

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


class Metrics:
    """Counters of a server, in a registry of their own.

    Args:
      engine: what it does is read when somebody asks.
      num_open: answers that are being made or wait.
    """

    def __init__(self, engine: Engine, num_open: Callable[[], int]) -> None:
        self.registry = registry = CollectorRegistry()

        def gauge(name: str, what: str, read: Callable[[], float]) -> None:
            Gauge(f"llama4_{name}", what, registry=registry).set_function(read)

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"llama4_{name}", what, labels, registry=registry)

        def seconds(name: str, what: str) -> Histogram:
            return Histogram(f"llama4_{name}_seconds", what, buckets=_SECONDS, registry=registry)

        scheduler, config = engine.scheduler, engine.config
        sizes = {
            "kv_cache": config.kv_cache,
            "max_rows": str(config.max_rows),
            "global_pages": str(scheduler.whole.count),
            "chunked_pages": str(scheduler.chunk.count),
        }
        Gauge("llama4_cache_config_info", "Sizes.", list(sizes), registry=registry).labels(
            **sizes
        ).set(1)
        gauge("num_requests_running", "Answers being made.", lambda: len(scheduler.running))
        gauge(
            "num_requests_waiting", "Answers that wait.",
            lambda: max(0, num_open() - len(scheduler.running)),
        )  # fmt: skip
        for name, pool in (("global", scheduler.whole), ("chunked", scheduler.chunk)):
            gauge(
                f"kv_cache_usage_perc_{name}",
                f"Part of the pages of {name} layers that is in use.",
                lambda pool=pool: pool.held / max(pool.count, 1),
            )
        gauge("prefix_cache_queries", "Prompt tokens looked up.", lambda: scheduler.looked_up)
        gauge("prefix_cache_hits", "Prompt tokens found.", lambda: scheduler.found)
        gauge("num_preemptions", "Answers begun again.", lambda: scheduler.preemptions)
        gauge("iterations", "Steps taken.", lambda: engine.counters.steps)
        gauge("spec_decode_num_draft_tokens", "Drafted.", lambda: engine.counters.drafted)
        gauge("spec_decode_num_accepted_tokens", "Accepted.", lambda: engine.counters.accepted)
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = counter("generation_tokens", "New tokens.")
        self.requests = counter("request_success", "Answers that ended.", "finished_reason")
        self.rejections = counter("admission_rejections", "Requests refused.", "reason")
        self.first_token = seconds("time_to_first_token", "From arrival to the first token.")
        self.between = seconds("inter_token_latency", "Between tokens of an answer.")
        self.whole = seconds("e2e_request_latency", "From arrival to the end.")

    def observe(self, events: list[Event]) -> None:
        """Count the events of a step."""
        self.generation_tokens.inc(sum(len(event.tokens) for event in events))
        for event in events:
            if event.finish_reason is not None:
                self.requests.labels(event.finish_reason).inc()


class Watch:
    """The times of one request."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._began = metrics, time.monotonic()
        self._last: float | None = None

    def tokens(self, count: int) -> None:
        """Take note of new tokens."""
        if not count:
            return
        now = time.monotonic()
        if self._last is None:
            self._metrics.first_token.observe(now - self._began)
        else:
            for _ in range(count):
                self._metrics.between.observe((now - self._last) / count)
        self._last = now

    def end(self) -> None:
        """Take note of the end."""
        self._metrics.whole.observe(time.monotonic() - self._began)
