"""Every setting of the engine, and the only reader of the environment.

Precedence, lowest first: what the code says (`App(lease_ms=…)`), `tqe.toml`, `TQE_*` variables, the
command line. Whatever is unknown or out of range is refused with its name, its source and what is allowed:
a misspelt setting that is ignored is found in production.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_type_hints

import msgspec
from msgspec import Meta

from tqe import cpus
from tqe.errors import SettingsError
from tqe.formats import LANE_NAME_CHARS_MAX, LANES_MAX, RESULT_BYTES_CEILING

TOML_NAME: Final = "tqe.toml"
PREFIX: Final = "TQE_"

# Variables with our prefix that are no settings: what builds and tests of the engine itself read.
RESERVED: Final = frozenset({"TQE_CRASHPOINT", "TQE_BUILD_SANITIZE", "TQE_BUILD_OPTIMIZE", "TQE_TEST_SEED"})

_MIB = 1024 * 1024
_DAY_MS = 86_400_000
_YEAR_S = 31_536_000

_LANE = re.compile(rf"[a-z0-9_-]{{1,{LANE_NAME_CHARS_MAX}}}")
_APP = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_NAMESPACE = re.compile(r"[A-Za-z0-9_.-]{1,32}")
_HOST = re.compile(r"[A-Za-z0-9._:-]{1,253}")
_ORIGIN = re.compile(r"https?://[a-z0-9._:\[\]-]{1,253}")
_SCHEMES = ("redis://", "rediss://", "unix://")


def _int(low: int, high: int, what: str) -> Meta:
    return Meta(ge=low, le=high, description=f"a whole number from {low} to {high}: {what}")


def _says(what: str) -> Meta:
    return Meta(description=what)


def _default_data_dir(env: Mapping[str, str]) -> Path:
    base = env.get("XDG_DATA_HOME", "")
    # The XDG rule: a relative path there is to be ignored.
    root = Path(base) if base.startswith("/") else Path(env.get("HOME") or Path.home()) / ".local" / "share"
    return root / "tqe"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One immutable set of settings. Build it with `load`; each description says what is allowed."""

    # Where
    redis_url: Annotated[
        str | None, _says("a redis://, rediss:// or unix:// address; leave it out for the embedded server")
    ] = field(default=None, repr=False)  # may carry a password
    app: Annotated[str | None, _says("the app to run, as module:attribute")] = None
    namespace: Annotated[str, _says("1 to 32 of A-Z a-z 0-9 _ . -, the prefix of every key in Redis")] = "tq"
    data_dir: Annotated[Path, _says("a folder for the embedded server's data")] = field(
        default_factory=lambda: _default_data_dir(os.environ)
    )

    # Lanes
    lanes: Annotated[
        tuple[str, ...],
        _says(
            f"1 to {LANES_MAX} different names, highest rank first,"
            f" each of 1 to {LANE_NAME_CHARS_MAX} of a-z 0-9 _ -"
        ),
    ] = ("high", "normal", "low")
    lane_weights: Annotated[
        tuple[int, ...], _says("a weight of 1 to 1000 for each of lanes, as shares of time; empty: strict")
    ] = ()
    default_lane: Annotated[str, _says("one of lanes, used by submissions that name no priority")] = "normal"

    # Processes
    procs: Annotated[
        int,
        _int(
            1,
            1024,
            "the number of worker processes; or auto: the CPUs that we may use, by affinity and quota",
        ),
    ] = field(default_factory=cpus.usable)
    autoscale: Annotated[
        tuple[int, int] | None,
        _says("MIN,MAX, the fewest and the most worker processes, 1 to 1024; MAX may be auto, and is procs"),
    ] = None
    drain_target_ms: Annotated[
        int, _int(100, _DAY_MS, "with autoscale, ms in which the workers are to finish what waits")
    ] = 30_000
    concurrency: Annotated[int, _int(1, 100_000, "async jobs that one worker runs at once")] = 100
    pin: Annotated[bool, _says("true or false: whether each worker is pinned to a CPU")] = True
    preload: Annotated[bool, _says("true or false: whether the app is imported before the fork")] = True
    burst: Annotated[bool, _says("true or false: whether to stop when no job is left")] = False
    metrics_port: Annotated[int | None, _int(0, 65_535, "the port of /metrics (0: any free one)")] = None
    metrics_host: Annotated[
        str, _says("the address that /metrics listens on; 0.0.0.0 lets other machines read it")
    ] = "127.0.0.1"
    recycle_jobs: Annotated[int | None, _int(1, 10**12, "jobs after which a worker is replaced")] = None
    recycle_rss_mb: Annotated[int | None, _int(16, 10**7, "MiB of memory at which a worker is replaced")] = (
        None
    )

    # Leases, limits and time
    lease_ms: Annotated[int, _int(1_000, 3_600_000, "ms until an unrenewed lease ends")] = 15_000
    grace_ms: Annotated[int, _int(0, _DAY_MS, "ms that running jobs get when workers are told to stop")] = (
        30_000
    )
    hard_after_ms: Annotated[
        int,
        _int(0, _DAY_MS, "least ms between a job's soft limit and its kill (or 20 % of the limit, if more)"),
    ] = 10_000
    quantum_us: Annotated[
        int, _int(100, 10_000_000, "microseconds of work that a worker keeps for itself")
    ] = 5_000

    # Sizes
    payload_max_bytes: Annotated[int, _int(64, 16 * _MIB, "bytes of an encoded payload")] = _MIB
    result_max_bytes: Annotated[
        int, _int(0, RESULT_BYTES_CEILING, "bytes of an encoded result that are kept")
    ] = RESULT_BYTES_CEILING
    error_max_bytes: Annotated[int, _int(64, 65_536, "bytes of an error's text that are kept")] = 8 * 1024
    zstd_threshold_bytes: Annotated[int, _int(0, 16 * _MIB, "bytes from which payloads are compressed")] = (
        1024
    )

    # What is kept, and for how long
    idempotency_ttl_s: Annotated[int, _int(1, _YEAR_S, "seconds that an idempotency key is held")] = 86_400
    result_ttl_s: Annotated[
        int, _int(1, _YEAR_S, "seconds that status and result are kept after the end")
    ] = 3_600
    dlq_max: Annotated[int, _int(1, 10**9, "dead jobs that are kept")] = 1_000_000
    snapshots_max: Annotated[int, _int(1_000, 10**10, "status records that are kept")] = 2_000_000
    learn: Annotated[
        bool, _says("true or false: whether to train on what was captured, in the background")
    ] = False
    learn_jobs: Annotated[int, _int(100, 10**7, "new captured runs after which to train again")] = 1_000
    learn_every_s: Annotated[int, _int(1, _YEAR_S, "least seconds between two trainings")] = 600
    traces_max: Annotated[
        int, _int(0, 10**7, "runs that are kept to learn durations from (0: none are captured)")
    ] = 50_000

    # Retries
    max_retries: Annotated[int, _int(0, 1_000_000, "retries after a job's first try")] = 3
    backoff_base_ms: Annotated[
        int, _int(0, _DAY_MS, "ms before the first retry, doubled for each next one")
    ] = 2_000
    backoff_cap_ms: Annotated[int, _int(0, 365 * _DAY_MS, "most ms between two tries")] = 3_600_000
    crashes_max: Annotated[int, _int(1, 1_000, "crashes of its worker after which a job is dead")] = 3
    unknown_type_grace_s: Annotated[
        int, _int(0, _YEAR_S, "seconds that a job of an unknown type is redelivered")
    ] = 600

    # Schedules
    cron: Annotated[
        tuple[dict[str, Any], ...],
        _says("[[cron]] tables in tqe.toml, one a schedule: name, type, expression or every, tz, payload, …"),
    ] = ()

    # The REST API
    http_origins: Annotated[
        tuple[str, ...], _says("origins of web pages that may call the REST API, as https://shop.example.com")
    ] = ()

    http_rate_per_s: Annotated[
        int | None, _int(1, 10**7, "requests (and lines of a batch) a second that each token may send")
    ] = None
    http_backlog_jobs_max: Annotated[
        int | None, _int(0, 10**9, "jobs that may wait in a lane; beyond, the REST API takes none for it")
    ] = None
    http_backlog_s_max: Annotated[
        int | None, _int(0, 10**9, "the same in predicted seconds of work on one worker")
    ] = None

    # Logs
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], _says("debug, info, warning or error")
    ] = "info"
    log_format: Annotated[Literal["text", "json"], _says("text or json")] = "text"

    def __post_init__(self) -> None:
        wrong = _contradictions(self)
        if wrong:
            raise SettingsError("; ".join(wrong))


