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
    idempotency_key: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
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
    predicted_ms: Annotated[
        int | None, Meta(description="How long it will run: as predicted, or its type's mean.")
    ]
    predicted_wait_ms: Annotated[int | None, Meta(description="How long until it starts, as of now.")]


class Cancelled(Struct, rename="camel"):
    """`requested`: it runs, or a worker has it, and was asked to drop it."""

    id: str
    outcome: Literal["cancelled", "requested"]


class BatchLine(Struct, rename="camel", omit_defaults=True):
    """The answer to one line of a batch: either `id` and `created`, or `error`."""

    line: Annotated[int, Meta(description="Number of the line in the request, from 1.")]
    id: str | None = None
    created: bool | None = None
    error: ProblemDocument | None = None


class Lane(Struct, rename="camel"):
    """A lane and what waits in it, in jobs; `sorted` of the `queued` are in its ordered part."""

    name: str
    queued: int
    sorted: int
    paused: bool
    oldest_age_ms: int | None
    predicted_wait_ms: int | None
    predicted_backlog_ms: Annotated[int, Meta(description="How long one worker would be busy with it.")]


class Queues(Struct, rename="camel"):
    """The whole queue, in jobs."""

    queues: list[Lane]
    running: int
    scheduled: int
    dead: int
    quarantined_frames: int
    parked_frames: int
    submitted_per_s: float
    ended_per_s: float
    totals: dict[str, int]
    predicted_backlog_ms: Annotated[int, Meta(description="The same of all lanes that are not paused.")]


class LanePaused(Struct, rename="camel"):
    """Whether workers take nothing from the lane."""

    name: str
    paused: bool


class LanePurged(Struct, rename="camel"):
    """How many jobs were cancelled."""

    name: str
    purged: int


class Schedule(Struct, rename="camel"):
    """A schedule: either `expression`, read in the zone `tz`, or `every` so many seconds."""

    name: str
    app: str
    type: str
    expression: str | None
    every: float | None
    tz: str
    payload: dict[str, Any]
    missed: Literal["skip", "once", "all"]
    jitter: Annotated[float, Meta(description="Seconds within which a job starts after its slot.")]
    overlap: bool
    slot_as: str | None
    options: dict[str, Any]
    paused: bool
    last: Annotated[str | None, Meta(description="Up to when its slots have been seen to.")]
    last_job: str | None
    next: str | None


class Schedules(Struct, rename="camel"):
    """All schedules; `damaged` are names of those that cannot be read."""

    schedules: list[Schedule]
    damaged: list[str]


class SchedulePaused(Struct, rename="camel"):
    """Whether a schedule submits nothing."""

    name: str
    paused: bool


class RunningJob(Struct, rename="camel"):
    """A job that runs, since ms since 1970; async jobs do not tell their type."""

    id: str
    type: str
    since_ms: int


class Worker(Struct, rename="camel"):
    """One worker process, as of the last second."""

    incarnation: str
    host: str
    worker: int
    pid: int
    cpu: int | None
    state: str
    lanes: list[str]
    jobs: list[RunningJob]


class Workers(Struct, rename="camel"):
    """All workers that live."""

    workers: list[Worker]


class DeadEntry(Struct, rename="camel", omit_defaults=True):
    """A dead job; its payload where one was asked for."""

    id: str
    type: str | None
    lane: str | None
    reason: str | None
    error: str | None
    attempts: int
    crashes: int
    died_at: str | None
    payload: dict[str, Any] | None = None


class DeadPage(Struct, rename="camel"):
    """A page, newest first. With a filter it may be short or empty; `cursor` null: it was the last."""

    jobs: list[DeadEntry]
    cursor: str | None


class DeadGroup(Struct, rename="camel"):
    """Dead jobs of one type, reason and error."""

    type: str | None
    reason: str | None
    error: str
    count: int
    newest: str | None
    sample: str
    ids: list[str]


class DeadGroups(Struct, rename="camel"):
    """Groups of the newest dead jobs; `more`: there are older ones that were not looked at."""

    groups: list[DeadGroup]
    jobs: int
    more: bool


class Selection(Struct, rename="camel", forbid_unknown_fields=True):
    """Which dead jobs: one of `ids`, `type` and the beginning of `reason`, or `all`."""

    ids: list[str] | None = None
    type: str | None = None
    reason: str | None = None
    all: bool = False
    dry_run: bool = False


class Replayed(Struct, rename="camel", omit_defaults=True):
    """How many run again, and the ids of those that do not; after a dry run only `matched`."""

    replayed: int | None = None
    missing: list[str] | None = None
    damaged: list[str] | None = None
    unknown: list[str] | None = None
    matched: int | None = None


class Deleted(Struct, rename="camel", omit_defaults=True):
    """How many are gone; after a dry run only `matched`."""

    deleted: int | None = None
    matched: int | None = None


class Health(Struct, rename="camel"):
    """Alive, or ready."""

    status: str


class ProblemDocument(Struct, rename="camel"):
    """RFC 9457. Some problems have more members, such as firstId, priorities, limitBytes."""

    type: str
    title: str
    status: int
    detail: str
