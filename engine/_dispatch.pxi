# The hot path: walk leased frames job by job, decode each payload straight into the task's struct, call, mark the board.
#
# No system call and no clock call per job: tiny jobs are timed in runs of 32, and the quantum and the lease end are compared where
# the clock is read. What is not the plain case (options, zstd, cancels, coroutines, unknown types) leaves to Python.

import msgspec

import logging
import os

cdef extern from *:
    """
    #include <pthread.h>
    static int tqe_forked = 0;
    static void tqe_in_child(void) { tqe_forked = 1; }
    static int tqe_watch_forks(void) { return pthread_atfork(0, 0, tqe_in_child); }
    """
    int tqe_forked
    int tqe_watch_forks()

cdef extern from "Python.h":
    object PyObject_CallOneArg(object f, object a)
    object PyObject_Call(object f, object args, object kwargs)
    object PyObject_Vectorcall(object f, PyObject **args, size_t nargsf, PyObject *kwnames)
    int PyIter_Send(object iterator, object value, PyObject **result) except? -1
    PyObject *PyContextVar_Set(PyObject *variable, PyObject *value) except NULL
    bint PyCoro_CheckExact(object o)
    void Py_INCREF(object o)
    void Py_DECREF(PyObject *o)

cdef enum:
    MODE_FIELDS = 0
    MODE_STRUCT = 1
    MODE_KWARGS = 2
    ARGS_MAX = 255
    RUN_OF = 32
    TINY_NS = 10000
    # A synchronous job may run beside coroutines, on the thread that serves their timers, if at most one in twenty of its type's
    # last hundred took longer than a millisecond; and no longer than two milliseconds of such jobs in one turn of the loop.
    SHORT_NS = 1000000
    SHORT_OF = 100
    BESIDE_NS = 2000000
    # Why a walk ended.
    _ENDED = 0
    _TIME = 1
    _STOP = 2
    _FULL = 3
    _LEASE_END = 4
    _SPECIAL = 5
    _BLOCKED = 6

RUN_ENDED = _ENDED  # nothing left to start in these leases
RUN_TIME = _TIME  # the time given is over
RUN_STOP = _STOP  # the stop word is set
RUN_FULL = _FULL  # the outcome half has no room for another record
RUN_LEASE_END = _LEASE_END  # until_ns lies behind us: start nothing more
RUN_SPECIAL = _SPECIAL  # the next job needs Python: take() it
RUN_BLOCKED = _BLOCKED  # the next job is a coroutine and no slot is free

cdef tuple _EMPTY = ()
_decode = msgspec.json.Decoder(dict).decode


if tqe_watch_forks() != 0:
    raise MemoryError("no room to watch forks")


def end_if_forked(error=None):
    """End this process if it is the child of a fork that a task made: coming back from the task it would go on as a second
    worker, on the same connections and the same board. `error` is what the task raised."""
    if tqe_forked:
        end_child(error)


cdef int end_child(object error) except -1:
    code = 1
    try:
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        else:
            logging.getLogger("tqe.worker").error("a task forked, and the child came back from the task: it ends here")
    finally:
        os._exit(code & 0xFF)


@cython.final
cdef class Entry:
    """A task as the hot path sees it. `mean_ns` < 0 means never measured."""

    cdef readonly str name
    cdef readonly bytes key
    cdef readonly int number
    cdef readonly object func
    cdef readonly object decode
    cdef readonly tuple positional
    cdef readonly tuple keyword_only
    cdef readonly int mode
    cdef readonly bint is_async
    cdef readonly unsigned long long timeout_ms
    cdef readonly unsigned long long hard_ms
    cdef readonly unsigned long long retries  # packed retry rule, see layout.C_RETRIES
    cdef public double mean_ns
    cdef public unsigned long long seen
    cdef double _long  # part of the last jobs that took longer than SHORT_NS
    cdef tuple _names
    cdef char *_block
    cdef Slot _slot  # keeps _block's memory alive

    def __init__(self, *, str name, int number, func, decode, tuple positional, tuple keyword_only, int mode, bint is_async,
                 unsigned long long timeout_ms=0, unsigned long long hard_ms=0, unsigned long long retries=0,
                 double mean_ns=-1.0):
        if number < 0 or number >= TASKS_MAX:
            raise ValueError("task number out of range")
        if len(positional) + len(keyword_only) > ARGS_MAX:
            raise ValueError("too many parameters")
        self.name = name
        self.key = name.encode()
        if not 1 <= len(self.key) <= TASK_NAME_BYTES:
            raise ValueError("a task's name has 1 to 64 bytes")
        self.number = number
        self.func = func
        self.decode = decode
        self.positional = positional
        self.keyword_only = keyword_only
        self._names = positional + keyword_only
        self.mode = mode
        self.is_async = is_async
        self.timeout_ms = timeout_ms
        self.hard_ms = hard_ms
        self.retries = retries
        self.mean_ns = mean_ns
        self.seen = 0
        self._long = 0
        self._block = NULL

    def bind(self, Slot slot not None):
        """Count on this slot's board from now on."""
        cdef char *p = slot.base + O_TASKS + self.number * TASK_BYTES
        memset(p, 0, TASK_BYTES)
        memcpy(p, PyBytes_AS_STRING(self.key), PyBytes_GET_SIZE(self.key))
        self._slot = slot
        self._block = p

    cpdef timed(self, unsigned long long jobs, unsigned long long ns):
        """Account a run of `jobs` that took `ns` together."""
        cdef double mean = <double>ns / <double>jobs
        if self._block == NULL:
            raise RuntimeError("bind() first")
        self.seen += jobs
        self._long += ((1.0 if mean > SHORT_NS else 0.0) - self._long) * min(1.0, <double>jobs / min(self.seen, SHORT_OF))
        if self.mean_ns < 0:
            self.mean_ns = mean
        else:
            self.mean_ns += (mean - self.mean_ns) * (0.125 if jobs == 1 else 0.25)
        tqe_add(self._block + T_SUM_NS, ns)
        tqe_add(self._block + T_COMPLETED, jobs)
        tqe_add(self._block + T_RUN_BINS + 8 * tqe_bin(<unsigned long long>(mean / 1000.0)), jobs)
        tqe_plain(self._block + T_MEAN_NS, <unsigned long long>self.mean_ns)
        tqe_add(self._block + T_TIMED, jobs)

    cpdef bint short(self):
        """Whether jobs of this type are known to be so short that one may run between two steps of coroutines."""
        return self.seen >= SHORT_OF and 0 <= self.mean_ns <= SHORT_NS and self._long <= 0.05

    cpdef waited(self, unsigned long long jobs, unsigned long long us):
        """Account the wait of `jobs` that were fetched together."""
        if self._block == NULL:
            raise RuntimeError("bind() first")
        tqe_add(self._block + T_WAIT_SUM_US, us * jobs)
        tqe_add(self._block + T_WAIT_BINS + 8 * tqe_bin(us), jobs)

    cpdef count(self, int word):
        """Add one to a counter of the task's block (layout.T_FAILED, T_RETRIED, T_DEAD)."""
        if self._block == NULL or word < TASK_NAME_BYTES or word % 8 or word >= TASK_BYTES:
            raise ValueError(word)
        tqe_add(self._block + word, 1)


