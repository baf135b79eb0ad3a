# The hot path: walk a leased frame job by job, decode each payload straight into the task's struct, call, mark the board.
#
# No system call and no clock call per job: tiny jobs are timed in runs of 32, and a stop word, the lease end and the quantum are
# compared where the clock is read. What is not the plain case (options, zstd, cancels, coroutines, unknown types) leaves to Python.

cdef extern from "Python.h":
    object PyMemoryView_FromMemory(char *mem, Py_ssize_t size, int flags)
    object PyObject_CallOneArg(object f, object a)
    object PyObject_Call(object f, object args, object kwargs)
    object PyObject_Vectorcall(object f, PyObject **args, size_t nargsf, PyObject *kwnames)
    int PyBUF_READ

cdef enum:
    MODE_FIELDS = 0
    MODE_STRUCT = 1
    MODE_KWARGS = 2
    ARGS_MAX = 64
    RUN_OF = 32
    TINY_NS = 10000

# What Runner.run returns.
cdef enum:
    _ENDED = 0
    _TIME = 1
    _STOP = 2
    _FULL = 3
    _LEASE_END = 4
    _SPECIAL = 5

RUN_ENDED = _ENDED  # nothing left to start in this lease
RUN_TIME = _TIME  # the time given is over
RUN_STOP = _STOP  # the stop word is set
RUN_FULL = _FULL  # the outcome half has no room for another record
RUN_LEASE_END = _LEASE_END  # lease_until lies behind us: start nothing more
RUN_SPECIAL = _SPECIAL  # the next job needs Python: take() it

cdef tuple _EMPTY = ()


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
    cdef tuple _names
    cdef char *_block

    def __init__(self, *, str name, int number, func, decode, tuple positional, tuple keyword_only, int mode, bint is_async,
                 unsigned long long timeout_ms=0, unsigned long long hard_ms=0, unsigned long long retries=0,
                 double mean_ns=-1.0):
        if number < 0 or number >= TASKS_MAX:
            raise ValueError("task number out of range")
        if len(positional) + len(keyword_only) > ARGS_MAX:
            raise ValueError("too many parameters")
        self.name = name
        self.key = name.encode()
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
        self._block = NULL

    def bind(self, Slot slot not None):
        """Count on this slot's board from now on."""
        cdef char *p = slot.base + O_TASKS + self.number * TASK_BYTES
        memset(p, 0, TASK_BYTES)
        memcpy(p, PyBytes_AS_STRING(self.key), len(self.key))
        self._block = p

    cpdef timed(self, unsigned long long jobs, unsigned long long ns):
        """Account a run of `jobs` that took `ns` together."""
        cdef double mean = <double>ns / <double>jobs
        cdef double weight
        if self._block == NULL:
            raise RuntimeError("bind() first")
        self.seen += jobs
        if self.mean_ns < 0:
            self.mean_ns = mean
        else:
            weight = 0.125 if jobs == 1 else 0.25
            self.mean_ns += (mean - self.mean_ns) * weight
        tqe_add(self._block + T_SUM_NS, ns)
        tqe_add(self._block + T_COMPLETED, jobs)
        tqe_add(self._block + T_RUN_BINS + 8 * tqe_bin(<unsigned long long>(mean / 1000.0)), jobs)
        tqe_plain(self._block + T_MEAN_NS, <unsigned long long>self.mean_ns)
        tqe_add(self._block + T_TIMED, jobs)

    cpdef waited(self, unsigned long long jobs, unsigned long long us):
        """Account the wait of `jobs` that were fetched together."""
        tqe_add(self._block + T_WAIT_SUM_US, us * jobs)
        tqe_add(self._block + T_WAIT_BINS + 8 * tqe_bin(us), jobs)

    cpdef count(self, int word):
        """Add one to a counter of the task's block (layout.T_FAILED, T_RETRIED, T_DEAD)."""
        tqe_add(self._block + word, 1)


