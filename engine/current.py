"""The job that is running here, for the code of tasks.

Nothing is made until somebody asks: a synchronous job is looked up where the hot path keeps it, and jobs that
share a process
(coroutines, the helper thread) are told apart by a context variable, which holds whatever the worker has put
there.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True, kw_only=True, slots=True)
class CurrentJob:
    """What a task may know about its own job.

    `attempt` counts from 1 and leaves out crashes. `token` names this very lease: a store of the user's that
    remembers the token can refuse what an earlier, slower execution still sends.
    """

    id: str
    type: str
    lane: str
    attempt: int
    crashes: int
    token: str


IN_CONTEXT: Final[ContextVar[Any]] = ContextVar("tqe_current_job", default=None)
LookUp = Callable[[Any], CurrentJob | None]
_look_up: LookUp | None = None


def job_or_none() -> CurrentJob | None:
    """The job that this code runs in, if there is one."""
    return None if _look_up is None else _look_up(IN_CONTEXT.get())


def current_job() -> CurrentJob:
    """The job that this code runs in. RuntimeError outside of a worker's job."""
    job = job_or_none()
    if job is None:
        raise RuntimeError(
            "current_job() was called outside of a job: only a task that a worker runs has one"
        )
    return job


def set_look_up(look_up: LookUp | None) -> LookUp | None:
    """The worker says how to describe what IN_CONTEXT holds, and, for None, the job that runs inline.

    None: there is no worker any more. Answers with what counted before.
    """
    global _look_up
    before, _look_up = _look_up, look_up
    return before