cdef list _NO_CLAIMS = []


# No cycle leads through a lease, so the collector need not follow it: leases come by the thousand, and each of them would
# bring its next run nearer.
@cython.final
@cython.no_gc
cdef class Lease:
    """A frame that this worker holds: where the walk stands, and its row on the board."""

    cdef readonly bytes frame
    cdef Slot _slot  # keeps the memory of _state
    cdef FrameHead _head
    cdef readonly int row
    cdef readonly int rank
    cdef readonly int next  # absolute index of the next job to start
    cdef readonly int stop  # absolute index where this worker stops: the rest was given back
    cdef public int running  # coroutines and helper jobs under way
    cdef public object cancels  # set of absolute indexes, or None
    cdef public object options  # the frame's options, decoded, or None
    cdef list _claims  # None: it is held as it was fetched
    cdef public object pieces  # how to cut what was given back: [(base, n)]
    cdef public bint settling  # a settle of it is unanswered
    cdef public bint lost  # fenced: whatever is settled of it will be refused
    cdef bint _seen
    cdef public unsigned long long started_ms
    cdef public unsigned long long finished_ms
    cdef public unsigned long long first_done_ns
    cdef public double predicted_ns
    cdef const unsigned char *_pos
    cdef unsigned char *_state  # state byte of `base`

    def __init__(self, bytes frame not None, Slot slot not None, int rank=0):
        """Check the frame (DamagedFrame, NewerFrame) and take a row for it (IndexError when none is free)."""
        frame_sound(frame, &self._head, NULL)
        self._open(frame, slot, rank)

    cdef int _open(self, bytes frame, Slot slot, int rank) except -1:
        if self._head.options_bytes:
            try:
                self.options = _decode(PyBytes_FromStringAndSize(<const char *>self._head.data + F_HEADER, self._head.options_bytes))
            except msgspec.DecodeError as e:
                raise DamagedFrame("the options of the frame are no JSON object") from e
        self.row = slot._take_row(<const char *>self._head.data + AT_ID, self._head.base, self._head.n, self._head.run)
        self.frame = frame
        self._slot = slot
        self.rank = rank
        self.next = self._head.base
        self.stop = self._head.base + self._head.n
        self.pieces = ()
        self._pos = self._head.data + F_HEADER + self._head.options_bytes
        self._state = slot._states(self.row)
        return 0

    @property
    def claims(self):
        """[(base, n)]: the leases in Redis that this frame is held by."""
        if self._claims is None:
            self._claims = [(self._head.base, self._head.n)]
        return self._claims

    @claims.setter
    def claims(self, list claims not None):
        self._claims = claims

    @property
    def header(self):
        return header_of(self.frame, &self._head)

    @property
    def frame_id(self):
        return PyBytes_FromStringAndSize(<const char *>self._head.data + AT_ID, F_ID)

    @property
    def name(self):
        """Name of the lease as fetched."""
        return PyBytes_FromStringAndSize(<const char *>self._head.data + AT_ID, F_LEASE)

    @property
    def lane(self):
        return PyUnicode_DecodeASCII(<const char *>self._head.data + AT_LANE, self._head.lane_bytes, NULL)

    @property
    def base(self):
        return self._head.base

    @property
    def n(self):
        return self._head.n

    @property
    def run(self):
        return self._head.run

    @property
    def tracked(self):
        return (self._head.flags & FLAG_TRACKED) != 0

    @property
    def attempts(self):
        return self._head.attempts

    @property
    def enqueued_us(self):
        return self._head.enqueued_us

    cpdef bint ended(self):
        """Nothing of what is kept here waits or runs."""
        return self.next >= self.stop and self.running == 0

    cdef int _plain_done(self) except -1:
        """The frame as submitted, never cut, never tried before; all its jobs have completed with nothing to tell but that."""
        cdef int i
        if self._head.n != self._head.total or self.next < self._head.base + self._head.n or self.running:
            return False
        if self._head.attempts or self._head.crashes:
            return False
        # Once a part was settled, Redis knows the rest by another name.
        if self._claims is not None and (len(self._claims) != 1 or <int>self._claims[0][1] != self._head.n):
            return False
        for i in range(self._head.n):
            if self._state[i] != JOB_DONE:
                return False
        return True

    cdef bint _ended_well(self) except -1:
        """Held under one name, never tried before, and all jobs under that name have completed or have a record."""
        cdef int i, base, n
        if self.settling or not self._head.flags & FLAG_TRACKED:
            return False
        if self._head.attempts or self._head.crashes:
            return False
        base, n = self._head.base, self._head.n
        if self._claims is not None:
            if len(self._claims) != 1:
                return False
            base, n = self._claims[0]
        for i in range(base - self._head.base, base - self._head.base + n):
            if self._state[i] != JOB_DONE and self._state[i] != JOB_RECORDED:
                return False
        return True

    def to_settle(self):
        """Whether a claim holds a job that has ended or was given back."""
        cdef int i, base, n
        for claim in self.claims:
            base = claim[0] - self._head.base
            n = claim[1]
            for i in range(base, base + n):
                if self._state[i] >= JOB_DONE:
                    return True
        return False

    def next_type(self):
        """Type of the next job to start."""
        if self.next >= self.stop:
            raise IndexError("nothing left")
        return PyBytes_FromStringAndSize(<const char *>self._pos + 1, self._pos[0])

    def give_back(self, int index):
        """Mark all jobs from `index` on as returned: this worker will not start them."""
        cdef int i
        if index < self.next or index > self.stop:
            raise ValueError("only what is ahead can be given back")
        for i in range(index, self.stop):
            self._state[i - self._head.base] = JOB_RETURNED
        self.stop = index

    def skip_rest(self):
        """Start nothing more of it, and say nothing about it: it is not ours any more."""
        self.stop = self.next

    def types_ahead(self):
        """(type, jobs) runs of what is not started yet, in order."""
        cdef const unsigned char *p = self._pos
        cdef const unsigned char *end = self._head.data + self._head.size
        cdef const unsigned char *known = NULL
        cdef int known_bytes = 0, jobs = 0, i
        cdef JobRef job
        cdef list out = []
        for i in range(self.stop - self.next):
            p = next_job(p, end, &job)
            if p == NULL:
                break
            if job.type_bytes != known_bytes or memcmp(job.type, known, known_bytes) != 0:
                if jobs:
                    out.append((PyBytes_FromStringAndSize(<const char *>known, known_bytes), jobs))
                known = job.type
                known_bytes = job.type_bytes
                jobs = 0
            jobs += 1
        if jobs:
            out.append((PyBytes_FromStringAndSize(<const char *>known, known_bytes), jobs))
        return out


