"""Ids, options of a submission, records and statuses: what needs no Redis."""

import os
import threading
from datetime import UTC, datetime, timedelta

import pytest

from tests.support.fake_clock import FakeClock
from tqe import job
from tqe.errors import InvalidOption, UnknownLane

NOW_MS = 1_700_000_000_000
LANES = ("high", "normal", "low")


def options(**given: object) -> job.SubmitOptions:
    return job.submit_options(given, lanes=LANES, default_lane="normal", now_ms=NOW_MS)


class TestIds:
    def test_an_id_has_its_form_and_tells_its_time(self, fake_clock: FakeClock) -> None:
        frame_id = job.IdMaker(fake_clock).frame_id()
        assert job.is_frame_id(frame_id.decode()) and len(frame_id) == 26
        assert frame_id.endswith(b"00")
        assert job.id_time_ms(frame_id) == NOW_MS
        second, character = job.bucket_of(frame_id)
        assert second == NOW_MS // 1000 and character == frame_id[10:11].decode()
        assert job.bucket_of(frame_id.decode()) == (second, character)

    def test_ids_increase_within_one_millisecond_and_over_bucket_turns(self, fake_clock: FakeClock) -> None:
        maker = job.IdMaker(fake_clock)
        ids = [maker.frame_id() for _ in range(20_000)]
        assert ids == sorted(set(ids))

    def test_ids_increase_when_the_clock_steps_back(self, fake_clock: FakeClock) -> None:
        maker = job.IdMaker(fake_clock)
        before = maker.frame_id()
        fake_clock.step_wall(ms=-60_000)
        assert maker.frame_id() > before

    def test_a_maker_keeps_its_bucket_character_for_at_most_512_ids(self, fake_clock: FakeClock) -> None:
        maker = job.IdMaker(fake_clock)
        characters = []
        for _ in range(512 * 40):
            characters.append(maker.frame_id()[10])
            fake_clock.advance(us=700)
        runs = [characters[i : i + 512] for i in range(0, len(characters), 512)]
        assert all(len(set(run)) == 1 for run in runs)
        assert len({run[0] for run in runs}) > 8

    def test_a_forked_child_makes_other_ids_even_if_the_lock_was_held(self, fake_clock: FakeClock) -> None:
        maker = job.IdMaker(fake_clock)
        maker.frame_id()
        reader, writer = os.pipe()
        with maker._lock:
            pid = os.fork()
            if pid == 0:
                os.write(writer, maker.frame_id())
                os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        child = os.read(reader, 26)
        os.close(reader)
        os.close(writer)
        mine = maker.frame_id()
        assert len(child) == 26 and child[10:] != mine[10:]
        assert abs(int.from_bytes(child[12:24]) - int.from_bytes(mine[12:24])) > 1

    def test_threads_get_different_ids(self) -> None:
        maker, found = job.IdMaker(), []
        threads = [
            threading.Thread(target=lambda: found.extend([maker.frame_id() for _ in range(2000)]))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(found)) == 8000

    def test_job_ids_split_into_what_they_were_made_of(self) -> None:
        frame_id = job.IDS.frame_id()
        assert job.split_job_id(job.job_id(frame_id, 17)) == (frame_id, 17)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "x",
            "0" * 26,
            "0" * 26 + ".",
            "0" * 26 + ".01",
            "0" * 26 + ".1000",
            "U" * 26 + ".1",
            "0" * 26 + ".1\n",
            "0" * 25 + "l.1",
            "0" * 26 + ".\u0661",
        ],
    )
    def test_what_is_no_job_id_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match="not a job id"):
            job.split_job_id(text)


