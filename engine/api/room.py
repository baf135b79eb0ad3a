"""Owns how many bytes of requests a server process holds at once, over all its connections."""

from __future__ import annotations

from typing import Any, Final

from tqe.api.problems import Problem

# Each request has a limit of its own, but 2,000 connections times that limit are more than a container has.
ROOM_BYTES: Final = 64 * 1024 * 1024
# So much of a request finds room always, or a few large bodies that come slowly would keep out all others.
SMALL_BYTES: Final = 16 * 1024
HOLD: Final = "tqe.hold"  # in a request's scope: what it holds


class Room:
    """What all requests of this process hold together, beyond the small part of each."""

    def __init__(self, limit_bytes: int = ROOM_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0


class Hold:
    """What one request holds until it is answered: its body, and of a batch what has not been submitted of it
    and the lines of its answer. `over`: there was no room for all of it."""

    __slots__ = ("_counted", "_ended", "_room", "_size", "over")

    def __init__(self, room: Room) -> None:
        self._room = room
        self._size = 0
        self._counted = 0
        self._ended = False
        self.over = False

    def add(self, size: int) -> bool:
        """Hold so many bytes more, or less. False, and they do not count, if there is no room for them."""
        if self._ended:
            return True  # the client is gone, and what worked for it has not noticed yet
        counted = max(0, self._size + size - SMALL_BYTES)
        more = counted - self._counted
        if more > 0 and self._room.held_bytes + more > self._room.limit_bytes:
            self.over = True
            return False
        self._room.held_bytes += more
        self._size += size
        self._counted = counted
        return True

    def end(self) -> None:
        """Hold nothing any more, for good."""
        self.add(-self._size)
        self._ended = True


def hold_of(scope: Any) -> Hold:
    """What a request holds."""
    hold: Hold = scope[HOLD]
    return hold


def no_room() -> Problem:
    """What is told to a request that does not fit beside the others."""
    detail = "this server process holds as many bytes of requests as it may: send it again, or less at once"
    return Problem(503, "too-busy", "Too much comes in at once", detail, retry_after_s=1)
