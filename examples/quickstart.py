"""A few tasks to play with: `tqe run examples.quickstart:app`, or just `tqe run` in the project's folder."""

import asyncio
import random

from tqe import App, current_job

app = App("quickstart")


@app.task("GREET")
def greet(name: str) -> str:
    """Submit it with `tqe submit GREET '{"name": "Ann"}' --wait`."""
    return f"Hello, {name}!"


@app.task("EMAIL", timeout=30, max_retries=5)
def send_email(to: str, subject: str = "Hello") -> str:
    """Stands for sending: over HTTP it is submitted with the curl line of the README."""
    return f"{subject!r} went to {to}"


@app.task("FETCH", priority="high", timeout=10)
async def fetch(url: str, seconds: float = 1.0) -> dict[str, object]:
    """Stands for a request: while it waits, its worker runs up to --concurrency others."""
    await asyncio.sleep(seconds)
    return {"url": url, "attempt": current_job().attempt}


@app.task("FLAKY", max_retries=5, backoff=0.5, backoff_max=5)
def flaky(chance: float = 0.5) -> str:
    """Fails now and then, and is retried with a growing pause."""
    if random.random() < chance:
        raise ConnectionError("the other side did not answer")
    return "went through"


@app.task("DIVIDE", max_retries=1, backoff=0.5)
def divide(a: float, b: float) -> float:
    """With b = 0 it ends in the dead-letter queue: `tqe dlq list`."""
    return a / b
