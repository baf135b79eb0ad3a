"""Owns the names of everything in Redis: one method or attribute a key, and no other module spells one."""

from typing import Final

DEFAULT_NAMESPACE: Final = "tq"


def _bytes(name: str | bytes) -> bytes:
    return name.encode() if isinstance(name, str) else name


class Keys:
    """Names of one shard. All share the hash tag `{shard}`: a script call stays in one slot of a Cluster.

    Names are bytes, ready for the wire. What the hot path needs again and again (lanes) is built once.
    """

    __slots__ = (
        "_lanes",
        "_prefix",
        "cancel",
        "closed",
        "cron",
        "cron_paused",
        "delayed",
        "depth",
        "dlq",
        "dlq_index",
        "dlq_meta",
        "done_prefix",
        "incarnations",
        "learner",
        "means",
        "model",
        "parked",
        "paused",
        "quarantine",
        "stats",
        "tokens",
        "traces",
        "void",
        "waiting",
    )

    def __init__(self, namespace: str = DEFAULT_NAMESPACE, shard: int = 0) -> None:
        if not namespace or any(c in namespace for c in "{}*?[]\\ \n"):
            raise ValueError(f"a namespace is a plain name without braces or wildcards, not {namespace!r}")
        p = f"{namespace}:{{{shard}}}:".encode()
        self._prefix = p
        self._lanes: dict[str | bytes, tuple[bytes, bytes, bytes]] = {}
        self.cancel = p + b"cancel"
        self.closed = p + b"closed"
        self.cron = p + b"cron"
        self.cron_paused = p + b"cron_paused"
        self.delayed = p + b"delayed"
        self.depth = p + b"depth"
        self.dlq = p + b"dlq"
        self.dlq_index = p + b"dlq_index"
        self.dlq_meta = p + b"dlq_meta"
        self.done_prefix = p + b"done:"
        self.incarnations = p + b"incarnations"
        self.learner = p + b"learner"
        self.means = p + b"means"
        self.model = p + b"model"
        self.parked = p + b"parked"
        self.paused = p + b"paused"
        self.quarantine = p + b"quarantine"
        self.stats = p + b"stats"
        self.tokens = p + b"tokens"
        self.traces = p + b"traces"
        self.void = p + b"void"
        self.waiting = p + b"waiting"

    @property
    def prefix(self) -> bytes:
        """What all names of the shard begin with."""
        return self._prefix

    def lane(self, name: str | bytes) -> tuple[bytes, bytes, bytes]:
        """The lane's list, sorted set and wake tokens: (`queue:`, `sorted:`, `wake:`)."""
        found = self._lanes.get(name)
        if found is None:
            p, lane = self._prefix, _bytes(name)
            found = self._lanes[name] = (p + b"queue:" + lane, p + b"sorted:" + lane, p + b"wake:" + lane)
        return found

    def queue(self, lane: str | bytes) -> bytes:
        return self.lane(lane)[0]

    def sorted(self, lane: str | bytes) -> bytes:
        return self.lane(lane)[1]

    def wake(self, lane: str | bytes) -> bytes:
        return self.lane(lane)[2]

    def processing(self, incarnation: str | bytes) -> bytes:
        """Leases of an incarnation: lease name → frame."""
        return self._prefix + b"processing:" + _bytes(incarnation)

    def worker(self, incarnation: str | bytes) -> bytes:
        """What a worker runs, published by its steward."""
        return self._prefix + b"worker:" + _bytes(incarnation)

    def tasks(self, steward: str | bytes) -> bytes:
        """What the tasks of a host did so far, under the name that its steward gave itself."""
        return self._prefix + b"tasks:" + _bytes(steward)

    def idem(self, key: str | bytes) -> bytes:
        """An idempotency key, as stored: plain, or already hashed if it is long."""
        return self._prefix + b"idem:" + _bytes(key)

    def bucket(self, second: int, char: str | bytes) -> bytes:
        """A bucket of snapshots."""
        return self._prefix + b"job:%d" % second + _bytes(char)

    def done(self, frame_id: str | bytes) -> bytes:
        """Channel on which the end of a frame's jobs is told to those who wait."""
        return self.done_prefix + _bytes(frame_id)
