"""The one owner of fork, signals, process groups and what processes may have open.

Only the supervisor reacts to SIGTERM, SIGINT and SIGHUP: Ctrl-C and service managers send them to everybody
at once, and a steward or worker that died of one could not settle any more. Children ignore them, obey the
board's words, and die with their parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import select
import signal
import sys
import threading
from collections.abc import Callable, Container
from typing import Final, NamedTuple, NoReturn

from tqe.telemetry import logs

SOFT_SIGNAL: Final = signal.SIGRTMIN + 6  # interrupts the job that the board's condemn words name
EXIT_FAILED: Final = 1

FILES_MAX: Final = 65_536

_PR_SET_PDEATHSIG: Final = 1
_WATCHED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_UNHEARD_BY_CHILDREN: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_IGNORED_BY_CHILDREN: Final = (
    signal.SIGTTOU,  # a child is not in the terminal's foreground group; writing there must not stop it
    SOFT_SIGNAL,  # its default action is death; the worker installs its own handler when it is ready
)
# Looked up before any fork: loading a library in the child could meet a lock that a thread held.
_libc = ctypes.CDLL(None, use_errno=True)

_log = logs.get("supervisor")


class Death(NamedTuple):
    """A child that ended: the signal that killed it, or 0 and its exit code."""

    pid: int
    signal: int
    code: int

    @property
    def how(self) -> str:
        """`SIGKILL` or `exit 3`, for logs and reasons."""
        return signal_name(self.signal) if self.signal else f"exit {self.code}"


def signal_name(number: int) -> str:
    """The usual name of a signal, also of the real-time ones."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Signals:
    """What was sent to this process, read in order from a pipe: no code of ours runs inside a handler."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._before = {number: signal.signal(number, _noted) for number in _WATCHED}
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)  # what came before this is heard now

    def wait(self, timeout_s: float) -> list[int]:
        """Sleep until a signal or the timeout; answer with what was sent, a death of a child left out."""
        if not select.select([self._reader], [], [], timeout_s)[0]:
            return []
        with contextlib.suppress(BlockingIOError):
            return [number for number in os.read(self._reader, 4096) if number != signal.SIGCHLD]
        return []

    def close(self) -> None:
        """Give the process back as it was."""
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._reader)
        os.close(self._writer)

    def forget_in_child(self) -> None:
        """The child of a fork must not read or feed its parent's pipe."""
        os.close(self._reader)
        os.close(self._writer)


def _noted(number: int, frame: object) -> None:
    """The pipe has it."""


def fork(
    run: Callable[[], int],
    *,
    name: str,
    before: Callable[[], None] | None = None,
    supervises: bool = False,
) -> int:
    """Run `run` in a child of its own process group, to exit with what it returns; answers with its pid.

    A child that `supervises` is to make `Signals`: what is sent to it before that waits.

    Only from the main thread: the kernel sends the death signal when the *thread* that forked ends.
    """
    parent = os.getpid()
    _flush()  # what stands in a buffer would be written by both
    # A signal between fork and reset would run the supervisor's handler in the child.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            held = mask | set(_WATCHED) if supervises else mask - set(_WATCHED)
            _be_child(run, name=name, before=before, parent=parent, mask=held)
        # Both sides set the group, so that it is there whoever runs first.
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        return pid
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _be_child(
    run: Callable[[], int],
    *,
    name: str,
    before: Callable[[], None] | None,
    parent: int,
    mask: set[signal.Signals | int],
) -> NoReturn:
    code = EXIT_FAILED
    try:
        _reset_signals()
        _die_with(parent)
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        _reseed()
        gc.enable()
        logs.set_process(name)
        if before is not None:
            before()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask - {SOFT_SIGNAL})
        code = run()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else EXIT_FAILED
    except BaseException:
        _log.exception("the process ends on an unexpected error")
    finally:
        _flush()
        # Not sys.exit: what the parent registered with atexit is the parent's.
        os._exit(code & 0xFF)


