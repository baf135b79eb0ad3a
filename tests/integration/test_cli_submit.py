"""`tqe submit` against a real Redis: what goes in, what is refused, and what is said of it."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.support.cli import Cli
from tests.support.hands import Hands
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until
from tqe.cli import submit as module
from tqe.errors import RedisUnavailable
from tqe.store.keys import Keys

KEYS = Keys()


@pytest.fixture
def cli(redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.chdir(tmp_path)
    return Cli({"TQE_REDIS_URL": redis_server.url})


def waiting(client: redis.Redis) -> list[tuple[str, Any]]:
    """(type, payload) of what the queue holds, in the order in which workers would get it."""
    return [(kind, payload) for _, kind, payload in Hands(client).fetch().jobs()]


# ------------------------------------------------------------------ one job


def test_a_job_is_submitted_and_its_id_printed(cli: Cli, redis_client: redis.Redis) -> None:
    result = cli("submit", "EMAIL", '{"to": "a@example.com"}')
    assert result.exit_code == 0
    assert cli.json("job", result.stdout.strip())["status"] == "queued"
    assert waiting(redis_client) == [("EMAIL", {"to": "a@example.com"})]


def test_json_is_id_and_created(cli: Cli) -> None:
    told = cli.json("submit", "EMAIL", "{}")
    assert list(told) == ["id", "created"]
    assert told["created"] is True


def test_a_payload_may_come_from_standard_input_or_be_left_out(cli: Cli, redis_client: redis.Redis) -> None:
    assert cli("submit", "A", "-", stdin='{"n": 1}\n').exit_code == 0
    assert cli("submit", "B").exit_code == 0
    assert waiting(redis_client) == [("A", {"n": 1}), ("B", {})]


def test_a_second_submission_with_a_key_finds_the_first_job(cli: Cli) -> None:
    first = cli.json("submit", "A", '{"n": 1}', "--idempotency-key", "k")
    second = cli.json("submit", "A", '{"n": 1}', "--idempotency-key", "k")
    assert second == {"id": first["id"], "created": False}
    assert "no new one was created" in cli("submit", "A", '{"n": 1}', "--idempotency-key", "k").stderr
    said = cli.fails(1, "submit", "A", '{"n": 2}', "--idempotency-key", "k")
    assert first["id"] in said


def test_options_arrive(cli: Cli, redis_client: redis.Redis) -> None:
    cli.json("submit", "A", "--priority", "HIGH")
    cli.json("submit", "B", "--delay", "60")
    status = cli.json("status")
    assert status["lanes"]["high"]["queued"] == 1
    assert status["scheduled"] == 1


def test_a_time_without_a_zone_is_local(cli: Cli) -> None:
    assert cli.json("submit", "A", "--run-at", "2020-01-01T00:00")["created"]
    assert cli.json("status")["lanes"]["normal"]["queued"] == 1  # that time is over
    assert "no ISO 8601 time" in cli("submit", "A", "--run-at", "tomorrow").stderr


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (("A", "[1]"), "JSON object"),
        (("A", '"x"'), "JSON object"),
        (("A", "{"), "not JSON"),
        (("A", '{"a": NaN}'), "not JSON"),
        (("A", '{"a": 1e999}'), "cannot be read"),
        (("A", '{"a": 1, "a": 2}'), "twice"),
        (("A", '{"a":' * 500 + "1" + "}" * 500), "nested deeper"),
        (("A", '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), "nested deeper"),
        (("A", json.dumps({"a": "x" * 1_100_000})), "the limit is 1048576"),
        (("no type", "{}"), "is no type"),
        (("A", "{}", "--priority", "urgent"), "configured are: high, normal, low"),
        (("A", "{}", "--delay", "-1"), "negative"),
        (("A", "{}", "--delay", "1e12"), "more than ten years"),
        (("A", "{}", "--delay", "nan"), "finite"),
        (("A", "{}", "--delay", "soon"), "not a valid float"),
        (("A", "{}", "--timeout", "0"), "leave it out"),
        (("A", "{}", "--max-retries", "-1"), "max_retries takes"),
        (("A", "{}", "--max-retries", "x"), "not a valid integer"),
        (("A", "{}", "--expires", "0"), "could never run"),
        (("A", "{}", "--idempotency-key", ""), "1 to"),
        (("A", "{}", "--idempotency-key", "k" * 5000), "1 to"),
        (("A", "{}", "--delay", "1", "--run-at", "2030-01-01T00:00:00Z"), "exclude"),
        (("A", "{}", "--wait=-1"), "-1"),
        ((), "TYPE"),
        (("A", "{}", "--file", "x"), "--file"),
        (("--file", "x", "--idempotency-key", "k"), "single job"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    cli: Cli, redis_client: redis.Redis, args: tuple[str, ...], part: str
) -> None:
    assert part in cli.fails(2, "submit", *args)
    assert redis_client.dbsize() == 0


def test_with_an_app_types_arguments_and_lanes_are_those_of_its_tasks(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(
        "from tqe import App\n"
        "app = App()\n"
        "@app.task('SHIP', priority='high')\n"
        "def ship(order: int) -> None: ...\n"
    )
    assert "order is missing" in cli.fails(2, "submit", "SHIP", "{}", "--app", "shop:app")
    assert "order is wrong" in cli.fails(2, "submit", "SHIP", '{"order": "x"}', "--app", "shop:app")
    assert "no argument colour" in cli.fails(
        2, "submit", "SHIP", '{"order": 1, "colour": 2}', "--app", "shop:app"
    )
    cli.json("submit", "SHIP", '{"order": 1}', "--app", "shop:app")
    assert cli.json("status")["lanes"]["high"]["queued"] == 1
    assert "no module nosuch" in cli.fails(2, "submit", "SHIP", "--app", "nosuch:app")


# ------------------------------------------------------------------ waiting


@pytest.fixture
def answer(redis_client: redis.Redis) -> Callable[[str, Any], threading.Thread]:
    """`answer(state, value)` ends the next job that comes, from another thread."""

    def begin(state: str, value: Any) -> threading.Thread:
        def work() -> None:
            wait_until(lambda: redis_client.llen(KEYS.queue("normal")))
            Hands(redis_client).fetch().settle(lambda name: (state, value))

        thread = threading.Thread(target=work)
        thread.start()
        return thread

    return begin


def test_wait_prints_the_result(cli: Cli, answer: Callable[[str, Any], threading.Thread]) -> None:
    thread = answer("C", {"sum": 3})
    result = cli("submit", "ADD", '{"a": 1}', "--wait=20")
    thread.join()
    assert (result.exit_code, json.loads(result.stdout)) == (0, {"sum": 3})
    assert result.stderr.strip().endswith(".0")  # the id, for whoever has to look it up


def test_wait_without_seconds_waits_on_and_json_has_all_of_it(
    cli: Cli, answer: Callable[[str, Any], threading.Thread]
) -> None:
    thread = answer("C", 7)
    told = cli.json("submit", "ADD", "{}", "--wait")
    thread.join()
    assert (told["status"], told["result"], told["created"]) == ("completed", 7, True)


def test_wait_for_a_job_that_fails(cli: Cli, answer: Callable[[str, Any], threading.Thread]) -> None:
    thread = answer("D", "Traceback (most recent call last):\n  …\nValueError: no good")
    said = cli.fails(1, "submit", "ADD", "{}", "--wait=20", "--json")
    thread.join()
    assert "failed: ValueError: no good" in said


def test_wait_gives_up(cli: Cli) -> None:
    assert "result is not there yet" in cli.fails(1, "submit", "ADD", "{}", "--wait=0.05")


# ------------------------------------------------------------------ many jobs


def lines(*objects: Any) -> str:
    return "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in objects)


def test_good_lines_go_in_and_bad_ones_are_reported_by_number(
    cli: Cli, redis_client: redis.Redis, tmp_path: Path
) -> None:
    (tmp_path / "jobs.ndjson").write_text(
        lines(
            {"type": "A", "payload": {"n": 1}},
            "",
            {"type": "A", "payload": [1]},
            "not json",
            {"type": "A", "payload": {"n": 2}, "priority": "high", "maxRetries": 1, "timeout": 5},
            {"type": "A", "payload": {}, "priority": "nowhere"},
            {"payload": {}},
            {"type": "A", "payload": {"n": 3}, "delay": -1},
            {"type": "B"},
        )
    )
    result = cli("submit", "--file", "jobs.ndjson", "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert {name: told[name] for name in ("created", "duplicate", "rejected")} == {
        "created": 3,
        "duplicate": 0,
        "rejected": 5,
    }
    assert [error["line"] for error in told["errors"]] == [3, 4, 6, 7, 8]
    assert "no lane 'nowhere'" in told["errors"][2]["error"]
    assert waiting(redis_client) == [("A", {"n": 2}), ("A", {"n": 1}), ("B", {})]


def test_people_read_the_same(cli: Cli) -> None:
    result = cli("submit", "--file", "-", stdin=lines({"type": "A"}, *["x"] * 30))
    assert result.exit_code == 1
    assert result.stdout == "1 created, 0 duplicate, 30 rejected\n"
    assert result.stderr.splitlines()[0].startswith("line 2: the line is not JSON")
    assert result.stderr.splitlines()[-1] == "… and 10 more bad lines"


def test_a_stream_of_any_length_is_read_in_parts(
    cli: Cli, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LINES_AT_ONCE", 3)
    objects: list[Any] = [{"type": "A", "payload": {"n": n}} for n in range(10)]
    objects[4] = "x"
    objects[7] = {"type": "A", "payload": {}, "priority": "nowhere"}
    result = cli("submit", "--file", "-", "--json", stdin=lines(*objects))
    told = json.loads(result.stdout)
    assert (told["created"], [one["line"] for one in told["errors"]]) == (8, [5, 8])
    assert [payload["n"] for _, payload in waiting(redis_client)] == [0, 1, 2, 3, 5, 6, 8, 9]


def test_keys_of_lines_make_duplicates(cli: Cli) -> None:
    line = {"type": "A", "payload": {"n": 1}, "idempotencyKey": "k"}
    told = cli("submit", "--file", "-", "--json", stdin=lines(line, line, {**line, "payload": {"n": 2}}))
    assert json.loads(told.stdout)["errors"][0]["line"] == 3
    assert [json.loads(told.stdout)[name] for name in ("created", "duplicate", "rejected")] == [1, 1, 1]


def test_options_count_for_all_lines(cli: Cli) -> None:
    assert cli("submit", "--file", "-", "--priority", "low", stdin=lines(*[{"type": "A"}] * 5)).exit_code == 0
    assert cli.json("status")["lanes"]["low"]["queued"] == 5
    assert "no lane" in cli.fails(2, "submit", "--file", "-", "--priority", "x", stdin=lines({"type": "A"}))


def test_a_byte_order_mark_and_windows_line_ends_are_no_obstacle(cli: Cli) -> None:
    text = b"\xef\xbb\xbf" + b'{"type": "A"}\r\n{"type": "A"}\r\n\r\n'
    assert cli("submit", "--file", "-", stdin=text).stdout == "2 created, 0 duplicate, 0 rejected\n"


def test_a_line_without_end_is_refused_and_the_next_one_is_not(cli: Cli) -> None:
    text = '{"type": "A", "payload": {"x": "' + "y" * 400_000 + '"}}\n{"type": "A"}\n'
    result = cli("submit", "--file", "-", "--json", stdin=text, TQE_PAYLOAD_MAX_BYTES="64")
    told = json.loads(result.stdout)
    assert (told["created"], told["errors"][0]["line"]) == (1, 1)
    assert "the limit is 64" in told["errors"][0]["error"]


def test_a_payload_above_the_limit_is_one_bad_line(cli: Cli) -> None:
    text = lines({"type": "A", "payload": {"x": "y" * 100}}, {"type": "A"})
    told = json.loads(cli("submit", "--file", "-", "--json", stdin=text, TQE_PAYLOAD_MAX_BYTES="64").stdout)
    assert (told["created"], [one["line"] for one in told["errors"]]) == (1, [1])


def test_a_file_that_is_not_there(cli: Cli, tmp_path: Path) -> None:
    assert "No such file" in cli.fails(1, "submit", "--file", "nowhere.ndjson")
    assert "directory" in cli.fails(1, "submit", "--file", str(tmp_path))


def test_an_empty_file_is_no_mistake(cli: Cli) -> None:
    assert cli("submit", "--file", "-", stdin="").stdout == "0 created, 0 duplicate, 0 rejected\n"


def test_what_went_in_before_a_failure_is_told(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINES_AT_ONCE", 2)
    submit_many = module.Client.submit_many

    def breaks(self: Any, items: Any, **options: Any) -> Any:
        if items[0][1]["n"] == 2:
            raise RedisUnavailable("Redis cannot be reached: it is gone")
        return submit_many(self, items, **options)

    monkeypatch.setattr(module.Client, "submit_many", breaks)
    text = lines(*[{"type": "A", "payload": {"n": n}} for n in range(4)])
    result = cli("submit", "--file", "-", "--json", stdin=text)
    assert result.exit_code == 1
    assert json.loads(result.stdout)["created"] == 2
    assert "it is gone" in result.stderr


def test_redis_out_of_memory(cli: Cli, redis_client: redis.Redis) -> None:
    redis_client.config_set("maxmemory", "1")
    said = cli.fails(1, "submit", "A", "{}")
    assert "memory" in said
