"""`/metrics`: what the engine counts, and what only the server sees."""

from __future__ import annotations

from collections.abc import Iterable
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mii_hcache.runtime.generation import GenerationService, RestoreReport
from mii_hcache.serve.metric_words import WORDS

PREFIX = "mii_hcache_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_REQUEST_BUCKETS_S = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class ServiceCollector(Collector):
    """A service's metrics under our prefix: names that end in `_total` are counters, others gauges. Counters are there
    from the beginning, so that whoever watches sees the first step of each."""

    def __init__(self, service: GenerationService) -> None:
        self._service = service

    def collect(self) -> Iterable[Metric]:
        """Asks the service, at each scrape."""
        counters = {name: 0.0 for name in WORDS if name.endswith("_total")}
        for name, value in sorted({**counters, **self._service.metrics()}.items()):
            help_text = WORDS.get(name, name.replace("_", " "))
            if name.endswith("_total"):
                yield CounterMetricFamily(PREFIX + name.removesuffix("_total"), help_text, value=value)
            else:
                yield GaugeMetricFamily(PREFIX + name, help_text, value=value)

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are known at scrapes only."""
        return []


class ServerMetrics:
    """Counts requests and where prompt tokens came from. Event loop only, except `text`."""

    def __init__(self, service: GenerationService) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(ServiceCollector(service))

        def name(suffix: str) -> str:
            return f"{PREFIX}http_{suffix}"

        self._requests = Counter(name("requests"), "Requests answered", ["route", "status"], registry=self._registry)
        self._request_s = Histogram(
            name("request_seconds"),
            "From a request's first byte to its answer's last",
            ["route"],
            buckets=_REQUEST_BUCKETS_S,
            registry=self._registry,
        )
        self._ttft_s = Histogram(
            name("ttft_seconds"),
            "From submission to the first token",
            buckets=_TTFT_BUCKETS_S,
            registry=self._registry,
        )
        self._prompt_tokens = Counter(
            name("prompt_tokens"),
            "Prompt tokens of finished answers, by where their state came from",
            ["source"],
            registry=self._registry,
        )
        self._generated_tokens = Counter(
            name("generated_tokens"), "Tokens of finished answers", registry=self._registry
        )
        self._misses = Counter(
            name("misses"), "Finished answers with a miss_reason", ["reason"], registry=self._registry
        )
        for source in ("resident", "restored", "recomputed", "prefilled"):
            self._prompt_tokens.labels(source)

    def count_answer(self, report: RestoreReport, num_generated: int) -> None:
        """One finished answer."""
        self._prompt_tokens.labels("resident").inc(report.resident_tokens)
        self._prompt_tokens.labels("restored").inc(report.restored_tokens)
        self._prompt_tokens.labels("recomputed").inc(report.recomputed_tokens)
        self._prompt_tokens.labels("prefilled").inc(report.prefill_tokens)
        self._generated_tokens.inc(num_generated)
        if report.ttft_ms is not None:
            self._ttft_s.observe(report.ttft_ms / 1e3)
        if report.miss_reason is not None:
            self._misses.labels(report.miss_reason).inc()

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """One HTTP request."""
        self._requests.labels(route, str(status)).inc()
        self._request_s.labels(route).observe(seconds)

    def text(self) -> bytes:
        """Prometheus's text format."""
        return generate_latest(self._registry)


class CountRequests:
    """ASGI middleware: counts and times each request under its route's path."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; other scopes pass."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, start = 500, perf_counter()

        async def send_and_look(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_look)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.count_request(route, status, perf_counter() - start)