cdef class Lease:
    """A frame that this worker holds: where the walk stands, and its row on the board."""

    cdef readonly bytes frame
    cdef readonly object header
    cdef readonly bytes frame_id
    cdef readonly int base
    cdef readonly int n
    cdef readonly int run
    cdef readonly int total
    cdef readonly int flags
    cdef readonly int attempts
    cdef readonly int row
    cdef readonly str lane
    cdef readonly unsigned long long enqueued_us
    cdef readonly int next  # absolute index of the next job to start
    cdef public int stop  # absolute index where this worker stops: the rest was given back
    cdef public int running  # coroutines and helper jobs under way
    cdef public object cancels  # set of absolute indexes, or None
    cdef public object options  # the frame's options, decoded, or None
    cdef public int rank
    cdef public list claims  # [(base, n)]: the leases in Redis that this frame is held by
    cdef public unsigned long long fetched_ns
    cdef public unsigned long long started_ms
    cdef public unsigned long long finished_ms
    cdef public unsigned long long first_done_ns
    cdef public bint settling  # a settle of it is unanswered
    cdef public object pieces  # how to cut what was given back: [(base, n)]
    cdef public bint lost  # fenced: nothing of it may be settled any more
    cdef public double predicted_ns
    cdef readonly bint tracked
    cdef const char *_p
    cdef const char *_pos
    cdef const char *_end
    cdef unsigned char *_state  # state byte of `base`

    def __init__(self, bytes frame not None, header, Slot slot not None, int rank=0):
        """`header` is codec.parse(frame), which has checked shape, CRC and walk: the walk here trusts them."""
        self.frame = frame
        self.header = header
        self.frame_id = header.frame_id
        self.base = header.base
        self.n = header.n
        self.run = header.run
        self.total = header.total
        self.flags = header.flags
        self.tracked = (self.flags & 1) != 0
        self.attempts = header.attempts
        self.lane = header.lane
        self.enqueued_us = header.enqueued_us
        self.next = self.base
        self.stop = self.base + self.n
        self.running = 0
        self.cancels = None
        self.options = None
        self.rank = rank
        self.claims = [(self.base, self.n)]
        self.settling = self.lost = False
        self.pieces = ()
        self.started_ms = self.finished_ms = self.fetched_ns = self.first_done_ns = 0
        self.predicted_ns = 0
        self._p = PyBytes_AS_STRING(frame)
        self._pos = self._p + 128 + len(header.options)
        self._end = self._p + PyBytes_GET_SIZE(frame)
        self.row = slot.open_row(self.frame_id, self.base, self.n, self.run)
        self._state = slot._states(self.row)

    def ended(self):
        """Nothing of what is kept here waits or runs."""
        return self.next >= self.stop and self.running == 0

    def plain_done(self):
        """All jobs of the frame as submitted have completed with nothing to tell but that."""
        cdef int i
        if self.n != self.total or self.next < self.base + self.n:
            return False
        for i in range(self.n):
            if self._state[i] != JOB_DONE:
                return False
        return True

    def to_settle(self):
        """Whether a claim holds a job that has ended or was given back."""
        cdef int i, base, n
        for claim in self.claims:
            base = claim[0] - self.base
            n = claim[1]
            for i in range(base, base + n):
                if self._state[i] >= JOB_DONE:
                    return True
        return False

    def next_type(self):
        """Type of the next job to start."""
        if self.next >= self.stop:
            raise IndexError("nothing left")
        return PyBytes_FromStringAndSize(self._pos + 1, <unsigned char>self._pos[0])

    def give_back(self, int index):
        """Mark all jobs from `index` on as returned: this worker will not start them."""
        cdef int i
        if index < self.next:
            raise ValueError("started jobs cannot be given back")
        for i in range(index, self.stop):
            self._state[i - self.base] = JOB_RETURNED
        self.stop = index

    def types_ahead(self):
        """(type, jobs) runs of what is not started yet, in order."""
        cdef const char *p = self._pos
        cdef unsigned int word
        cdef int tl, i
        cdef list out = []
        cdef bytes last = None
        cdef const char *lp = NULL
        cdef int ll = -1
        cdef int k = 0
        for i in range(self.stop - self.next):
            tl = <unsigned char>p[0]
            if ll != tl or memcmp(lp, p + 1, tl) != 0:
                if k:
                    out.append((last, k))
                last = PyBytes_FromStringAndSize(p + 1, tl)
                lp = p + 1
                ll = tl
                k = 0
            k += 1
            memcpy(&word, p + 1 + tl, 4)
            p += 5 + tl
            if word & 0x80000000:
                p += 2 + (<unsigned int><unsigned char>p[0] | <unsigned int><unsigned char>p[1] << 8)
            p += word & 0x3FFFFFFF
        if k:
            out.append((last, k))
        return out


