"""Operating over HTTP: lanes, workers, the dead-letter queue."""

import json

import msgspec
import pytest
import redis
from prometheus_client.parser import text_string_to_metric_families

from tests.support.cli import bury
from tests.support.hands import Hands
from tests.support.metric_names import full_sample
from tests.support.waiting import wait_until
from tests.support.web import Web
from tqe.api import shapes
from tqe.schedule import Timetable, make
from tqe.store import housekeeping, scheduling
from tqe.store.call import SyncDoor
from tqe.store.keys import Keys
from tqe.telemetry import metrics


def submit(web: Web, kind: str = "A", **options: object) -> str:
    return str(web.post("/api/v1/jobs", {"type": kind, **options}).json["id"])


def dead_jobs(web: Web, client: redis.Redis, *kinds: str) -> list[str]:
    names = [submit(web, kind) for kind in kinds]
    bury(client, len(kinds))
    return names


# ------------------------------------------------------------------ lanes


def test_lanes_and_totals(web: Web) -> None:
    submit(web, priority="high")
    submit(web, delay=60)
    told = web.get("/api/v1/queues").json
    assert [lane["name"] for lane in told["queues"]] == ["high", "normal", "low"]
    assert [lane["queued"] for lane in told["queues"]] == [1, 0, 0]
    assert told["queues"][0]["oldestAgeMs"] >= 0 and told["queues"][1]["oldestAgeMs"] is None
    assert (told["scheduled"], told["dead"], told["totals"]["submitted"]) == (1, 0, 2)
    assert "dlqDropped" in told["totals"] and not any("_" in name for name in told["totals"])


def test_pause_and_resume(web: Web, redis_client: redis.Redis) -> None:
    submit(web, priority="low")
    assert web.post("/api/v1/queues/LOW/pause").json == {"name": "low", "paused": True}
    assert web.get("/api/v1/queues").json["queues"][2]["paused"] is True
    assert Hands(redis_client).fetch().jobs() == []
    assert web.post("/api/v1/queues/low/resume").json == {"name": "low", "paused": False}
    assert len(Hands(redis_client).fetch().jobs()) == 1
    for verb in ("pause", "resume", "purge"):
        web.post(f"/api/v1/queues/urgent/{verb}").problem(404, "not-found")


def test_who_submits_is_told_at_once_that_a_lane_was_paused(web: Web, redis_client: redis.Redis) -> None:
    redis_client.zadd(Keys().incarnations, {"one": 2e12})
    record = {"worker": 0, "pid": 1, "cpu": 0, "state": "idle", "host": "h", "jobs": []}
    redis_client.set(Keys().worker("one"), json.dumps(record))
    body = {"type": "A", "priority": "low", "delay": 3_600}  # it does not enter the lane
    wait_until(lambda: web.post("/api/v1/jobs", body).json["predictedWaitMs"] is not None)
    for verb, told in (("pause", False), ("resume", True)) * 2:
        web.post(f"/api/v1/queues/low/{verb}")
        assert (web.post("/api/v1/jobs", body).json["predictedWaitMs"] is not None) == told


@pytest.mark.parametrize("paused", [False, True])
def test_a_purge_cancels_what_waits_and_nothing_else(
    web: Web, redis_client: redis.Redis, paused: bool
) -> None:
    running = submit(web)
    held = Hands(redis_client).fetch()
    waiting = [submit(web) for _ in range(3)]
    other, later = submit(web, priority="high"), submit(web, delay=60)
    if paused:
        web.post("/api/v1/queues/normal/pause")
    assert web.post("/api/v1/queues/normal/purge").json == {"name": "normal", "purged": 3}
    states = {name: web.get(f"/api/v1/jobs/{name}").json["status"] for name in waiting}
    assert set(states.values()) == {"cancelled"}
    assert web.get(f"/api/v1/jobs/{other}").json["status"] == "queued"
    assert web.get(f"/api/v1/jobs/{later}").json["status"] == "scheduled"
    told = web.get("/api/v1/queues").json
    assert (told["queues"][1]["queued"], told["totals"]["cancelled"]) == (0, 3)
    assert redis_client.zrange("tq:{0}:incarnations", 0, -1) == [held.incarnation.encode()]
    held.settle(lambda name: ("C", None))
    assert web.get(f"/api/v1/jobs/{running}").json["status"] == "completed"
    assert web.post("/api/v1/queues/normal/purge").json["purged"] == 0


def test_a_purge_of_many(web: Web) -> None:
    web.post("/api/v1/jobs:batch", b'{"type": "A"}\n' * 3_000, Content_Type="application/x-ndjson")
    assert web.post("/api/v1/queues/normal/purge").json["purged"] == 3_000
    assert web.get("/api/v1/queues").json["queues"][1]["queued"] == 0