def admit(list frames not None, Slot slot not None, dict ranks not None, int other_rank, list suspects=None):
    """Make leases of fetched frames: ([Lease], jobs, [(frame, error)]). An error is a FrameError, or None where no row is free.
    Those of suspects are appended to `suspects` instead, if it is given, and not counted."""
    cdef list leases = []
    cdef list odd = []
    cdef bytes frame
    cdef Lease lease
    cdef long jobs = 0
    cdef int rank
    cdef const unsigned char *lane = NULL  # of the frame before
    cdef int fault
    for frame in frames:
        lease = Lease.__new__(Lease)
        fault = frame_check(<octets>PyBytes_AS_STRING(frame), PyBytes_GET_SIZE(frame), &lease._head, NULL)
        if fault != SOUND:
            try:
                frame_raise(fault)
            except (DamagedFrame, NewerFrame) as e:
                odd.append((frame, e))
            continue
        if lane == NULL or memcmp(lane, lease._head.data + AT_LANE, F_LANE_MAX) != 0:
            lane = lease._head.data + AT_LANE
            rank = ranks.get(PyUnicode_DecodeASCII(<const char *>lane, lease._head.lane_bytes, NULL), other_rank)
        try:
            lease._open(frame, slot, rank)
        except IndexError:
            odd.append((frame, None))
            continue
        except DamagedFrame as e:
            odd.append((frame, e))
            continue
        if lease._head.flags & FLAG_SUSPECT and suspects is not None:
            suspects.append(lease)
            continue
        jobs += lease._head.n
        leases.append(lease)
    return leases, jobs, odd


# What a worker's Hold and Settler do with leases by the hundred: frames of one cost as much here as their jobs.


def hold_all(list leases not None, dict held not None, list ready not None, double per_job_ns):
    """Take in leases that all have jobs to start; `ready` has a list a rank. Returns (bytes, predicted ns) that they add."""
    cdef Lease lease
    cdef Py_ssize_t size = 0
    cdef double ns = 0
    cdef list rank = None
    cdef int number = -1
    for lease in leases:
        held[lease] = None
        size += lease._head.size
        lease.predicted_ns = per_job_ns * lease._head.n
        ns += lease.predicted_ns
        if lease.rank != number:
            number = lease.rank
            rank = ready[number]
        rank.append(lease)
    return size, ns


def start_all(list leases not None, int at, int end, list ended not None):
    """All jobs of leases[at:end] have been started: take them out; those of which nothing runs have ended. Returns the predicted
    ns that are no longer ahead."""
    cdef Lease lease
    cdef double ns = 0
    cdef int k
    for k in range(at, end):
        lease = leases[k]
        ns += lease.predicted_ns
        lease.predicted_ns = 0
        if lease.running == 0:
            ended.append(lease)
    del leases[at:end]
    return ns


def still_held(list leases not None, dict held not None):
    """The leases that are held, each once: ([those with claims], [those without, which wait to be released])."""
    cdef Lease lease
    cdef list claimed = []
    cdef list rest = []
    for lease in leases:
        if not lease._seen and lease in held:
            lease._seen = True
            (claimed if lease._claims is None or lease._claims else rest).append(lease)
    for lease in leases:
        lease._seen = False
    return claimed, rest


def close_all(list leases not None, dict held not None, Slot slot not None):
    """These are settled whole: free their rows. Returns the bytes that they held."""
    cdef Lease lease
    cdef Py_ssize_t size = 0
    for lease in leases:
        lease._claims = _NO_CLAIMS
        if held.pop(lease, lease) is None:
            size += lease._head.size
            slot._free_row(lease.row)
    return size


def names_of(list leases not None):
    """Names of the leases as fetched."""
    cdef Lease lease
    return [PyBytes_FromStringAndSize(<const char *>lease._head.data + AT_ID, F_LEASE) for lease in leases]


def rows_of(list leases not None):
    """Rows of the leases."""
    cdef Lease lease
    return [lease.row for lease in leases]


def waited(list leases not None, dict entries not None, long long now_us):
    """Account how long these waited in their lane, under the type of their next job."""
    cdef Lease lease
    cdef Entry entry = None
    cdef const unsigned char *p
    for lease in leases:
        if lease.next >= lease.stop:
            continue
        p = lease._pos
        if entry is None or PyBytes_GET_SIZE(entry.key) != p[0] or memcmp(PyBytes_AS_STRING(entry.key), p + 1, p[0]) != 0:
            entry = entries.get(PyBytes_FromStringAndSize(<const char *>p + 1, p[0]))
        if entry is not None:
            entry.waited(lease.stop - lease.next, max(0, now_us - lease._head.enqueued_us))


