"""What `/metrics` says, in Prometheus' words. Every server has a registry of its own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_FINE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128)


class Metrics:
    """The counters, gauges and histograms of one server.

    Args:
        model: its name.
        weight_bytes: of its weights in memory.
        rows: of its decoder.
    """

    def __init__(self, model: str, weight_bytes: int, rows: int):
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "grace_requests", "HTTP requests answered", ["path", "status"], registry=registry
        )
        self.prompt_tokens = Counter("grace_prompt_tokens", "Tokens of prompts read", registry=registry)
        self.generated_tokens = Counter("grace_generated_tokens", "Tokens generated", registry=registry)
        self.cancelled = Counter(
            "grace_cancelled_requests", "Answers broken off since their client left", registry=registry
        )
        self.refused = Counter(
            "grace_refused_requests", "Requests refused at a full queue", registry=registry
        )
        self.preparing = Gauge(
            "grace_preparing_requests", "Requests whose prompt is being read", registry=registry
        )
        self.queued = Gauge("grace_queued_answers", "Answers that wait for a row", registry=registry)
        self.running = Gauge("grace_running_answers", "Answers that have a row", registry=registry)
        self.batch_size = Histogram(
            "grace_batch_size", "Rows of a decoding step", buckets=_ROWS, registry=registry
        )
        self.step_seconds = Histogram(
            "grace_decode_step_seconds", "Time of a decoding step", buckets=_FINE_SECONDS, registry=registry
        )
        self.prefill_seconds = Histogram(
            "grace_prefill_seconds", "Time to read one prompt", buckets=_SECONDS, registry=registry
        )
        self.queue_seconds = Histogram(
            "grace_queue_seconds", "Wait for a row", buckets=_SECONDS, registry=registry
        )
        self.first_token_seconds = Histogram(
            "grace_first_token_seconds",
            "From submission to the first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self.answer_seconds = Histogram(
            "grace_answer_seconds", "From submission to the last token", buckets=_SECONDS, registry=registry
        )
        for name, about, value in (
            ("grace_weight_bytes", "Bytes of weights in memory", weight_bytes),
            ("grace_rows", "Answers that are decoded together at most", rows),
        ):
            Gauge(name, about, ["model"], registry=registry).labels(model).set(value)

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self.registry)
