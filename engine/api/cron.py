"""Owns the routes of schedules: list, pause, resume."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from tqe.api.bodies import answer
from tqe.api.documents import cron_document
from tqe.api.problems import not_found
from tqe.api.service import Service
from tqe.store import scheduling
from tqe.store.scheduling import Row, View


async def show(service: Service, request: Request) -> Response:
    """All schedules."""
    view = await _look(service)
    schedules = [cron_document(row, view.now_ms) for row in view.rows.values()]
    return answer({"schedules": schedules, "damaged": list(view.damaged)})


async def pause(service: Service, request: Request) -> Response:
    """It submits nothing until it is resumed."""
    row = _row(request, await _look(service))
    name = row.schedule.name
    await service.client.run(scheduling.pause(service.client.core.keys, name))
    return answer({"name": name, "paused": True})


async def resume(service: Service, request: Request) -> Response:
    """Its slots count again, from now on."""
    view = await _look(service)
    row = _row(request, view)
    name = row.schedule.name
    if row.paused:
        await service.client.run(scheduling.resume(service.client.core.keys, name, view.now_ms))
    return answer({"name": name, "paused": False})


async def _look(service: Service) -> View:
    return await service.client.run(scheduling.look(service.client.core.keys))


def _row(request: Request, view: View) -> Row:
    name = str(request.path_params["name"])
    row = view.rows.get(name)
    if row is None:
        raise not_found(f"there is no schedule {name[:64]!r}; /api/v1/cron lists those that there are")
    return row