def test_workers_as_their_steward_published_them(web: Web, redis_client: redis.Redis) -> None:
    hands = Hands(redis_client)
    record = {"worker": 1, "pid": 7, "cpu": 0, "state": "running", "host": "h", "lanes": ["high"]}
    record["jobs"] = [{"id": "01ARZ3NDEKTSV4RRFFQ69G5F00.0", "type": "A", "since_ms": 5}]
    redis_client.set(hands.keys.worker(hands.incarnation), json.dumps(record))
    (told,) = web.get("/api/v1/workers").json["workers"]
    assert (told["pid"], told["lanes"], told["jobs"][0]["sinceMs"]) == (7, ["high"], 5)
    assert told["incarnation"] == hands.incarnation


# ------------------------------------------------------------------ dead letters


def test_dead_jobs_are_listed_shown_and_grouped(web: Web, redis_client: redis.Redis) -> None:
    names = dead_jobs(web, redis_client, "A", "A", "B")
    told = web.get("/api/v1/dlq").json
    assert sorted(job["id"] for job in told["jobs"]) == sorted(names)
    assert told["cursor"] is None and told["jobs"][0]["diedAt"].endswith("Z")
    assert [job["type"] for job in web.get("/api/v1/dlq?type=B&reason=fail").json["jobs"]] == ["B"]
    one = web.get(f"/api/v1/dlq/{names[0]}").json
    assert (one["payload"], one["reason"], one["attempts"]) == ({}, "failed", 1)
    groups = web.get("/api/v1/dlq/groups").json
    assert [(group["type"], group["count"], group["error"]) for group in groups["groups"]] == [
        ("A", 2, "ValueError: no good"),
        ("B", 1, "ValueError: no good"),
    ]
    assert (groups["jobs"], groups["more"]) == (3, False)


def test_pages_of_dead_jobs(web: Web, redis_client: redis.Redis) -> None:
    web.post("/api/v1/jobs:batch", b'{"type": "A"}\n' * 501, Content_Type="application/x-ndjson")
    bury(redis_client, 501)
    first = web.get("/api/v1/dlq").json
    second = web.get(f"/api/v1/dlq?cursor={first['cursor']}").json
    assert len({job["id"] for job in first["jobs"] + second["jobs"]}) == 501
    assert second["cursor"] is None
    for wrong in ("x", "1/x", "x/01ARZ3NDEKTSV4RRFFQ69G5F00.0", "nan/01ARZ3NDEKTSV4RRFFQ69G5F00.0"):
        web.get(f"/api/v1/dlq?cursor={wrong}").problem(400, "invalid-query")


def test_replay_and_delete_one(web: Web, redis_client: redis.Redis) -> None:
    again, gone = dead_jobs(web, redis_client, "A", "B")
    assert web.post(f"/api/v1/dlq/{again}/replay").json["replayed"] == 1
    assert web.get(f"/api/v1/jobs/{again}").json["status"] == "queued"
    assert web("DELETE", f"/api/v1/dlq/{gone}").json == {"deleted": 1}
    for name in (again, gone, "nonsense"):
        web.get(f"/api/v1/dlq/{name}").problem(404, "not-found")
        web.post(f"/api/v1/dlq/{name}/replay").problem(404, "not-found")
        web("DELETE", f"/api/v1/dlq/{name}").problem(404, "not-found")


def test_replay_and_delete_what_a_filter_selects(web: Web, redis_client: redis.Redis) -> None:
    names = dead_jobs(web, redis_client, "A", "A", "B", "C")
    for verb in ("replay", "delete"):
        dry = web.post(f"/api/v1/dlq:{verb}", {"type": "A", "dryRun": True})
        assert dry.json == {"matched": 2}
    assert web.get("/api/v1/queues").json["dead"] == 4
    assert web.post("/api/v1/dlq:replay", {"type": "A"}).json["replayed"] == 2
    assert web.post("/api/v1/dlq:delete", {"ids": names[2:3]}).json == {"deleted": 1}
    assert web.post("/api/v1/dlq:delete", {"all": True, "dryRun": True}).json == {"matched": 1}
    assert web.post("/api/v1/dlq:delete", {"all": True}).json == {"deleted": 1}
    assert web.get("/api/v1/queues").json["dead"] == 0


@pytest.mark.parametrize(
    "body",
    [
        None,
        {},
        {"dryRun": True},
        {"all": False},
        {"all": True, "type": "A"},
        {"ids": ["x"]},
        {"ids": 3},
        {"x": 1},
    ],
)
def test_nothing_is_replayed_or_deleted_by_mistake(web: Web, redis_client: redis.Redis, body: object) -> None:
    dead_jobs(web, redis_client, "A")
    for verb in ("replay", "delete"):
        web.post(f"/api/v1/dlq:{verb}", body).problem(422, "invalid-selection")
    assert web.get("/api/v1/queues").json["dead"] == 1


