"""TQE as a peer of the others; `BENCH_SINGLE` submits one job a call."""

import os
import time
from typing import Any

import common

from tqe import App

app = App(redis_url=common.URL or None, log_level="warning")


@app.task("NOOP")
def noop(to: str, n: int) -> None:
    common.done()


@app.task("TIMED")
def timed(sent_ns: int, number: int) -> None:
    common.timed(sent_ns, number)


def submit_all(jobs: int) -> Any:
    if os.environ.get("BENCH_SINGLE"):
        for number in range(jobs):
            noop.submit(**common.payload(number))
        return
    noop.submit_many(common.payload(number) for number in range(jobs))


if __name__ == "__main__":
    common.main(
        submit_all,
        lambda number: app.submit("TIMED", {"sent_ns": time.monotonic_ns(), "number": number}),
        app.client.connect,
    )
