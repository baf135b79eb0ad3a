"""The one tree of exceptions of the engine, and the four that task code raises or meets.

Everything that the library raises on purpose is a `TQEError`, so one `except` catches it all; below it,
one branch a caller: who starts things (`SettingsError`, `AppImportError`, `RegistrationError`), who talks
to Redis (`ServerError`), who submits (`SubmitError`), who waits (`ResultError`). The last four are no
errors of the engine but words between it and a task, and so stand outside of the tree: `except TQEError`
in a task must not eat them.

Each carries its facts as attributes, and the same facts as constructor arguments in that order (`args`
must rebuild the exception, or copying and sending it to another process would scramble it).
"""

from collections.abc import Sequence
from typing import Any


class TQEError(Exception):
    """Anything that the engine raises on purpose. Catch it to handle every failure of the library alike."""


# --- at start ---


class SettingsError(TQEError):
    """A setting is unknown or has a value that is not allowed. The text names it, its source and what is
    allowed."""


class AppImportError(TQEError):
    """The app named on the command line or in TQE_APP cannot be imported. Fix the name or what it imports."""


class AppNotFound(AppImportError):
    """The name of the app leads to no module, no attribute, or something that is no App. Fix the name, or
    start in the folder where it is."""


class RegistrationError(TQEError):
    """A task cannot be registered: its name is taken or malformed, or its signature cannot be served. The
    text says which."""


# --- Redis ---


class ServerError(TQEError):
    """Redis cannot do what was asked. Nothing is lost on our side; see which of the three below it is."""


class RedisUnavailable(ServerError):
    """Redis cannot be reached, is loading or busy, or the connection broke. `applied` is False when what
    was asked was surely not done, so that it may be repeated, and None when nobody can tell. Try again
    later."""

    def __init__(self, message: str = "", *, applied: bool | None = None) -> None:
        super().__init__(message)
        self.applied = applied


class ServerUnfit(ServerError):
    """Redis answers but must not be used as it is: it may evict keys, is older than 6.2, refuses the
    password or is read-only. The text says which, and what to change in its configuration."""


class QueueFull(ServerError):
    """Redis has reached its memory limit and takes no new jobs; workers go on. Submit again once they have
    freed memory, or give Redis more."""


# --- submitting ---


class SubmitError(TQEError):
    """A submission was refused or not finished. Unless the class says otherwise, no job was created."""


class InvalidPayload(SubmitError):
    """The payload is not a JSON object: a wrong type, NaN, a number beyond 64 bits, or nested too deep.
    Change it."""


