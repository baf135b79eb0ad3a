"""docs/METRICS.md against what is exposed: every name, with its type and labels, and nothing else."""

import re
from pathlib import Path

from tests.support.metric_names import exposed, full_sample
from tqe.board import layout
from tqe.telemetry import metrics

DOC = Path(__file__).parents[2] / "docs" / "METRICS.md"
ROW = re.compile(r"^\| `(taskqueue_\w+)`(?:\{([\w, ]+)\})? \| (\w+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
UNITS = {"jobs", "seconds", "0 or 1", "frames", "leases", "workers", "events", "calls"}


def test_the_page_and_the_docs_name_the_same_metrics() -> None:
    told = {
        name: (kind, tuple(sorted(labels.replace(" ", "").split(",")) if labels else ()))
        for name, labels, kind, _, _ in ROW.findall(DOC.read_text())
    }
    assert told == exposed()


def test_every_row_has_a_unit_and_a_meaning() -> None:
    for name, _, _, unit, meaning in ROW.findall(DOC.read_text()):
        assert unit.strip() in UNITS, name
        assert len(meaning.strip()) > 10, name
        assert name.endswith("_seconds") <= (unit.strip() == "seconds"), name


def test_what_is_counted_is_shown() -> None:
    """A counter that was added to the board and to no page would be seen by nobody."""
    assert set(layout.HOST_COUNTERS) == set(metrics.HOST_TOTALS)
    elsewhere = {"fetches", "settles", "fetch_us", "settle_us", "busy_ns", "loop_lag_us"}
    elsewhere |= {"predictions", "prediction_off_us"}
    of_the_queue = {"completed", "failed", "fenced", "cancelled", "unknown"}  # counted by scripts, for all
    fallbacks = {f"fallback_{reason}" for reason in metrics.FALLBACKS}
    assert set(layout.COUNTERS) == set(metrics.WORKER_TOTALS) | fallbacks | elsewhere | of_the_queue


def test_help_is_a_sentence() -> None:
    for family in metrics.families(full_sample()):
        assert family.documentation.endswith("."), family.name
