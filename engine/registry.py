"""Owns the tasks of an app: what a function takes, how its payload is decoded, under which name it runs."""

import inspect
import re
import sys
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any, Final, Generic, Literal, ParamSpec, TypedDict, TypeVar

import msgspec

from tqe.errors import ArgumentsError, RegistrationError
from tqe.formats import PARAMETERS_MAX, TASKS_MAX
from tqe.job import Span, check_retries, is_type_name, seconds_to_ms, timeout_to_ms

P = ParamSpec("P")
R = TypeVar("R")

Mode = Literal["fields", "struct", "kwargs"]
Fault = Literal["missing", "unknown", "wrong"]
Exceptions = tuple[type[BaseException], ...]
# What a task's own function makes of a payload (the decoded JSON object): numbers and short texts by name.
Features = Callable[[dict[str, Any]], Mapping[str, Any]]

_LANE: Final = re.compile(r"[a-z0-9_-]{1,16}")
_MISSING: Final = re.compile(r"Object missing required field `([^`]*)`")
_UNKNOWN: Final = re.compile(r"Object contains unknown field `([^`]*)`")
_PATH: Final = re.compile(r" - at `([^`]*)`")


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What a task may set for its jobs; None leaves it to the settings."""

    timeout_ms: int = 0
    hard_after_ms: int | None = None
    max_retries: int | None = None
    retry_on: Exceptions = (Exception,)
    no_retry_on: Exceptions = ()
    lane: str | None = None
    backoff_base_ms: int | None = None
    backoff_cap_ms: int | None = None
    track: bool = True
    features: Features | None = None


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """How a payload becomes arguments: decode it, read the fields, pass them in this order."""

    mode: Mode
    positional: tuple[str, ...] = ()
    keyword_only: tuple[str, ...] = ()
    struct: type[msgspec.Struct] | None = None
    decoder: "msgspec.json.Decoder[Any]" = field(repr=False)
    signature: inspect.Signature = field(repr=False)


class Task(Generic[P, R]):
    """A function registered under a type name; calling it calls the function, here and now.

    Read-only after construction. The worker decodes with `decoder`, then, by `mode`:
    `fields`  reads `positional` and `keyword_only` from the struct and passes them so;
    `struct`  passes the struct itself as the one argument;
    `kwargs`  passes the decoded dict as keywords.
    """

    def __init__(self, name: str, func: Callable[P, R], options: TaskOptions | None = None) -> None:
        if not is_type_name(name):
            raise RegistrationError(
                f"{name[:80]!r} cannot name a task: it takes 1 to 64 of A-Z a-z 0-9 _ . : -"
            )
        options = options or TaskOptions()
        self.name: Final = name
        self.key: Final = name.encode()
        self.func: Final = func
        self.is_async: Final = _is_async(func)
        _refuse_generators(name, func)
        parameters = read_parameters(name, func)
        self.mode: Final = parameters.mode
        self.struct: Final = parameters.struct
        self.decoder: Final = parameters.decoder
        self.positional: Final = parameters.positional
        self.keyword_only: Final = parameters.keyword_only
        self._signature: Final = parameters.signature
        self.options: Final = options
        self.timeout_ms: Final = options.timeout_ms
        self.hard_after_ms: Final = options.hard_after_ms
        self.max_retries: Final = options.max_retries
        self.retry_on: Final = options.retry_on
        self.no_retry_on: Final = options.no_retry_on
        self.lane: Final = options.lane
        self.backoff_base_ms: Final = options.backoff_base_ms
        self.backoff_cap_ms: Final = options.backoff_cap_ms
        self.track: Final = options.track
        self.features: Final = options.features
        self.__doc__ = getattr(func, "__doc__", None)
        self.__name__ = getattr(func, "__name__", name)
        self.__wrapped__ = func

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.func(*args, **kwargs)

    def call_with(self, arguments: Any) -> R:
        """Call it with what `decoder` made of a payload, as a worker does."""
        call: Callable[..., R] = self.func
        if self.mode == "struct":
            return call(arguments)
        if self.mode == "kwargs":
            return call(**arguments)
        named = {name: getattr(arguments, name) for name in self.keyword_only}
        return call(*(getattr(arguments, name) for name in self.positional), **named)

    def __repr__(self) -> str:
        return f"<Task {self.name}: {place_of(self.func)}>"

    def payload_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The payload that says the same as a call with these arguments."""
        if not args:
            return kwargs
        if self.mode == "struct" and len(args) == 1 and not kwargs:
            return args[0]
        if len(args) > len(self.positional) or self.mode == "struct":
            raise ArgumentsError(f"{self.name} takes {self._takes()}, not {len(args)} positional arguments")
        payload = dict(zip(self.positional, args, strict=False))
        twice = payload.keys() & kwargs.keys()
        if twice:
            raise ArgumentsError(f"{self.name} got {', '.join(sorted(twice))} twice")
        return {**payload, **kwargs}

    def validate(self, payload: bytes) -> None:
        """Refuse an encoded payload that the worker would refuse: it is decoded just as the worker does."""
        try:
            decoded = self.decoder.decode(payload)
            if self.mode == "kwargs":
                self._signature.bind(**decoded)
        except (msgspec.DecodeError, TypeError, ValueError, RecursionError) as e:
            raise ArgumentsError(self.explain(e)[1]) from e

    def explain(self, error: BaseException) -> tuple[Fault, str]:
        """What is wrong with a payload that `decoder` refused, for whoever reads it.

        `missing` and `unknown` may be cured by a worker of another version, `wrong` cannot.
        """
        text = str(error)
        path = _PATH.search(text)
        where = path[1].removeprefix("$").removeprefix(".") if path else ""
        said = _PATH.sub("", text).replace("`", "")
        if found := _MISSING.search(text):
            name = f"{where}.{found[1]}" if where else found[1]
            return "missing", f"{self.name}: the argument {name} is missing; it takes {self._takes()}"
        if found := _UNKNOWN.search(text):
            name = f"{where}.{found[1]}" if where else found[1]
            return "unknown", f"{self.name} has no argument {name}; it takes {self._takes()}"
        if where:
            return "wrong", f"{self.name}: the argument {where} is wrong: {said}"
        return "wrong", f"{self.name}: {said}"

    def _takes(self) -> str:
        if self.mode == "struct" and self.struct is not None:
            return f"the fields of {self.struct.__name__}: {', '.join(self.struct.__struct_encode_fields__)}"
        return ", ".join((*self.positional, *self.keyword_only)) or "no arguments"


