"""Owns the tasks that a coroutine's job starts: each of their steps is a step of that job.

A job that waits for `gather`, a `TaskGroup` or `wait_for` runs most of its code in tasks of its own. An
unmarked step belongs to nobody: a job that kills its process there would come back for ever, since nobody is
charged, and the limit signal would find nothing to interrupt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context
from typing import Any

from tqe import current
from tqe.codec import hot


def mark_children(loop: asyncio.AbstractEventLoop) -> None:
    """Have the loop mark, step by step, each task that is made in the context of a job."""
    loop.set_task_factory(_make_task)


def _make_task(
    loop: asyncio.AbstractEventLoop,
    coroutine: Any,
    *,
    context: Context | None = None,
    **options: Any,
) -> asyncio.Task[Any]:
    job = current.IN_CONTEXT.get() if context is None else context.get(current.IN_CONTEXT)
    if isinstance(job, hot.AsyncJob):
        coroutine = Child(job, coroutine)
    return asyncio.Task(coroutine, loop=loop, context=context, **options)


class Child(Coroutine[Any, Any, Any]):
    """A coroutine that tells the board whose it is while a step of it runs. All else is the coroutine's."""

    def __init__(self, job: hot.AsyncJob, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._job = job
        self._coroutine = coroutine

    def send(self, value: Any) -> Any:
        return self._step(self._coroutine.send, value)

    def throw(self, *error: Any) -> Any:
        return self._step(self._coroutine.throw, *error)

    def _step(self, drive: Callable[..., Any], *told: Any) -> Any:
        marked = self._job.mark()
        try:
            return drive(*told)
        except BaseException as e:
            hot.end_if_forked(e)
            raise
        finally:
            if marked:
                self._job.unmark()

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._coroutine.__await__()

    def __getattr__(self, name: str) -> Any:
        # Debuggers, and libraries that ask how far a task has come, read `cr_frame` and the like.
        return getattr(self._coroutine, name)