def types_of(list leases not None):
    """The types of the leases' jobs, each once, or None if a frame mixes types."""
    cdef set found = set()
    cdef const unsigned char *known = NULL
    cdef const unsigned char *p
    cdef Lease lease
    for lease in leases:
        if lease._head.type_runs != 1:
            return None
        p = lease._head.data + F_HEADER + lease._head.options_bytes
        if known == NULL or p[0] != known[0] or memcmp(p, known, 1 + known[0]) != 0:
            found.add(PyBytes_FromStringAndSize(<const char *>p + 1, p[0]))
            known = p
    return found


def plain_done(list leases not None):
    """Split leases that have ended: ({(bucket second, bucket char, snapshot): [Lease]}, [the others]).

    The first are whole, uncut frames whose jobs all completed with nothing to tell; their key is what `settle` wants to know
    of all of them at once. Untracked ones have an empty snapshot.
    """
    cdef dict groups = {}
    cdef list others = []
    cdef list group = None
    cdef Lease lease
    cdef Lease first = None
    for lease in leases:
        if lease.settling or not lease._plain_done():
            others.append(lease)
            continue
        if first is None or not alike(first, lease):
            first = lease
            key = done_key(lease)
            group = groups.get(key)
            if group is None:
                group = groups[key] = []
        group.append(lease)
        lease.settling = True
    return groups, others


def results_of(Slot slot not None, list leases not None):
    """Split leases further, by their records: (ones, larger, others).

    The jobs of the first two have all completed at their first try, and tell nothing but their results. `ones` are frames of
    one, by their key as above: {key: ([Lease], [field])}; `larger` are [(Lease, [name, field, name, field, …])].
    """
    cdef dict ones = {}, by_row = {}
    cdef list larger = [], others = [], cells, told
    cdef Lease lease
    cdef Lease first = None
    cdef tuple group = None
    cdef int i
    for lease in leases:
        if lease._ended_well():
            by_row[lease.row] = (lease, [None] * <int>lease.claims[0][1])
    if by_row:
        # Where a job stands in both halves, the record in the one in use is the truth.
        read_results(slot, 1 - slot.half, by_row)
        read_results(slot, slot.half, by_row)
    for lease in leases:
        found = by_row.get(lease.row)
        if found is None or (<tuple>found)[0] is not lease:
            others.append(lease)
            continue
        told = told_of(lease, <list>(<tuple>found)[1])
        if told is None:
            others.append(lease)
            continue
        lease.settling = True
        if lease._head.total > 1:
            larger.append((lease, told))
            continue
        if first is None or not alike(first, lease):
            first = lease
            key = done_key(lease)
            group = ones.get(key)
            if group is None:
                group = ones[key] = ([], [])
        (<list>group[0]).append(lease)
        (<list>group[1]).append(told[1])
    return ones, larger, others


cdef list told_of(Lease lease, list cells):
    """[name, field, …] of the claim's recorded jobs, or None if one of them has something else to tell."""
    cdef list told = []
    cdef int i, base = lease.claims[0][0]
    cdef const unsigned char *state = lease._state + (base - lease._head.base)
    cdef char name[32]
    cdef int size
    memcpy(name, lease._head.data + AT_ID, F_ID)
    name[F_ID] = b'.'
    for i in range(len(cells)):
        if state[i] != JOB_RECORDED:
            continue
        if cells[i] is None:
            return None
        size = snprintf(name + F_ID + 1, 5, "%d", base + i)
        told.append(PyBytes_FromStringAndSize(name, F_ID + 1 + size))
        told.append(cells[i])
    # A frame of one is settled with its field.
    return told if told or lease._head.total > 1 else None


cdef int read_results(Slot slot, int half, dict by_row) except -1:
    """Put the fields of plain results of one half into their cells; a cell is None again if the job has more to tell."""
    cdef const char *p = slot.base + O_HALVES + half * HALF_BYTES
    cdef unsigned int at = 0, length, row, last_row = ROWS, error_n, result_n
    cdef unsigned short index
    cdef unsigned long long started_ms, finished_ms, times[2]
    cdef char head[112]
    cdef int head_n = 0, base = 0, n = 0
    cdef list cells = None
    cdef Lease lease
    cdef bytes field
    cdef char *to
    times[0] = times[1] = 0
    while at < slot.used[half]:
        memcpy(&length, p + at, 4)
        memcpy(&row, p + at + 4, 4)
        if row != last_row:
            last_row = row
            found = by_row.get(row)
            cells = None
            if found is not None:
                lease = <Lease>(<tuple>found)[0]
                cells = <list>(<tuple>found)[1]
                base, n = lease.claims[0]
        memcpy(&index, p + at + 8, 2)
        if cells is None or index < base or index >= base + n:
            at += length
            continue
        memcpy(&error_n, p + at + 32, 4)
        memcpy(&result_n, p + at + 36, 4)
        if p[at + 10] != OUT_DONE or error_n:
            cells[index - base] = None
            at += length
            continue
        memcpy(&started_ms, p + at + 16, 8)
        memcpy(&finished_ms, p + at + 24, 8)
        if not head_n or started_ms != times[0] or finished_ms != times[1]:
            times[0], times[1] = started_ms, finished_ms
            head_n = snprintf(head, 112, b'{"attempts":1,"started_at":%llu,"finished_at":%llu,"result":',
                              started_ms, finished_ms)
        field = PyBytes_FromStringAndSize(NULL, head_n + (result_n or 4) + 1)
        to = PyBytes_AS_STRING(field)
        memcpy(to, head, head_n)
        if result_n:
            memcpy(to + head_n, p + at + RECORD_HEADER_BYTES, result_n)
        else:
            memcpy(to + head_n, b"null", 4)
        to[PyBytes_GET_SIZE(field) - 1] = b'}'
        cells[index - base] = field
        at += length
    return 0