class Registry:
    """The tasks of one app by name. Frozen before workers start, so that all of them know the same."""

    def __init__(self) -> None:
        self._tasks: dict[str, Task[..., Any]] = {}
        self._by_key: dict[bytes, Task[..., Any]] = {}
        self._frozen = False

    def add(self, task: Task[..., Any]) -> None:
        if self._frozen:
            raise RegistrationError(
                f"task {task.name} ({place_of(task.func)}) comes too late: workers have started;"
                " register it while the app is imported"
            )
        first = self._tasks.get(task.name)
        if first is not None:
            raise RegistrationError(
                f"task {task.name} is registered twice:"
                f" in {place_of(first.func)} and in {place_of(task.func)}"
            )
        if len(self._tasks) >= TASKS_MAX:
            raise RegistrationError(
                f"an app has at most {TASKS_MAX} tasks, {task.name} ({place_of(task.func)}) is one more"
            )
        self._tasks[task.name] = task
        self._by_key[task.key] = task

    def get(self, name: str) -> Task[..., Any] | None:
        return self._tasks.get(name)

    def lookup(self, key: bytes) -> Task[..., Any] | None:
        """By the bytes that stand in a frame."""
        return self._by_key.get(key)

    def freeze(self) -> None:
        self._frozen = True

    @property
    def frozen(self) -> bool:
        return self._frozen

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tasks)

    def __iter__(self) -> Iterator[Task[..., Any]]:
        return iter(self._tasks.values())

    def __len__(self) -> int:
        return len(self._tasks)

    def __contains__(self, name: object) -> bool:
        return name in self._tasks


# ------------------------------------------------------------------ options of a task


class DeclaredOptions(TypedDict, total=False):
    """What stands in `@app.task(...)`; None is the same as not given. Spans in seconds."""

    timeout: Span | None
    hard_after: Span | None
    max_retries: int | None
    retry_on: type[BaseException] | Collection[type[BaseException]] | None
    no_retry_on: type[BaseException] | Collection[type[BaseException]] | None
    priority: str | None
    lane: str | None  # another name of priority
    backoff: Span | None
    backoff_max: Span | None
    track: bool | None
    features: Features | None


OPTION_NAMES: Final = tuple(DeclaredOptions.__annotations__)


