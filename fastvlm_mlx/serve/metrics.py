"""What the server has done, in figures that Prometheus reads."""

from __future__ import annotations

from typing import Any

from ..generation.response import Response

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
RATES = (1, 2.5, 5, 10, 25, 50, 100, 250, 500)
# The paths that are counted by name; strangers can't fill memory with others.
ROUTES = {"/", "/health", "/ready", "/metrics"}
ROUTES |= {"/v1/models", "/v1/chat/completions", "/v1/responses"}
ROUTES |= {"/v1/messages", "/v1/messages/count_tokens"}
ROUTES |= {"/api/chat", "/api/generate", "/api/tags", "/api/ps", "/api/show", "/api/version"}


class Metrics:
    """Counters and histograms of one server; each server has its own registry.

    Args:
        engine: whose queue, batch and cache are shown as they are when asked.
    """

    def __init__(self, engine: Any):
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Any:
            return Counter(f"fastvlm_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Any, *labels: str) -> Any:
            return Histogram(f"fastvlm_{name}", text, labels, buckets=buckets, registry=registry)

        self.requests = counter("requests", "Requests answered", "route", "status")
        self.seconds = histogram(
            "request_seconds", "From request to end of reply", SECONDS, "route"
        )
        self.images = counter("images", "Images of requests")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts, images included")
        self.cached_tokens = counter("cached_prompt_tokens", "Those that a cache held")
        self.cached_images = counter("cached_images", "Images that a cache held")
        self.tokens = counter("generated_tokens", "Tokens of answers")
        self.answers = counter("answers", "Answers that ended", "reason")
        self.queue = histogram("queue_seconds", "Waiting for a place", SECONDS)
        self.encode = histogram("encode_seconds", "Encoding a request's images", SECONDS)
        self.prefill = histogram("prefill_seconds", "From images to first token", SECONDS)
        self.first = histogram("time_to_first_token_seconds", "Time to first token", SECONDS)
        self.rate = histogram("tokens_per_second", "Tokens per second of an answer", RATES)
        for name, text, read in (
            ("queued_requests", "Requests that wait", lambda: engine.queued),
            ("batch_size", "Answers that are decoded together", lambda: engine.running),
            ("alive", "1 while the engine works", lambda: float(engine.alive)),
            ("active_memory_bytes", "Memory of MLX's arrays", _active_memory),
            ("peak_memory_bytes", "The most that MLX's arrays have taken", _peak_memory),
        ):
            Gauge(f"fastvlm_{name}", text, registry=registry).set_function(read)

    def done(self, path: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        route = path if path in ROUTES else "other"
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def observe(self, piece: Response) -> None:
        """Count a piece of an answer, and at its end the answer."""
        self.tokens.inc()
        if piece.generation_tokens == 1:
            self.prompt_tokens.inc(piece.prompt_tokens)
            self.cached_tokens.inc(piece.cached_tokens)
            self.cached_images.inc(piece.cached_images)
            self.queue.observe(piece.queue_time)
            self.encode.observe(piece.encode_time)
            self.prefill.observe(piece.prefill_time)
            self.first.observe(piece.ttft)
        if piece.finish_reason is not None:
            self.answers.labels(piece.finish_reason).inc()
            if piece.generation_tps:
                self.rate.observe(piece.generation_tps)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)


def _active_memory() -> float:
    import mlx.core as mx

    return float(mx.get_active_memory())


def _peak_memory() -> float:
    import mlx.core as mx

    return float(mx.get_peak_memory())
