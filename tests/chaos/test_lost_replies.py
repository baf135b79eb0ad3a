"""Proves what a lost command means, script by script, with real workers behind the proxy.

The column that matters most is `late`: the command is applied after its sender gave up on it and took itself
over. None of the modes may lose a job, run one twice, or leave anything behind: the faults are on the
timeline under a name that the checker takes for no excuse.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.chaos.arena import RETRY_BASE_MS, Arena, Producer
from tests.chaos.checker import Limits
from tests.chaos.journal import now_ns
from tests.chaos.procs import TqeRun
from tests.chaos.proxy import HANG, RESET, Proxy, Rule, runs
from tests.support.waiting import wait_until
from tqe.errors import TQEError
from tqe.store.scripts import SCRIPTS

LEASE_S = 3.0
SHORT = pytest.mark.timeout(180)
LONG = (pytest.mark.campaign, pytest.mark.timeout(900))

MODES: dict[str, Callable[[Proxy, str], Rule]] = {
    "request": lambda proxy, sha: proxy.drop_request(runs(sha), then=RESET),
    "half": lambda proxy, sha: proxy.cut_request(runs(sha)),
    "reply": lambda proxy, sha: proxy.drop_reply(runs(sha), then=RESET),
    "late": lambda proxy, sha: proxy.late(runs(sha), then=RESET),
    "noscript": lambda proxy, sha: proxy.answer(runs(sha), b"-NOSCRIPT No matching script.\r\n"),
    "loading": lambda proxy, sha: proxy.answer(
        runs(sha), b"-LOADING Redis is loading the dataset in memory\r\n"
    ),
    "busy": lambda proxy, sha: proxy.answer(runs(sha), b"-BUSY Redis is busy running a script.\r\n", times=3),
    "sliced": lambda proxy, sha: proxy.slice_reply(runs(sha), times=20),
    "request_silent": lambda proxy, sha: proxy.drop_request(runs(sha), then=HANG),
    "reply_silent": lambda proxy, sha: proxy.drop_reply(runs(sha), then=HANG),
    "late_silent": lambda proxy, sha: proxy.late(runs(sha), then=HANG),
}
SILENT = {name for name in MODES if name.endswith("_silent")}  # each costs its sender's whole read deadline


@dataclass
class Scene:
    """A queue at work, and a way to provoke each script."""

    arena: Arena
    proxy: Proxy
    run: TqeRun
    producer: Producer

    def flow(self) -> None:
        self.producer.bulk("QUICK", 40, lambda n: {"us": 300})
        self.producer.bulk("RESULT", 10, result=lambda n: [n, n * n])
        self.producer.bulk("FLAKY", 3, lambda n: {"failures": 1}, expect="fail:1")

    def delayed(self) -> None:
        self.producer.bulk("QUICK", 3, journal_opts={"delay_ms": 100}, delay=0.1)

    def cancel(self) -> None:
        handle = self.producer.single("QUICK", {}, delay=3600, expect="cancelled")
        with contextlib.suppress(TQEError):
            handle.cancel()
        # Whatever the first answer was: asked again, it must be so.
        began = now_ns()
        answer = handle.cancel()
        self.arena.submits.write(f"V\t{began}\tcancel\t{handle.id}\t{answer}\n")

    def pause(self) -> None:
        for verb in (self.producer.app.client.pause, self.producer.app.client.resume):
            with contextlib.suppress(TQEError):
                verb("low")
            verb("low")

    def crash(self) -> None:
        """A dead worker's jobs are taken over, and its replacement registers by the same script."""
        self.run.kill_worker(self.arena.rng)

    def wait(self) -> None:
        time.sleep(LEASE_S / 3)

    def provoke(self, script: str) -> None:
        {
            "enqueue": self.flow,
            "fetch": self.flow,
            "settle": self.flow,
            "takeover": self.crash,
            "renew": self.wait,
            "promote": self.delayed,
            "cancel": self.cancel,
            "pause": self.pause,
            "resume": self.pause,
        }[script]()


# Of these the sender is a producer, which submits on without taking anything over.
OF_PRODUCERS = {"enqueue", "cancel", "pause", "resume"}
PROVOKED = ("enqueue", "fetch", "settle", "takeover", "renew", "promote", "cancel", "pause", "resume")


@pytest.fixture
def wire(arena: Arena) -> Iterator[Proxy]:
    with Proxy(arena.server.socket, Path(arena.server.folder) / "wire.sock") as proxy:
        arena.redis_url = proxy.url
        yield proxy
        assert proxy.errors == []


def let_late_commands_come(scene: Scene, rule: Rule, script: str) -> None:
    """Release a held command once its sender has taken itself over, or surely gone on without it."""
    seen = len(scene.proxy.commands)

    def taken_over() -> bool:
        return any(c.sha == SCRIPTS["takeover"].sha for c in list(scene.proxy.commands)[seen:])

    with contextlib.suppress(AssertionError):
        wait_until(taken_over, 0.2 if script in OF_PRODUCERS else 1.0)
    rule.release()
    assert rule.applied.wait(10), "the held command was never applied"


def mode_params() -> list[object]:
    return [pytest.param(mode, marks=LONG if mode in SILENT else SHORT, id=mode) for mode in MODES]


@pytest.mark.parametrize("mode", mode_params())
def test_each_script_may_lose_a_command(arena: Arena, wire: Proxy, mode: str) -> None:
    scene = Scene(arena, wire, arena.run(procs=2, lease_s=LEASE_S), arena.producer())
    scene.flow()
    arena.wait_drained()
    fired: dict[str, bool] = {}
    for script in PROVOKED:
        began = now_ns()
        rule = MODES[mode](wire, SCRIPTS[script].sha)
        scene.flow()
        with contextlib.suppress(TQEError):
            scene.provoke(script)
        fired[script] = rule.fired.wait(LEASE_S)
        if rule.action == "late" and fired[script]:
            let_late_commands_come(scene, rule, script)
        wire.clear()
        arena.faults.record("wire", t_ns=began, until_ns=now_ns(), mode=mode, script=script)
        arena.wait_drained()
    never = [script for script, was in fired.items() if not was]
    assert never == [], f"never provoked: {never}"
    limits = Limits(
        lease_ms=int(LEASE_S * 1000), retry_base_ms=RETRY_BASE_MS, retry_cap_ms=2000, redis_reruns=False
    )
    report = arena.finish(limits)
    assert set(report.reruns) <= {"retry", "kill"}, report
    assert report.finals["completed"] + report.finals["cancelled"] == report.jobs


@pytest.mark.parametrize("mode", ["request", "reply", "late"])
@SHORT
def test_leaving_may_lose_its_command(arena: Arena, wire: Proxy, mode: str) -> None:
    """What a lost `leave` leaves behind ends with its lease; another supervisor clears it away."""
    arena.run(procs=1, lease_s=1.0)
    leaver = arena.run(procs=1, lease_s=1.0)
    producer = arena.producer()
    producer.bulk("QUICK", 500, lambda n: {"us": 100})
    rule = MODES[mode](wire, SCRIPTS["leave"].sha)
    assert leaver.stop() == 0
    assert rule.fired.is_set()
    rule.release()
    arena.wait_drained()
    live = 2  # a worker and, where it registers, its steward
    wait_until(lambda: arena.direct.zcard("tq:{0}:incarnations") <= live, 20, "the left lease ends")
    report = arena.finish(Limits(lease_ms=1000, redis_reruns=False))
    assert report.finals["completed"] == report.jobs
