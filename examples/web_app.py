"""A Starlette app that submits jobs and shows how they end; FastAPI is the same, with its own way of routing.

Run `tqe run examples.web_app:jobs` and `uvicorn examples.web_app:web` side by side.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tqe import App, IdempotencyConflict, JobFailed, RedisUnavailable, ResultTimeout, SubmitError

jobs = App("shop")


@jobs.task("REPORT", timeout=60, max_retries=2)
async def report(customer: str, months: int = 1) -> dict[str, object]:
    """Stands for work that no request should wait for."""
    if months < 1:
        raise ValueError(f"{months} months are none")
    await asyncio.sleep(0.01 * months)
    return {"customer": customer, "pages": 3 * months}


async def order_report(request: Request) -> Response:
    """202 with the job's id. The same Idempotency-Key orders the same report once."""
    body = await request.json()
    try:
        job = await jobs.asubmit("REPORT", body, idempotency_key=request.headers.get("idempotency-key"))
    except IdempotencyConflict as e:
        return JSONResponse({"error": str(e)}, 409)
    except SubmitError as e:  # arguments that the task does not take, a payload that is too large, …
        return JSONResponse({"error": str(e)}, 422)
    except RedisUnavailable as e:
        return JSONResponse({"error": str(e)}, 503, {"Retry-After": "1"})
    return JSONResponse({"id": job.id, "created": job.created}, 202, {"Location": f"/reports/{job.id}"})


async def show_report(request: Request) -> Response:
    """The result if it comes within a second, else how far the job is."""
    try:
        job = jobs.async_client.handle(request.path_params["id"])
    except ValueError as e:  # no id at all
        return JSONResponse({"error": str(e)}, 404)
    try:
        return JSONResponse({"status": "completed", "result": await job.result(timeout=1)})
    except ResultTimeout:
        return JSONResponse({"status": await job.status()}, 202)
    except JobFailed as e:
        return JSONResponse({"status": "dead", "error": e.error.strip().splitlines()[-1]})


@contextlib.asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    """At the end, send what is still waiting and disconnect."""
    yield
    await jobs.aclose()


web = Starlette(
    routes=[
        Route("/reports", order_report, methods=["POST"]),
        Route("/reports/{id}", show_report),
    ],
    lifespan=lifespan,
)
