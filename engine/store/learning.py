"""What stewards and the command line do with the stream of traces and with the hash `p model`.

The hash `model` is what a second host gets the model from: `version`, `previous`, and for each of these two
`manifest:<version>`, `history:<version>` and, where the gate chose a model, `bytes:<version>`. `manifest`,
`sha256`, `bound_us` (T) and `mean_us` (m) are those of `version`. `mode:<lane>` and `rung` are read by every
host; `ban:<sha256>` counts workers that died while they scored with that model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tqe.errors import QueueFull
from tqe.store.call import Argument, SyncDoor
from tqe.store.housekeeping import ask, transaction, watched
from tqe.store.keys import Keys
from tqe.store.model import DEFAULT_MODE, MODES, RUNGS, mode_field

PAGE: Final = 2_000
DEATHS_MAX: Final = 2  # so many workers that died while they scored with a model ban its hash
FILES_BYTES_MAX: Final = 64 * 1024 * 1024
# Fields that are large, and that only their own readers ask for.
_LARGE: Final = (b"bytes:", b"history:", b"manifest")


# ------------------------------------------------------------------ traces


def add_trace(keys: Keys, trace: bytes, traces_max: int) -> tuple[Argument, ...]:
    """The command that appends one run to the stream, which drops its oldest ones by itself."""
    return ("XADD", keys.traces, "MAXLEN", "~", traces_max, "*", "j", trace)


def traces(door: SyncDoor, keys: Keys, after: bytes = b"", limit: int | None = None) -> Iterator[bytes]:
    """Captured runs from after that id on, the oldest first."""
    for _, trace in entries(door, keys, after, limit):
        yield trace


def entries(
    door: SyncDoor, keys: Keys, after: bytes = b"", limit: int | None = None
) -> Iterator[tuple[bytes, bytes]]:
    """The same with their ids, page by page."""
    left = limit
    while left is None or left > 0:
        count = PAGE if left is None else min(PAGE, left)
        start = b"(" + after if after else b"-"
        page = ask(door, ("XRANGE", keys.traces, start, "+", "COUNT", count))[0]
        for name, fields in page:
            yield name, fields[1]
        if len(page) < count:
            return
        after = page[-1][0]
        left = None if left is None else left - count


def last_trace(door: SyncDoor, keys: Keys) -> bytes:
    """Id of the newest run, empty if there is none."""
    found = ask(door, ("XREVRANGE", keys.traces, "+", "-", "COUNT", 1))[0]
    return bytes(found[0][0]) if found else b""


def traces_held(door: SyncDoor, keys: Keys) -> int:
    """How many runs the stream holds."""
    return int(ask(door, ("XLEN", keys.traces))[0])


# ------------------------------------------------------------------ the model


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelState:
    """What every host must know of the published model. Times in µs."""

    version: str = ""
    previous: str = ""
    sha256: str = ""  # empty where the gate chose a mean
    bound_us: int = 0
    mean_us: int = 0
    trained_at: str = ""
    chosen: str = ""
    rung: str = "fifo"
    modes: Mapping[str, str] = field(default_factory=dict)
    bans: Mapping[str, int] = field(default_factory=dict)  # hash → deaths
    refused: Mapping[str, str] = field(default_factory=dict)  # hash or version → why no host may load it
    scored: int = 0
    fallbacks: Mapping[str, int] = field(default_factory=dict)

    @property
    def refusal(self) -> str:
        """Why the version may not be loaded, '' if it may."""
        return self.refused.get(self.sha256) or self.refused.get(self.version) or ""

    def mode(self, lane: str) -> str:
        """The lane's mode; the default where none was set."""
        return self.modes.get(lane, DEFAULT_MODE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """A version's files, as bytes: what a model's folder holds."""

    manifest: bytes
    history: bytes
    model: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A version and what stands in its manifest, for who publishes it."""

    version: str
    sha256: str
    bound_us: int
    mean_us: int
    trained_at: str
    chosen: str
    rung: str


def state(door: SyncDoor, keys: Keys) -> ModelState:
    """The state as of now; its fields but the large ones."""
    names = [name for name in ask(door, ("HKEYS", keys.model))[0] if not name.startswith(_LARGE)]
    values = ask(door, ("HMGET", keys.model, *names))[0] if names else []
    found = {
        name.decode("utf-8", "replace"): value.decode("utf-8", "replace")
        for name, value in zip(names, values, strict=True)
        if value is not None
    }
    get = found.get
    return ModelState(
        version=get("version", ""),
        previous=get("previous", ""),
        sha256=get("sha256", ""),
        bound_us=_whole(get("bound_us")),
        mean_us=_whole(get("mean_us")),
        trained_at=get("trained_at", ""),
        chosen=get("chosen", ""),
        rung=get("rung", "fifo") if get("rung") in RUNGS else "fifo",
        modes={lane: mode for lane, mode in _under(found, "mode:").items() if mode in MODES},
        bans={sha256: _whole(deaths) for sha256, deaths in _under(found, "ban:").items()},
        refused=_under(found, "refused:"),
        scored=_whole(get("scored")),
        fallbacks={reason: _whole(count) for reason, count in _under(found, "fallback:").items()},
    )


def _under(found: Mapping[str, str], prefix: str) -> dict[str, str]:
    return {name[len(prefix) :]: value for name, value in found.items() if name.startswith(prefix)}


def _whole(text: str | None) -> int:
    try:
        return max(0, int(float(text))) if text else 0
    except (ValueError, OverflowError):
        return 0


def publish(door: SyncDoor, keys: Keys, made: Published, files: Files) -> None:
    """Make a version the current one; the current one becomes the previous. Older files are dropped.

    Raises QueueFull when they are too large for the hash, or Redis has no room.
    """
    size = len(files.manifest) + len(files.history) + len(files.model or b"")
    if size > FILES_BYTES_MAX:
        raise QueueFull(
            f"the model's files have {size:,} bytes, {FILES_BYTES_MAX:,} is the most: train on fewer jobs"
        )

    def change(pipe: Any) -> None:
        held = set(pipe.hkeys(keys.model))
        before, previous = (value or b"" for value in pipe.hmget(keys.model, "version", "previous"))
        if before.decode() == made.version:
            before = previous  # published again
        kept = {b"", made.version.encode(), before}
        pipe.multi()
        old = [name for name in held if _version_of(name) not in kept]
        if old:
            pipe.hdel(keys.model, *old)
        pipe.hset(
            keys.model, mapping=_fields(made, files) | {"previous": before, **_current(made, files.manifest)}
        )

    _must(door, keys, change)


def _version_of(name: bytes) -> bytes:
    """Whose file a field is; b"" for all other fields, which stay whatever the version is."""
    kind, _, version = name.partition(b":")
    return version if kind in (b"bytes", b"history", b"manifest", b"facts") else b""


def _fields(made: Published, files: Files) -> dict[str, Any]:
    found: dict[str, Any] = {
        f"manifest:{made.version}": files.manifest,
        f"history:{made.version}": files.history,
        f"facts:{made.version}": ",".join(
            (made.sha256, str(made.bound_us), str(made.mean_us), made.trained_at, made.chosen, made.rung)
        ),
    }
    if files.model is not None:
        found[f"bytes:{made.version}"] = files.model
    return found


def _current(made: Published, manifest: bytes) -> dict[str, Any]:
    return {
        "version": made.version,
        "sha256": made.sha256,
        "bound_us": made.bound_us,
        "mean_us": made.mean_us,
        "trained_at": made.trained_at,
        "chosen": made.chosen,
        "rung": made.rung,
        "manifest": manifest,
    }


def rollback(door: SyncDoor, keys: Keys) -> tuple[str, str] | None:
    """Make the previous version the current one again: (from, to), or None where there is no other."""

    def change(pipe: Any) -> tuple[str, str] | None:
        version, previous = (value or b"" for value in pipe.hmget(keys.model, "version", "previous"))
        name = previous.decode()
        facts = pipe.hget(keys.model, f"facts:{name}") if name else None
        manifest = pipe.hget(keys.model, f"manifest:{name}") if name else None
        pipe.multi()
        if facts is None or manifest is None:
            return None
        pipe.hset(keys.model, mapping=_current(_published(name, facts), manifest) | {"previous": version})
        return version.decode(), name

    found: tuple[str, str] | None = _must(door, keys, change)
    return found


def _must(door: SyncDoor, keys: Keys, change: Any) -> Any:
    """Under WATCH, as often as somebody else writes in between: that is counters, and modes."""
    done: list[Any] = []

    def noted(pipe: Any) -> bool:
        done[:] = [change(pipe)]
        return True

    while not watched(door, keys.model, noted):
        pass
    return done[0]


def withdraw(door: SyncDoor, keys: Keys, version: str) -> bool:
    """Take a version out of use that no host may load: the one before, if it may be loaded, orders again.

    False if another is the current one by now.
    """

    def change(pipe: Any) -> bool:
        current, previous = (value or b"" for value in pipe.hmget(keys.model, "version", "previous"))
        name = previous.decode()
        facts = pipe.hget(keys.model, f"facts:{name}") if name else None
        manifest = pipe.hget(keys.model, f"manifest:{name}") if name else None
        made = None if facts is None or manifest is None else _published(name, facts)
        if made is not None and any(
            pipe.hexists(keys.model, f"refused:{one}") for one in (made.sha256, made.version)
        ):
            made = None
        pipe.multi()
        if current.decode() != version:
            return False
        pipe.hdel(keys.model, "previous")
        if made is None or manifest is None:
            pipe.hdel(keys.model, "version", "manifest", "sha256", "trained_at", "chosen")
            pipe.hset(keys.model, mapping={"rung": "fifo", "bound_us": 0, "mean_us": 0})
        else:
            pipe.hset(keys.model, mapping=_current(made, manifest))
        return True

    return bool(_must(door, keys, change))


def _published(version: str, facts: bytes) -> Published:
    sha256, bound_us, mean_us, trained_at, chosen, rung = facts.decode().split(",")
    return Published(
        version=version,
        sha256=sha256,
        bound_us=int(bound_us),
        mean_us=int(mean_us),
        trained_at=trained_at,
        chosen=chosen,
        rung=rung,
    )


def files(door: SyncDoor, keys: Keys, version: str) -> Files | None:
    """The files of a version, None if Redis does not hold them (any more)."""
    manifest, history, model = ask(
        door, ("HMGET", keys.model, f"manifest:{version}", f"history:{version}", f"bytes:{version}")
    )[0]
    if manifest is None or history is None:
        return None
    return Files(manifest=manifest, history=history, model=model)


def set_mode(door: SyncDoor, keys: Keys, lanes: Sequence[str], mode: str) -> None:
    """From now on these lanes are ordered so."""
    if mode not in MODES:
        raise ValueError(mode)
    pairs = [item for lane in lanes for item in (mode_field(lane), mode)]
    if pairs:
        ask(door, ("HSET", keys.model, *pairs))


def set_rung(door: SyncDoor, keys: Keys, version: str, rung: str) -> bool:
    """What orders from now on, if that version is still the current one."""

    def change(pipe: Any) -> bool:
        same = (pipe.hget(keys.model, "version") or b"").decode() == version
        pipe.multi()
        if same:
            pipe.hset(keys.model, "rung", rung)
        return same

    return bool(_must(door, keys, change))


def refuse(door: SyncDoor, keys: Keys, what: str, reason: str) -> None:
    """No host may load that version, or the model of that SHA-256, ever."""
    ask(door, ("HSET", keys.model, f"refused:{what}", reason[:500]))


def add_death(door: SyncDoor, keys: Keys, sha256: str) -> int:
    """A worker died while it scored with that model; how many have."""
    return int(ask(door, ("HINCRBY", keys.model, f"ban:{sha256}", 1))[0])


def count_scored(door: SyncDoor, keys: Keys, scored: int, fallbacks: Mapping[str, int]) -> None:
    """Add what the workers of a host have scored, and what fell back, to the totals."""
    commands: list[tuple[Argument, ...]] = []
    if scored:
        commands.append(("HINCRBY", keys.model, "scored", scored))
    commands += [
        ("HINCRBY", keys.model, f"fallback:{reason}", count) for reason, count in fallbacks.items() if count
    ]
    if commands:
        transaction(door, *commands)


# ------------------------------------------------------------------ who learns


def hold_learner(door: SyncDoor, keys: Keys, who: str, ttl_ms: int) -> bool:
    """Become, or stay, the one steward that watches the model and trains; False while it is another."""
    if ask(door, ("SET", keys.learner, who, "NX", "PX", ttl_ms))[0] is not None:
        return True
    if (ask(door, ("GET", keys.learner))[0] or b"").decode("utf-8", "replace") != who:
        return False
    # In between ours may have ended and another's begun: two then watch for a moment, which is harmless.
    ask(door, ("PEXPIRE", keys.learner, ttl_ms))
    return True
