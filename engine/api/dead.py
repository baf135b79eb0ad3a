"""Owns the routes of the dead-letter queue: list, group, show, replay, delete."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tqe.api.bodies import answer, finite, job_name_of, object_of, wrong_query
from tqe.api.documents import dead_document
from tqe.api.problems import Problem, not_found, outward
from tqe.api.service import Service
from tqe.api.shapes import Selection
from tqe.job import split_job_id
from tqe.store import reading
from tqe.store.producing import Replayed
from tqe.store.reading import Cursor

IDS_MAX: Final = 10_000


async def show_all(service: Service, request: Request) -> Response:
    """A page, newest first."""
    query = request.query_params
    page = await service.client.dead_page(
        type_name=query.get("type"), reason=query.get("reason"), cursor=_cursor(query.get("cursor"))
    )
    after = page.cursor
    return answer(
        {
            "jobs": [dead_document(job) for job in page.jobs],
            "cursor": None if after is None else f"{after.died_ms:.17g}/{after.id.decode()}",
        }
    )


def _cursor(text: str | None) -> Cursor | None:
    if text is None:
        return None
    died_ms, _, name = text.partition("/")
    try:
        split_job_id(name)
        return Cursor(finite(died_ms), name.encode())
    except ValueError as e:
        raise wrong_query("cursor", "is no cursor of an earlier page") from e


async def groups(service: Service, request: Request) -> Response:
    """The newest dead jobs by type, reason and error, the largest group first."""
    return answer(await service.groups.document())


async def show(service: Service, request: Request) -> Response:
    """One entry with its payload."""
    name = job_name_of(request)
    job = await service.client.dead_job(name)
    if job is None:
        raise _not_dead(name)
    return answer(dead_document(job) | {"payload": job.payload})


async def replay_one(service: Service, request: Request) -> Response:
    """Run it again."""
    name = job_name_of(request)
    done = await service.client.replay(name)
    service.groups.forget()
    if done.missing:
        raise _not_dead(name)
    return answer(replay_document(done))


async def replay_many(service: Service, request: Request) -> Response:
    """Run again what the body selects."""
    wanted = await _selection(request)
    if wanted.dry_run:
        return answer({"matched": await _count(service, wanted)})
    if wanted.ids is not None:
        done = await service.client.replay(*wanted.ids)
    else:
        done = await service.client.replay_all(type_name=wanted.type, reason=wanted.reason)
    service.groups.forget()
    return answer(replay_document(done))


def replay_document(done: Replayed) -> dict[str, Any]:
    """How many were replayed, and the ids of those that were not."""
    return {
        "replayed": len(done.replayed),
        "missing": list(done.missing),
        "damaged": list(done.damaged),
        "unknown": list(done.unknown),
    }


async def delete_one(service: Service, request: Request) -> Response:
    """Drop it for good."""
    name = job_name_of(request)
    deleted = await service.client.purge(name)
    service.groups.forget()
    if not deleted:
        raise _not_dead(name)
    return answer({"deleted": 1})


async def delete_many(service: Service, request: Request) -> Response:
    """Drop what the body selects."""
    wanted = await _selection(request)
    if wanted.dry_run:
        return answer({"matched": await _count(service, wanted)})
    if wanted.ids is not None:
        deleted = await service.client.purge(*wanted.ids)
    else:
        deleted = await service.client.purge_all(type_name=wanted.type, reason=wanted.reason)
    service.groups.forget()
    return answer({"deleted": deleted})


async def _selection(request: Request) -> Selection:
    body: Mapping[str, Any] = await object_of(request)
    try:
        wanted = msgspec.convert(body, Selection)
        for name in wanted.ids or ():
            split_job_id(name)
    except (msgspec.ValidationError, ValueError) as e:
        raise Problem(422, "invalid-selection", "The selection cannot be used", outward(str(e))) from e
    ways = (wanted.ids is not None, wanted.type is not None or wanted.reason is not None, wanted.all)
    if sum(ways) != 1 or len(wanted.ids or ()) > IDS_MAX:
        # A body that was forgotten must not mean everything.
        detail = f'give "ids" (at most {IDS_MAX}), or "type" and "reason", or "all": true; one of these'
        raise Problem(422, "invalid-selection", "The selection cannot be used", detail)
    return wanted


async def _count(service: Service, wanted: Selection) -> int:
    keys = service.client.core.keys
    if wanted.ids is not None:
        return await service.client.run(reading.dead_among(keys, wanted.ids))
    if wanted.all:
        return await service.client.run(reading.dead_total(keys))
    count, cursor = 0, None
    while True:
        page = await service.client.dead_page(type_name=wanted.type, reason=wanted.reason, cursor=cursor)
        count += len(page.jobs)
        cursor = page.cursor
        if cursor is None:
            return count


def _not_dead(name: str) -> Problem:
    return not_found(f"job {name} is not in the dead-letter queue")