cdef class Runner:
    """Runs the jobs of leases on the calling thread. One a worker.

    `on_failure(lease, index, entry, exception, in_arguments)` writes the record of a job that raised and returns nothing;
    `on_result(lease, index, entry, result)` writes that of a tracked job whose result is not None.
    """

    cdef readonly Slot slot
    cdef readonly dict entries
    cdef object _on_failure
    cdef object _on_result
    cdef object _encode
    cdef char *_board
    cdef unsigned long long _step
    cdef public unsigned long long until_ns  # end of the lease, CLOCK_BOOTTIME
    cdef public long long redis_offset_ms  # Redis time - CLOCK_BOOTTIME
    cdef Entry _last
    cdef Lease _lease  # the job that runs inline, for current()
    cdef int _index
    cdef Entry _entry
    cdef unsigned int _result_max

    def __init__(self, Slot slot not None, dict entries not None, *, on_failure, on_result, encode, unsigned int result_max_bytes=65536):
        cdef Entry entry
        for entry in entries.values():
            entry.bind(slot)
        self.slot = slot
        self.entries = entries
        self._on_failure = on_failure
        self._on_result = on_result
        self._encode = encode
        self._board = slot.base
        self._step = tqe_load(slot.base + C_STEP)
        self.until_ns = 0
        self.redis_offset_ms = 0
        self._last = None
        self._lease = None
        self._entry = None
        self._index = 0
        self._result_max = min(result_max_bytes, 65536)

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

    def run(self, Lease lease not None, unsigned long long limit_ns):
        """Run jobs of the lease for about `limit_ns`; returns (RUN_* code, jobs ended)."""
        cdef const char *p
        cdef unsigned int word, size
        cdef int tl, start = lease.next
        cdef Entry entry = self._last
        cdef unsigned long long begun = tqe_now(), since = begun, now, end = begun + limit_ns
        cdef unsigned long long counted = 0  # jobs since the clock was read
        cdef int code = _ENDED
        cdef char *board = self._board
        cdef unsigned char *state
        cdef object payload, args, result
        if begun >= self.until_ns:
            return _LEASE_END, 0
        if lease.options is not None or lease.cancels is not None:
            return (_SPECIAL if lease.next < lease.stop else _ENDED), 0
        if lease.started_ms == 0:
            lease.started_ms = <unsigned long long>(<long long>(begun // 1000000) + self.redis_offset_ms)
        self._lease = lease
        p = lease._pos
        state = lease._state + (lease.next - lease.base)
        while lease.next < lease.stop:
            if tqe_load(board + C_STOP):
                code = _STOP
                break
            tl = <unsigned char>p[0]
            if entry is None or PyBytes_GET_SIZE(entry.key) != tl or memcmp(PyBytes_AS_STRING(entry.key), p + 1, tl) != 0:
                if counted:  # a run belongs to one type
                    now = tqe_now()
                    entry.timed(counted, now - since)
                    since = now
                    counted = 0
                found = self.entries.get(PyBytes_FromStringAndSize(p + 1, tl))
                if found is None:
                    code = _SPECIAL
                    break
                entry = <Entry>found
                self._last = entry
                self._entry = entry
                tqe_plain(board + C_TASK, entry.number)
                tqe_plain(board + C_TIMEOUT_MS, entry.timeout_ms)
                tqe_plain(board + C_HARD_MS, entry.hard_ms)
                tqe_plain(board + C_RETRIES, entry.retries)
                if now_over(since, end):
                    code = _TIME
                    break
            memcpy(&word, p + 1 + tl, 4)
            if word & 0xC0000000 or entry.is_async:
                code = _SPECIAL
                break
            if self.slot.used[self.slot.half] > HALF_BYTES - ROOM_BYTES:
                code = _FULL
                break
            size = word & 0x3FFFFFFF
            # From here the job counts as started: if we die before its state is `done`, it is charged and runs again.
            self._index = lease.next
            self._entry = entry
            tqe_plain(board + C_ROW, lease.row)
            tqe_plain(board + C_INDEX, lease.next)
            tqe_plain(board + C_TASK, entry.number)
            state[0] = JOB_STARTED
            self._step += 1
            tqe_plain(board + C_STEP, self._step)
            tqe_store(board + C_IN_USER, self._step)
            lease.next += 1
            lease._pos = p + 5 + tl + size
            result = None
            try:
                payload = PyMemoryView_FromMemory(<char *>p + 5 + tl, size, PyBUF_READ)
                args = PyObject_CallOneArg(entry.decode, payload)
            except BaseException as e:
                tqe_store(board + C_IN_USER, 0)
                self._on_failure(lease, lease.next - 1, entry, e, True)
            else:
                try:
                    result = call_task(entry, args)
                except BaseException as e:
                    tqe_store(board + C_IN_USER, 0)
                    self._on_failure(lease, lease.next - 1, entry, e, False)
                else:
                    tqe_store(board + C_IN_USER, 0)
                    if result is None or not lease.tracked:
                        state[0] = JOB_DONE
                    else:
                        self._keep(lease, lease.next - 1, entry, result, since)
            counted += 1
            p = lease._pos
            state += 1
            if counted >= RUN_OF or entry.mean_ns >= TINY_NS or entry.mean_ns < 0 or entry.seen < RUN_OF:
                now = tqe_now()
                entry.timed(counted, now - since)
                since = now
                counted = 0
                if now >= end:
                    code = _TIME
                    break
                if now >= self.until_ns:
                    code = _LEASE_END
                    break
        if counted:
            entry.timed(counted, tqe_now() - since)
        self._lease = None
        if lease.next >= lease.stop and code == _TIME:
            code = _ENDED
        lease.finished_ms = <unsigned long long>(<long long>(tqe_now() // 1000000) + self.redis_offset_ms)
        return code, lease.next - start

    def take(self, Lease lease not None):
        """Hand the next job to Python, which must start it or settle it: (index, type, payload as stored, options, zstd)."""
        cdef const char *p = lease._pos
        cdef unsigned int word, options = 0
        cdef int tl, index = lease.next
        if lease.next >= lease.stop:
            raise IndexError("nothing left to take")
        tl = <unsigned char>p[0]
        cdef bytes key = PyBytes_FromStringAndSize(p + 1, tl)
        memcpy(&word, p + 1 + tl, 4)
        p += 5 + tl
        cdef bytes opts = b""
        if word & 0x80000000:
            options = <unsigned int><unsigned char>p[0] | <unsigned int><unsigned char>p[1] << 8
            opts = PyBytes_FromStringAndSize(p + 2, options)
            p += 2 + options
        cdef bytes payload = PyBytes_FromStringAndSize(p, word & 0x3FFFFFFF)
        lease._pos = p + (word & 0x3FFFFFFF)
        lease.next += 1
        return index, key, payload, opts, (word & 0x40000000) != 0

    def done(self, Lease lease not None, int index):
        """Mark a job that ended with nothing to tell."""
        lease._state[index - lease.base] = JOB_DONE

    def started(self, Lease lease not None, int index):
        """Mark a job that runs as a coroutine or on the helper thread."""
        lease._state[index - lease.base] = JOB_STARTED

    def call(self, Lease lease not None, int index, Entry entry not None, payload, *, unsigned long long timeout_ms,
             unsigned long long hard_ms, unsigned long long retries):
        """Run one job inline that take() gave out, with its own limits. Outcome as in run(); returns nothing."""
        cdef char *board = self._board
        cdef object args, result = None
        cdef unsigned long long begun = tqe_now()
        if lease.started_ms == 0:
            lease.started_ms = <unsigned long long>(<long long>(begun // 1000000) + self.redis_offset_ms)
        self._lease = lease
        self._index = index
        self._entry = entry
        self._last = None  # the limits on the board are this job's: the next run writes its task's own
        tqe_plain(board + C_ROW, lease.row)
        tqe_plain(board + C_INDEX, index)
        tqe_plain(board + C_TASK, entry.number)
        tqe_plain(board + C_TIMEOUT_MS, timeout_ms)
        tqe_plain(board + C_HARD_MS, hard_ms)
        tqe_plain(board + C_RETRIES, retries)
        lease._state[index - lease.base] = JOB_STARTED
        self._step += 1
        tqe_plain(board + C_STEP, self._step)
        tqe_store(board + C_IN_USER, self._step)
        try:
            args = PyObject_CallOneArg(entry.decode, payload)
        except BaseException as e:
            tqe_store(board + C_IN_USER, 0)
            self._on_failure(lease, index, entry, e, True)
        else:
            try:
                result = call_task(entry, args)
            except BaseException as e:
                tqe_store(board + C_IN_USER, 0)
                self._on_failure(lease, index, entry, e, False)
            else:
                tqe_store(board + C_IN_USER, 0)
                if result is None or not lease.tracked:
                    lease._state[index - lease.base] = JOB_DONE
                else:
                    self._keep(lease, index, entry, result, begun)
        entry.timed(1, tqe_now() - begun)
        self._lease = None
        lease.finished_ms = <unsigned long long>(<long long>(tqe_now() // 1000000) + self.redis_offset_ms)

    cdef object _keep(self, Lease lease, int index, Entry entry, object result, unsigned long long clock_ns):
        """Record a result; what cannot be encoded or is too long goes to Python. The times are those of the last look at the clock."""
        cdef bytes encoded
        cdef unsigned long long at_ms = <unsigned long long>(<long long>(clock_ns // 1000000) + self.redis_offset_ms)
        try:
            encoded = PyObject_CallOneArg(self._encode, result)
        except Exception:
            return self._on_result(lease, index, entry, result)
        if PyBytes_GET_SIZE(encoded) > self._result_max or not self.slot._append(
                lease.row, index, OUT_DONE, 0, at_ms, at_ms, NULL, 0,
                PyBytes_AS_STRING(encoded), <unsigned int>PyBytes_GET_SIZE(encoded)):
            return self._on_result(lease, index, entry, result)
        lease._state[index - lease.base] = JOB_RECORDED

    def invoke(self, Entry entry not None, args):
        """Call a task with its decoded arguments, outside of the board: for coroutines and the helper thread."""
        return call_task(entry, args)

    def steps(self, coroutine, Lease lease not None, int index, Entry entry not None, *, unsigned long long timeout_ms,
              unsigned long long hard_ms, unsigned long long retries):
        """Wrap a job's coroutine: each of its steps stands on the board, so that a crash or a blocked loop has a name."""
        return Steps(self, coroutine, lease, index, entry, timeout_ms, hard_ms, retries)


cdef inline bint now_over(unsigned long long since, unsigned long long end) noexcept:
    return since >= end


cdef object call_task(Entry entry, object args):
    cdef PyObject *stack[ARGS_MAX]
    cdef list held
    cdef Py_ssize_t i, n
    if entry.mode == MODE_STRUCT:
        return PyObject_CallOneArg(entry.func, args)
    if entry.mode == MODE_KWARGS:
        return PyObject_Call(entry.func, _EMPTY, args)
    n = len(entry._names)
    if n == 1 and not entry.keyword_only:
        return PyObject_CallOneArg(entry.func, getattr(args, <str>entry.positional[0]))
    held = [getattr(args, <str>name) for name in entry._names]
    for i in range(n):
        stack[i] = <PyObject *>held[i]
    if entry.keyword_only:
        return PyObject_Vectorcall(entry.func, stack, len(entry.positional), <PyObject *>entry.keyword_only)
    return PyObject_Vectorcall(entry.func, stack, n, NULL)


cdef class Steps:
    """An awaitable that drives a job's coroutine and marks the running step on the board."""

    cdef Runner _runner
    cdef object _coroutine
    cdef Lease _lease
    cdef int _index
    cdef Entry _entry
    cdef unsigned long long _timeout_ms
    cdef unsigned long long _hard_ms
    cdef unsigned long long _retries

    def __init__(self, Runner runner, coroutine, Lease lease, int index, Entry entry, unsigned long long timeout_ms,
                 unsigned long long hard_ms, unsigned long long retries):
        self._runner = runner
        self._coroutine = coroutine
        self._lease = lease
        self._index = index
        self._entry = entry
        self._timeout_ms = timeout_ms
        self._hard_ms = hard_ms
        self._retries = retries

    cdef inline void _enter(self) noexcept:
        cdef char *board = self._runner._board
        self._runner._last = None
        tqe_plain(board + C_ROW, self._lease.row)
        tqe_plain(board + C_INDEX, self._index)
        tqe_plain(board + C_TASK, self._entry.number)
        tqe_plain(board + C_TIMEOUT_MS, self._timeout_ms)
        tqe_plain(board + C_HARD_MS, self._hard_ms)
        tqe_plain(board + C_RETRIES, self._retries)
        self._runner._step += 1
        tqe_plain(board + C_STEP, self._runner._step)
        tqe_store(board + C_IN_USER, self._runner._step)

    cdef inline void _leave(self) noexcept:
        tqe_store(self._runner._board + C_IN_USER, 0)

    def __await__(self):
        return self

    def __iter__(self):
        return self

    def __next__(self):
        return self.send(None)

    def send(self, value):
        self._enter()
        try:
            return self._coroutine.send(value)
        finally:
            self._leave()

    def throw(self, *args):
        self._enter()
        try:
            return self._coroutine.throw(*args)
        finally:
            self._leave()

    def close(self):
        self._enter()
        try:
            return self._coroutine.close()
        finally:
            self._leave()