# ------------------------------------------------------------------ schedules


def test_schedules_are_listed_paused_and_resumed(web: Web, redis_client: redis.Redis) -> None:
    keys = Keys()
    options = {"max_retries": 1, "lane": "low"}
    schedules = (
        make(type="REPORT", name="nightly", expression="30 2 * * *", slot_as="day", options=options),
        make(type="PING", every=3600),
    )
    timetable = Timetable(app="m:app", born_ms=1, schedules=schedules)
    housekeeping.watched(
        SyncDoor(redis_client), keys.cron, lambda pipe: scheduling.register(pipe, keys, timetable)
    )
    redis_client.hset(keys.cron, "schedule:BAD", "{")
    told = web.get("/api/v1/cron").json
    assert told["damaged"] == ["BAD"]
    ping, nightly = told["schedules"]
    assert (ping["name"], ping["every"], ping["paused"], ping["lastJob"]) == ("PING", 3600, False, None)
    assert (nightly["slotAs"], nightly["options"]) == ("day", {"maxRetries": 1, "lane": "low"})
    msgspec.convert(told, shapes.Schedules)
    assert web.post("/api/v1/cron/PING/pause").json == {"name": "PING", "paused": True}
    assert web.get("/api/v1/cron").json["schedules"][0]["next"] is None
    for _ in range(2):
        assert web.post("/api/v1/cron/PING/resume").json == {"name": "PING", "paused": False}
    assert web.get("/api/v1/cron").json["schedules"][0]["next"] is not None
    for verb in ("pause", "resume"):
        web.post(f"/api/v1/cron/nothing/{verb}").problem(404, "not-found")


# ------------------------------------------------------------------ metrics


def test_metrics_of_the_queue(web: Web) -> None:
    before = parsed(web)
    submit(web, priority="high")
    web.post("/api/v1/queues/low/pause")
    now = parsed(web)
    assert now["taskqueue_queue_depth", "high"] == 1 and now["taskqueue_queue_depth", "low"] == 0
    assert now["taskqueue_queue_paused", "low"] == 1
    assert (
        now["taskqueue_jobs_submitted_total", ""] == before.get(("taskqueue_jobs_submitted_total", ""), 0) + 1
    )
    assert now["taskqueue_redis_up", ""] == 1


def test_the_page_has_the_queue_and_nothing_of_a_host(web: Web) -> None:
    """Scraped beside the stewards' pages it must not count anything of theirs twice."""
    names = {name for name, _ in parsed(web)}
    queue = {family.name for family in metrics.queue_families(full_sample().queue)}
    assert {name.removesuffix("_total") for name in names} <= queue
    assert web.get("/metrics").headers["content-type"].startswith("text/plain")


def parsed(web: Web) -> dict[tuple[str, str], float]:
    """Values by name and lane."""
    return {
        (sample.name, sample.labels.get("priority", "")): sample.value
        for family in text_string_to_metric_families(web.get("/metrics").body.decode())
        for sample in family.samples
    }


# ------------------------------------------------------------------ odd data


def test_odd_data_in_redis_breaks_no_look(web: Web, redis_client: redis.Redis) -> None:
    """Written by hand or by another version: whoever only looks must go on looking."""
    keys, name = Keys(), "01ARZ3NDEKTSV4RRFFQ69G5F00.0"
    redis_client.hset(keys.depth, mapping={"normal": "x", "low": "9" * 5_000})
    redis_client.hset(keys.stats, mapping={"completed": "many", "submitted": "5"})
    schedule = {"name": "ODD", "type": "A", "every_ms": 60_000, "options": ["lane"]}
    redis_client.hset(keys.cron, "schedule:ODD", json.dumps(schedule))
    redis_client.zadd(keys.incarnations, {"one": 2e12})
    redis_client.set(keys.worker("one"), '{"worker": 1e300, "pid": 1, "jobs": [{"id": 5}]}')
    redis_client.hset(keys.dlq_meta, name, '{"type": ["A"], "attempts": "x", "died_at": 1e300}')
    redis_client.zadd(keys.dlq_index, {name: 1})
    redis_client.hset(keys.dlq, name, b"x")
    told = web.get("/api/v1/queues").json
    assert told["totals"]["submitted"] == 5 and told["totals"]["completed"] == 0
    assert web.get("/api/v1/cron").json == {"schedules": [], "damaged": ["ODD"]}
    assert [job["id"] for job in web.get("/api/v1/dlq").json["jobs"]] == [name]
    assert web.get("/api/v1/dlq/groups").json["jobs"] == 1
    assert web.get(f"/api/v1/dlq/{name}").json["attempts"] == 0
    assert web.get("/readyz").status == 200
    assert "Traceback" not in web.program.text()
