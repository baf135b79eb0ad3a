"""Owns the ASGI application: the routes of the table, and how every failure becomes a problem document."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from tqe import __version__
from tqe.api import openapi, page, reference
from tqe.api.endpoints import ENDPOINTS, Endpoint
from tqe.api.problems import Problem, of_error
from tqe.api.service import Service
from tqe.errors import TQEError
from tqe.telemetry import logs

Handler = Callable[[Request], Awaitable[Response]]

_log = logs.get("api")


def build(service: Service) -> Starlette:
    """The application of one server process."""
    document = openapi.document(ENDPOINTS, version=__version__)
    described, shown = msgspec.json.encode(document), reference.page(document)

    async def openapi_document(request: Request) -> Response:
        return Response(described, media_type="application/json")

    by_path: dict[str, dict[str, Handler]] = {}
    for endpoint in ENDPOINTS:
        by_path.setdefault(endpoint.path, {})[endpoint.method] = _handler(service, endpoint)
    routes = [_route(path, handlers) for path, handlers in by_path.items()]
    routes += [Route("/openapi.json", openapi_document), page.route("/docs", shown), *page.routes()]
    return Starlette(
        routes=routes,
        lifespan=service.running,
        exception_handlers={HTTPException: _http_problem},
        middleware=_cross_origin(service.settings.http_origins),
    )


def _cross_origin(origins: Sequence[str]) -> list[Middleware]:
    """What lets pages of these origins call with a token. Never with cookies, of which we know none."""
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["Retry-After"],
        )
    ]


def _route(path: str, handlers: Mapping[str, Handler]) -> Route:
    """One for all methods of a path: of several, the first would say that it takes none of the others'."""

    async def serve(request: Request) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        return await handlers[method](request)

    return Route(path, serve, methods=list(handlers))


def _handler(service: Service, endpoint: Endpoint) -> Handler:
    handle, scope, changes = endpoint.handle, endpoint.scope, endpoint.method != "GET"

    async def serve(request: Request) -> Response:
        try:
            if scope is not None:
                token = await service.guard.admit(request, scope, changes=changes)
                service.limits.ask(request, token)
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

    return serve


async def _http_problem(request: Request, error: Exception) -> Response:
    """What the router says by itself: no such path, not with this method."""
    assert isinstance(error, HTTPException)
    texts: dict[int, tuple[str, str, str]] = {
        404: ("not-found", "Not found", "there is no such path; /openapi.json lists those that there are"),
        405: (
            "method-not-allowed",
            "The path does not take this method",
            f"not {request.method} here, but {(error.headers or {}).get('Allow', 'others')}",
        ),
    }
    name, title, detail = texts.get(error.status_code, ("http-error", "The request failed", error.detail))
    return Problem(error.status_code, name, title, detail).response(error.headers)
