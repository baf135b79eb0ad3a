"""TQE is a distributed task-queue engine for Python on Redis; this is what users import."""

from tqe.errors import JobCancelled, Reject, Retry, SoftTimeLimit, TQEError

__version__ = "0.1.0.dev0"

__all__ = [
    "JobCancelled",
    "Reject",
    "Retry",
    "SoftTimeLimit",
    "TQEError",
    "__version__",
]
