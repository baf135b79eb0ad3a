"""Owns the ASGI application: the routes of the table, and how every failure becomes a problem document."""

from __future__ import annotations

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from tqe import __version__
from tqe.api import openapi
from tqe.api.endpoints import ENDPOINTS, Endpoint
from tqe.api.problems import Problem, of_error
from tqe.api.service import Service
from tqe.errors import TQEError
from tqe.telemetry import logs

_log = logs.get("api")


def build(service: Service) -> Starlette:
    """The application of one server process."""
    described = msgspec.json.encode(openapi.document(ENDPOINTS, version=__version__))

    async def openapi_document(request: Request) -> Response:
        return Response(described, media_type="application/json")

    routes = [_route(service, endpoint) for endpoint in ENDPOINTS]
    routes.append(Route("/openapi.json", openapi_document))
    return Starlette(
        routes=routes, lifespan=service.running, exception_handlers={HTTPException: _http_problem}
    )


def _route(service: Service, endpoint: Endpoint) -> Route:
    handle = endpoint.handle

    async def serve(request: Request) -> Response:
        try:
            return await handle(service, request)
        except Problem as problem:
            return problem.response()
        except TQEError as e:
            return of_error(e).response()
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        except Exception:
            _log.exception("a request failed", method=request.method, path=request.url.path)
            return Problem(
                500,
                "internal-error",
                "The server failed",
                "this is a defect of the server; its log tells more",
            ).response()

    return Route(endpoint.path, serve, methods=[endpoint.method])


async def _http_problem(request: Request, error: Exception) -> Response:
    """What the router says by itself: no such path, not with this method."""
    assert isinstance(error, HTTPException)
    texts: dict[int, tuple[str, str, str]] = {
        404: ("not-found", "Not found", "there is no such path; /openapi.json lists those that there are"),
        405: ("method-not-allowed", "The path does not take this method", f"not {request.method} here"),
    }
    name, title, detail = texts.get(error.status_code, ("http-error", "The request failed", error.detail))
    return Problem(error.status_code, name, title, detail).response(error.headers)
