"""Owns what a client is told when something is wrong: problem documents (RFC 9457), one for each error."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from starlette.responses import Response

from tqe.errors import (
    ArgumentsError,
    IdempotencyConflict,
    InvalidOption,
    InvalidPayload,
    PayloadTooLarge,
    QueueFull,
    RedisUnavailable,
    ServerUnfit,
    SubmitUnknown,
    TQEError,
    UnknownLane,
)
from tqe.job import OUTWARD_NAMES

MEDIA_TYPE: Final = "application/problem+json"
_PREFIX: Final = "urn:tqe:problem:"
_OUTWARD: Final = {snake: camel for camel, snake in OUTWARD_NAMES.items()}
# Quoted text first: a name in it is none. Its end may have been cut off.
_NAMES: Final = re.compile(
    r"""(?<!\w)(['"`])(?:\\.|(?!\1).)*(?:\1|$)|\b(?:""" + "|".join(_OUTWARD) + r")\b", re.DOTALL
)

# The first that fits counts: class, status, name, title, seconds after which trying again makes sense.
_KINDS: Final[tuple[tuple[type[TQEError], int, str, str, int], ...]] = (
    (PayloadTooLarge, 413, "payload-too-large", "The payload is too large", 0),
    (IdempotencyConflict, 409, "idempotency-conflict", "The idempotency key belongs to another job", 0),
    (InvalidPayload, 400, "invalid-body", "The body cannot be used", 0),
    (UnknownLane, 422, "unknown-priority", "There is no such priority", 0),
    (ArgumentsError, 422, "wrong-arguments", "The payload does not fit the task", 0),
    (InvalidOption, 422, "invalid-option", "An option cannot be used", 0),
    (QueueFull, 503, "queue-full", "Redis takes no more jobs", 5),
    (SubmitUnknown, 504, "outcome-unknown", "Nobody can tell whether the job was created", 0),
    (RedisUnavailable, 503, "redis-unavailable", "Redis does not answer", 1),
    (ServerUnfit, 503, "redis-unfit", "Redis must not be used as it is", 30),
)


class Problem(Exception):
    """A request that is answered with a problem document. `facts` are members of it for programs."""

    def __init__(
        self, status: int, name: str, title: str, detail: str, *, retry_after_s: int = 0, **facts: Any
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.name = name
        self.title = title
        self.detail = detail
        self.retry_after_s = retry_after_s
        self.facts = facts

    def document(self) -> dict[str, Any]:
        """The members of the document."""
        return {
            "type": _PREFIX + self.name,
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            **self.facts,
        }

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        """The answer."""
        found = dict(headers or {})
        if self.retry_after_s:
            found["Retry-After"] = str(self.retry_after_s)
        if self.status == 401:
            found["WWW-Authenticate"] = "Bearer"
        body = msgspec.json.encode(self.document())
        return Response(body, self.status, headers=found, media_type=MEDIA_TYPE)


def of_error(error: TQEError) -> Problem:
    """What an error of the engine means for who asked over HTTP."""
    for kind, status, name, title, retry_after_s in _KINDS:
        if isinstance(error, kind):
            return Problem(
                status, name, title, outward(str(error)), retry_after_s=retry_after_s, **_facts(error)
            )
    return Problem(500, "engine-error", "The engine failed", outward(str(error)))


def _facts(error: TQEError) -> dict[str, Any]:
    if isinstance(error, IdempotencyConflict):
        return {"firstId": error.first_id}
    if isinstance(error, UnknownLane):
        return {"priorities": list(error.lanes)}
    if isinstance(error, SubmitUnknown):
        return {"id": error.job_id}
    if isinstance(error, PayloadTooLarge):
        return {"limitBytes": error.limit_bytes}
    return {}


def outward(text: str) -> str:
    """Names of options as they are spelt on the wire. What is quoted is the caller's, and stays."""
    return _NAMES.sub(lambda found: _OUTWARD.get(found[0], found[0]), text)


def not_found(detail: str) -> Problem:
    """What was asked for is not there."""
    return Problem(404, "not-found", "Not found", detail)


def body_too_large(limit_bytes: int) -> Problem:
    """A request's body is above the limit of its route."""
    detail = f"the body is larger than {limit_bytes} bytes, which is what this route takes"
    return Problem(413, "body-too-large", "The body is too large", detail, limitBytes=limit_bytes)
