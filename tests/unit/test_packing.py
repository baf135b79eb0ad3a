"""Packing: every job of a submission is found again where the receipt says, whatever it differs in."""

import random
from typing import Any

import msgspec
import pytest

from tqe import clock, codec
from tqe.client.core import Core
from tqe.client.packing import Receipt
from tqe.codec import payload as codec_payload
from tqe.errors import InvalidOption, InvalidPayload, PartialSubmit, UnknownLane
from tqe.formats import FRAME_BYTES_MAX
from tqe.registry import Registry, Task, task_options
from tqe.settings import Settings
from tqe.store.steps import Begin, Finish


def core() -> Core:
    registry = Registry()
    registry.add(Task("FAST", lambda n, x="": None, task_options("FAST", {"priority": "high"})))
    registry.add(Task("ANY", lambda **values: None))
    return Core(Settings(), registry, lambda receipt: [])


class Carrier:
    """Carries out a submission without Redis: every call is answered with `created`. `log` has what was done,
    `calls` the arguments of each call."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.calls: list[Any] = []
        self.now_us = 1_700_000_000_000_000

    def run(self, steps: Any) -> Receipt:
        answer: Any = None
        while True:
            try:
                step = steps.send(answer)
            except StopIteration as stop:
                receipt: Receipt = stop.value
                return receipt
            answer = None
            if isinstance(step, Begin):
                self.log.append("begin")
                self.calls.append(step.call)
            else:
                assert isinstance(step, Finish), step
                self.log.append("finish")
                args = self.calls[-1].args
                answer = [self.now_us, *[1] * (args.count(b"G") + args.count(b"K"))]

    def frames(self) -> dict[bytes, bytes]:
        """Frames by id."""
        found = {}
        for call in self.calls:
            for argument in call.args:
                if isinstance(argument, bytes) and argument[:2] == b"F1":
                    found[codec.parse(argument).frame_id] = argument
        return found


def jobs_of(receipt: Receipt, frames: dict[bytes, bytes]) -> list[tuple[Any, ...]]:
    """(type, payload, lane, tracked, limits) of each position, as the frames have them."""
    found: list[tuple[Any, ...]] = []
    for position in receipt.positions():
        place = receipt.find(position)
        assert place is not None
        frame = frames[place[0]]
        header = codec.parse(frame)
        kind, stored, own, zstd = codec.job_at(frame, place[1])
        assert not (own and header.options)
        payload = decoded(stored, zstd)
        limits = msgspec.json.decode(own or header.options or b"{}")
        found.append((kind.decode(), payload, header.lane, bool(header.flags & codec.TRACKED), limits))
    return found


def decoded(stored: bytes, zstd: bool) -> Any:
    return codec_payload.decode(codec_payload.decompress(stored) if zstd else stored)


def test_jobs_that_differ_in_everything_are_found_again() -> None:
    """Lanes, limits, tracking, compression and keys in any order: several frames are open at once."""
    seeded = random.Random(7)
    items: list[Any] = []
    expected = []
    for n in range(5_000):
        kind = seeded.choice(["FAST", "ANY", "other", "else"])
        payload: dict[str, Any] = {"n": n}
        if seeded.random() < 0.05:
            payload["x"] = "y" * seeded.choice([500, 1_500, 70_000])
        own: dict[str, Any] = {}
        if seeded.random() < 0.3:
            own["timeout"] = seeded.choice([1, 2, 2.0])
        if seeded.random() < 0.3:
            own["max_retries"] = seeded.choice([0, 1])
        if seeded.random() < 0.2:
            own["priority"] = seeded.choice(["low", "high"])
        if seeded.random() < 0.1:
            own["track"] = seeded.choice([True, False])
        if seeded.random() < 0.1:
            own["idempotency_key"] = f"key {n}"
        items.append((kind, payload, own) if own or seeded.random() < 0.1 else (kind, payload))
        limits = {"timeout_ms": int(own["timeout"] * 1000)} if "timeout" in own else {}
        limits |= {"max_retries": own["max_retries"]} if "max_retries" in own else {}
        lane = own.get("priority", "high" if kind == "FAST" else "normal")
        expected.append((kind, payload, lane, own.get("track", True), limits))
    carrier = Carrier()
    receipt = carrier.run(core().submit_mixed(items, {}, collect=False, progress=None))
    frames = carrier.frames()
    assert (receipt.total, receipt.created, receipt.refused) == (5_000, 5_000, {})
    assert jobs_of(receipt, frames) == expected
    assert all(len(frame) <= FRAME_BYTES_MAX or codec.parse(frame).n == 1 for frame in frames.values())


def test_limits_that_alternate_keep_their_jobs_apart() -> None:
    """Four jobs at 0, 2, 1, 3 of a frame would look like one run of four."""
    items = [("other", {"n": n}, {"timeout": 1 + n % 2}) for n in range(4)]
    carrier = Carrier()
    receipt = carrier.run(core().submit_mixed(items, {}, collect=False, progress=None))
    found = jobs_of(receipt, carrier.frames())
    assert [(job[1]["n"], job[4]["timeout_ms"]) for job in found] == [
        (0, 1000),
        (1, 2000),
        (2, 1000),
        (3, 2000),
    ]
    assert len(carrier.frames()) == 1


@pytest.mark.parametrize("size", [10, 60, 900, 1_100, 70_000])
def test_alike_jobs_of_any_size_are_found_again(size: int) -> None:
    n = 2_500 if size < 1_000 else 60
    payloads = [{"n": at, "x": random.Random(at).randbytes(size // 2).hex()} for at in range(n)]
    carrier = Carrier()
    receipt = carrier.run(
        core().submit_of("FAST", iter(payloads), {"timeout": 5}, collect=False, progress=None)
    )
    frames = carrier.frames()
    found = jobs_of(receipt, frames)
    assert [job[1] for job in found] == payloads
    assert {(job[0], job[2], job[4]["timeout_ms"]) for job in found} == {("FAST", "high", 5000)}
    assert all(len(frame) <= FRAME_BYTES_MAX or codec.parse(frame).n == 1 for frame in frames.values())
    if size < 70_000:  # frames are filled: none is less than half full but the last of each thousand
        assert len(frames) <= 2 * sum(map(len, frames.values())) / FRAME_BYTES_MAX + n / 1_000 + 1


def test_frames_of_mixed_types_tell_their_types() -> None:
    carrier = Carrier()
    items = [(kind, {"n": 1}) for kind in ("a", "a", "b", "a")]
    carrier.run(core().submit_mixed(items, {}, collect=False, progress=None))
    (call,) = carrier.calls
    assert b"Q,4,0,0,0,normal,a*2;b*1;a*1" in call.args


# ------------------------------------------------------------------ pipelining and stamps


def test_a_call_is_packed_while_the_one_before_is_under_way() -> None:
    carrier = Carrier()
    log = carrier.log

    def payloads() -> Any:
        for n in range(60_000):
            if n % 1_000 == 0:
                log.append("pack")
            yield {"x": "y" * 50, "n": n}

    carrier.run(core().submit_of("other", payloads(), {}, collect=False, progress=None))
    # The first answer is read at once: it tells Redis' time. From then on something is packed while a call is
    # under way, and never are two.
    assert log[log.index("begin") + 1] == "finish"
    later = log[log.index("finish") + 1 :]
    text = " ".join(later)
    assert "begin pack" in text and "begin begin" not in text and "finish finish" not in text
    assert log.count("begin") == log.count("finish") > 3 and log[-1] == "finish"


def test_frames_are_stamped_once_the_time_is_known() -> None:
    carrier = Carrier()
    ours = core()
    for _ in range(2):
        payloads = [{"x": "y" * 50, "n": n} for n in range(40_000)]
        carrier.run(ours.submit_of("other", payloads, {}, collect=False, progress=None))
    stamps = [
        [codec.parse(one).enqueued_us for one in call.args if isinstance(one, bytes) and one[:2] == b"F1"]
        for call in carrier.calls
    ]
    assert set(stamps[0]) == {0} and len(stamps) >= 4
    # One frame of the second call was packed before the first was sent: it had not fitted.
    assert stamps[1][0] == 0 and all(carrier.now_us <= stamp for stamp in stamps[1][1:])
    assert all(carrier.now_us <= stamp for call in stamps[2:] for stamp in call)


def test_what_is_refused_while_a_call_is_under_way_comes_after_its_answer() -> None:
    ours = core()
    carrier = Carrier()
    ours.time.heard(carrier.now_us)
    items: list[Any] = [("other", {"x": "y" * 900, "n": n}) for n in range(4_000)]
    items[3_500] = ("other", ["no object"])
    with pytest.raises(PartialSubmit) as caught:
        carrier.run(ours.submit_mixed(items, {}, collect=False, progress=None))
    assert isinstance(caught.value.cause, InvalidPayload)
    assert carrier.log[-1] == "finish" and carrier.log.count("begin") == carrier.log.count("finish")


def test_an_error_of_the_callers_own_iterator_waits_for_what_is_under_way() -> None:
    ours = core()
    carrier = Carrier()
    ours.time.heard(carrier.now_us)

    def payloads() -> Any:
        for n in range(3_000):
            yield {"x": "y" * 900, "n": n}
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        carrier.run(ours.submit_of("other", payloads(), {}, collect=False, progress=None))
    assert carrier.log[-1] == "finish" and carrier.log.count("begin") == carrier.log.count("finish")


# ------------------------------------------------------------------ options that are remembered


def refused(items: list[Any], given: dict[str, Any] | None = None) -> dict[int, type[Exception]]:
    receipt = Carrier().run(core().submit_mixed(items, given or {}, collect=True, progress=None))
    return {position: type(error) for position, error in receipt.refused.items()}


def test_options_that_look_alike_are_not_taken_for_each_other() -> None:
    good: list[Any] = [("a", {}, {"timeout": 1}), ("a", {}, {"max_retries": 1}), ("a", {}, {"track": True})]
    for bad in ({"timeout": True}, {"max_retries": True}, {"track": 1}, {"max_retries": 1.0}):
        assert refused([*good, ("a", {}, bad)]) == {3: InvalidOption}
    assert refused([*good, ("a", {}, {"timeout": 1.0})]) == {}


@pytest.mark.parametrize(
    ("item", "error"),
    [
        (("a b", {}), InvalidPayload),
        ((["a"], {}), InvalidPayload),
        ((7, {}), InvalidPayload),
        (("a", {}, []), InvalidPayload),
        (("a", {}, {"timeout": [1]}), InvalidOption),
        (("a", {}, {"priority": "nowhere"}), UnknownLane),
        (("a", {}, {"idempotency_key": ""}), InvalidOption),
        (("a", {}, {"idempotency_key": 7}), InvalidOption),
        (("a", {}, {"nonsense": 7}), InvalidOption),
        (("a",), InvalidPayload),
        ("ab", InvalidPayload),
    ],
)
@pytest.mark.parametrize("among", [0, 1, 3])
def test_a_bad_item_is_refused_alone(item: Any, error: type[Exception], among: int) -> None:
    items: list[Any] = [("a", {"n": 1}), ("b", {"n": 2}), ("a", {"n": 3}, {"timeout": 1})][:among]
    assert refused([*items, item, *items]) == {among: error}


def test_times_are_told_anew_for_each_job() -> None:
    """`expires` counts from the moment of its job: what is remembered would end ever earlier."""
    ours = core()
    known: dict[Any, Any] = {}
    for own in ({"expires": 5}, {"run_at": clock.wall_ms() / 1000 + 100}):
        first = ours._known_options("a", None, {}, own, known)
        assert ours._known_options("a", None, {}, own, known) is not first
    assert ours._known_options("a", None, {}, {"delay": 5}, known) is ours._known_options(
        "b", None, {}, {"delay": 5}, known
    )


def test_an_answer_belongs_to_its_frame() -> None:
    ours = core()
    items = [("a", {"n": n}, {"idempotency_key": str(n)}) for n in range(3)]
    steps = ours.submit_mixed(items, {}, collect=True, progress=None)
    steps.send(None)
    steps.send(None)
    with pytest.raises(StopIteration) as stop:
        steps.send([1_700_000_000_000_000, 1, b"01JZ4XQ9T3ABCDEFGHJKMNPQ00.0 " + b"f" * 16, 1])
    receipt = stop.value.value
    assert receipt.created == 2 and list(receipt.refused) == [1]