def task_options(name: str, given: Mapping[str, Any]) -> TaskOptions:
    """Check what stands in `@app.task(...)`. Raises RegistrationError, for spans and counts InvalidOption."""
    for option in given:
        if option not in OPTION_NAMES:
            raise RegistrationError(
                f"task {name}: {option} is not an option; there are: {', '.join(OPTION_NAMES)}"
            )
    get = given.get
    lane = get("priority") if get("lane") is None else get("lane")
    if lane is not None and not (isinstance(lane, str) and _LANE.fullmatch(lane.lower())):
        raise RegistrationError(f"task {name}: priority takes the name of a lane, not {lane!r}")
    track = get("track")
    if track is not None and not isinstance(track, bool):
        raise RegistrationError(f"task {name}: track takes true or false, not {track!r}")
    features = get("features")
    if features is not None and not callable(features):
        raise RegistrationError(f"task {name}: features takes a function of the payload, not {features!r}")
    return TaskOptions(
        timeout_ms=0 if get("timeout") is None else timeout_to_ms(get("timeout")),
        hard_after_ms=_span(get, "hard_after"),
        max_retries=check_retries(get("max_retries")),
        retry_on=_exceptions(name, "retry_on", get("retry_on"), (Exception,)),
        no_retry_on=_exceptions(name, "no_retry_on", get("no_retry_on"), ()),
        lane=None if lane is None else lane.lower(),
        backoff_base_ms=_span(get, "backoff"),
        backoff_cap_ms=_span(get, "backoff_max"),
        track=track is not False,
        features=features,
    )


def _span(get: Callable[[str], Any], option: str) -> int | None:
    value = get(option)
    return None if value is None else seconds_to_ms(option, value)


def _exceptions(name: str, option: str, value: Any, default: Exceptions) -> Exceptions:
    if value is None:
        return default
    found = tuple(value) if isinstance(value, list | tuple | set | frozenset) else (value,)
    for one in found:
        if not (isinstance(one, type) and issubclass(one, BaseException)):
            raise RegistrationError(f"task {name}: {option} takes exception classes, not {one!r}")
    return found


# ------------------------------------------------------------------ reading a signature


def place_of(func: Callable[..., Any]) -> str:
    """Where a function stands, for messages: module, qualified name, file and line."""
    inner = inspect.unwrap(func)
    where = f"{getattr(inner, '__module__', '?')}.{getattr(inner, '__qualname__', type(inner).__qualname__)}"
    code = getattr(inner, "__code__", None)
    return f"{where} ({code.co_filename}:{code.co_firstlineno})" if code else where


def read_parameters(name: str, func: Callable[..., Any]) -> Parameters:
    try:
        signature = _signature(func)
    except (TypeError, ValueError) as e:
        raise RegistrationError(f"task {name}: {place_of(func)} has no signature that can be read") from e
    positional: list[inspect.Parameter] = []
    keyword_only: list[inspect.Parameter] = []
    takes_any = False
    for parameter in signature.parameters.values():
        match parameter.kind:
            case inspect.Parameter.POSITIONAL_ONLY | inspect.Parameter.VAR_POSITIONAL:
                star = "*" if parameter.kind is inspect.Parameter.VAR_POSITIONAL else ""
                raise RegistrationError(
                    f"task {name}: {place_of(func)} takes {star}{parameter.name} by position only,"
                    " but a payload is a JSON object and has only names"
                )
            case inspect.Parameter.VAR_KEYWORD:
                takes_any = True
            case inspect.Parameter.KEYWORD_ONLY:
                keyword_only.append(parameter)
            case _:
                positional.append(parameter)
    if len(positional) + len(keyword_only) > PARAMETERS_MAX:
        raise RegistrationError(
            f"task {name}: {place_of(func)} has more than {PARAMETERS_MAX} parameters;"
            " take one struct, or **kwargs"
        )
    hints = _hints(func)
    mode: Mode = "fields"
    struct = None
    if takes_any:
        mode = "kwargs"
    elif len(positional) == 1 and not keyword_only:
        struct = _struct_of(name, hints.get(positional[0].name))
        mode = "fields" if struct is None else "struct"
    if mode == "fields":
        struct = _make_struct(name, [*positional, *keyword_only], hints)
    return Parameters(
        mode=mode,
        positional=tuple(p.name for p in positional),
        keyword_only=tuple(p.name for p in keyword_only),
        struct=struct,
        decoder=msgspec.json.Decoder(dict[str, Any] if struct is None else struct),
        signature=signature,
    )


