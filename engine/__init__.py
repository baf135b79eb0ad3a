"""TQE is a distributed task-queue engine for Python on Redis; this is what users import."""

__version__ = "0.1.0.dev0"

__all__ = ["__version__"]
