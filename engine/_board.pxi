# One worker's slot of the board: rows, state bytes, outcome records. Offsets: engine/board/layout.py (a test compares them).

cdef extern from *:
    """
    #include <time.h>
    #include <stdint.h>
    static inline void tqe_store(char *p, uint64_t v) { __atomic_store_n((uint64_t *)p, v, __ATOMIC_RELEASE); }
    static inline uint64_t tqe_load(const char *p) { return __atomic_load_n((const uint64_t *)p, __ATOMIC_ACQUIRE); }
    static inline void tqe_plain(char *p, uint64_t v) { __atomic_store_n((uint64_t *)p, v, __ATOMIC_RELAXED); }
    static inline void tqe_add(char *p, uint64_t v) { *(uint64_t *)p += v; }
    static inline void tqe_store32(char *p, uint32_t v) { __atomic_store_n((uint32_t *)p, v, __ATOMIC_RELEASE); }
    static inline uint64_t tqe_now(void) {
        struct timespec t; clock_gettime(CLOCK_BOOTTIME, &t);
        return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
    }
    static inline int tqe_bin(uint64_t us) {
        int k; if (us < 2) return 0; k = 63 - __builtin_clzll(us); return k > 23 ? 23 : k;
    }
    """
    void tqe_store(char *p, unsigned long long v) nogil
    unsigned long long tqe_load(const char *p) nogil
    void tqe_plain(char *p, unsigned long long v) nogil
    void tqe_add(char *p, unsigned long long v) nogil
    void tqe_store32(char *p, unsigned int v) nogil
    unsigned long long tqe_now() nogil
    int tqe_bin(unsigned long long us) nogil

cdef enum:
    C_STOP = 56
    C_LEASE_UNTIL = 96
    C_STEP = 136
    C_IN_USER = 144
    C_ROW = 152
    C_INDEX = 160
    C_TASK = 168
    C_TIMEOUT_MS = 176
    C_HARD_MS = 184
    C_ASYNC = 216
    C_HALF = 232
    C_RETRIES = 240
    CONTROL_BYTES = 4096
    TASKS_MAX = 512
    TASK_BYTES = 512
    TASK_NAME_BYTES = 64
    T_COMPLETED = 64
    T_FAILED = 72
    T_SUM_NS = 80
    T_WAIT_SUM_US = 88
    T_MEAN_NS = 96
    T_TIMED = 104
    T_RUN_BINS = 128
    T_WAIT_BINS = 320
    ROWS = 2048
    ROW_BYTES = 64
    R_RANGE = 0
    R_BLOCK = 8
    R_ID = 16
    R_RUN = 48
    R_STATES = 56
    INLINE_JOBS = 8
    BLOCKS = 256
    BLOCK_BYTES = 1024
    JOB_LEASED = 0
    JOB_STARTED = 1
    JOB_DONE = 2
    JOB_RECORDED = 3
    JOB_RETURNED = 4
    HALVES = 2
    HALF_BYTES = 524288
    RECORD_HEADER_BYTES = 40
    OUT_DONE = 1
    O_TASKS = 4096
    O_ROWS = 266240
    O_BLOCKS = 397312
    O_HALVES = 659456
    SLOT_BYTES = 1708032
    # room that must be left before a job may start: its result, its error and the header fit (64 + 8 KiB, rounded up)
    ROOM_BYTES = 81920

cdef unsigned long long ROW_LIVE = <unsigned long long>1 << 48


