"""Owns OpenTelemetry: spans around submitting, waiting and running, and a trace's way from one to the other.

`instrument(app)` is all that an application calls. Without it, or without the package, nothing here runs and
no job carries a trace. docs/decisions has why the trace travels in a job's options.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Final

from tqe import __version__
from tqe.app import App
from tqe.client import AsyncClient, AsyncJobHandle, AsyncJobHandles, Client, JobHandle, JobHandles
from tqe.client.core import Core, Progress
from tqe.current import CurrentJob
from tqe.job import SubmitOptions
from tqe.registry import Task
from tqe.settings import Settings

try:
    from opentelemetry import context as otel_context
    from opentelemetry import propagate, trace
except ImportError:
    _installed = False
else:
    _installed = True

SYSTEM: Final = "tqe"
CARRIER_CHARS_MAX: Final = 4_096  # what a trace may add to a job; a larger one (baggage) travels without it


def instrument(app: App, tracer_provider: trace.TracerProvider | None = None) -> bool:
    """Trace the jobs of an app: call it where the app is made. False, and nothing changes, if the package
    `opentelemetry-api` is not installed (`pip install tqe[otel]`).

    Spans go to that provider, else to the global one of each process; a worker's is set up in an
    `@app.on_worker_start` hook.
    """
    if not _installed:
        return False
    tracer = trace.get_tracer("tqe", __version__, tracer_provider)
    app.use_clients(
        client=partial(TracingClient, tracer=tracer), async_client=partial(TracingAsyncClient, tracer=tracer)
    )
    app.tracing = partial(RunSpan, tracer)
    return True


def _carrier() -> dict[str, str] | None:
    """What a job carries: the trace of this context if it is sampled, else nothing."""
    if not trace.get_current_span().get_span_context().trace_flags.sampled:
        return None
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    if sum(len(key) + len(value) for key, value in carrier.items()) > CARRIER_CHARS_MAX:
        carrier = {key: value for key, value in carrier.items() if key == "traceparent"}
    return carrier or None


class TracingCore(Core):
    """Gives each job the trace of the context that submits it."""

    def options(self, task: Task[..., Any] | None, given: Mapping[str, Any]) -> SubmitOptions:
        found = super().options(task, given)
        carrier = _carrier()
        return found if carrier is None else replace(found, trace=tuple(carrier.items()))


# ------------------------------------------------------------------ submitting and waiting


@contextmanager
def _sending(tracer: trace.Tracer, what: str, **attributes: Any) -> Iterator[trace.Span]:
    told = {"messaging.system": SYSTEM, "messaging.operation.name": "send"}
    told["messaging.operation.type"] = "send"
    with tracer.start_as_current_span(
        f"send {what}", kind=trace.SpanKind.PRODUCER, attributes={**told, **attributes}
    ) as span:
        yield span


@contextmanager
def _waiting(tracer: trace.Tracer, name: str) -> Iterator[None]:
    told = {"messaging.system": SYSTEM, "messaging.operation.name": "wait", "messaging.message.id": name}
    with tracer.start_as_current_span("wait for a result", kind=trace.SpanKind.CLIENT, attributes=told):
        yield


def _sent(span: trace.Span, job: JobHandle | AsyncJobHandle) -> None:
    if span.is_recording():
        span.set_attributes({"messaging.message.id": job.id, "tqe.job.created": job.created})


def _sent_many(span: trace.Span, jobs: JobHandles | AsyncJobHandles) -> None:
    span.set_attribute("messaging.batch.message_count", len(jobs))


def _name(task: Task[..., Any] | str) -> str:
    return task if isinstance(task, str) else task.name


class TracingClient(Client):
    """The sync client with spans."""

    def __init__(self, settings: Settings, *, tracer: trace.Tracer, **given: Any) -> None:
        super().__init__(settings, **given)
        self._tracer = tracer
        self.core = TracingCore(settings, self.core.registry, self._handles)

    def submit(self, type_name: str, payload: Any, **options: Any) -> JobHandle:
        with _sending(self._tracer, type_name, **{"tqe.job.type": type_name}) as span:
            job = super().submit(type_name, payload, **options)
            _sent(span, job)
            return job

    def submit_many(
        self, items: Iterable[Any], *, collect: bool = False, progress: Progress | None = None, **options: Any
    ) -> JobHandles:
        with _sending(self._tracer, "many") as span:
            jobs = super().submit_many(items, collect=collect, progress=progress, **options)
            _sent_many(span, jobs)
            return jobs

    def submit_alike(
        self,
        task: Task[..., Any] | str,
        payloads: Iterable[Any],
        *,
        collect: bool = False,
        progress: Progress | None = None,
        **options: Any,
    ) -> JobHandles:
        with _sending(self._tracer, _name(task), **{"tqe.job.type": _name(task)}) as span:
            jobs = super().submit_alike(task, payloads, collect=collect, progress=progress, **options)
            _sent_many(span, jobs)
            return jobs

    def result(self, name: str, timeout: float | None = None) -> Any:
        with _waiting(self._tracer, name):
            return super().result(name, timeout)


class TracingAsyncClient(AsyncClient):
    """The async client with spans."""

    def __init__(self, settings: Settings, *, tracer: trace.Tracer, **given: Any) -> None:
        super().__init__(settings, **given)
        self._tracer = tracer
        self.core = TracingCore(settings, self.core.registry, self._handles)

    async def submit(self, type_name: str, payload: Any, **options: Any) -> AsyncJobHandle:
        with _sending(self._tracer, type_name, **{"tqe.job.type": type_name}) as span:
            # With an option given, even as None, its options are its own: they carry the trace.
            job = await super().submit(type_name, payload, **{"track": None, **options})
            _sent(span, job)
            return job

    async def submit_many(
        self, items: Iterable[Any], *, collect: bool = False, progress: Progress | None = None, **options: Any
    ) -> AsyncJobHandles:
        with _sending(self._tracer, "many") as span:
            jobs = await super().submit_many(items, collect=collect, progress=progress, **options)
            _sent_many(span, jobs)
            return jobs

    async def submit_alike(
        self,
        task: Task[..., Any] | str,
        payloads: Iterable[Any],
        *,
        collect: bool = False,
        progress: Progress | None = None,
        **options: Any,
    ) -> AsyncJobHandles:
        with _sending(self._tracer, _name(task), **{"tqe.job.type": _name(task)}) as span:
            jobs = await super().submit_alike(task, payloads, collect=collect, progress=progress, **options)
            _sent_many(span, jobs)
            return jobs

    async def result(self, name: str, timeout: float | None = None) -> Any:
        with _waiting(self._tracer, name):
            return await super().result(name, timeout)


# ------------------------------------------------------------------ running


class RunSpan:
    """The span of one run. `context` is where the job runs; the span is the current one there."""

    def __init__(
        self, tracer: trace.Tracer, job: CurrentJob, carrier: Mapping[str, str], waited_s: float
    ) -> None:
        told: dict[str, str | int | float] = {
            "messaging.system": SYSTEM,
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": job.lane,
            "messaging.message.id": job.id,
            "tqe.job.type": job.type,
            "tqe.job.attempt": job.attempt,
            "tqe.job.wait_s": waited_s,
        }
        parent = propagate.extract(carrier)
        self._span = tracer.start_span(
            f"process {job.type}", context=parent, kind=trace.SpanKind.CONSUMER, attributes=told
        )
        self.context = contextvars.copy_context()
        self.context.run(otel_context.attach, trace.set_span_in_context(self._span, parent))

    def failed(self, error: BaseException, reason: str) -> None:
        """The run failed so."""
        self._span.record_exception(error)
        self._span.set_attribute("error.type", type(error).__qualname__)
        self._span.set_status(trace.StatusCode.ERROR, reason)

    def end(self) -> None:
        """The run is over."""
        self._span.end()
