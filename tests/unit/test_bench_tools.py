"""The tools of bench/: tables that nobody types, peers that fit their adapters, counts that can fail."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import compare, counts, marks
from bench.documents import put
from bench.ordering import made, replay, tables
from bench.peers import peers, table
from bench.rest import table as rest_table
from tqe.bench import suite

ROOT = Path(__file__).resolve().parent.parent.parent
RESULT = ROOT / "bench" / "results" / "peers.json"
OWN_RESULT = ROOT / "bench" / "results" / "tqe.json"


def result(**more: Any) -> dict[str, Any]:
    """Two rounds of two queues."""

    def row(peer: str, turn: int, rate: float) -> dict[str, Any]:
        figures = ("drain_worker_us", "drain_redis_us", "through_rate", "submit_rate", "submit_producer_us")
        found = dict.fromkeys((*figures, "bytes_per_job", "p50_ms", "p99_ms"), 2.0)
        return {"peer": peer, "procs": 1, "round": turn, "drain_rate": rate, **found}

    peer = {"versions": {"x": "1.2.3"}, "guarantee": "g", "results": "r", "bulk": "b", "config": "c"}
    return {
        "taken": "2030-01-02T03:04:05+00:00",
        "scale": 1.0,
        "rounds": 2,
        "quiet": True,
        "persistence": "AOF everysec",
        "machine": {"cpu": "a CPU", "cores": 2},
        "versions": {"kernel": "Linux 6", "redis_server": "Redis 7.0.15"},
        "peers": {"tqe": peer, "celery": peer},
        "rows": [
            row("celery", 0, 1_000),
            row("tqe", 0, 500_000),
            row("tqe", 1, 600_000),
            row("celery", 1, 800),
        ],
        **more,
    }


def test_the_table_has_medians_ranges_and_ratios_within_a_round() -> None:
    lines = table.tables(result()).splitlines()
    ours = next(line for line in lines if line.startswith("| tqe 1.2.3"))
    theirs = next(line for line in lines if line.startswith("| celery 1.2.3"))
    assert "550,000 (500,000 to 600,000)" in ours
    assert "900 (800 to 1,000)" in theirs
    assert "625 (500 to 750)" in theirs  # 500,000 / 1,000 and 600,000 / 800
    assert lines.index(ours) < lines.index(theirs)
    assert "a CPU, 2 cores" in lines[0] and "2030-01-02" in lines[0]


def test_a_busy_machine_a_short_run_and_a_failure_are_told() -> None:
    assert "Not a result" not in table.tables(result())
    assert "Not a result" in table.tables(result(quiet=False))
    assert "Not a result" in table.tables(result(scale=0.1))
    assert "Not a result:** one round" in table.tables(result(rounds=1))
    failed = result()
    failed["rows"].append({"peer": "celery", "procs": 1, "round": 2, "failed": "it broke"})
    assert "Runs of celery failed" in table.tables(failed)


def test_what_others_used_during_a_run_makes_it_no_result_of_that_queue() -> None:
    """Files of the first schema have no such figure, and are read as before."""
    shared = result()
    for row in shared["rows"]:
        row["foreign"] = 0.02
    assert "Not a result" not in table.tables(shared)
    shared["rows"][0]["foreign"] = 0.23  # of celery
    told = table.tables(shared)
    assert "**Not a result:** others used up to 23% of the machine during runs of celery." in told


def test_only_what_stands_between_the_marks_is_replaced() -> None:
    document = f"above\n{table.BEGIN}\nold\n{table.END}\nbelow\n"
    once = put("new", document, table.BEGIN, table.END)
    assert once == f"above\n{table.BEGIN}\n\nnew\n\n{table.END}\nbelow\n"
    assert put("new", once, table.BEGIN, table.END) == once
    with pytest.raises(SystemExit, match="marks"):
        put("new", "no marks", table.BEGIN, table.END)


@pytest.mark.skipif(not RESULT.exists(), reason="no result of a run beside other queues is committed")
def test_the_readme_says_what_the_committed_result_says() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert put(table.tables(json.loads(RESULT.read_text("utf-8"))), readme, table.BEGIN, table.END) == readme


def test_each_mark_has_a_scenario_that_measures_it() -> None:
    for words, scenario, name in marks.MARKS:
        figures = {figure.name: figure for figure in suite.SCENARIOS[scenario].figures}
        assert figures[name].mark is not None, words


def measured(*played: tuple[str, str, list[float], list[float]], **more: Any) -> dict[str, Any]:
    """A result file with (scenario, figure, values, foreign use a run); marks are 5, and more is better."""
    figure = {"median": 900_000.0, "min": 1.5, "max": 2.5, "unit": "jobs/s", "mark": 5.0, "stretch": 9.0}
    return {
        "schema": suite.SCHEMA,
        "taken": "2030-01-02T03:04:05+00:00",
        "machine": {"cpu": "a CPU", "cores": 2},
        "versions": {"kernel": "6", "redis_server": "7", "python": "3.11"},
        "runs": 5,
        "quick": False,
        "verdict": "noisy",
        "noise": ["it was loud"],
        "scenarios": {
            scenario: {
                "foreign": foreign,
                "figures": {name: {**figure, "better": "more", "values": values}},
            }
            for scenario, name, values, foreign in played
        },
        **more,
    }


def test_the_table_of_marks_says_what_was_measured_met_and_missed() -> None:
    told = marks.table(
        measured(
            ("drain", "rate", [5.0, 6, 7, 8, 9], [0.0] * 5),
            ("singles", "rate", [4.9] * 5, [0.1] * 5),
            ("together", "rate", [4.9, 5, 6, 1, 7], [0.0] * 5),
            ("results", "rate", [6.0] * 5, [0.0, 0.3, 0.0, 0.0, 0.0]),
        )
    )
    assert "**noisy**" in told and "Noise: it was loud." in told
    assert "900,000 (1.5 to 2.5) | jobs/s | 5 | 9 | met |" in told
    assert told.count("**missed**") == 1 and told.count("not measured") == len(marks.MARKS) - 4
    assert told.count("| met by 3 of 5 |") == 1
    assert told.count("| not judged: 30% foreign use |") == 1


def test_a_file_of_the_first_schema_is_judged_by_its_runs_and_an_unknown_one_is_refused() -> None:
    """It said `met` of the median alone, under any noise."""
    old = measured(("drain", "rate", [4.9, 5, 6, 1, 7], [0.0] * 5), schema=1)
    old["scenarios"]["drain"]["figures"]["rate"]["met"] = True
    assert "| met by 3 of 5 |" in marks.table(old)
    with pytest.raises(SystemExit, match="schema 99"):
        marks.table(measured(schema=99))


@pytest.mark.skipif(not OWN_RESULT.exists(), reason="no result of tqe bench is committed")
def test_the_page_on_performance_says_what_the_committed_result_says() -> None:
    page = (ROOT / "docs" / "PERFORMANCE.md").read_text("utf-8")
    found = marks.table(json.loads(OWN_RESULT.read_text("utf-8")))
    assert put(found, page, marks.BEGIN, marks.END) == page


def test_the_tables_have_their_places() -> None:
    put("", (ROOT / "README.md").read_text("utf-8"), table.BEGIN, table.END)
    put("", (ROOT / "docs" / "PERFORMANCE.md").read_text("utf-8"), marks.BEGIN, marks.END)


@pytest.mark.parametrize("peer", peers.load().values(), ids=lambda peer: peer.name)
def test_each_peer_has_its_adapter_and_a_way_to_tell_that_it_is_done(peer: peers.Peer) -> None:
    adapter = peers.HERE / peer.adapter
    text = adapter.read_text("utf-8")
    if adapter.suffix == ".py":
        ast.parse(text)
        assert "common.done()" in text and "common.timed(" in text and "common.main(" in text
    assert peer.quiet or peer.counted
    assert peer.instances in ("one", "each")
    assert all("==" in spec for spec in peer.python[:1]), "the version of the queue itself is named"


def test_every_adapter_is_used() -> None:
    used = {peer.adapter for peer in peers.load().values()}
    assert {path.name for path in peers.HERE.glob("use_*")} == used


def test_an_unknown_peer_is_refused_by_name() -> None:
    with pytest.raises(SystemExit, match="there is no peer nonsense; there are: tqe"):
        peers.chosen(["tqe", "nonsense"])


def test_counts_fail_above_the_tolerance_only(capsys: pytest.CaptureFixture[str]) -> None:
    limit = 100 * (1 + counts.TOLERANCE)
    assert counts.compare({"a": limit - 0.1, "b": 50.0, "new": 7.0}, {"a": 100.0, "b": 100.0}) == []
    assert counts.compare({"a": limit + 0.1}, {"a": 100.0}) == ["a"]
    assert "-50.0%" in capsys.readouterr().out


def test_the_small_parts_and_the_scripts_still_run() -> None:
    """Without a stopwatch, as `make bench-compare` runs them."""
    command = [sys.executable, "-m", "pytest", "-q", "bench/micro", "-o", "python_files=bench_*.py"]
    command += ["--benchmark-disable", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_part_that_an_old_commit_lacks_costs_a_comparison_that_part_only(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whatever is imported of the engine, is imported where one part is set up."""
    for module in ("bench.micro.parts", "bench.micro.bench_parts", "bench.micro.bench_scripts"):
        looked = f"import sys, {module}; print([name for name in sys.modules if name.startswith('tqe')])"
        done = subprocess.run(
            [sys.executable, "-c", looked], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert done.stdout == "[]\n", module
    compare.table({"a": [1.0]}, {"a": [1.0], "b": [1.0]}, {"a": 1, "b": 1})
    assert "b  only after" in " ".join(capsys.readouterr().out.split(" "))


def test_counts_that_are_required_are_not_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for options, code in (([], 0), (["--require"], 1)):
        monkeypatch.setattr(sys, "argv", ["counts", *options])
        assert counts.main() == code
        assert counts.UNCHECKED in capsys.readouterr().out


def test_counts_of_a_machine_without_committed_ones_say_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(counts, "count", lambda: {"codec.parse, one": 1.0})
    monkeypatch.setattr(counts, "fingerprint", lambda: "another")
    monkeypatch.setattr(sys, "argv", ["counts"])
    assert counts.main() == 0
    assert f"{counts.UNCHECKED}: no figures are committed for another" in capsys.readouterr().out


def test_the_committed_counts_are_of_parts_that_there_are() -> None:
    committed = json.loads(counts.COMMITTED.read_text()) if counts.COMMITTED.exists() else {}
    for kind, figures in committed.items():
        assert set(figures) <= set(counts.PARTS), kind


# ------------------------------------------------------------------ over HTTP


def test_the_table_of_the_rest_api_is_that_of_the_committed_result() -> None:
    found = json.loads((ROOT / "bench" / "results" / "http.json").read_text())
    text = (ROOT / "docs" / "HTTP_API.md").read_text()
    assert f"{rest_table.BEGIN}\n{rest_table.made(found)}\n{rest_table.END}" in text
    assert found["chaos"]["failed"] == 0 and found["end_to_end"]["failed"] == 0
    assert "Not a result" in rest_table.made(found | {"quiet": False})
    assert "Not a result" not in rest_table.made(found | {"quiet": True, "scale": 1.0})


def test_a_replay_is_a_trace_squeezed_into_seconds_with_predictions_of_before() -> None:
    work, predicted, bound_s, told = replay.compressed(made.traces()[1], jobs=200, seconds=4.0)
    assert (len(work), len(predicted), told["jobs"]) == (200, 200, 200)
    assert sum(work.run_s) == pytest.approx(replay.LOAD * replay.SERVERS * 4.0)
    assert list(work.due_s) == sorted(work.due_s) and work.due_s[-1] < 4.5
    assert all(p is not None and p > 0 for p in predicted) and list(predicted) != list(work.run_s)
    assert bound_s > 0


def test_a_document_without_the_marks_is_left_as_it_is(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("# A page\n")
    found = json.loads((ROOT / "bench" / "results" / "http.json").read_text())
    with pytest.raises(SystemExit, match="lacks the marks"):
        rest_table.put(found, document)
    assert document.read_text() == "# A page\n"


@pytest.mark.parametrize("path", [tables.README, tables.DOCUMENT])
def test_what_is_said_about_ordering_is_what_the_committed_results_say(path: str) -> None:
    """`make ordering-tables` after new results."""
    text = (ROOT / path).read_text("utf-8")
    assert tables.written(path, text, tables.read()) == text


def test_a_missed_mark_of_ordering_is_bold() -> None:
    loads = {"0.9": {"bounded_chosen": dict.fromkeys(("p95_vs_fifo", "p99_vs_fifo", "max_vs_fifo"), 0.05)}}
    loads["0.9"]["bounded_chosen"]["share_of_oracle"] = 0.25
    files = {"traces": {"traces": {"t": {"evaluation": {"loads": loads}}}}, "made": {"traces": {}}}
    row = tables.SECTIONS["ordering-marks"][1](files).splitlines()[-1]
    assert row == "| t | bounded_chosen | **+5.0 %** | +5.0 % | +5.0 % | **25.0 to 25.0 %** |"