class PayloadTooLarge(SubmitError):
    """The encoded payload is above `payload_max_bytes`. Store the data elsewhere and submit a reference to
    it."""

    def __init__(self, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(size_bytes, limit_bytes)
        self.size_bytes = size_bytes
        self.limit_bytes = limit_bytes

    def __str__(self) -> str:
        return (
            f"the payload has {self.size_bytes} bytes and the limit is {self.limit_bytes}:"
            " store the data elsewhere and submit a reference, or raise payload_max_bytes"
        )


class ArgumentsError(SubmitError):
    """The payload does not fit the task's parameters: one is missing, unknown or of a wrong type. Change
    the call."""


class UnknownLane(SubmitError):
    """The priority names a lane that is not configured. Use one of `lanes`, or add it to the `lanes`
    setting."""

    def __init__(self, lane: str, lanes: Sequence[str] = ()) -> None:
        super().__init__(lane, lanes)
        self.lane = lane
        self.lanes = tuple(lanes)

    def __str__(self) -> str:
        return f"there is no lane {self.lane!r}; configured are: {', '.join(self.lanes) or 'none'}"


class InvalidOption(SubmitError):
    """An option of a submission (delay, expires, timeout, key, …) is unknown or out of range. The text
    names it."""


class IdempotencyConflict(SubmitError):
    """The idempotency key was used for a submission with another type, payload or lane. `first_id` is the
    job that holds the key: use another key, or the first job."""

    def __init__(self, first_id: str) -> None:
        super().__init__(first_id)
        self.first_id = first_id

    def __str__(self) -> str:
        return f"the idempotency key belongs to job {self.first_id}, which was submitted with another body"


class PartialSubmit(SubmitError):
    """A bulk submission failed half-way. `handles` are the jobs that were created, in order, and `cause`
    says why the rest was not: submit the rest again, or all of it under idempotency keys."""

    def __init__(self, handles: Sequence[Any], cause: BaseException | None = None) -> None:
        super().__init__(handles, cause)
        self.handles = list(handles)
        self.cause = cause

    def __str__(self) -> str:
        return f"{len(self.handles)} jobs were created before the submission failed: {self.cause}"


class SubmitUnknown(SubmitError):
    """The connection broke before the answer came, and the job is untracked, so nobody can tell whether it
    was created. Submitting again may run it twice; `track=True` (the default) or a key makes repeating
    safe."""

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id

    def __str__(self) -> str:
        return (
            f"nobody can tell whether job {self.job_id} was created: the connection broke before the answer"
        )


# --- waiting for results ---


class ResultError(TQEError):
    """A job has no result to give. The class says why."""


class JobFailed(ResultError):
    """The job is dead: its task failed and has no retries left. `error` is the last error's text; `tqe
    dlq` lists the job and can replay it."""

    def __init__(self, error: str, job_id: str = "") -> None:
        super().__init__(error, job_id)
        self.error = error
        self.job_id = job_id

    def __str__(self) -> str:
        return f"job {self.job_id} failed: {self.error}" if self.job_id else f"the job failed: {self.error}"


class JobWasCancelled(ResultError):
    """The job was cancelled, or expired before it started, and will not run. Submit it again if it should."""

    def __init__(self, job_id: str, reason: str = "") -> None:
        super().__init__(job_id, reason)
        self.job_id = job_id
        self.reason = reason

    def __str__(self) -> str:
        return f"job {self.job_id} was cancelled" + (f": {self.reason}" if self.reason else "")


class ResultTooLarge(ResultError):
    """The job completed, but what it returned was larger than `result_max_bytes` and was not kept. Let the
    task store it elsewhere and return a reference."""


class ResultTimeout(ResultError, TimeoutError):
    """The job had not ended when the time to wait was over. It goes on; wait again or look at its status."""


class ResultUnavailable(ResultError):
    """Nothing is known of the job's result: it was submitted with `track=False`, or its record has
    expired. Ask earlier, or raise `result_ttl_s`."""


# --- in tests of applications ---


class EagerModeError(TQEError):
    """Eager mode (`tqe.testing`) was asked for what only a real queue has. The text says what, and what to
    use."""


class QueueStuck(TQEError):
    """Jobs of a test's queue did not end in time, or its workers ended. The text says what is left."""


# --- inside the engine ---


class FrameError(TQEError):
    """Bytes that should be a frame cannot be used. They are kept aside, never executed and never dropped."""


class DamagedFrame(FrameError):
    """A frame fails its checksum or its shape. It goes to quarantine; the cause lies outside of the
    engine."""


class NewerFrame(FrameError):
    """A frame was written by a newer version. It is parked until a worker of that version takes it:
    upgrade."""


class LeaseLost(TQEError):
    """This incarnation's lease is gone: another one owns its jobs. It takes itself over and goes on."""


class ScriptError(TQEError):
    """A Lua script refused its arguments or broke. A defect of the engine or of a changed script: report
    it. `code` is the first word of the answer: BAD (arguments), BOTH or LIVE (takeover), or Redis' own."""

    def __init__(self, text: str = "", script: str = "") -> None:
        super().__init__(text, script)
        self.text = text
        self.script = script
        self.code = text.partition(" ")[0]

    def __str__(self) -> str:
        return f"{self.script}: {self.text}" if self.script else self.text


# --- between the engine and a task ---


class Retry(Exception):
    """Raise it in a task to be retried, after `delay` seconds, or after the usual backoff when it is None. It
    consumes an attempt like any other failure."""

    def __init__(self, message: str = "", delay: float | None = None) -> None:
        super().__init__(message, delay)
        self.message = message
        self.delay = delay

    def __str__(self) -> str:
        return self.message or "the task asked for a retry"


class Reject(Exception):
    """Raise it in a task to send the job to the dead-letter queue at once, whatever retries are left.
    `reason` is shown there."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason or "the task rejected the job"


class SoftTimeLimit(BaseException):
    """Raised inside of a task that has run longer than its timeout. Clean up and return, or let it pass:
    the attempt counts as failed. A task that goes on is killed a little later. No `Exception`, so that
    `except Exception` in a task does not swallow it."""


class JobCancelled(BaseException):
    """Raised inside of a running task when its job was cancelled. Clean up and let it pass."""
