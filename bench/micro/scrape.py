"""How long a scrape takes after the deaths of many workers: `python -m bench.micro.scrape [DEATHS]`.

Each death leaves a life's counters on the board and one file of the app's own metrics of each of four kinds.
The page is asked for over HTTP, before the steward has folded the files (it begins within five seconds) and
after. Prints JSON: the slowest of the scrapes, and of the runs of the fold.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from prometheus_client.mmap_dict import MmapedDict, mmap_key

from tqe.board import layout
from tqe.board.board import Board
from tqe.steward.sums import Sums
from tqe.telemetry import metrics
from tqe.telemetry.user_metrics import FOLDED_MAX, FoldUserMetrics, UserMetrics

KINDS = ("counter", "histogram", "gauge_max", "summary")
SERIES = 5  # in each file
TYPES = 20
LIVING = 8
SCRAPES = 7
DEAD = 5_000_000  # above what Linux gives to any process


def leave(folder: Path, pid: int) -> None:
    """The files of one process."""
    for kind in KINDS:
        book = MmapedDict(str(folder / f"{kind}_{pid}.db"))
        for series in range(SERIES):
            labels = {"what": f"w{series}"}
            key = mmap_key(f"shop_{kind}", f"shop_{kind}", list(labels), list(labels.values()), "Help.")
            book.write_value(key, 1.0, 0.0)
        book.close()


def die(board: Board) -> None:
    """One life, and its end."""
    slot = board.slots[0]
    for at in range(TYPES):
        slot.bind(at, f"TYPE{at}")[layout.T_COMPLETED // layout.WORD] = 1
    slot.add("completed", TYPES)
    board.retire(slot)


def slowest(act: Callable[[], object], times: int) -> dict[str, float]:
    """Of so many: on the clock, and of CPU time, which other programs do not blur."""
    found = []
    for _ in range(times):
        began = time.perf_counter(), time.process_time()
        act()
        found.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    return {"ms": round(max(found)[0] * 1e3, 1), "cpu_ms": round(max(one[1] for one in found) * 1e3, 1)}


def main() -> None:
    """Make the dead, measure, print."""
    deaths = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000
    board = Board(1)
    for _ in range(deaths):
        die(board)
    sums = Sums(board)

    def take() -> metrics.Sample:
        counters, tasks = sums.read()
        return metrics.Sample(queue=metrics.QueueSample(), counters=counters, tasks=tasks)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        own = UserMetrics(folder)
        duty = FoldUserMetrics(own)
        for pid in (*range(DEAD, DEAD + deaths), *range(1, LIVING + 1)):
            leave(folder, pid)
        served = metrics.serve(take, port=0, address="127.0.0.1", more=own.collect)
        try:

            def scrape() -> None:
                with urllib.request.urlopen(f"http://127.0.0.1:{served.port}/metrics", timeout=60) as answer:
                    answer.read()

            told = {
                "deaths": deaths,
                "files": len(KINDS) * deaths,
                "scrape_before_fold": slowest(scrape, SCRAPES),
                # A scrape waits for one of these at most.
                "run_of_fold": slowest(duty.run_once, -(-len(KINDS) * deaths // FOLDED_MAX)),
                "scrape_after_fold": slowest(scrape, SCRAPES),
            }
        finally:
            served.close()
    print(json.dumps(told))


if __name__ == "__main__":
    main()
