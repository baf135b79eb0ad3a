"""The job that is running here, for the code of tasks.

A synchronous job is looked up where the hot path keeps it, which costs nothing until somebody asks; jobs that share a process
(coroutines, the helper thread) are told apart by a context variable.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, kw_only=True, slots=True)
class CurrentJob:
    """What a task may know about its own job.

    `attempt` counts from 1 and leaves out crashes. `token` names this very lease: a store of the user's that remembers the
    token can refuse what an earlier, slower execution still sends.
    """

    id: str
    type: str
    lane: str
    attempt: int
    crashes: int
    token: str


IN_CONTEXT: Final[ContextVar[CurrentJob | None]] = ContextVar("tqe_current_job", default=None)
_inline: Callable[[], CurrentJob | None] | None = None


def current_job() -> CurrentJob:
    """The job that this code runs in. RuntimeError outside of a worker's job."""
    job = IN_CONTEXT.get()
    if job is None and _inline is not None:
        job = _inline()
    if job is None:
        raise RuntimeError("current_job() was called outside of a job: only a task that a worker runs has one")
    return job


def set_inline(lookup: Callable[[], CurrentJob | None] | None) -> None:
    """The worker says how to find the job that runs inline (None: there is no worker any more)."""
    global _inline
    _inline = lookup