cdef bint alike(Lease a, Lease b) noexcept:
    """Frames of one of the same bucket, lane, type and times have the same key. Larger frames are worth making it."""
    return (
        a._head.total == 1 and b._head.total == 1
        and a.started_ms == b.started_ms and a.finished_ms == b.finished_ms
        and (a._head.flags & FLAG_TRACKED) == (b._head.flags & FLAG_TRACKED)
        # bytes of time that name the second and the bucket character: equal ids up to there name one bucket
        and memcmp(a._head.data + AT_ID, b._head.data + AT_ID, 11) == 0
        and memcmp(a._head.data + AT_LANE, b._head.data + AT_LANE, F_LANE_MAX) == 0
        and a._head.data[F_HEADER + a._head.options_bytes] == b._head.data[F_HEADER + b._head.options_bytes]
        and memcmp(a._head.data + F_HEADER + a._head.options_bytes, b._head.data + F_HEADER + b._head.options_bytes,
                   1 + a._head.data[F_HEADER + a._head.options_bytes]) == 0
    )


cdef unsigned char _digit[256]  # value of a Crockford base-32 character


cdef void _fill_digits(const char *alphabet) noexcept:
    cdef int k
    memset(_digit, 0, 256)
    for k in range(32):
        _digit[<unsigned char>alphabet[k]] = <unsigned char>k


_fill_digits(b"0123456789ABCDEFGHJKMNPQRSTVWXYZ")


cdef str types_told(Lease lease):
    """As `types`, which checks and walks the frame once more."""
    cdef const unsigned char *p = lease._head.data + F_HEADER + lease._head.options_bytes
    if lease._head.type_runs != 1:
        return types(lease.frame)
    return f"{PyUnicode_DecodeASCII(<const char *>p + 1, p[0], NULL)}*{lease._head.n}"


cdef tuple done_key(Lease lease):
    cdef long long ms = 0
    cdef int i
    if not lease._head.flags & FLAG_TRACKED:
        return 0, "", b""
    for i in range(10):
        ms = ms << 5 | _digit[lease._head.data[AT_ID + i]]
    return (
        ms // 1000,
        chr(lease._head.data[AT_ID + 10]),
        f"C,{lease._head.total},0,{lease.started_ms},{lease.finished_ms},{lease.lane},{types_told(lease)}".encode(),
    )