def board_constants():
    """The layout as it was compiled in, by name; tests compare it with tqe.board.layout."""
    return {
        "C_STOP": C_STOP, "C_LEASE_UNTIL": C_LEASE_UNTIL, "C_STEP": C_STEP, "C_IN_USER": C_IN_USER, "C_ROW": C_ROW,
        "C_INDEX": C_INDEX, "C_TASK": C_TASK, "C_TIMEOUT_MS": C_TIMEOUT_MS, "C_HARD_MS": C_HARD_MS, "C_ASYNC": C_ASYNC, "C_HALF": C_HALF, "C_RETRIES": C_RETRIES,
        "CONTROL_BYTES": CONTROL_BYTES, "TASKS_MAX": TASKS_MAX, "TASK_BYTES": TASK_BYTES, "TASK_NAME_BYTES": TASK_NAME_BYTES, "T_COMPLETED": T_COMPLETED,
        "T_FAILED": T_FAILED, "T_SUM_NS": T_SUM_NS, "T_WAIT_SUM_US": T_WAIT_SUM_US, "T_MEAN_NS": T_MEAN_NS,
        "T_TIMED": T_TIMED, "T_RUN_BINS": T_RUN_BINS, "T_WAIT_BINS": T_WAIT_BINS, "ROWS": ROWS, "ROW_BYTES": ROW_BYTES,
        "R_RANGE": R_RANGE, "R_BLOCK": R_BLOCK, "R_ID": R_ID, "R_RUN": R_RUN, "R_STATES": R_STATES,
        "INLINE_JOBS": INLINE_JOBS, "BLOCKS": BLOCKS, "BLOCK_BYTES": BLOCK_BYTES, "JOB_LEASED": JOB_LEASED,
        "JOB_STARTED": JOB_STARTED, "JOB_DONE": JOB_DONE, "JOB_RECORDED": JOB_RECORDED, "JOB_RETURNED": JOB_RETURNED,
        "HALVES": HALVES, "HALF_BYTES": HALF_BYTES, "RECORD_HEADER_BYTES": RECORD_HEADER_BYTES, "ROOM_BYTES": ROOM_BYTES, "OUT_DONE": OUT_DONE,
        "O_TASKS": O_TASKS, "O_ROWS": O_ROWS, "O_BLOCKS": O_BLOCKS, "O_HALVES": O_HALVES, "SLOT_BYTES": SLOT_BYTES,
        "ROW_LIVE": ROW_LIVE,
    }


def records_of(board, Py_ssize_t start):
    """Records of the outcome half that begins there, in the order in which they were written, up to the first unwritten one.

    [(row, index, status, delay_ms, started_ms, finished_ms, error, result)]
    """
    cdef const unsigned char[::1] view = board
    cdef const char *p
    cdef Py_ssize_t at = 0
    cdef unsigned int length, row, delay_ms, error_n, result_n
    cdef unsigned short index
    cdef unsigned long long started_ms, finished_ms
    cdef list found = []
    if start < 0 or start % 8 or view.shape[0] - start < HALF_BYTES:
        raise ValueError("the board is too small for this half")
    p = <const char *>&view[0] + start
    while at <= HALF_BYTES - RECORD_HEADER_BYTES:
        memcpy(&length, p + at, 4)
        if length < RECORD_HEADER_BYTES or length > HALF_BYTES - at:
            break
        memcpy(&row, p + at + 4, 4)
        memcpy(&index, p + at + 8, 2)
        memcpy(&delay_ms, p + at + 12, 4)
        memcpy(&started_ms, p + at + 16, 8)
        memcpy(&finished_ms, p + at + 24, 8)
        memcpy(&error_n, p + at + 32, 4)
        memcpy(&result_n, p + at + 36, 4)
        if error_n > length or result_n > length or error_n + result_n > length - RECORD_HEADER_BYTES:
            break
        found.append((
            row, index, <unsigned char>p[at + 10], delay_ms, started_ms, finished_ms,
            PyBytes_FromStringAndSize(p + at + RECORD_HEADER_BYTES, error_n),
            PyBytes_FromStringAndSize(p + at + RECORD_HEADER_BYTES + error_n, result_n),
        ))
        at += length
    return found


