"""TQE is a distributed task-queue engine for Python on Redis; this is what users import."""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tqe.app import App, AppTask, Submitter
    from tqe.client import (
        AsyncClient,
        AsyncJobHandle,
        AsyncJobHandles,
        Client,
        JobHandle,
        JobHandles,
    )
    from tqe.current import CurrentJob, current_job
    from tqe.errors import (
        ArgumentsError,
        IdempotencyConflict,
        InvalidOption,
        InvalidPayload,
        JobCancelled,
        JobFailed,
        JobWasCancelled,
        PartialSubmit,
        PayloadTooLarge,
        QueueFull,
        RedisUnavailable,
        Reject,
        ResultError,
        ResultTimeout,
        ResultTooLarge,
        ResultUnavailable,
        Retry,
        SoftTimeLimit,
        SubmitError,
        SubmitUnknown,
        TQEError,
        UnknownLane,
    )
    from tqe.job import JobStatus
    from tqe.settings import Settings
    from tqe.worker.reporting import FailedAttempt

__version__ = "0.1.0.dev0"

# Names by the module that has them, imported when first asked for: a helper process of the engine that needs
# one small module must not load everything.
_HOMES: Final = {
    "tqe.app": ("App", "AppTask", "Submitter"),
    "tqe.client": (
        "AsyncClient",
        "AsyncJobHandle",
        "AsyncJobHandles",
        "Client",
        "JobHandle",
        "JobHandles",
    ),
    "tqe.current": ("CurrentJob", "current_job"),
    "tqe.errors": (
        "ArgumentsError",
        "IdempotencyConflict",
        "InvalidOption",
        "InvalidPayload",
        "JobCancelled",
        "JobFailed",
        "JobWasCancelled",
        "PartialSubmit",
        "PayloadTooLarge",
        "QueueFull",
        "RedisUnavailable",
        "Reject",
        "ResultError",
        "ResultTimeout",
        "ResultTooLarge",
        "ResultUnavailable",
        "Retry",
        "SoftTimeLimit",
        "SubmitError",
        "SubmitUnknown",
        "TQEError",
        "UnknownLane",
    ),
    "tqe.job": ("JobStatus",),
    "tqe.settings": ("Settings",),
    "tqe.worker.reporting": ("FailedAttempt",),
}
_HOME_OF: Final = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "App",
    "AppTask",
    "ArgumentsError",
    "AsyncClient",
    "AsyncJobHandle",
    "AsyncJobHandles",
    "Client",
    "CurrentJob",
    "FailedAttempt",
    "IdempotencyConflict",
    "InvalidOption",
    "InvalidPayload",
    "JobCancelled",
    "JobFailed",
    "JobHandle",
    "JobHandles",
    "JobStatus",
    "JobWasCancelled",
    "PartialSubmit",
    "PayloadTooLarge",
    "QueueFull",
    "RedisUnavailable",
    "Reject",
    "ResultError",
    "ResultTimeout",
    "ResultTooLarge",
    "ResultUnavailable",
    "Retry",
    "Settings",
    "SoftTimeLimit",
    "SubmitError",
    "SubmitUnknown",
    "Submitter",
    "TQEError",
    "UnknownLane",
    "__version__",
    "current_job",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(home), name)
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