@cython.final
cdef class Runner:
    """Runs the jobs of leases: synchronous ones at once, on the calling thread, coroutines as tasks of its loop. One a worker.

    `on_failure(lease, index, entry, exception, in_arguments)` writes the record of a job that raised and returns nothing;
    `on_result(lease, index, entry, result)` writes that of a tracked job whose result is too long, or no JSON.
    See `beside()` for what coroutines need.
    """

    cdef readonly Slot slot
    cdef readonly dict entries
    cdef object _on_failure
    cdef object _on_result
    cdef object _encode
    cdef char *_board
    cdef unsigned long long _step
    cdef public unsigned long long until_ns  # end of the lease, CLOCK_BOOTTIME
    cdef public unsigned long long beside_until_ns  # when this turn's time for jobs beside coroutines is over; 0: none ran
    cdef public long long redis_offset_ms  # Redis time - CLOCK_BOOTTIME
    cdef Lease _lease  # the job that runs inline, for current()
    cdef int _index
    cdef Entry _entry
    cdef unsigned int _result_max
    cdef readonly unsigned long long ended  # jobs that have ended here, however
    # of the walk under way
    cdef unsigned long long _since  # when the clock was last read
    cdef unsigned long long _end  # when the time given is over
    cdef unsigned long long _counted  # jobs since then
    cdef unsigned long long _since_ms  # the same moment by Redis
    # of jobs beside others
    cdef readonly set active  # jobs under way: AsyncJob, and what Python adds
    cdef public list late  # while not None, outcomes of coroutines wait here: (job, result, error, in arguments)
    cdef int _slots
    cdef public bint apart  # synchronous jobs run as if coroutines did, even if none does
    cdef bint _starved  # a coroutine found no free slot
    cdef object _spawn
    cdef object _limit
    cdef object _failed_beside
    cdef object _changed
    cdef object _context
    cdef list _ended

    def __init__(self, Slot slot not None, dict entries not None, *, on_failure, on_result, encode, unsigned int result_max_bytes=65536):
        cdef Entry entry
        for entry in entries.values():
            entry.bind(slot)
        global tqe_forked
        tqe_forked = 0  # whoever makes a runner is the worker
        self.slot = slot
        self.entries = entries
        self._on_failure = on_failure
        self._on_result = on_result
        self._encode = encode
        self._board = slot.base
        self._step = tqe_load(slot.base + C_STEP)
        self._result_max = min(result_max_bytes, 65536)
        self.active = set()

    def beside(self, *, int slots, spawn, limit, failed, changed, context, list ended not None):
        """Say how coroutines run: at most `slots` at once, each started by `spawn(job)`, an event loop's create_task.

        `limit(job)` is called for a job with a time limit; `failed(job, exception, in_arguments)` writes the outcome of one that
        raised; `changed()` is called when a lease has ended, or a slot is free that was missed. `context` is the context
        variable that gets the job; leases that have ended are appended to `ended`.
        """
        self._slots = slots
        self._spawn = spawn
        self._limit = limit
        self._failed_beside = failed
        self._changed = changed
        self._context = context
        self._ended = ended

    def current(self):
        """(lease, index, entry) of the job that runs inline now, or None."""
        if self._lease is None:
            return None
        return self._lease, self._index, self._entry

    def now_ms(self):
        """Redis time in ms, as of the last fetch and this machine's clock."""
        return <long long>(tqe_now() // 1000000) + self.redis_offset_ms

    def stopped(self):
        """The stop word."""
        return tqe_load(self._board + C_STOP)

    def run(self, list leases not None, int head, unsigned long long limit_ns):
        """Run the jobs of leases[head:] in order, for about `limit_ns`.

        Returns (code, head, jobs): why it ended (RUN_*), the lease where it stands (those before have nothing left to start),
        and how many jobs it started.
        """
        cdef int code = _ENDED, at = head, start
        cdef long jobs = 0
        cdef Lease lease
        self._since = tqe_now()
        self._end = self._since + limit_ns
        self._counted = 0
        self._entry = None
        self._clock_ms()
        if self._since >= self.until_ns:
            return _LEASE_END, head, 0
        try:
            while at < len(leases):
                lease = leases[at]
                start = lease.next
                try:
                    code = self._walk(lease)
                finally:
                    jobs += lease.next - start
                if lease.next >= lease.stop:
                    at += 1
                    lease.finished_ms = self._since_ms
                if code != _ENDED:
                    break
        finally:
            self._lease = None
            if self._counted:
                self._look(self._entry)
        return code, at, jobs

    cdef int _walk(self, Lease lease) except -1:
        """Run the lease's jobs until it has none left, or until something ends the walk."""
        cdef const unsigned char *p = lease._pos
        cdef unsigned int word
        cdef int type_bytes, code
        cdef bint beside
        cdef unsigned long long now
        cdef Entry entry = self._entry
        if lease.options is not None or lease.cancels is not None:
            return _SPECIAL if lease.next < lease.stop else _ENDED
        if lease.started_ms == 0:
            lease.started_ms = self._since_ms
        self._lease = lease
        while lease.next < lease.stop:
            if tqe_load(self._board + C_STOP):
                return _STOP
            type_bytes = p[0]
            if entry is None or PyBytes_GET_SIZE(entry.key) != type_bytes or memcmp(PyBytes_AS_STRING(entry.key), p + 1, type_bytes) != 0:
                if self._counted:
                    # What was counted belongs to the task before.
                    code = self._look(self._entry)
                    if code != _ENDED:
                        return code
                entry = self._switch(p + 1, type_bytes)
                if entry is None:
                    return _SPECIAL
            memcpy(&word, p + 1 + type_bytes, 4)
            if word >> 30:  # not a mask: with a constant of 32 bits it would be done by Python
                return _SPECIAL
            if entry.is_async:
                code = self._start(lease, entry, p + 5 + type_bytes, word)
                if code != _ENDED:
                    return code
                p = lease._pos
                continue
            beside = self.apart or bool(self.active)
            if beside:
                # Timers and connections of coroutines must not wait for a job that runs inline.
                now = tqe_now()
                if self.beside_until_ns and now >= self.beside_until_ns:
                    return _TIME
                if not entry.short():
                    return _SPECIAL
                if not self.beside_until_ns:
                    self.beside_until_ns = now + BESIDE_NS
                if not self._counted:
                    self._since = now
            if self.slot.used[self.slot.half] > HALF_BYTES - ROOM_BYTES:
                return _FULL
            p += 5 + type_bytes
            lease._pos = p + word
            lease.next += 1
            # A copy, not a view: a user's struct may hold msgspec.Raw, which points into what it was decoded from.
            self._execute(lease, lease.next - 1, entry, PyBytes_FromStringAndSize(<const char *>p, word))
            p = lease._pos
            self._counted += 1
            if self._counted >= RUN_OF or beside or entry.mean_ns >= TINY_NS or entry.seen < RUN_OF:
                code = self._look(entry)
                if code != _ENDED:
                    return code
        return _ENDED

    cdef int _start(self, Lease lease, Entry entry, const unsigned char *payload, unsigned int size) except -1:
        """Start the next job as a coroutine. Its payload is copied: the frame may be settled in part before it is decoded."""
        cdef int code
        if len(self.active) >= self._slots:
            self._starved = True
            return _BLOCKED
        lease._pos = payload + size
        lease.next += 1
        self._spawn_job(lease, lease.next - 1, entry, PyBytes_FromStringAndSize(<const char *>payload, size),
                        entry.timeout_ms, entry.hard_ms, entry.retries, None)
        if not len(self.active) & (RUN_OF - 1):
            code = self._look(entry)
            if code != _ENDED:
                return code
        return _ENDED

    cdef object _spawn_job(self, Lease lease, int index, Entry entry, object payload, unsigned long long timeout_ms,
                           unsigned long long hard_ms, unsigned long long retries, object own):
        cdef AsyncJob job = AsyncJob.__new__(AsyncJob)
        job._runner = self
        job.lease = lease
        job.index = index
        job.entry = entry
        job._payload = payload
        job._timeout_ms = timeout_ms
        job._hard_ms = hard_ms
        job._retries = retries
        job.own = own
        job.ending = ""
        job._begun_ns = tqe_now()
        lease._state[index - lease._head.base] = JOB_STARTED
        lease.running += 1
        self.active.add(job)
        tqe_plain(self._board + C_ASYNC, len(self.active))
        job.task = self._spawn(job)
        if timeout_ms:
            self._limit(job)
        return job

    def start(self, Lease lease not None, int index, Entry entry not None, payload, own, *, unsigned long long timeout_ms,
              unsigned long long hard_ms, unsigned long long retries):
        """Start a coroutine for a job that take() gave out, with its own limits, which stay with it as `own`."""
        if lease.started_ms == 0:
            lease.started_ms = <unsigned long long>(<long long>(tqe_now() // 1000000) + self.redis_offset_ms)
        return self._spawn_job(lease, index, entry, payload, timeout_ms, hard_ms, retries, own)

    def leave(self, job):
        """A job beside others has ended, of whatever kind: its slot is free. Call it after its lease has been told."""
        self.active.discard(job)
        tqe_plain(self._board + C_ASYNC, len(self.active))
        if self._starved or not self.active:
            self._starved = False
            self._changed()

    cdef object _ended_beside(self, AsyncJob job):
        cdef Lease lease = job.lease
        cdef unsigned long long now = tqe_now()
        job.entry.timed(1, now - job._begun_ns)
        self.ended += 1
        lease.running -= 1
        lease.finished_ms = <unsigned long long>(<long long>(now // 1000000) + self.redis_offset_ms)
        if not lease.first_done_ns:
            lease.first_done_ns = now
        if lease.running == 0 and lease.next >= lease.stop:
            self._ended.append(lease)
            self._starved = True
        self.leave(job)

    cdef Entry _switch(self, const unsigned char *key, int size):
        """The task of another type."""
        cdef Entry entry = self.entries.get(PyBytes_FromStringAndSize(<const char *>key, size))
        self._entry = entry
        if entry is not None:
            tqe_plain(self._board + C_TIMEOUT_MS, entry.timeout_ms)
            tqe_plain(self._board + C_HARD_MS, entry.hard_ms)
            tqe_plain(self._board + C_RETRIES, entry.retries)
            tqe_plain(self._board + C_TASK, entry.number)
        return entry

    cdef int _look(self, Entry entry) except -1:
        """Read the clock: account what ran since the last look, and say whether the walk must end."""
        cdef unsigned long long now = tqe_now()
        if self._counted:
            entry.timed(self._counted, now - self._since)
        self._since = now
        self._counted = 0
        self._clock_ms()
        if now >= self.until_ns:
            return _LEASE_END
        return _TIME if now >= self._end else _ENDED

    cdef inline void _clock_ms(self) noexcept:
        self._since_ms = <unsigned long long>(<long long>(self._since // 1000000) + self.redis_offset_ms)

    cdef inline void _mark(self, int row, int index, unsigned char *state) noexcept:
        """The board says that this job runs."""
        tqe_plain(self._board + C_ROW, row)
        tqe_plain(self._board + C_INDEX, index)
        state[0] = JOB_STARTED
        self._step += 1
        tqe_plain(self._board + C_STEP, self._step)
        tqe_store(self._board + C_IN_USER, self._step)

    def rehearse(self, Lease lease not None, Entry entry not None, long jobs):
        """Do for so many jobs what is done around a job for the board, the clock and the metrics, and nothing else: it tells
        what they cost. Returns how many it did."""
        cdef long done = 0
        cdef int at
        self._since = tqe_now()
        self._end = self._since
        self._counted = 0
        while done < jobs and not tqe_load(self._board + C_STOP):
            at = done % lease._head.n
            self._mark(lease.row, lease._head.base + at, lease._state + at)
            tqe_store(self._board + C_IN_USER, 0)
            lease._state[at] = JOB_DONE
            done += 1
            self._counted += 1
            if self._counted >= RUN_OF:
                self._look(entry)
        return done

    cdef object _execute(self, Lease lease, int index, Entry entry, object payload):
        """Run one job. From here it counts as started: if we die before its state is `done`, it is charged and runs again."""
        cdef char *board = self._board
        cdef unsigned char *state = lease._state + (index - lease._head.base)
        cdef object args, result
        self.ended += 1
        self._index = index
        self._entry = entry
        self._mark(lease.row, index, state)
        try:
            args = PyObject_CallOneArg(entry.decode, payload)
        except BaseException as e:
            tqe_store(board + C_IN_USER, 0)
            # A limit that struck while they were decoded says nothing about the arguments.
            self._on_failure(lease, index, entry, e, isinstance(e, Exception))
            return None
        try:
            result = call_task(entry, args)
        except BaseException as e:
            end_if_forked(e)
            tqe_store(board + C_IN_USER, 0)
            self._on_failure(lease, index, entry, e, False)
            return None
        if tqe_forked:
            end_child(None)
        tqe_store(board + C_IN_USER, 0)
        if result is None or not lease._head.flags & FLAG_TRACKED:
            state[0] = JOB_DONE
        else:
            self._keep(lease, index, entry, result)

    def conclude(self, Lease lease not None, int index, Entry entry not None, result):
        """Write the outcome of a job beside others that returned."""
        if lease.lost:
            return  # it will be refused; and its row may be another lease's before the record is gone
        if result is None or not lease._head.flags & FLAG_TRACKED:
            lease._state[index - lease._head.base] = JOB_DONE
            return
        self._since_ms = <unsigned long long>(<long long>(tqe_now() // 1000000) + self.redis_offset_ms)
        self._keep(lease, index, entry, result)

    cdef object _keep(self, Lease lease, int index, Entry entry, object result):
        """Record a result; what cannot be encoded or is too long goes to Python. The times are those of the last look at the clock."""
        cdef bytes encoded
        try:
            encoded = PyObject_CallOneArg(self._encode, result)
        except Exception:
            self._on_result(lease, index, entry, result)
            return None
        if PyBytes_GET_SIZE(encoded) > self._result_max or not self.slot._append(
                lease.row, index, OUT_DONE, 0, self._since_ms, self._since_ms, NULL, 0,
                PyBytes_AS_STRING(encoded), <unsigned int>PyBytes_GET_SIZE(encoded)):
            self._on_result(lease, index, entry, result)
            return None
        lease._state[index - lease._head.base] = JOB_RECORDED

    def take(self, Lease lease not None):
        """Hand the next job to Python, which must start it or settle it: (index, type, payload as stored, options, zstd)."""
        cdef JobRef job
        cdef const unsigned char *after
        if lease.next >= lease.stop:
            raise IndexError("nothing left to take")
        after = next_job(lease._pos, lease._head.data + lease._head.size, &job)
        if after == NULL:
            raise IndexError("the frame ends within a job")  # cannot be: the frame was checked
        lease._pos = after
        lease.next += 1
        return (
            lease.next - 1,
            PyBytes_FromStringAndSize(<const char *>job.type, job.type_bytes),
            PyBytes_FromStringAndSize(<const char *>job.payload, job.payload_bytes),
            PyBytes_FromStringAndSize(<const char *>job.options, job.options_bytes),
            job.zstd,
        )

    def done(self, Lease lease not None, int index):
        """Mark a job that ended with nothing to tell."""
        lease._state[index - lease._head.base] = JOB_DONE

    def started(self, Lease lease not None, int index):
        """Mark a job that runs as a coroutine or on the helper thread."""
        lease._state[index - lease._head.base] = JOB_STARTED

    def call(self, Lease lease not None, int index, Entry entry not None, payload, *, unsigned long long timeout_ms,
             unsigned long long hard_ms, unsigned long long retries):
        """Run one job inline that take() gave out, with its own limits. Outcome as in run(); returns nothing."""
        self._since = tqe_now()
        self._clock_ms()
        if lease.started_ms == 0:
            lease.started_ms = self._since_ms
        self._lease = lease
        self._limits(entry, timeout_ms, hard_ms, retries)
        try:
            self._execute(lease, index, entry, payload)
        finally:
            self._lease = None
            self._counted = 1
            self._look(entry)
            lease.finished_ms = self._since_ms

    cdef inline void _limits(self, Entry entry, unsigned long long timeout_ms, unsigned long long hard_ms, unsigned long long retries) noexcept:
        tqe_plain(self._board + C_TASK, entry.number)
        tqe_plain(self._board + C_TIMEOUT_MS, timeout_ms)
        tqe_plain(self._board + C_HARD_MS, hard_ms)
        tqe_plain(self._board + C_RETRIES, retries)

    def invoke(self, Entry entry not None, args):
        """Call a task with its decoded arguments, off the board: for coroutines and the helper thread."""
        return call_task(entry, args)


cdef object call_task(Entry entry, object args):
    """Call by position: what the generated struct has checked needs no dict of keywords."""
    cdef PyObject *stack[ARGS_MAX]
    cdef Py_ssize_t filled = 0
    cdef object name, value
    if entry.mode == MODE_STRUCT:
        return PyObject_CallOneArg(entry.func, args)
    if entry.mode == MODE_KWARGS:
        return PyObject_Call(entry.func, _EMPTY, args)
    try:
        for name in entry._names:
            value = getattr(args, <str>name)
            Py_INCREF(value)
            stack[filled] = <PyObject *>value
            filled += 1
        if entry.keyword_only:
            return PyObject_Vectorcall(entry.func, stack, len(entry.positional), <PyObject *>entry.keyword_only)
        return PyObject_Vectorcall(entry.func, stack, filled, NULL)
    finally:
        while filled:
            filled -= 1
            Py_DECREF(stack[filled])


async def _awaited(awaitable):
    return await awaitable


@cython.final
cdef class AsyncJob:
    """A job that runs as a coroutine, and is the coroutine that the event loop's task drives.

    It decodes the payload at its first step, marks each step on the board (so that a crash or a blocked loop has a name), and
    writes the outcome at its last one. For the loop it always returns None: nothing of a job ends in a task's exception.
    """

    cdef Runner _runner
    cdef readonly Lease lease
    cdef readonly int index
    cdef readonly Entry entry
    cdef readonly object own  # limits that are not its task's, or None
    cdef readonly object task  # the event loop's task
    cdef public str ending  # why it is being cancelled: 'timeout', 'cancel', 'return', or ''
    cdef public object timer
    cdef object _payload
    cdef object _coroutine
    cdef unsigned long long _timeout_ms
    cdef unsigned long long _hard_ms
    cdef unsigned long long _retries
    cdef unsigned long long _begun_ns

    @property
    def timeout_ms(self):
        return self._timeout_ms

    cdef inline void _enter(self) noexcept:
        cdef Runner runner = self._runner
        tqe_plain(runner._board + C_ROW, self.lease.row)
        tqe_plain(runner._board + C_INDEX, self.index)
        runner._limits(self.entry, self._timeout_ms, self._hard_ms, self._retries)
        runner._step += 1
        tqe_plain(runner._board + C_STEP, runner._step)
        tqe_store(runner._board + C_IN_USER, runner._step)

    cdef inline int _leave(self) except -1:
        if tqe_forked:
            end_child(None)
        tqe_store(self._runner._board + C_IN_USER, 0)
        return 0

    def mark(self):
        """A step of a task that the job has started begins. False if that need not be told: the job's own step runs, of which
        this one is a part, or the job is over, and its row may be another's."""
        if tqe_load(self._runner._board + C_IN_USER) or self not in self._runner.active:
            return False
        self._enter()
        return True

    def unmark(self):
        """The step that `mark` began is over."""
        self._leave()

    cdef object _open(self):
        """Decode the payload and make the task's coroutine."""
        cdef object arguments
        try:
            arguments = PyObject_CallOneArg(self.entry.decode, self._payload)
        except BaseException as e:
            self._leave()
            # A limit that struck while they were decoded says nothing about the arguments.
            self._end(None, e, isinstance(e, Exception))
            return None
        self._payload = None
        try:
            self._coroutine = call_task(self.entry, arguments)
        except BaseException as e:
            self._leave()
            self._end(None, e, False)
            return None
        if not PyCoro_CheckExact(self._coroutine):
            self._coroutine = _awaited(self._coroutine)
        return self._coroutine

    cdef object _end(self, object result, object error, bint in_arguments):
        """The last step is over. Outcomes wait while the worker takes itself over: the outcome area is being sorted out."""
        cdef Runner runner = self._runner
        self._coroutine = None
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if runner.late is not None:
            runner.late.append((self, result, error, in_arguments))
        elif error is None:
            runner.conclude(self.lease, self.index, self.entry, result)
        else:
            runner._failed_beside(self, error, in_arguments)
        runner._ended_beside(self)

    cdef object _step(self, object thrown):
        """One step: what the task waits for, or None with the job ended (`_coroutine` is None)."""
        cdef PyObject *got = NULL
        cdef int status
        cdef object value
        self._enter()
        if self._coroutine is None:
            if thrown is not None:
                self._leave()
                self._end(None, thrown, False)  # cancelled before it began
                return None
            Py_DECREF(PyContextVar_Set(<PyObject *>self._runner._context, <PyObject *>self))  # the token
            if self._open() is None:
                return None
        try:
            if thrown is not None:
                value = self._coroutine.throw(thrown)
                self._leave()
                return value
            status = PyIter_Send(self._coroutine, None, &got)
            if status == 1:
                value = <object>got
                Py_DECREF(got)
                self._leave()
                return value
            if status == 0:
                value = <object>got
                Py_DECREF(got)
                self._leave()
                self._end(value, None, False)
                return None
        except StopIteration as e:
            self._leave()
            self._end(e.value, None, False)
            return None
        except BaseException as e:
            end_if_forked(e)
            self._leave()
            self._end(None, e, False)
            return None
        return None

    def __await__(self):
        return self

    def __iter__(self):
        return self

    def __next__(self):
        cdef object value = self._step(None)
        if self._coroutine is None:
            raise StopIteration
        return value

    def send(self, value):
        cdef object got = self._step(None)
        if self._coroutine is None:
            raise StopIteration
        return got

    def throw(self, kind, value=None, traceback=None):
        cdef object error = kind if isinstance(kind, BaseException) else (kind() if value is None else value)
        cdef object got = self._step(error)
        if self._coroutine is None:
            raise StopIteration
        return got

    def close(self):
        if self._coroutine is not None:
            self._coroutine.close()
            self._coroutine = None