def _flush() -> None:
    for stream in (sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(OSError, ValueError):
            if stream is not None:
                stream.flush()


def _reset_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in _WATCHED:
        signal.signal(number, signal.SIG_DFL)
    for ignored in _IGNORED_BY_CHILDREN:
        signal.signal(ignored, signal.SIG_IGN)
    for unheard in _UNHEARD_BY_CHILDREN:
        # Not SIG_IGN, which every program that a job starts would inherit: its terminate() would do nothing.
        signal.signal(unheard, deaf)
        signal.siginterrupt(unheard, False)
    os.register_at_fork(before=_hold_signals, after_in_parent=_let_signals, after_in_child=_hear_again)


def deaf(number: int, frame: object) -> None:
    """A signal that is the supervisor's alone."""


# Around a fork of a job's: a pool may end its process before the child has come to hear signals again.
_mask = threading.local()


def _hold_signals() -> None:
    _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, _UNHEARD_BY_CHILDREN)


def _let_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before)


def _hear_again() -> None:
    """In a process that a job has forked, which is none of ours."""
    for number in _UNHEARD_BY_CHILDREN:
        if signal.getsignal(number) is deaf:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    _let_signals()


def _die_with(parent: int) -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it died before prctl: the signal will never come
        os._exit(EXIT_FAILED)


def _reseed() -> None:
    """Children that share a random state draw the same numbers. Python's own reseeds itself after a fork."""
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        with contextlib.suppress(Exception):
            numpy.random.seed()


def raise_file_limit() -> int:
    """Let this process and its children have as many files open as the system allows, up to 65,536; how many
    that are. The usual soft limit of 1,024 is fewer than the connections that a server takes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, FILES_MAX)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return soft if soft != resource.RLIM_INFINITY else FILES_MAX
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def reap(own: Container[int]) -> list[Death]:
    """Every child that has ended. Of those in `own` the rest of the process group is killed first.

    As PID 1 of a container orphans of others land here too: they are reaped and told nobody.
    """
    found: list[Death] = []
    while True:
        try:
            # Looked at without reaping: while the zombie is there nobody else can get its pid, nor its group.
            seen = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return found
        if seen is None:
            return found
        if seen.si_pid in own:
            kill_group(seen.si_pid)
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, seen.si_pid, os.WEXITED | os.WNOHANG)
        if seen.si_code == os.CLD_EXITED:
            found.append(Death(seen.si_pid, 0, seen.si_status))
        else:
            found.append(Death(seen.si_pid, seen.si_status, 0))


def wait_for(pid: int) -> None:
    """Reap a child that was killed."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def has_ended(pid: int) -> bool:
    """Whether a child is over; it is not reaped."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def end(pid: int, *, timeout_s: float) -> bool:
    """SIGTERM to a child, and reap it; False if it has not ended in time."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    watched = os.pidfd_open(pid)
    try:
        if not select.select([watched], [], [], timeout_s)[0]:
            return False
    finally:
        os.close(watched)
    wait_for(pid)
    return True


def install_limit_signal(handler: Callable[[], None]) -> None:
    """Make the supervisor's interrupt call `handler` in this worker's main thread, between two bytecodes."""
    signal.signal(SOFT_SIGNAL, lambda number, frame: handler())


def interrupt(pid: int) -> None:
    """Send the signal that makes a worker look at its condemn words."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, SOFT_SIGNAL)


def kill_group(pid: int) -> None:
    """SIGKILL to a child and to all that it started: what a job left running goes with it."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        # Not its own group yet (killed within the first instant), or nobody left in it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def probe(run: Callable[[], bytes]) -> bytes | None:
    """Run something in a throw-away child, mute, and bring back its answer; None if it failed there."""
    reader, writer = os.pipe2(os.O_CLOEXEC)

    def tell() -> int:
        os.close(reader)
        mute = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        os.dup2(mute, 1)
        os.dup2(mute, 2)
        os.write(writer, run() + b"\n")
        return 0

    try:
        pid = fork(_quiet(tell), name="probe")
    finally:
        os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        answer = stream.readline()  # not to the end: what it started may hold the pipe open
    kill_group(pid)
    wait_for(pid)
    return answer.rstrip(b"\n") or None


def _quiet(run: Callable[[], int]) -> Callable[[], int]:
    """The probe's failure is no news: what it tried is tried again where it can be told."""

    def guarded() -> int:
        try:
            return run()
        except BaseException:
            return EXIT_FAILED

    return guarded
