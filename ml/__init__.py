"""The duration model: predicts how long jobs will run, and orders them by it.

The engine runs without this package's dependencies. Serving (`features`, `history`, `score`, `order`,
`watch`, `model`) needs only the standard library, and LightGBM's shared library when there is a model;
training and evaluation need `pip install "tqe[ml]"` and ask for it by `need`.
"""

import importlib
from typing import Any, Final

from tqe.errors import TQEError

# What a module of the `ml` extra is needed for; pictures belong to `bench`, since few machines draw.
_EXTRA_OF: Final = {"numpy": "ml", "lightgbm": "ml", "matplotlib": "bench"}


class ModelError(TQEError):
    """A model, a trace or the library behind them cannot be used. The text says which, and what to do."""


class HostError(ModelError):
    """This host cannot do it now (no memory, no process, no file): that says nothing of the model, and
    another host, or a later try, may succeed."""


def need(module: str) -> Any:
    """Import an optional dependency; raises ModelError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as e:  # OSError: the wheel is there, the system's libgomp is not
        extra = _EXTRA_OF[module.partition(".")[0]]
        raise ModelError(f'{module} cannot be used ({e}): pip install "tqe[{extra}]"') from e
