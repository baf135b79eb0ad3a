"""Steps: what a procedure asks of its connection, so that the sync and the async client share every
procedure.

A procedure is a generator that yields steps, is sent their answers, gets their failures thrown in, and
returns its result. Nothing in it waits or touches a socket.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from tqe.store.call import Call

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Reads:
    """Plain commands that change nothing, sent together; the answer is the list of their replies."""

    commands: tuple[tuple[bytes | str | int | float, ...], ...]


@dataclass(frozen=True, slots=True)
class Begin:
    """Send a call and do not wait for its answer; at most one is under way. Nothing is raised here: whatever
    becomes of the call is told to `Finish`."""

    call: Call


@dataclass(frozen=True, slots=True)
class Finish:
    """Wait for the answer of the call that was begun."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Do nothing for so long."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Listen:
    """Subscribe to a channel; the answer comes when the server has confirmed it."""

    channel: bytes


@dataclass(frozen=True, slots=True)
class Hear:
    """Wait for a message on what is listened to, at most so long; the answer is whether one came."""

    seconds: float


Step = Call | Reads | Begin | Finish | Pause | Listen | Hear
Steps = Generator[Step, Any, T]
