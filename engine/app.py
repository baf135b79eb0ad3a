"""The App: where tasks are registered and submitted; what users of the engine hold in their hands."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import os
import sys
import sysconfig
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, ParamSpec, TypeVar, Unpack, overload

from tqe import current, settings
from tqe.client import AsyncClient, AsyncJobHandle, AsyncJobHandles, Client, JobHandle, JobHandles
from tqe.errors import AppImportError, AppNotFound, RegistrationError, SettingsError
from tqe.job import Options, Span
from tqe.registry import DeclaredOptions, Registry, Task, TaskOptions, place_of, task_options
from tqe.schedule import Schedule, Timetable, make, timetable
from tqe.settings import Settings

if TYPE_CHECKING:
    from tqe.worker.reporting import FailedAttempt
    from tqe.worker.runner import Tracing

P = ParamSpec("P")
R = TypeVar("R")
Hook = TypeVar("Hook", bound=Callable[[], Any])
ErrorHook = TypeVar("ErrorHook", bound="Callable[[FailedAttempt], Any]")
AnyHook = TypeVar("AnyHook", bound=Callable[..., Any])
AnyAppTask = TypeVar("AnyAppTask", bound="AppTask[..., Any]")
Progress = Callable[[int], None]

_CRON_OPTIONS: Final = ("every", "tz", "missed", "jitter", "overlap", "slot_as")

# Clients of a parent process. They are kept, not dropped: closing what is inherited could end its sessions.
_inherited: Final[list[object]] = []


class App:
    """Tasks, settings and the clients that submit.

    Settings given here are the weakest: tqe.toml, `TQE_*` and the command line override them. Nothing is read
    and nobody connects before the first use.
    """

    def __init__(self, name: str | None = None, **code: Any) -> None:
        self.name = name
        self.registry = Registry()
        self.schedules: dict[str, Schedule] = {}
        self.worker_start_hooks: list[Callable[[], Any]] = []
        self.worker_stop_hooks: list[Callable[[], Any]] = []
        self.tracing: Tracing | None = None
        self.error_hooks: list[Callable[[FailedAttempt], Any]] = []
        self._code = code
        self._settings: Settings | None = None
        self._make_client: Callable[..., Client] = Client
        self._make_async_client: Callable[..., AsyncClient] = AsyncClient
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._client: Client | None = None
        self._async_clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncClient] = (
            weakref.WeakKeyDictionary()
        )

    def __repr__(self) -> str:
        return f"<App {self.name or ''} tasks={len(self.registry)}>"

    # -------------------------------------------------------------- settings

    @property
    def code_settings(self) -> dict[str, Any]:
        """What the code says, for whoever merges it with a command line."""
        return dict(self._code)

    @property
    def settings(self) -> Settings:
        if self._settings is None:
            self._settings = settings.load(code=self._code)
        return self._settings

    def configure(self, merged: Settings) -> None:
        """Use these settings from now on; before the first submission."""
        if self._client is not None or len(self._async_clients):
            raise SettingsError("settings cannot change any more: the app has connected already")
        self._settings = merged

    def use_clients(self, *, client: Callable[..., Client], async_client: Callable[..., AsyncClient]) -> None:
        """Submit through clients that these make, with the arguments of Client; before the first use."""
        if self._client is not None or len(self._async_clients):
            raise SettingsError("clients cannot change any more: the app has connected already")
        self._make_client, self._make_async_client = client, async_client

    @contextlib.contextmanager
    def replaced(
        self,
        merged: Settings,
        *,
        client: Callable[..., Client] | None = None,
        async_client: Callable[..., AsyncClient] | None = None,
    ) -> Iterator[None]:
        """For tests: meanwhile the app has these settings and fresh clients, perhaps made by these; then its
        own again."""
        before = self._settings, self._make_client, self._make_async_client
        clients = self._client, self._async_clients
        self._settings = merged
        self._make_client, self._make_async_client = client or before[1], async_client or before[2]
        self._client, self._async_clients = None, weakref.WeakKeyDictionary()
        try:
            yield
        finally:
            self.close()
            self._settings, self._make_client, self._make_async_client = before
            self._client, self._async_clients = clients

    # -------------------------------------------------------------- tasks

    @overload
    def task(self, name: Callable[P, R]) -> AppTask[P, R]: ...
    @overload
    def task(
        self, name: str | None = None, **options: Unpack[DeclaredOptions]
    ) -> Callable[[Callable[P, R]], AppTask[P, R]]: ...
    def task(self, name: Any = None, **options: Any) -> Any:
        """Register a function: `@app.task("EMAIL", timeout=30, max_retries=5)`, or bare `@app.task`, which
        takes the function's name.

        Options: timeout, hard_after (seconds), max_retries, retry_on, no_retry_on (exception classes),
        priority, backoff, backoff_max (seconds), track. Per submission they can be given again, `features`
        excepted: a function of the payload that picks what a job's duration is predicted from.
        """
        if callable(name):
            return self._register(getattr(name, "__name__", type(name).__name__), name, TaskOptions())

        def register(func: Callable[P, R]) -> AppTask[P, R]:
            given = getattr(func, "__name__", type(func).__name__) if name is None else name
            if not isinstance(given, str):
                raise RegistrationError(f"a task's name is a text, not {given!r}")
            return self._register(given, func, task_options(given, options))

        return register

    def _register(self, name: str, func: Callable[P, R], options: TaskOptions) -> AppTask[P, R]:
        if isinstance(func, Task):
            raise RegistrationError(f"{place_of(func.func)} is a task already: {func.name}")
        task = AppTask(self, name, func, options)
        self.registry.add(task)
        return task

    @overload
    def cron(
        self,
        expression: str | None = None,
        *,
        name: str | None = None,
        every: Span | None = None,
        tz: str = "UTC",
        payload: Any = None,
        missed: str = "once",
        jitter: Span = 0,
        overlap: bool = True,
        slot_as: str | None = None,
        **options: Any,
    ) -> Callable[[AnyAppTask], AnyAppTask]: ...
    @overload
    def cron(
        self,
        expression: str | None,
        type: str,
        payload: Any = None,
        *,
        name: str | None = None,
        every: Span | None = None,
        tz: str = "UTC",
        missed: str = "once",
        jitter: Span = 0,
        overlap: bool = True,
        slot_as: str | None = None,
        **options: Any,
    ) -> Schedule: ...
    def cron(
        self,
        expression: str | None = None,
        type: str | None = None,
        payload: Any = None,
        *,
        name: str | None = None,
        **given: Any,
    ) -> Any:
        """Submit a job at each time of a cron expression, or `every` so many seconds: above `@app.task(…)`,
        or with the type of a task, for further schedules of it, which then need a `name`.

        `missed` says what becomes of slots at which no steward ran: `skip`, `once` (the latest) or `all`.
        `jitter` spreads the starts over so many seconds; `overlap=False` passes a slot over while the job of
        the one before goes on; `slot_as` names the argument that gets the slot's time. Options of a
        submission: priority, timeout, max_retries, expires, track. See docs/CRON.md.
        """
        own = {option: given.pop(option) for option in _CRON_OPTIONS if option in given}

        def register(type_name: str) -> Schedule:
            made = make(
                type=type_name, name=name, expression=expression, payload=payload, options=given, **own
            )
            return self._schedule(made)

        if type is not None:
            return register(type)

        def decorate(task: AnyAppTask) -> AnyAppTask:
            register(_name_of_task(task))
            return task

        return decorate

    def _schedule(self, made: Schedule) -> Schedule:
        if self.registry.frozen:
            raise RegistrationError(
                f"schedule {made.name} comes too late: workers have started;"
                " make it while the app is imported"
            )
        if made.name in self.schedules:
            raise RegistrationError(f"there is a schedule {made.name} already: give this one another name=…")
        self.schedules[made.name] = made
        return made

    def timetable(self, path: str, merged: Settings, *, born_ms: int) -> Timetable:
        """All schedules: those of the code and of the [[cron]] tables. Raises RegistrationError or
        SettingsError."""
        return timetable(
            path,
            born_ms,
            self.schedules.values(),
            merged.cron,
            registry=self.registry,
            lanes=merged.lanes,
            default_lane=merged.default_lane,
        )

    def on_worker_start(self, hook: Hook) -> Hook:
        """Call the function in each worker before its first job: connections belong there, not at import."""
        self.worker_start_hooks.append(_plain(hook))
        return hook

    def on_worker_stop(self, hook: Hook) -> Hook:
        """Call the function in each worker after its last job."""
        self.worker_stop_hooks.append(_plain(hook))
        return hook

    def on_error(self, hook: ErrorHook) -> ErrorHook:
        """Call the function with each attempt that fails (`tqe.FailedAttempt`), in the worker but beside its
        jobs: a hook that raises is logged, one that is slow misses some. See docs/OBSERVING.md."""
        self.error_hooks.append(_plain(hook))
        return hook

    def run_start_hooks(self) -> None:
        for hook in self.worker_start_hooks:
            hook()

    def run_stop_hooks(self) -> None:
        for hook in reversed(self.worker_stop_hooks):
            hook()

    # -------------------------------------------------------------- clients

    @property
    def client(self) -> Client:
        """The client of this process; threads share it. A forked child gets its own."""
        if self._pid != os.getpid():
            self._leave_to_parent()
        client = self._client
        if client is None:
            with self._lock:
                client = self._client
                if client is None:
                    client = self._client = self._make_client(self.settings, registry=self.registry)
        return client

    @property
    def async_client(self) -> AsyncClient:
        """The client of the running event loop."""
        if self._pid != os.getpid():
            self._leave_to_parent()
        loop = asyncio.get_running_loop()
        with self._lock:
            client = self._async_clients.get(loop)
            if client is None:
                for ended in [one for one in self._async_clients if one.is_closed()]:
                    del self._async_clients[ended]
                client = self._make_async_client(self.settings, registry=self.registry)
                self._async_clients[loop] = client
        return client

    def _leave_to_parent(self) -> None:
        _inherited.extend((self._client, list(self._async_clients.values())))
        self._begin()

    def close(self) -> None:
        """Disconnect the sync client. The next use connects again."""
        if self._client is not None and self._pid == os.getpid():
            self._client.close()
        self._client = None

    async def aclose(self) -> None:
        """Send what is waiting and disconnect the client of the running event loop."""
        client = self._async_clients.pop(asyncio.get_running_loop(), None)
        if client is not None and self._pid == os.getpid():
            await client.close()

    # -------------------------------------------------------------- submitting

    def submit(self, type: str, payload: Any = None, **options: Unpack[Options]) -> JobHandle:
        """Submit one job. Raises a SubmitError, RedisUnavailable or QueueFull if there is none.

        Options: priority, delay, run_at, timeout, max_retries, expires, idempotency_key, track.
        """
        _warn_in_loop("app.asubmit")
        return self.client.submit(type, {} if payload is None else payload, **options)

    def submit_many(
        self,
        items: Iterable[Any],
        *,
        collect: bool = False,
        progress: Progress | None = None,
        **options: Unpack[Options],
    ) -> JobHandles:
        """Submit `(type, payload)` or `(type, payload, options)` items in bulk; see Client.submit_many."""
        _warn_in_loop("app.asubmit_many")
        return self.client.submit_many(items, collect=collect, progress=progress, **options)

    async def asubmit(self, type: str, payload: Any = None, **options: Unpack[Options]) -> AsyncJobHandle:
        """`submit` for async code."""
        return await self.async_client.submit(type, {} if payload is None else payload, **options)

    async def asubmit_many(
        self,
        items: Iterable[Any],
        *,
        collect: bool = False,
        progress: Progress | None = None,
        **options: Unpack[Options],
    ) -> AsyncJobHandles:
        """`submit_many` for async code."""
        return await self.async_client.submit_many(items, collect=collect, progress=progress, **options)


class AppTask(Task[P, R]):
    """A task of an app: call it and it runs here and now; submit it and a worker runs it."""

    def __init__(self, app: App, name: str, func: Callable[P, R], options: TaskOptions) -> None:
        super().__init__(name, func, options)
        self.app: Final = app

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> JobHandle:
        """Submit one job with these arguments. They are checked here, before anything is sent."""
        return Submitter(self, Options()).submit(*args, **kwargs)

    delay = submit

    async def asubmit(self, *args: P.args, **kwargs: P.kwargs) -> AsyncJobHandle:
        """`submit` for async code."""
        return await Submitter(self, Options()).asubmit(*args, **kwargs)

    def submit_many(
        self,
        payloads: Iterable[Any],
        *,
        collect: bool = False,
        progress: Progress | None = None,
        **options: Unpack[Options],
    ) -> JobHandles:
        """Submit many jobs: payloads, or `(payload, options)` where some differ; options here count for
        all."""
        _warn_in_loop(f"{self.__name__}.asubmit_many")
        return self.app.client.submit_alike(self, payloads, collect=collect, progress=progress, **options)

    async def asubmit_many(
        self,
        payloads: Iterable[Any],
        *,
        collect: bool = False,
        progress: Progress | None = None,
        **options: Unpack[Options],
    ) -> AsyncJobHandles:
        """`submit_many` for async code."""
        return await self.app.async_client.submit_alike(
            self, payloads, collect=collect, progress=progress, **options
        )

    def with_options(self, **options: Unpack[Options]) -> Submitter[P]:
        """The task with options of a submission:
        `send_email.with_options(delay=5).submit(to="a@example.com")`."""
        return Submitter(self, options)


class Submitter(Generic[P]):
    """A task together with options of a submission. The options are apart from the arguments, so that a
    task may have parameters named like them."""

    def __init__(self, task: AppTask[P, Any], options: Options) -> None:
        self._task = task
        self._options = options

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> JobHandle:
        task = self._task
        _warn_in_loop(f"{task.__name__}.asubmit")
        return task.app.client.submit(task.name, task.payload_of(args, kwargs), **self._options)

    delay = submit

    async def asubmit(self, *args: P.args, **kwargs: P.kwargs) -> AsyncJobHandle:
        task = self._task
        payload = task.payload_of(args, kwargs)
        return await task.app.async_client.submit(task.name, payload, **self._options)

    def submit_many(
        self,
        payloads: Iterable[Any],
        *,
        collect: bool = False,
        progress: Progress | None = None,
        **more: Unpack[Options],
    ) -> JobHandles:
        options: Options = {**self._options, **more}
        return self._task.submit_many(payloads, collect=collect, progress=progress, **options)

    async def asubmit_many(
        self,
        payloads: Iterable[Any],
        *,
        collect: bool = False,
        progress: Progress | None = None,
        **more: Unpack[Options],
    ) -> AsyncJobHandles:
        options: Options = {**self._options, **more}
        return await self._task.asubmit_many(payloads, collect=collect, progress=progress, **options)


# ------------------------------------------------------------------ importing an app


def load_app(path: str) -> App:
    """Import `module:attribute`, also from the current folder. AppImportError says what to mend."""
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise AppNotFound(f"{path!r} names no app: write module:attribute, for example app:app")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        if e.name is not None and (module_name == e.name or module_name.startswith(f"{e.name}.")):
            raise AppNotFound(f"there is no module {module_name} in {here} nor on the path") from e
        raise AppImportError(f"importing {module_name} failed: {_where(e)}") from e
    except (Exception, SystemExit) as e:  # it runs any code of the user's, which may raise anything
        raise AppImportError(f"importing {module_name} failed: {_where(e)}") from e
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise AppNotFound(f"{module_name} has no attribute {attribute}")
        found = getattr(found, part)
    if not isinstance(found, App):
        raise AppNotFound(f"{path} is no App, but {type(found).__name__}")
    return found


def _where(error: BaseException) -> str:
    """The error and the line of the user's code that it comes from: not the library's that refused
    something."""
    lines = traceback.extract_tb(error.__traceback__)[1:]
    own = [line for line in lines if not line.filename.startswith((*_FOREIGN, "<frozen "))]
    at = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {error}{at}"


# Code of others: the standard library, what is installed, and the engine itself.
_FOREIGN: Final = tuple(
    f"{folder}{os.sep}"
    for folder in (
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        Path(__file__).parent,
    )
)


# ------------------------------------------------------------------ helpers


def _plain(hook: AnyHook) -> AnyHook:
    if inspect.iscoroutinefunction(hook):
        raise RegistrationError(f"{place_of(hook)} is async, but hooks of workers are plain functions")
    return hook


def _name_of_task(task: object) -> str:
    if isinstance(task, Task):
        return task.name
    what = place_of(task) if callable(task) else repr(task)
    raise RegistrationError(f"{what} is no task yet: put @app.cron(…) above @app.task(…)")


_warned = False


def _warn_in_loop(instead: str) -> None:
    """Once a process: a blocking submit stops all else that its event loop does."""
    global _warned
    if _warned or asyncio._get_running_loop() is None or _in_sync_job():
        return
    _warned = True
    warnings.warn(
        f"submit() blocks the event loop that it was called in; use `await {instead}(…)`", stacklevel=3
    )


def _in_sync_job() -> bool:
    """A worker runs sync tasks inside of its own event loop, which they may block."""
    if current.IN_CONTEXT.get() is not None:
        return False
    try:
        current.current_job()
    except RuntimeError:
        return False
    return True
