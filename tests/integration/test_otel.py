"""OpenTelemetry: a trace goes from who submits to the run of the job, in another process."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import baggage, context, trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, Sampler

from tqe import App, JobFailed, current_job
from tqe.job import submit_options
from tqe.otel import instrument
from tqe.testing import Queue, queue

Spans = Callable[[], list[dict[str, Any]]]


class Lines(SpanExporter):
    """Spans of all processes, a line each."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        told = "".join(
            json.dumps({**json.loads(span.to_json()), "pid": os.getpid()}) + "\n" for span in spans
        )
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(fd, told.encode())
        os.close(fd)
        return SpanExportResult.SUCCESS


def traced_app(path: Path, sampler: Sampler = ALWAYS_ON) -> tuple[App, trace.Tracer]:
    provider = TracerProvider(sampler=sampler)
    provider.add_span_processor(SimpleSpanProcessor(Lines(path)))
    app = App("traced")
    assert instrument(app, provider)

    @app.task("SYNC")
    def sync(n: int) -> str:
        with provider.get_tracer("own").start_as_current_span("inside"):
            return str(baggage.get_baggage("user"))

    @app.task("ASYNC")
    async def coroutine(n: int) -> int:
        await asyncio.sleep(0.01)
        with provider.get_tracer("own").start_as_current_span("inside"):
            return n

    @app.task("OUTER")
    def outer() -> str:
        return sync.submit(1).id

    @app.task("FAILS", max_retries=1)
    def fails() -> None:
        raise ValueError(f"attempt {current_job().attempt}")

    return app, provider.get_tracer("test")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spans"


