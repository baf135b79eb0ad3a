"""Help for the tests of applications: jobs that run at once in the test, and a real queue on a private Redis.

`docs/TESTING.md` says when to take which; `tqe.testing.plugin` has the pytest fixtures.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tqe.testing.eager_mode import Eager, eager
    from tqe.testing.private_queue import Queue, private_redis, queue

# Imported when first asked for: pytest loads the plugin in every project of the same environment.
_HOMES: Final = {
    "Eager": "tqe.testing.eager_mode",
    "eager": "tqe.testing.eager_mode",
    "Queue": "tqe.testing.private_queue",
    "private_redis": "tqe.testing.private_queue",
    "queue": "tqe.testing.private_queue",
}

__all__ = ["Eager", "Queue", "eager", "private_redis", "queue"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)