@cython.final
cdef class Slot:
    """A worker's own slot: it alone writes rows, states and records; the steward reads them when the worker is dead."""

    cdef object _board  # keeps the mapping alive
    cdef char *base
    cdef list _free_rows
    cdef list _free_blocks
    cdef int half
    cdef unsigned int used[2]
    cdef bytearray _settling  # rows that the settle under way ends: their records need not move to the other half

    def __init__(self, board, Py_ssize_t offset):
        cdef unsigned char[::1] view = board
        if offset < 0 or offset % 8 or view.shape[0] - offset < SLOT_BYTES:
            raise ValueError("the board is too small for this slot")
        self._board = board
        self.base = <char *>&view[0] + offset
        self._free_rows = list(range(ROWS - 1, -1, -1))
        self._free_blocks = list(range(BLOCKS - 1, -1, -1))
        self._settling = bytearray(ROWS)
        self.half = 0
        self.used[0] = self.used[1] = 0

    def free_rows(self):
        """(rows, state blocks) that are free."""
        return len(self._free_rows), len(self._free_blocks)

    def open_row(self, bytes frame_id not None, int base, int n, int run):
        """Take a row for a lease as fetched; all its jobs are `leased`. Returns the row's number; IndexError when none is free."""
        if PyBytes_GET_SIZE(frame_id) != 26 or n < 1 or n > 1000 or base < 0 or base > 999:
            raise ValueError("not a lease")
        return self._take_row(PyBytes_AS_STRING(frame_id), base, n, run)

    cdef int _take_row(self, const char *frame_id, int base, int n, int run) except -1:
        cdef int row, block = -1
        if not self._free_rows or (n > INLINE_JOBS and not self._free_blocks):
            raise IndexError("the board has no free row for another lease")
        row = self._free_rows.pop()
        if n > INLINE_JOBS:
            block = self._free_blocks.pop()
            memset(self.base + O_BLOCKS + block * BLOCK_BYTES, JOB_LEASED, n)
        cdef char *p = self.base + O_ROWS + row * ROW_BYTES
        tqe_plain(p + R_BLOCK, block + 1)
        memcpy(p + R_ID, frame_id, 26)
        tqe_plain(p + R_RUN, run)
        tqe_plain(p + R_STATES, 0)
        tqe_store(p + R_RANGE, <unsigned long long>base | <unsigned long long>n << 16 | <unsigned long long>base << 32 | ROW_LIVE)
        return row

    def narrow_row(self, int row, int base, int n):
        """The lease is now named by this part of the row: one store, so that a kill leaves the old range or the new one."""
        cdef char *p = self._row(row)
        cdef unsigned long long r = tqe_load(p + R_RANGE)
        if not r & ROW_LIVE or n < 1 or base < <int>(r & 0xFFFF) or base + n > <int>((r & 0xFFFF) + (r >> 16 & 0xFFFF)):
            raise ValueError("not a part of the row")
        tqe_store(p + R_RANGE, <unsigned long long>base | <unsigned long long>n << 16 | r & (<unsigned long long>0xFFFF << 32) | ROW_LIVE)

    def close_row(self, int row):
        """Free a row whose settle has been answered."""
        self._free_row(row)

    cdef int _free_row(self, int row) except -1:
        cdef char *p = self._row(row)
        cdef unsigned long long block = tqe_load(p + R_BLOCK)
        if not tqe_load(p + R_RANGE) & ROW_LIVE:
            raise ValueError("the row is free already")  # freed twice, two leases would share it
        tqe_store(p + R_RANGE, 0)
        if block:
            self._free_blocks.append(<int>block - 1)
        self._free_rows.append(row)
        return 0

    def close_rows(self, list leases not None):
        """The same for leases that are settled whole."""
        cdef Lease lease
        for lease in leases:
            self._free_row(lease.row)

    def states(self, int row):
        """State bytes of the whole row, from the base that was fetched."""
        cdef char *p = self._row(row)
        cdef unsigned long long r = tqe_load(p + R_RANGE)
        cdef int n = <int>((r & 0xFFFF) + (r >> 16 & 0xFFFF) - (r >> 32 & 0xFFFF))
        return PyBytes_FromStringAndSize(<char *>self._states(row), n)

    def set_state(self, int row, int index, int state):
        """Write the state of one job, by its index in the frame."""
        self._job(row, index)[0] = <unsigned char>state

    cdef unsigned char *_job(self, int row, int index) except NULL:
        cdef unsigned long long r = tqe_load(self._row(row) + R_RANGE)
        cdef int at = index - <int>(r >> 32 & 0xFFFF)
        if at < 0 or at >= <int>((r & 0xFFFF) + (r >> 16 & 0xFFFF) - (r >> 32 & 0xFFFF)):
            raise IndexError(index)
        return self._states(row) + at

    def room(self):
        """Bytes left in the outcome half in use: a record of so many, header included, still fits."""
        return HALF_BYTES - self.used[self.half] - 8  # records are padded to 8, and an end mark follows

    def record(self, int row, int index, int status, *, unsigned int delay_ms=0, unsigned long long started_ms=0,
               unsigned long long finished_ms=0, bytes error=b"", bytes result=b""):
        """Append one outcome, then mark the job `recorded`. The length word goes last: a kill leaves a whole record or none."""
        cdef unsigned char *state = self._job(row, index)
        if not self._append(row, index, status, delay_ms, started_ms, finished_ms,
                            PyBytes_AS_STRING(error), <unsigned int>PyBytes_GET_SIZE(error),
                            PyBytes_AS_STRING(result), <unsigned int>PyBytes_GET_SIZE(result)):
            raise MemoryError("the outcome half is full")
        state[0] = JOB_RECORDED

    def begin_settle(self, rows):
        """Switch halves: what the rows in this settle recorded stays in the old half, all else moves to the new one.

        Returns the old half's number. The other half must be idle: its settle was answered (see end_settle).
        """
        cdef int old = self.half, new = 1 - self.half
        cdef char *p = self.base + O_HALVES + old * HALF_BYTES
        cdef unsigned int at = 0, length, row
        if self.used[new]:
            raise RuntimeError("two settles under way")
        for r in rows:
            self._settling[r] = 1
        self.half = new
        tqe_store(self.base + C_HALF, new)
        while at < self.used[old]:
            memcpy(&length, p + at, 4)
            memcpy(&row, p + at + 4, 4)
            if not self._settling[row]:
                self._copy(p + at, length)
            at += length
        for r in rows:
            self._settling[r] = 0
        return old

    def end_settle(self, int half):
        """The reply of the settle that took this half was read: reset it."""
        if self.used[half] and half != self.half:
            tqe_store32(self.base + O_HALVES + half * HALF_BYTES, 0)
            self.used[half] = 0

    def reset_halves(self):
        """All that was recorded is settled: begin anew."""
        cdef int half
        for half in range(2):
            tqe_store32(self.base + O_HALVES + half * HALF_BYTES, 0)
            self.used[half] = 0

    cdef int _append(self, int row, int index, int status, unsigned int delay_ms, unsigned long long started_ms,
                     unsigned long long finished_ms, const char *error, unsigned int error_n, const char *result,
                     unsigned int result_n) noexcept:
        cdef unsigned int length = (RECORD_HEADER_BYTES + error_n + result_n + 7) & ~<unsigned int>7
        cdef unsigned int at = self.used[self.half]
        cdef char *p = self.base + O_HALVES + self.half * HALF_BYTES + at
        cdef unsigned short index16 = <unsigned short>index
        if at + length + 4 > HALF_BYTES:
            return 0
        memset(p + length, 0, 4)  # the end mark behind the record, before the record becomes visible
        memcpy(p + 4, &row, 4)
        memcpy(p + 8, &index16, 2)
        p[10] = <char>status
        p[11] = 0
        memcpy(p + 12, &delay_ms, 4)
        memcpy(p + 16, &started_ms, 8)
        memcpy(p + 24, &finished_ms, 8)
        memcpy(p + 32, &error_n, 4)
        memcpy(p + 36, &result_n, 4)
        if error_n:
            memcpy(p + 40, error, error_n)
        if result_n:
            memcpy(p + 40 + error_n, result, result_n)
        tqe_store32(p, length)
        self.used[self.half] = at + length
        return 1

    cdef void _copy(self, const char *record, unsigned int length) noexcept:
        cdef unsigned int at = self.used[self.half]
        cdef char *p = self.base + O_HALVES + self.half * HALF_BYTES + at
        if at + length + 4 > HALF_BYTES:
            return  # cannot be: what is copied came out of a half of the same size
        memset(p + length, 0, 4)
        memcpy(p + 4, record + 4, length - 4)
        tqe_store32(p, length)
        self.used[self.half] = at + length

    cdef char *_row(self, int row) except NULL:
        if row < 0 or row >= ROWS:
            raise IndexError(row)
        return self.base + O_ROWS + row * ROW_BYTES

    cdef unsigned char *_states(self, int row) noexcept:
        cdef char *p = self.base + O_ROWS + row * ROW_BYTES
        cdef unsigned long long block = tqe_load(p + R_BLOCK)
        if block:
            return <unsigned char *>self.base + O_BLOCKS + (block - 1) * BLOCK_BYTES
        return <unsigned char *>p + R_STATES
