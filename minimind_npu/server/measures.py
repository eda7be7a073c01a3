"""What /metrics tells Prometheus: requests, tokens, times, and how full the batch is."""

from __future__ import annotations

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from starlette.responses import Response

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Measures:
    """Of one server."""

    def __init__(self, worker):
        """worker: whose running and waiting answers are told when they are asked for."""
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = Counter("danpu_requests", "answered requests", ["path", "status"], **own)
        self.prompt_tokens = Counter("danpu_prompt_tokens", "tokens of prompts", **own)
        self.new_tokens = Counter("danpu_generated_tokens", "generated tokens", **own)
        self.first = Histogram(
            "danpu_time_to_first_token_seconds", "from request to token", buckets=SECONDS, **own
        )
        self.whole = Histogram(
            "danpu_request_seconds", "from request to the end", buckets=SECONDS, **own
        )
        running = Gauge("danpu_running", "answers in the batch", **own)
        running.set_function(lambda: worker.running)
        waiting = Gauge("danpu_waiting", "answers that wait for a slot", **own)
        waiting.set_function(lambda: worker.waiting)

    async def tell(self, request) -> Response:
        """Endpoint of GET /metrics."""
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)