def load(
    *,
    code: Mapping[str, object] | None = None,
    toml_path: Path | str | None = None,
    env: Mapping[str, str] | None = None,
    cli: Mapping[str, object] | None = None,
) -> Settings:
    """Merge the four sources into one `Settings`, or raise `SettingsError`.

    `toml_path` None looks for tqe.toml in the current folder and does without when there is none; a path
    that is given must exist. In `cli`, None means that an option was not given. Lists may be text with
    commas in the environment and on the command line.
    """
    env = os.environ if env is None else env
    values: dict[str, Any] = {"data_dir": _default_data_dir(env)}
    ranks: dict[str, int] = {}  # which of the four said it

    def take(name: str, value: object, source: str, rank: int) -> None:
        if name not in _NAMES:
            raise SettingsError(f"{source} sets {name}, which is not a setting{_nearest(name, _NAMES)}")
        values[name] = _convert(name, value, source, text=rank > 1)
        ranks[name] = rank

    for name, value in (code or {}).items():
        take(name, value, "code", 0)
    path = _find_toml(toml_path)
    if path is not None:
        for name, value in _read_toml(path).items():
            take(name, value, str(path), 1)
    for variable, value in sorted(env.items()):
        # An empty variable counts as not set: that is what `VAR=${OTHER:-}` in deployment files means.
        if variable.startswith(PREFIX) and variable not in RESERVED and value != "":
            take(_of_variable(variable), value, f"the environment ({variable})", 2)
    for name, value in (cli or {}).items():
        if value is not None:
            take(name, value, "the command line", 3)
    if values.get("autoscale"):
        if ranks.get("procs", 0) > ranks["autoscale"]:
            del values["autoscale"]  # a fixed number, said later
        else:
            values["procs"] = values["autoscale"][1]
    return Settings(**values)


