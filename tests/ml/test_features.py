"""Columns and history: what they say, and that they never know the future."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ml import made
from tqe.ml import features
from tqe.ml.dataset import Facts, Record, Trace, collect
from tqe.ml.features import Columns, Schema, schema_of
from tqe.ml.history import SHRINK_JOBS, History, Level
from tqe.ml.predict import Learner, Ordered, Walk
from tqe.ml.simulate import replay, stretched


def with_duration(trace: Trace, job: int, duration_s: float) -> Trace:
    durations = list(trace.duration_s)
    durations[job] = duration_s
    return Trace(
        name=trace.name,
        facts=trace.facts,
        submit_s=trace.submit_s,
        duration_s=durations,
        end_s=[*trace.end_s[:job], trace.submit_s[job] + duration_s, *trace.end_s[job + 1 :]],
        numeric=trace.numeric,
        categorical=trace.categorical,
    )


# --- no leak ---


def same(a: list[float], b: list[float]) -> bool:
    return all(x == y or (x != x and y != y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_a_row_changes_exactly_when_a_completion_before_it_changes(seed: int) -> None:
    """Make one job longer. Rows of jobs submitted before its old end must not move, wherever it stands in the
    file; the first row of its type after that must."""
    trace = made.trace(300, seed=seed)
    columns = Columns(schema_of(trace))
    before = Walk(trace, columns)
    job = random.Random(seed).randrange(50, 200)
    end_s = trace.submit_s[job] + trace.duration_s[job]
    after = Walk(with_duration(trace, job, 3 * trace.duration_s[job]), columns)
    moved = [not same(a, b) for a, b in zip(before.rows, after.rows, strict=True)]
    known = [submit_s >= end_s for submit_s in trace.submit_s]
    assert not any(m and not k for m, k in zip(moved, known, strict=True))
    later = next(i for i, k in enumerate(known) if k and trace.facts[i].type == trace.facts[job].type)
    assert moved[later] and before.means[later] != after.means[later]


def test_nobody_knows_of_a_job_that_waited_before_it_has_ended() -> None:
    """A log of a backlog: the durations of those in front were not known when the others came."""
    lines = [Record(facts, at_s, took_s, 40.0) for facts, at_s, took_s, _ in made.records(300)]
    trace = collect("backlog", lines, numeric=("size",), categorical=("user",))
    walk = Walk(trace, Columns(schema_of(trace)))
    for job in range(0, 300, 7):
        ended = sum(end_s <= trace.submit_s[job] for end_s in trace.end_s[:job])
        assert ended < job or not job
        unknown = math.isnan(walk.rows[job][0])
        assert unknown == (ended == 0)
    first = next(job for job in range(300) if trace.submit_s[job] >= trace.end_s[0])
    assert first > 20 and all(math.isnan(row[0]) for row in walk.rows[:first])
    assert len(walk.late) > 20
    assert walk.whole_history().jobs == 300 > walk.history.jobs, "a version knows them all"


def test_rows_of_a_walk_do_not_depend_on_what_comes_later() -> None:
    trace = made.trace(400)
    columns = Columns(schema_of(trace))
    whole, first = Walk(trace, columns), Walk(trace.part(0, 250), columns)
    assert all(same(a, b) for a, b in zip(whole.rows, first.rows, strict=False))
    assert whole.means[:250] == first.means


@pytest.mark.parametrize("kind", ["type_mean", "hierarchical_mean"])
def test_a_replay_learns_of_a_job_when_it_has_completed_in_that_replay(kind: str) -> None:
    trace = made.trace(600)
    columns = Columns(schema_of(trace.part(0, 300)))
    walk = Walk(trace.part(0, 300), columns)

    def scores(test: Trace, arrive_s: list[float]) -> tuple[dict[int, tuple[float, float]], list[float]]:
        learner = Learner(test, [columns.keys(f) for f in test.facts], walk, kind)
        seen: dict[int, tuple[float, float]] = {}

        def predict(job: int, now_s: float) -> float | None:
            found = learner.predict(job, now_s)
            assert found is not None
            seen[job] = (now_s, found)
            return found

        policy = Ordered(predict, mode="sjf", scale_s=1.0, servers=1, on_completed=learner.completed)
        return seen, replay(arrive_s, test.duration_s, 1, policy)

    test = trace.part(300, 600)
    arrive_s = stretched(test.submit_s, test.duration_s, 1, 1.2)
    seen, start_s = scores(test, arrive_s)
    job = next(j for j in range(100, 300) if start_s[j] + test.duration_s[j] < arrive_s[-50])
    end_s = start_s[job] + test.duration_s[job]
    changed, _ = scores(with_duration(test, job, 5 * test.duration_s[job]), arrive_s)
    early = [j for j, (now_s, _) in seen.items() if now_s < end_s]
    assert len(early) > 20 and all(seen[j] == changed[j] for j in early)
    assert any(seen[j][1] != changed[j][1] for j in seen if seen[j][0] >= end_s)


@pytest.mark.parametrize("kind", ["type_mean", "hierarchical_mean"])
def test_a_replay_knows_exactly_what_has_completed(kind: str) -> None:
    trace = made.trace(500)
    walk = Walk(trace.part(0, 200), Columns(schema_of(trace.part(0, 200))))
    test = trace.part(200, 500)
    arrive_s = stretched(test.submit_s, test.duration_s, 2, 1.1)
    heard: list[tuple[str, float]] = []

    class Spy(Learner):
        def _learn(self, keys: list[object], duration_s: float) -> None:
            heard.append((str(keys[0]), duration_s))
            super()._learn(keys, duration_s)

    learner = Spy(test, [walk.columns.keys(f) for f in test.facts], walk, kind)
    counts: list[tuple[float, list[tuple[str, float]]]] = []

    def predict(job: int, now_s: float) -> float | None:
        found = learner.predict(job, now_s)
        counts.append((now_s, sorted(heard)))
        return found

    policy = Ordered(predict, mode="sjf", scale_s=1.0, servers=2, on_completed=learner.completed)
    start_s = replay(arrive_s, test.duration_s, 2, policy)
    assert len(counts) > 100
    for now_s, known in counts[::7]:
        done = [
            (test.facts[j].type, s)
            for j, (at, s) in enumerate(zip(start_s, test.duration_s, strict=True))
            if at + s <= now_s
        ]
        late = [(str(keys[0]), s) for end_s, keys, s in walk.late if end_s <= now_s]
        assert known == sorted(done + late)


# --- history ---


def test_the_hierarchical_mean_by_hand() -> None:
    history = History(2)
    assert history.hierarchical_mean(["A", ("A", 1)], 2) is None
    for seconds in (1.0, 3.0):
        history.completed(["A", ("A", 1)], seconds)
    history.completed(["B", ("B", 1)], 8.0)
    k, root = SHRINK_JOBS, 4.0
    kind = (2 * 2.0 + k * root) / (2 + k)
    assert history.hierarchical_mean(["A", ("A", 9)], 2) == pytest.approx(kind)
    assert history.hierarchical_mean(["A", ("A", 1)], 2) == pytest.approx((2 * 2.0 + k * kind) / (2 + k))
    assert history.hierarchical_mean(["C", ("C", 1)], 2) == pytest.approx(root)


def test_a_key_forgets_what_is_long_ago() -> None:
    history = History(1)
    for _ in range(1000):
        history.completed(["A"], 1.0)
    for _ in range(200):
        history.completed(["A"], 10.0)
    entry = history.levels[0].get("A")
    assert entry is not None and entry[1] > 9.0
    assert entry[2] == 1200


def test_a_level_is_bounded_and_keeps_what_is_in_use() -> None:
    level = Level(keys_max=100)
    for i in range(10_000):
        level.add(f"k{i}", 1.0, 0.0)
        level.add("busy", 2.0, 0.7)
        assert len(level) <= 101
    busy = level.get("busy")
    assert busy is not None and busy[2] > 9_000
    assert level.get("k0") is None and level.get("k9999") is not None


def test_a_history_survives_its_dump() -> None:
    trace = made.trace(300)
    walk = Walk(trace, Columns(schema_of(trace)))
    twin = History.load(walk.history.dump())
    copy = walk.history.copy()
    for other in (twin, copy):
        assert other.dump() == walk.history.dump()
    copy.completed(walk.columns.keys(trace.facts[0]), 99.0)
    assert copy.dump() != walk.history.dump()


# --- schema and rows ---


def test_columns_of_a_trace() -> None:
    schema = schema_of(made.trace(600))
    assert schema.sides == ("user",) and schema.numeric == ("size",)
    assert schema.prefixes == (1, 2)  # size never repeats: it is a column and no key
    assert Schema.load(schema.dump()) == schema
    assert len(schema.columns) == Columns(schema).width == len(set(schema.columns))
    assert schema.columns[-schema.categorical_columns :] == ("code.type", "code.user")


def test_an_id_is_no_category_and_a_constant_no_column() -> None:
    jobs = [
        Record(Facts("A", fields={"id": f"job{i}", "same": "x", "n": 1.0, "m": float(i % 3)}), float(i), 1.0)
        for i in range(100)
    ]
    schema = schema_of(collect("t", jobs, numeric=("n", "m"), categorical=("id", "same")))
    assert schema.categorical == () and schema.numeric == ("m",) and schema.key_fields == ("m",)


def test_calendar_columns_need_repetitions() -> None:
    def extras(days: float) -> tuple[str, ...]:
        jobs = [Record(Facts("A", at_s=1.7e9 + i * days * 864), i * days * 864, 1.0) for i in range(101)]
        return schema_of(collect("t", jobs)).extras

    assert extras(1) == () and extras(3) == ("hour",) and extras(15) == ("hour", "weekday")


def test_hour_and_weekday() -> None:
    facts = Facts("A", at_s=1709510400 + 3600 * 13.5)  # Monday 4 March 2024, 13:30 UTC
    assert features._hour(facts) == 13 and features._weekday(facts) == 0
    assert features._weekday(Facts("A", at_s=1709510400 - 1)) == 6


def test_everything_known_has_a_place_in_the_row() -> None:
    jobs = [
        Record(
            Facts(
                "AB"[i % 2],
                lane=("high", "low")[i % 3 == 0],
                payload_bytes=float(i % 7),
                attempt=1 + i % 2,
                at_s=1.7e9 + i * 7200,
                fields={"c": "xyz"[i % 3], "n": float(i % 5)},
            ),
            i * 7200.0,
            1.0 + i % 4,
        )
        for i in range(300)
    ]
    trace = collect("t", jobs, numeric=("n",), categorical=("c",))
    columns = Columns(schema_of(trace))
    names = columns.schema.columns
    walk = Walk(trace, columns)
    row = dict(zip(names, walk.rows[-1], strict=True))
    facts = trace.facts[-1]
    assert row["payload_bytes"] == facts.payload_bytes and row["attempt"] == facts.attempt
    assert row["field.n"] == facts.fields["n"] and row["hour"] == features._hour(facts)
    assert row["code.lane"] == columns.schema.codes["lane"][facts.lane]
    assert row["code.c"] == columns.schema.codes["c"][facts.fields["c"]]  # type: ignore[index]
    assert row["history.log_mean"] == pytest.approx(math.log(walk.means[-1]))
    assert row["level0.count"] > 100


def test_what_was_never_seen_is_unknown_and_not_zero() -> None:
    trace = made.trace(300)
    columns = Columns(schema_of(trace))
    walk = Walk(trace, columns)
    facts = Facts("NEW", fields={"user": "zoe", "size": None})
    mean, row = columns.row(facts, columns.keys(facts), walk.history)
    assert mean == walk.history.mean_s
    named = dict(zip(columns.schema.columns, row, strict=True))
    assert named["level0.count"] == 0.0
    assert all(
        math.isnan(named[n]) for n in ("level0.last", "side.user", "field.size", "code.type", "code.user")
    )


# --- payloads ---


def test_fields_are_found_in_payloads() -> None:
    payloads = [
        {"n": i, "on": True, "s": "x" * i, "items": [1], "c": "red", "mixed": 1 if i % 3 else "a"}
        for i in range(70)
    ]
    numeric, categorical = features.discover(payloads)
    assert numeric == ("mixed", "n", "on") and categorical == ("c", "s")
    assert features.pick(payloads[-1] | {"n": math.inf}, numeric, categorical) == {
        "mixed": None if payloads[-1]["mixed"] == "a" else 1.0,
        "n": None,
        "on": 1.0,
        "c": "red",
        "s": None,
    }


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=4),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers()),
    )
)
def test_no_payload_breaks_picking(payload: dict[str, object]) -> None:
    numeric, categorical = features.discover([payload])
    picked = features.pick(payload, numeric, categorical)
    assert all(v is None or isinstance(v, str) or math.isfinite(v) for v in picked.values())
