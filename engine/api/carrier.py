"""Owns the way of a trace (W3C Trace Context) from a request to the jobs that it submits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, Final

from starlette.requests import Request

from tqe.client.core import AnyTask, Core
from tqe.job import SubmitOptions

_PARENT: Final = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-([0-9a-f]{2})(-.*)?"
)
_STATE_CHARS_MAX: Final = 512
_carried: Final[ContextVar[tuple[tuple[str, str], ...]]] = ContextVar("tqe_carried", default=())


def carry(request: Request) -> dict[str, Any]:
    """What is submitted in this context from now on carries the request's trace, if it has a sampled one; as
    with other producers, nothing else is carried. The answer goes into the options of a submission."""
    _carried.set(
        ()
    )  # the task of a request that was sent behind another one has inherited that one's context
    parent, state = request.headers.get("traceparent", ""), request.headers.get("tracestate", "")
    found = _PARENT.fullmatch(parent)
    if found is None or not int(found[1], 16) & 1:
        return {}
    kept = state and len(state) <= _STATE_CHARS_MAX and state.isascii() and state.isprintable()
    _carried.set((("traceparent", parent), *((("tracestate", state),) if kept else ())))
    return {"track": None}  # an option given: with none, jobs of a kind share the same ones


class CarryingCore(Core):
    """Gives each job the trace of the request that submits it."""

    def options(self, task: AnyTask | None, given: Mapping[str, Any]) -> SubmitOptions:
        """As of any client, and the trace."""
        found, carried = super().options(task, given), _carried.get()
        return replace(found, trace=carried) if carried else found