class TestOptions:
    def test_nothing_given_is_the_default_lane_now(self) -> None:
        assert options() == job.SubmitOptions(lane="normal")
        assert options().limits() == b""

    def test_everything_given(self) -> None:
        found = options(
            priority="HIGH", delay=5, timeout=1.5, max_retries=0, expires=60, idempotency_key="k", track=False
        )
        assert found == job.SubmitOptions(
            lane="high",
            due="+5000",
            delay_ms=5000,
            expires_ms=NOW_MS + 60_000,
            timeout_ms=1500,
            max_retries=0,
            key="k",
            track=False,
        )
        assert found.limits() == b'{"timeout_ms":1500,"max_retries":0,"expires_ms":1700000060000}'

    def test_times_may_be_spans_and_instants(self) -> None:
        at = datetime.fromtimestamp(NOW_MS / 1000, UTC) + timedelta(seconds=2)
        assert options(delay=timedelta(milliseconds=1500)).due == "+1500"
        assert options(run_at=at).due == f"={NOW_MS + 2000}" == options(run_at=NOW_MS / 1000 + 2).due
        assert options(run_at=at).delay_ms == 2000
        assert options(run_at=NOW_MS / 1000 - 5).due == "0"
        assert options(expires=at).expires_ms == NOW_MS + 2000
        assert options(delay=0).due == "0"

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            ({"delay": -1}, "delay is negative"),
            ({"delay": float("nan")}, "delay takes a finite"),
            ({"delay": float("inf")}, "delay takes a finite"),
            ({"delay": 10**12}, "delay is more than ten years"),
            ({"delay": "5"}, "delay takes a number"),
            ({"delay": True}, "delay takes a number"),
            ({"delay": 10**5000}, "delay is more than ten years"),
            ({"delay": 1, "run_at": NOW_MS / 1000}, "exclude each other"),
            ({"run_at": datetime(2024, 1, 1)}, "has none"),
            ({"run_at": NOW_MS}, "more than ten years away"),
            ({"run_at": 5}, "more than ten years away"),
            ({"run_at": 10**400}, "more than ten years away"),
            ({"run_at": "tomorrow"}, "run_at takes"),
            ({"timeout": 0}, "timeout is 0"),
            ({"timeout": -0.1}, "timeout is negative"),
            ({"max_retries": -1}, "max_retries takes"),
            ({"max_retries": 1001}, "max_retries takes"),
            ({"max_retries": 1.0}, "max_retries takes"),
            ({"max_retries": True}, "max_retries takes"),
            ({"expires": 0}, "expires is 0"),
            ({"expires": 5, "delay": 5}, "never run"),
            ({"idempotency_key": ""}, "1 to 256 bytes, not 0"),
            ({"idempotency_key": "é" * 129}, "1 to 256 bytes, not 258"),
            ({"idempotency_key": 7}, "takes a text"),
            ({"idempotency_key": "\ud800"}, "not valid Unicode"),
            ({"track": 1}, "track takes"),
            ({"priority": "high", "lane": "low"}, "two names of one option"),
            ({"priority": 3}, "priority takes"),
            ({"prio": "high"}, "prio is not an option; there are: priority"),
        ],
    )
    def test_a_wrong_option_is_refused_by_name(self, given: dict[str, object], says: str) -> None:
        with pytest.raises(InvalidOption, match=says):
            options(**given)

    def test_a_lane_that_is_not_configured_is_refused(self) -> None:
        with pytest.raises(UnknownLane, match="'urgent'; configured are: high, normal, low"):
            options(priority="urgent")


class TestIdempotency:
    def test_long_keys_are_stored_hashed(self) -> None:
        assert job.stored_key("a" * 64) == "a" * 64
        assert job.stored_key("a" * 65).startswith("sha256:") and len(job.stored_key("a" * 65)) == 71

    def test_the_hash_knows_requests_apart(self) -> None:
        first = job.request_hash("EMAIL", "high", b'{"a":1}')
        assert len(first) == 16 and first == job.request_hash("EMAIL", "high", b'{"a":1}')
        others = {
            job.request_hash("SMS", "high", b'{"a":1}'),
            job.request_hash("EMAIL", "low", b'{"a":1}'),
            job.request_hash("EMAIL", "high", b'{"a":2}'),
        }
        assert first not in others and len(others) == 3


