"""Owns what goes over the wire, as types: the OpenAPI document is made of them, field names in camelCase."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct


class JobRequest(Struct, rename="camel", omit_defaults=True):
    """A job to submit."""

    type: Annotated[str, Meta(pattern="^[A-Za-z0-9_.:-]{1,64}$", description="The name of the task.")]
    payload: Annotated[
        dict[str, Any] | str, Meta(description="The task's arguments: an object, or the same as a JSON text.")
    ] = {}
    priority: Annotated[str | None, Meta(description="The lane, in any case: HIGH, normal, …")] = None
    idempotency_key: Annotated[str, Meta(min_length=1, max_length=1024)] | None = None
    delay: Annotated[float, Meta(ge=0, description="Seconds until it may run.")] | None = None
    run_at: Annotated[
        str | float | None, Meta(description="ISO 8601 with a zone, or seconds since 1970; not with delay.")
    ] = None
    timeout: Annotated[float, Meta(gt=0, description="Seconds after which a run is stopped.")] | None = None
    max_retries: Annotated[int, Meta(ge=0, le=1000)] | None = None
    expires: (
        Annotated[float, Meta(gt=0, description="Seconds after which it is dropped if it has not started.")]
        | None
    ) = None
    track: Annotated[bool | None, Meta(description="false: no status, no result.")] = None


class Submitted(Struct, rename="camel"):
    """What became of a submission."""

    id: str
    status: str
    created: Annotated[bool, Meta(description="false: an idempotency key found the job that was there.")]
    predicted_wait_ms: Annotated[
        int | None, Meta(description="Until it starts, going by the backlog and the rate; null: unknown.")
    ]


class JobDocument(Struct, rename="camel"):
    """One job: the fields of `tqe job --json`."""

    id: str
    type: str | None
    status: Literal["scheduled", "queued", "running", "retrying", "completed", "dead", "cancelled"]
    lane: str | None
    attempts: int
    submitted_at: str | None
    started_at: str | None
    finished_at: str | None
    result: Any
    error: str | None


class Cancelled(Struct, rename="camel"):
    """`requested`: it runs, or a worker has it, and was asked to drop it."""

    id: str
    outcome: Literal["cancelled", "requested"]


class Health(Struct, rename="camel"):
    """Alive, or ready."""

    status: str


class ProblemDocument(Struct, rename="camel"):
    """RFC 9457. Some problems have more members, such as firstId, priorities, limitBytes."""

    type: str
    title: str
    status: int
    detail: str
