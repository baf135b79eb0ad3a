"""Captured runs as traces: which count, and the file form."""

import json
from pathlib import Path

import pytest

from tests.ml import made
from tqe.ml import ModelError, dataset, traces


def lines(jobs: int = 300, **more: object) -> list[bytes]:
    """Made jobs as workers would have captured them."""
    found = []
    for facts, submit_s, duration_s, _ in made.records(jobs):
        entered_us = int((1.7e9 + submit_s) * 1e6)
        run = {
            "type": facts.type,
            "lane": "normal",
            "payload_bytes": 40,
            "attempt": 1,
            "entered_us": entered_us,
            "start_us": entered_us + 1000,
            "run_us": duration_s * 1e6,
            "outcome": "done",
            "fields": dict(facts.fields),
        }
        found.append(json.dumps(run | more).encode())
    return found


def test_captured_runs_become_a_trace() -> None:
    trace = traces.trace_of("t", traces.parse(lines()))
    original = made.trace(300)
    assert trace.numeric == ("size",) and trace.categorical == ("user",)
    assert [f.type for f in trace.facts] == [f.type for f in original.facts]
    assert trace.duration_s == pytest.approx(original.duration_s, abs=1e-6)
    assert trace.submit_s == pytest.approx(original.submit_s, abs=1e-4)
    assert trace.facts[3].fields["size"] == original.facts[3].fields["size"]
    assert trace.facts[3].payload_bytes == 40 and trace.facts[3].lane == "normal"


def test_a_run_ends_when_it_ended_and_not_when_it_could_have(tmp_path: Path) -> None:
    """Behind a backlog that is long after its entry; a file without the wait knows no better."""
    entered_us = 1.7e15
    runs = traces.parse(lines(3, entered_us=entered_us, start_us=entered_us + 60e6, run_us=2e6))
    path, schema = tmp_path / "jobs.csv.gz", tmp_path / "schema.json"
    traces.write(path, schema, runs)
    assert traces.trace_of("t", runs).end_s == [62.0] * 3
    assert dataset.read(path, schema).end_s == [62.0] * 3
    told = traces.parse(lines(3, entered_us=entered_us, start_us=entered_us - 1e6, run_us=2e6))
    assert traces.trace_of("t", told).end_s == [2.0] * 3, "clocks differ; nobody starts before his entry"


def test_failures_do_not_teach_and_limits_do() -> None:
    mixed = lines(2) + lines(2, outcome="timeout") + lines(2, outcome="failed")
    assert [run["outcome"] for run in traces.parse(mixed)] == ["done"] * 2 + ["timeout"] * 2
    assert len(traces.parse(mixed, counted=False)) == 6


def test_what_is_no_run_is_left_out() -> None:
    odd = [b"", b"{}", b"[]", b"\xff", b'{"type":1,"run_us":1}', b'{"type":"A","run_us":"x","entered_us":1}']
    assert traces.parse(odd) == [] and len(traces.parse([*odd, *lines(1)])) == 1
    assert len(traces.trace_of("t", traces.parse(lines(1, fields=[1]) + lines(3))).facts) == 4


def test_an_export_is_read_again_as_the_same_jobs(tmp_path: Path) -> None:
    runs = traces.parse(lines())
    path, schema = tmp_path / "jobs.csv.gz", tmp_path / "schema.json"
    traces.write(path, schema, runs)
    read, direct = dataset.read(path, schema), traces.trace_of("t", runs)
    assert read.name == "jobs" and len(read) == len(direct)
    assert read.duration_s == pytest.approx(direct.duration_s, abs=1e-6)
    assert read.end_s == pytest.approx(direct.end_s, abs=1e-5)
    assert (read.numeric, read.categorical) == (direct.numeric, direct.categorical)
    # Training on the file is training on the stream: what predicts sees payloads, and knows no other names.
    assert [f._replace(at_s=0.0) for f in read.facts] == [f._replace(at_s=0.0) for f in direct.facts]
    assert read.wait_s == pytest.approx(direct.wait_s) and direct.wait_s[0] == pytest.approx(0.001)
    assert read.facts[0].at_s == pytest.approx(direct.facts[0].at_s, abs=1e-3)


def test_nothing_captured_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no run was captured"):
        traces.write(tmp_path / "a.csv.gz", tmp_path / "s.json", [])
    with pytest.raises(ModelError, match="no usable job"):
        traces.trace_of("t", [])