class TestSnapshot:
    def test_it_reads_what_it_makes(self) -> None:
        snapshot = job.Snapshot("QRC", 3, 1, 2, 3, "high", "EMAIL*2;a:b.c-d*1")
        assert job.Snapshot.parse(snapshot.make()) == snapshot
        assert snapshot.make() == b"QRC,3,1,2,3,high,EMAIL*2;a:b.c-d*1"
        assert [snapshot.state_of(i) for i in range(3)] == ["Q", "R", "C"]
        assert [snapshot.type_of(i) for i in range(3)] == ["EMAIL", "EMAIL", "a:b.c-d"]

    def test_a_new_one(self) -> None:
        types = job.types_run_length(["A", "A", "B", "A"])
        assert types == "A*2;B*1;A*1"
        assert job.new_snapshot(4, "low", types) == b"Q,4,0,0,0,low,A*2;B*1;A*1"

    @pytest.mark.parametrize("value", [b"", b"Q", b"Q,x,0,0,0,a,b", b"QQ,3,0,0,0,a,b", b"Q,0,0,0,0,a,b"])
    def test_another_shape_is_refused(self, value: bytes) -> None:
        with pytest.raises(ValueError):
            job.Snapshot.parse(value)


class TestStatus:
    FRAME_ID = job.IdMaker(FakeClock()).frame_id()

    def status(
        self,
        value: bytes | None,
        *,
        index: int = 0,
        own: dict[str, object] | None = None,
        running: int | None = None,
        cancel: bool = False,
    ) -> job.JobStatus:
        return job.job_status(
            self.FRAME_ID,
            index,
            snapshot=None if value is None else job.Snapshot.parse(value),
            own=own or {},
            running_since_ms=running,
            cancel_requested=cancel,
            now_ms=NOW_MS,
        )

    @pytest.mark.parametrize(
        ("value", "running", "expected"),
        [
            (None, None, "unknown"),
            (b"Q,1,0,0,0,high,A*1", None, "queued"),
            (b"Q,1,1700000005000,0,0,high,A*1", None, "scheduled"),
            (b"Q,1,1699999995000,0,0,high,A*1", None, "queued"),
            (b"Q,1,0,0,0,high,A*1", NOW_MS - 5, "running"),
            (b"R,1,1700000005000,0,0,high,A*1", None, "retrying"),
            (b"R,1,0,0,0,high,A*1", None, "retrying"),
            (b"R,1,1699999995000,0,0,high,A*1", None, "queued"),
            (b"R,1,1699999995000,0,0,high,A*1", NOW_MS - 5, "running"),
            (b"C,1,0,1,2,high,A*1", NOW_MS - 5, "completed"),
            (b"D,1,0,1,2,high,A*1", None, "dead"),
            (b"X,1,0,1,2,high,A*1", None, "cancelled"),
            (b"E,1,0,1,2,high,A*1", None, "cancelled"),
            (b"B,1,0,1,2,high,A*1", None, "dead"),
        ],
    )
    def test_each_state(self, value: bytes | None, running: int | None, expected: str) -> None:
        found = self.status(value, running=running)
        assert found.status == expected and expected in job.STATUSES
        assert found.ended is (expected in ("completed", "dead", "cancelled"))

    def test_a_job_without_a_record_of_its_own_has_its_frames_times(self) -> None:
        found = self.status(b"C,5,0,1700000001000,1700000002500,high,A*3;B*2", index=3)
        assert found.as_dict() == {
            "id": f"{self.FRAME_ID.decode()}.3",
            "type": "B",
            "status": "completed",
            "lane": "high",
            "attempts": 1,
            "submitted_at": "2023-11-14T22:13:20.000Z",
            "started_at": "2023-11-14T22:13:21.000Z",
            "finished_at": "2023-11-14T22:13:22.500Z",
            "result": None,
            "error": None,
        }

    def test_its_own_record_wins(self) -> None:
        own = {"attempts": 4, "started_at": 3_000, "finished_at": 4_000, "error": {"message": "boom"}}
        found = self.status(b"CD,2,0,1000,2000,high,A*2", index=1, own=own)
        assert (found.status, found.attempts, found.error) == ("dead", 4, "boom")
        assert found.started_at == datetime.fromtimestamp(3, UTC)

    def test_an_index_beyond_the_frame_is_unknown(self) -> None:
        assert self.status(b"C,1,0,1,2,high,A*1", index=1).status == "unknown"

    def test_reasons_and_requests_are_told(self) -> None:
        assert "expired" in str(self.status(b"E,1,0,1,2,high,A*1").error)
        assert "quarantine" in str(self.status(b"B,1,0,1,2,high,A*1").error)
        assert self.status(b"Q,1,0,0,0,high,A*1", cancel=True).error == "cancellation requested"
        assert self.status(b"X,1,0,0,0,high,A*1", cancel=True).error is None