def override(base: Settings, given: Mapping[str, object]) -> Settings:
    """The same settings but for those given, which are checked as ever; for tests."""
    for name in given:
        if name not in _NAMES:
            raise SettingsError(f"{name} is not a setting{_nearest(name, _NAMES)}")
    values: dict[str, Any] = {}
    for name, value in given.items():
        values[name] = _convert(name, value, "code", text=False)
    return replace(base, **values)


def crashpoint(env: Mapping[str, str] | None = None) -> str | None:
    """The point in the code at which crash tests want this process to die (TQE_CRASHPOINT), or None."""
    return (os.environ if env is None else env).get("TQE_CRASHPOINT") or None


def environment(**given: str) -> dict[str, str]:
    """The environment for a command of ours that is started as a program, with these settings in it."""
    return {**os.environ, **{PREFIX + name.upper(): value for name, value in given.items()}}


_METRICS_FOLDER: Final = "PROMETHEUS_MULTIPROC_DIR"  # of prometheus-client, which asks for it by this name


def metrics_folder() -> Path | None:
    """The folder that the processes of this environment share their own metrics in, if there is one."""
    return Path(found) if (found := os.environ.get(_METRICS_FOLDER)) else None


def set_metrics_folder(folder: Path | None) -> None:
    """Name that folder to this process and its children."""
    if folder is None:
        os.environ.pop(_METRICS_FOLDER, None)
    else:
        os.environ[_METRICS_FOLDER] = str(folder)


def redacted(url: str) -> str:
    """The address without its password, for logs and error texts."""
    return re.sub(r"(://[^:@/]*):[^@/]*@", r"\1:***@", url)


def describe() -> dict[str, str]:
    """Each setting with what it takes, in the order of the class; documentation is made from it."""
    return {name: _allowed(name) for name in _NAMES}


_HINTS: Final[dict[str, Any]] = get_type_hints(Settings, include_extras=True)
_NAMES: Final = tuple(f.name for f in fields(Settings))


def _optional(name: str) -> bool:
    return type(None) in get_args(get_args(_HINTS[name])[0])


def _type(name: str) -> Any:
    """What msgspec converts to, without the None of `int | None`: a union takes no text and no range."""
    inner, meta = get_args(_HINTS[name])
    kinds = [t for t in get_args(inner) if t is not type(None)]
    return Annotated[kinds[0] if _optional(name) else inner, meta]


def _allowed(name: str) -> str:
    meta: Meta = get_args(_HINTS[name])[1]
    return meta.description or ""