def _make_struct(
    name: str, parameters: list[inspect.Parameter], hints: Mapping[str, Any]
) -> type[msgspec.Struct]:
    """A struct of the parameters. Keyword-only, because a required one may follow one with a default;
    not tracked by the garbage collector, because it lives for one call."""
    found: list[tuple[str, Any, Any]] = []
    for parameter in parameters:
        annotation = _supported(hints.get(parameter.name, Any))
        if parameter.default is inspect.Parameter.empty:
            found.append((parameter.name, annotation, msgspec.field()))
        else:
            found.append((parameter.name, annotation, _default(parameter.default)))
    try:
        return msgspec.defstruct(name, found, kw_only=True, forbid_unknown_fields=True, gc=False)
    except (TypeError, ValueError) as e:
        raise RegistrationError(f"task {name}: its parameters cannot be read: {e}") from e


def _default(value: Any) -> Any:
    """The function's own object, as in a call; by a factory where msgspec refuses what can change."""
    if value is None or isinstance(value, str | int | float | bytes | frozenset):
        return msgspec.field(default=value)
    return msgspec.field(default_factory=partial(_itself, value))


def _itself(value: Any) -> Any:
    return value


def _hints(func: Callable[..., Any]) -> dict[str, Any]:
    """Annotations with their strings resolved; one that cannot be resolved counts as Any."""
    inner = inspect.unwrap(func)
    if not (inspect.isfunction(inner) or inspect.ismethod(inner)):
        inner = getattr(inner, "func", None) or type(inner).__call__
    try:
        return typing.get_type_hints(inner, include_extras=True)
    except Exception:  # an annotation is any expression, and so may raise anything
        return {name: _hint(inner, name, given) for name, given in _annotations(inner).items()}


def _signature(func: Callable[..., Any]) -> inspect.Signature:
    if sys.version_info >= (3, 14):
        import annotationlib

        # Annotations are evaluated when asked for, and one of them may name what does not exist.
        return inspect.signature(func, annotation_format=annotationlib.Format.FORWARDREF)
    return inspect.signature(func)


def _annotations(func: Any) -> Mapping[str, Any]:
    if sys.version_info >= (3, 14):
        import annotationlib

        return annotationlib.get_annotations(func, format=annotationlib.Format.FORWARDREF)
    found: Mapping[str, Any] = getattr(func, "__annotations__", {})
    return found


def _hint(func: Any, name: str, annotation: Any) -> Any:
    def alone() -> None: ...

    alone.__annotations__ = {name: annotation}
    try:
        found = typing.get_type_hints(alone, getattr(func, "__globals__", {}), include_extras=True)
        return found[name]
    except Exception:  # as above
        return Any


def _struct_of(name: str, annotation: Any) -> type[msgspec.Struct] | None:
    if not (isinstance(annotation, type) and issubclass(annotation, msgspec.Struct)):
        return None
    if annotation.__struct_config__.array_like:
        raise RegistrationError(
            f"task {name}: {annotation.__name__} is array_like, but a payload is a JSON object"
        )
    return annotation


def _supported(annotation: Any) -> Any:
    """The annotation if msgspec can decode all of it, else Any: the task then gets plain JSON values."""
    try:
        msgspec.json.Decoder(annotation)
        info = msgspec.inspect.type_info(annotation)
    except (TypeError, ValueError, NameError, AttributeError):
        return Any
    return Any if _has_custom(info, set()) else annotation


def _has_custom(info: Any, seen: set[int]) -> bool:
    """Whether a type of the user's own that msgspec cannot decode occurs in it, however deep."""
    if isinstance(info, msgspec.inspect.CustomType | msgspec.inspect.ExtType | msgspec.inspect.RawType):
        return True
    if isinstance(info, tuple | list):
        return any(_has_custom(one, seen) for one in info)
    if id(info) in seen or not isinstance(info, msgspec.inspect.Type | msgspec.inspect.Field):
        return False
    seen.add(id(info))
    names = (
        [f.name for f in fields(info)] if is_dataclass(info) else list(getattr(info, "__struct_fields__", ()))
    )
    return any(_has_custom(getattr(info, name), seen) for name in names)


def _is_async(func: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(
        getattr(func, "__call__", None)  # noqa: B004 - an object with an async __call__
    )


def _refuse_generators(name: str, func: Callable[..., Any]) -> None:
    if inspect.isgeneratorfunction(func) or inspect.isasyncgenfunction(func):
        # Calling one only makes a generator: the job would count as completed without having run.
        raise RegistrationError(f"task {name}: {place_of(func)} is a generator function and would never run")
