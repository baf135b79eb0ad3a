"""Owns reading what clients send: bodies within their limits, queries with their types, that they are gone;
and writing JSON."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Final

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive

from tqe.api.problems import Problem, body_too_large, not_found
from tqe.codec.payload import parse_json
from tqe.job import split_job_id

BODY_BYTES_MAX: Final = 1024 * 1024
JSON_TYPES: Final = frozenset({"application/json"})
LINE_TYPES: Final = frozenset({"application/x-ndjson", "application/ndjson", "application/jsonl"})

_CANCEL_S: Final = 0.5

_encode: Final = msgspec.json.Encoder().encode
_JSON_HEADERS: Final = {"content-type": "application/json"}


def answer(value: Any, status: int = 200) -> Response:
    """A JSON answer."""
    return Response(_encode(value), status, headers=_JSON_HEADERS)


async def body_of(request: Request, *, limit_bytes: int = BODY_BYTES_MAX) -> bytes:
    """The whole body of a request of JSON."""
    check_type(request, JSON_TYPES)
    parts = [part async for part in pieces_of(request, limit_bytes=limit_bytes)]
    return parts[0] if len(parts) == 1 else b"".join(parts)


async def object_of(request: Request) -> dict[str, Any]:
    """The body as a JSON object; {} if there is no body."""
    raw = await body_of(request)
    return parse_json(raw, payload_max_bytes=BODY_BYTES_MAX, what="body") if raw.strip() else {}


async def pieces_of(request: Request, *, limit_bytes: int) -> AsyncIterator[bytes]:
    """The body as it arrives. Raises Problem as soon as it is, or says that it will be, above the limit."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit_bytes:
        raise body_too_large(limit_bytes)
    size, more = 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        piece: bytes = message.get("body", b"")
        more = message.get("more_body", False)
        size += len(piece)
        if size > limit_bytes:
            raise body_too_large(limit_bytes)
        if piece:
            yield piece


async def while_connected(receive: Receive, *work: Coroutine[Any, Any, None]) -> None:
    """Run these beside each other until one has ended or the client is gone; the others are cancelled.
    Raises what the first one raised."""
    tasks = [asyncio.create_task(one) for one in (*work, _departure(receive))]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        # Not for ever: a cancel that comes while a connection is being opened can get lost in it.
        ended, _ = await asyncio.wait(tasks, timeout=_CANCEL_S)
        for task in ended:
            if not task.cancelled():
                task.exception()  # what is told is told; asyncio would log it as never looked at


async def _departure(receive: Receive) -> None:
    """Returns when the client is gone; what it still sends is nobody's."""
    while (await receive())["type"] != "http.disconnect":
        pass


def check_type(request: Request, allowed: frozenset[str]) -> None:
    """A body of another type is refused. Not for tidiness: a page of another site can make a browser send
    forms and plain text here without asking, but not JSON."""
    given = request.headers.get("content-type")
    kind = "" if given is None else given.partition(";")[0].strip().lower()
    if given is not None and kind not in allowed:
        wanted = " or ".join(sorted(allowed))
        detail = f"the body is {kind[:60] or 'of no type'}; send it as Content-Type: {wanted}"
        raise Problem(415, "wrong-content-type", "A body of this type is not taken", detail)
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        detail = "a compressed body is not taken: send it as it is"
        raise Problem(415, "wrong-content-encoding", "A body in this encoding is not taken", detail)


def job_name_of(request: Request) -> str:
    """The job id of the path. What is none cannot be there."""
    name = str(request.path_params["id"])
    try:
        split_job_id(name)
    except ValueError as e:
        raise not_found(str(e)) from e
    return name


def query_number(request: Request, name: str, default: float, *, least: float, most: float) -> float:
    """A number of the query, within bounds. Raises Problem when it is none."""
    text = request.query_params.get(name)
    if text is None:
        return default
    try:
        value = finite(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        raise wrong_query(name, f"takes a number from {least:g} to {most:g}")
    return value


def finite(text: str) -> float:
    """The number that a text says; ValueError for none, and for NaN and infinities."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def wrong_query(name: str, detail: str) -> Problem:
    """A parameter of the query cannot be used."""
    return Problem(400, "invalid-query", "A parameter cannot be used", f"{name} {detail}", parameter=name)
