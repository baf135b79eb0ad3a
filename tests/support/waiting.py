"""Waiting for a condition, instead of sleeping and hoping."""

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_FIRST_PAUSE_S = 0.0005
_LONGEST_PAUSE_S = 0.02


def wait_until(condition: Callable[[], T], timeout: float = 10.0, what: str = "") -> T:
    """Return the first truthy value of `condition`; fail with `what` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    pause = _FIRST_PAUSE_S
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(_text(condition, timeout, what, value))
        time.sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE_S)


async def await_until(condition: Callable[[], T], timeout: float = 10.0, what: str = "") -> T:
    """`wait_until` for a test that runs in an event loop, which goes on meanwhile."""
    deadline = time.monotonic() + timeout
    pause = _FIRST_PAUSE_S
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(_text(condition, timeout, what, value))
        await asyncio.sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE_S)


def _text(condition: Callable[[], object], timeout: float, what: str, value: object) -> str:
    name = what or getattr(condition, "__qualname__", repr(condition))
    return f"not within {timeout} s: {name} (last value: {value!r})"
