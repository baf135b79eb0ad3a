"""Right and wrong uses of tasks, as type checkers see them; the test compares what they say with the marks.

`# wrong: a, b` stands on a line that mypy refuses with code a and pyright with rule b; all others are right.
"""

from __future__ import annotations

from collections.abc import Awaitable
from datetime import UTC, datetime, timedelta
from typing import assert_type

from tqe import App, AsyncJobHandle, JobHandle, Submitter, current_job
from tqe.app import AppTask
from tqe.testing import Eager, eager

app = App("typed", lease_ms=10_000)


@app.task("EMAIL", timeout=30, max_retries=5, backoff=timedelta(seconds=2), retry_on=(OSError, ValueError))
def send_email(to: str, subject: str = "Hello", *, copies: int = 1) -> str:
    return f"{to} {subject} {copies}"


@app.task
async def fetch(url: str, depth: int) -> list[int]:
    return [len(url), depth]


# --- what a task is, and what calling it answers ---

assert_type(send_email("a@example.com"), str)
assert_type(send_email.submit("a@example.com", copies=2), JobHandle)
assert_type(send_email.delay("a@example.com", "Hi"), JobHandle)
send_email(1)  # wrong: arg-type, reportArgumentType
task: AppTask[[str, int], Awaitable[list[int]]] = fetch  # wrong: assignment, reportAssignmentType

# --- arguments of a submission are those of the function ---

send_email.submit()  # wrong: call-arg, reportCallIssue
send_email.submit(1)  # wrong: arg-type, reportArgumentType
send_email.submit("a@example.com", copies="2")  # wrong: arg-type, reportArgumentType
send_email.submit("a@example.com", "Hi", 2)  # wrong: call-arg, reportCallIssue
send_email.submit("a@example.com", subjet="Hi")  # wrong: call-arg, reportCallIssue
send_email.submit("a@example.com", priority="high")  # wrong: call-arg, reportCallIssue
send_email.delay(to=None)  # wrong: arg-type, reportArgumentType

# --- options stand apart, and have types too ---

urgent = send_email.with_options(priority="high", delay=timedelta(minutes=1), idempotency_key="k")
assert_type(urgent.submit("a@example.com"), JobHandle)
urgent.submit(to=1)  # wrong: arg-type, reportArgumentType
send_email.with_options(run_at=datetime(2030, 1, 1, tzinfo=UTC), expires=None, track=False)
send_email.with_options(delai=1)  # wrong: call-arg, reportCallIssue
send_email.with_options(delay="soon")  # wrong: arg-type, reportArgumentType
send_email.with_options(max_retries=1.5)  # wrong: arg-type, reportArgumentType
send_email.submit_many([{"to": "a@example.com"}], priority="low", collect=True)
send_email.submit_many([{"to": "a@example.com"}], prio="low")  # wrong: call-arg, reportCallIssue
urgent.submit_many([], progress="yes")  # wrong: arg-type, reportArgumentType
app.submit("EMAIL", {"to": "a@example.com"}, timeout=3, max_retries=2)
app.submit("EMAIL", {}, timout=3)  # wrong: call-arg, reportCallIssue
app.submit("EMAIL", {}, track="no")  # wrong: arg-type, reportArgumentType

# --- async code ---


async def use() -> None:
    assert_type(await fetch("https://example.com", 1), list[int])
    handle = await fetch.asubmit("https://example.com", depth=1)
    assert_type(handle, AsyncJobHandle)
    assert_type(await handle.status(), str)
    await fetch.asubmit("https://example.com")  # wrong: call-arg, reportCallIssue
    await fetch.asubmit("https://example.com", "1")  # wrong: arg-type, reportArgumentType
    await fetch.with_options(delay=1).asubmit("url", depth="1")  # wrong: arg-type, reportArgumentType
    await fetch.submit("https://example.com", 1)  # wrong: misc, reportGeneralTypeIssues
    int(handle.result())  # wrong: call-overload, reportArgumentType
    assert_type(current_job().attempt, int)


# --- declaring ---

app.task("LATE", timeot=3)  # wrong: call-overload, reportCallIssue
app.task("LATE", timeout="3")  # wrong: call-overload, reportArgumentType
app.task("LATE", retry_on=[OSError()])  # wrong: list-item, reportArgumentType


@app.cron("*/5 * * * *")
@app.task("NIGHTLY", track=False)
def nightly() -> None: ...


assert_type(nightly.submit(), JobHandle)
assert_type(nightly.with_options(priority="low"), Submitter[[]])
nightly.submit(1)  # wrong: call-arg, reportCallIssue

# --- testing ---

with eager(app, max_retries=0) as ran:
    assert_type(ran, Eager)
