"""Owns the Prometheus page of the server: the queue as Redis has it at the moment of the scrape."""

from __future__ import annotations

import asyncio
from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from tqe import clock
from tqe.api.service import Service
from tqe.errors import TQEError
from tqe.steward.exporter import queue_sample
from tqe.store import backlog, housekeeping, reading
from tqe.telemetry import metrics

_ANSWER_S: Final = 2.0  # scrapers wait for ten seconds at most, by default


async def show(service: Service, request: Request) -> Response:
    """The metrics of the whole queue, and of this process none: a scrape reaches any of the server's
    processes, so that what each counts by itself would seem to jump."""
    queue = await _sample(service)
    registry = CollectorRegistry()
    registry.register(metrics.Page(lambda: metrics.queue_families(queue)))
    return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})


async def _sample(service: Service) -> metrics.QueueSample | None:
    """What Redis says; None where it does not answer."""
    keys, lanes = service.client.core.keys, service.settings.lanes
    asked_ns = clock.monotonic_ns()
    try:
        question = service.client.run(reading.ask(*housekeeping.totals_commands(keys, lanes)))
        totals = housekeeping.read_totals(await asyncio.wait_for(question, _ANSWER_S), lanes)
        latency_s = (clock.monotonic_ns() - asked_ns) / 1e9
        work = await asyncio.wait_for(service.client.run(backlog.look(keys, lanes)), _ANSWER_S)
    except (TQEError, TimeoutError):
        return None
    return queue_sample(totals, latency_s=latency_s, backlog=work)
