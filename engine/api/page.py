"""Owns the files of the pages: what is served for each, and what a browser may do with them."""

from __future__ import annotations

from importlib import resources
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_TYPES: Final = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# Nothing but our own files and our own API; no script or style in the page; no text ever becomes markup
# (trusted types), whatever stands in a job's payload or error; and nobody may frame the page.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    " require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def routes() -> list[Route]:
    """`/` and `/assets/…`. Open to all: there is nothing of the queue in them."""
    found = []
    for file in sorted(resources.files("tqe.api").joinpath("assets").iterdir(), key=lambda one: one.name):
        path = "/" if file.name == "index.html" else f"/assets/{file.name}"
        found.append(route(path, file.read_bytes(), file.name.rpartition(".")[2]))
    return found


def route(path: str, content: bytes, kind: str = "html") -> Route:
    """One file, which a browser may use as the policy says."""

    async def serve(request: Request) -> Response:
        return Response(content, headers=_HEADERS, media_type=_TYPES[kind])

    return Route(path, serve)