@pytest.fixture
def spans(path: Path) -> Spans:
    return lambda: [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def named(spans: Spans, name: str) -> list[dict[str, Any]]:
    return [span for span in spans() if span["name"] == name]


@pytest.fixture
def on(tqe_redis_url: str) -> Iterator[Callable[[App], Queue]]:
    """`on(app)`: the app's queue."""
    opened = []

    def begin(app: App) -> Queue:
        manager = queue(app, tqe_redis_url)
        made = manager.__enter__()
        opened.append(manager)
        return made

    yield begin
    for manager in opened:
        manager.__exit__(None, None, None)


def test_one_trace_from_the_submission_to_the_result(
    on: Callable[[App], Queue], path: Path, spans: Spans
) -> None:
    app, tracer = traced_app(path)
    work = on(app)
    token = context.attach(baggage.set_baggage("user", "ann"))
    try:
        with tracer.start_as_current_span("request") as request:
            jobs = [app.submit(kind, {"n": 1}, priority="high") for kind in ("ASYNC", "SYNC", "SYNC")]
            with work.worker():
                results = [job.result(timeout=20) for job in jobs]
    finally:
        context.detach(token)
    assert results == [1, "ann", "ann"]
    trace_id = f"0x{request.get_span_context().trace_id:032x}"
    assert {span["context"]["trace_id"] for span in spans()} == {trace_id}
    assert len(named(spans, "wait for a result")) == 3
    for job in jobs:
        (sent,) = [span for span in named(spans, "send SYNC") + named(spans, "send ASYNC")
                   if span["attributes"]["messaging.message.id"] == job.id]  # fmt: skip
        (ran,) = [span for span in spans() if span["name"].startswith("process ")
                  and span["attributes"]["messaging.message.id"] == job.id]  # fmt: skip
        assert (sent["kind"], ran["kind"]) == ("SpanKind.PRODUCER", "SpanKind.CONSUMER")
        assert sent["pid"] == os.getpid() != ran["pid"]
        assert ran["parent_id"] == sent["context"]["span_id"]
        told = ran["attributes"]
        assert (told["messaging.system"], told["messaging.destination.name"]) == ("tqe", "high")
        assert (told["messaging.operation.type"], told["tqe.job.attempt"]) == ("process", 1)
        assert told["tqe.job.wait_s"] >= 0
        inside = [span["parent_id"] for span in named(spans, "inside")]
        assert ran["context"]["span_id"] in inside


def test_failures_retries_and_jobs_of_jobs(on: Callable[[App], Queue], path: Path, spans: Spans) -> None:
    app, tracer = traced_app(path)
    work = on(app)
    with tracer.start_as_current_span("request"):
        failed, outer = app.submit("FAILS"), app.submit("OUTER")
        work.drain()
        with pytest.raises(JobFailed):
            failed.result()
    ran = named(spans, "process FAILS")
    assert [span["attributes"]["tqe.job.attempt"] for span in ran] == [1, 2]
    assert [span["status"]["status_code"] for span in ran] == ["ERROR", "ERROR"]
    assert [span["events"][0]["attributes"]["exception.message"] for span in ran] == [
        "attempt 1",
        "attempt 2",
    ]
    (parent,), (child,) = named(spans, "process OUTER"), named(spans, "send SYNC")
    assert child["parent_id"] == parent["context"]["span_id"] and child["pid"] == parent["pid"]
    assert child["attributes"]["messaging.message.id"] == outer.result()
    (grandchild,) = named(spans, "process SYNC")
    assert grandchild["parent_id"] == child["context"]["span_id"]


async def test_async_submissions_of_one_turn_keep_their_own_traces(
    on: Callable[[App], Queue], path: Path, spans: Spans
) -> None:
    app, tracer = traced_app(path)
    work = on(app)

    async def one(n: int) -> tuple[int, str]:
        with tracer.start_as_current_span(f"request {n}") as request:
            job = await app.asubmit("SYNC", {"n": n})
            return request.get_span_context().trace_id, job.id

    found = await asyncio.gather(*(one(n) for n in range(3)))
    many = await app.asubmit_many([("SYNC", {"n": n}) for n in range(3)])
    await work.adrain()
    await app.aclose()
    ran = {span["attributes"]["messaging.message.id"]: span for span in named(spans, "process SYNC")}
    for trace_id, job in found:
        assert int(ran[job]["context"]["trace_id"], 16) == trace_id
    (bulk,) = named(spans, "send many")
    assert bulk["attributes"]["messaging.batch.message_count"] == 3
    assert {ran[job.id]["parent_id"] for job in many} == {bulk["context"]["span_id"]}


def test_what_is_not_sampled_carries_nothing(on: Callable[[App], Queue], path: Path, spans: Spans) -> None:
    app, _ = traced_app(path, ALWAYS_OFF)
    work = on(app)
    app.submit("SYNC", {"n": 1})
    options = app.client.core.options(None, {})
    assert options.limits() == b"" and not options.trace
    work.drain()
    assert spans() == []


def test_an_error_without_words_costs_no_more_than_its_text(
    on: Callable[[App], Queue], path: Path, spans: Spans
) -> None:
    app, tracer = traced_app(path)

    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    @app.task("MUTE", max_retries=0)
    def mute() -> None:
        raise Mute

    work = on(app)
    with tracer.start_as_current_span("request"):
        failed, fine = app.submit("MUTE"), app.submit("SYNC", {"n": 1})
        with work.worker():
            assert fine.result(timeout=20) == "None"
            with pytest.raises(JobFailed):
                failed.result(timeout=20)
    assert len(named(spans, "process MUTE")) == 1


def test_a_trace_that_makes_no_sense_costs_the_trace(
    on: Callable[[App], Queue], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, _ = traced_app(path)
    work = on(app)
    core = app.client.core
    for odd in ((("traceparent", "nonsense"),), (("traceparent", 7),)):
        odd_options = replace(
            submit_options({}, lanes=work.settings.lanes, default_lane="normal", now_ms=0), trace=odd
        )
        monkeypatch.setattr(core, "options", lambda *_, found=odd_options: found)
        job = app.submit("SYNC", {"n": 1})
        work.drain()
        assert job.result() == "None"


def test_without_the_package_nothing_changes() -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from tqe import App\nfrom tqe.client import Client\nfrom tqe.otel import instrument\n"
        "app = App(redis_url='unix:///nowhere.sock')\n"
        "print(instrument(app), type(app.client) is Client, app.tracing)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=True
    )
    assert done.stdout == "False True None\n"