def _shown(name: str, value: object) -> str:
    return repr(redacted(value)) if name == "redis_url" and isinstance(value, str) else repr(value)


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(names)}"


def _of_variable(variable: str) -> str:
    name = variable.removeprefix(PREFIX).lower()
    if name not in _NAMES or variable != PREFIX + name.upper():
        near = _nearest(variable, [PREFIX + n.upper() for n in _NAMES])
        raise SettingsError(f"the environment sets {variable}, which is not a setting{near}")
    return name


def _find_toml(path: Path | str | None) -> Path | None:
    if path is None:
        found = Path(TOML_NAME)
        return found if found.is_file() else None
    return Path(path)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as e:
        raise SettingsError(f"{path} cannot be read: {e.strerror}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise SettingsError(f"{path} is not valid TOML: {e}") from e


def _convert(name: str, value: object, source: str, *, text: bool) -> object:
    """The value in the setting's own type. `text` accepts what a shell can say: "8", "true", "high,low"."""
    if value is None and _optional(name):
        return None
    try:
        converted = _as_declared(name, value, text=text)
    except (msgspec.ValidationError, TypeError) as e:
        raise _refused(name, value, source) from e
    if not _fits(name, converted):
        raise _refused(name, value, source)
    return converted


def _as_declared(name: str, value: object, *, text: bool) -> object:
    if name == "data_dir":
        if not isinstance(value, str | os.PathLike):
            raise TypeError("not a path")
        return Path(value).expanduser()
    if name in ("lanes", "lane_weights", "http_origins", "autoscale") and isinstance(value, str) and text:
        value = [part.strip() for part in value.split(",")]
    if name == "autoscale" and isinstance(value, list) and value[-1:] == ["auto"]:
        value = [*value[:-1], str(cpus.usable()) if text else cpus.usable()]
    if name == "procs" and value == "auto":
        value = cpus.usable()
    return msgspec.convert(value, _type(name), strict=not text)


def _refused(name: str, value: object, source: str) -> SettingsError:
    return SettingsError(f"{source} sets {name} to {_shown(name, value)}; it takes {_allowed(name)}")


def _lanes_fit(lanes: Sequence[str]) -> bool:
    distinct = len(set(lanes)) == len(lanes)
    return distinct and 1 <= len(lanes) <= LANES_MAX and all(_LANE.fullmatch(lane) for lane in lanes)


# What a field's type cannot say of its value.
_CHECKS: Final[dict[str, Callable[[Any], object]]] = {
    "redis_url": lambda url: url.startswith(_SCHEMES),
    "app": _APP.fullmatch,
    "namespace": _NAMESPACE.fullmatch,
    "lanes": _lanes_fit,
    "lane_weights": lambda weights: all(1 <= weight <= 1000 for weight in weights),
    "autoscale": lambda bounds: 1 <= bounds[0] <= bounds[1] <= 1024,
    "metrics_host": _HOST.fullmatch,
    "http_origins": lambda origins: all(_ORIGIN.fullmatch(origin) for origin in origins),
}


def _fits(name: str, value: object) -> bool:
    check = _CHECKS.get(name)
    return check is None or value is None or bool(check(value))


def _contradictions(s: Settings) -> list[str]:
    """What no field can say alone; the single ones again, for a `Settings` that was built without `load`."""
    wrong = [
        f"{name} = {_shown(name, getattr(s, name))}: it takes {_allowed(name)}"
        for name in _CHECKS
        if not _fits(name, getattr(s, name))
    ]
    if s.default_lane not in s.lanes:
        wrong.append(
            f"default_lane = {s.default_lane!r}: it takes one of lanes, which are {', '.join(s.lanes)}"
        )
    if s.lane_weights and len(s.lane_weights) != len(s.lanes):
        wrong.append(
            f"lane_weights = {_shown('lane_weights', s.lane_weights)}: it takes one for each of lanes, which"
            f" are {', '.join(s.lanes)}"
        )
    if s.autoscale and s.procs != s.autoscale[1]:
        wrong.append(f"procs = {s.procs}: with autoscale it is the most workers, which are {s.autoscale[1]}")
    if s.backoff_cap_ms < s.backoff_base_ms:
        wrong.append(
            f"backoff_cap_ms = {s.backoff_cap_ms}: it may not be below backoff_base_ms,"
            f" which is {s.backoff_base_ms}"
        )
    return wrong
