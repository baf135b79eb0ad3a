# The frame: makes, checks, walks, cuts and rewrites the byte strings that Redis stores (docs/WIRE_FORMAT.md, section 2).
#
# The plain functions at the top work on raw memory without the GIL and are what other parts of this module build on; the
# Python functions are at the end. Every reader first checks what it is about to use: frames come from a shared
# server, and a damaged one must end in quarantine, never in a read beyond its end. _pure.py is the twin.

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeASCII
from libc.stdint cimport int64_t
from libc.stdio cimport snprintf
from libc.string cimport memchr, memcmp, memcpy, memset

from tqe.errors import DamagedFrame, NewerFrame

ctypedef const unsigned char *octets

cdef enum:
    F_HEADER = 128
    F_JOBS_MAX = 1000
    F_TYPE_MAX = 64
    F_LANE_MAX = 16
    F_ID = 26
    F_LEASE = 41
    F_JOB_OPTIONS_MAX = 65535
    F_OPTIONS_MAX = 99999
    F_PAYLOAD_MAX = 0x3FFFFFFF
    # Offsets in the header.
    AT_VERSION = 1
    AT_FLAGS = 2
    AT_ID = 4
    AT_BASE = 31
    AT_N = 35
    AT_RUN = 40
    AT_TOTAL = 46
    AT_ATTEMPTS = 51
    AT_CRASHES = 55
    AT_REAPS = 58
    AT_UNKNOWNS = 61
    AT_BOOST = 65
    AT_LANE = 79
    AT_OPTIONS_BYTES = 96
    AT_CRC = 102
    AT_ENQUEUED = 111
    # Flags.
    FLAG_TRACKED = 1
    FLAG_SUSPECT = 4
    FLAG_OPTIONS = 16
    FLAGS_SETTABLE = 15  # the options flag follows from the options
    # What can be wrong with a frame, in the order of the checks.
    SOUND = 0
    FAULT_NEWER = 1
    FAULT_SHORT = 2
    FAULT_MAGIC = 3
    FAULT_SHAPE = 4
    FAULT_RANGE = 5
    FAULT_OPTIONS = 6
    FAULT_CRC = 7
    FAULT_BODY = 8
    FAULT_TYPE = 9

cdef tuple _FAULTS = (
    "",
    "the frame was written by another version of the engine",
    "the frame is shorter than a header",
    "the frame does not begin like one",
    "the header has a character that its field does not allow",
    "the numbers of the header contradict each other",
    "the options do not fit the header",
    "the checksum differs",
    "the body does not hold the jobs that the header counts",
    "a job has a malformed type name",
)

HEADER_BYTES = 128

# Ranges of the header's bytes, so that one pass of subtractions and compares, which the compiler turns into vector
# instructions, checks all 128; names and hex digits get a look-up each, by the class bits below.
cdef unsigned char _low[F_HEADER]
cdef unsigned char _span[F_HEADER]
cdef unsigned char _class[256]
cdef enum:
    IN_ID = 1
    IN_LANE = 2
    IN_HEX = 4
    IN_TYPE = 8
    IN_VERSION = 16

cdef char *_BLANK = (
    b"F1@ 00000000000000000000000000.000.0000.00000 0000 0000000000000 0000000000000 "
    b"                 00000 00000000 0000000000000000\n"
)


cdef int _frame_setup() except -1:
    cdef int i
    cdef bytes text = _BLANK
    assert len(text) == F_HEADER
    for i in range(F_HEADER):
        _low[i] = text[i]
        _span[i] = 9 if text[i] == b"0" else 0
    _span[AT_FLAGS] = 31
    for i in range(AT_ID, AT_ID + F_ID):
        _span[i] = 42
    for i in range(AT_LANE, AT_LANE + F_LANE_MAX):
        _span[i] = 90
    for i in range(AT_CRC, AT_CRC + 8):
        _span[i] = 54
    for i in b"0123456789ABCDEFGHJKMNPQRSTVWXYZ":
        _class[i] |= IN_ID
    for i in b"abcdefghijklmnopqrstuvwxyz0123456789_-":
        _class[i] |= IN_LANE
    for i in b"0123456789abcdef":
        _class[i] |= IN_HEX
    for i in b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789":
        _class[i] |= IN_TYPE | IN_VERSION
    for i in b"_.:-":
        _class[i] |= IN_TYPE
    return 0

_frame_setup()


cdef struct FrameHead:
    int flags
    int base
    int n
    int run
    int total
    int attempts
    int crashes
    int reaps
    int unknowns
    int lane_bytes
    int options_bytes
    int64_t boost_us
    int64_t enqueued_us
    int type_runs  # neighbours of one type count once; set by frame_body
    const unsigned char *data
    Py_ssize_t size


cdef struct JobRef:
    const unsigned char *type
    const unsigned char *options
    const unsigned char *payload
    int type_bytes
    int options_bytes
    int payload_bytes
    bint zstd


# Fields of the header to change; -1 leaves one as it is.
cdef struct Edit:
    int flags
    int run
    int attempts
    int crashes
    int reaps
    int unknowns
    int64_t boost_us


cdef inline int64_t read_digits(const unsigned char *p, int width) noexcept nogil:
    cdef int64_t v = 0
    cdef int i
    for i in range(width):
        v = v * 10 + (p[i] - 48)
    return v


@cython.cdivision(True)
cdef inline void write_digits(unsigned char *p, int width, int64_t v) noexcept nogil:
    cdef int i
    for i in range(width - 1, -1, -1):
        p[i] = <unsigned char>(48 + v % 10)
        v = v // 10


cdef inline bint all_in(const unsigned char *p, int size, int kind) noexcept nogil:
    cdef int i
    cdef unsigned char every = 255
    for i in range(size):
        every &= _class[p[i]]
    return (every & kind) != 0


cdef inline unsigned int read_crc(const unsigned char *frame) noexcept nogil:
    """The checksum that the header states; its eight characters have been checked."""
    cdef unsigned int v = 0
    cdef unsigned char c
    cdef int i
    for i in range(8):
        c = frame[AT_CRC + i]
        v = (v << 4) | (c - 48 if c < 97 else c - 87)
    return v


cdef inline unsigned int count_crc(const unsigned char *frame, Py_ssize_t size) noexcept nogil:
    """The checksum over all bytes but itself and `enqueued`, which scripts rewrite."""
    return tqe_crc32(tqe_crc32(0, frame, AT_CRC), frame + F_HEADER, <size_t>(size - F_HEADER))


cdef inline void seal(unsigned char *frame, Py_ssize_t size) noexcept nogil:
    cdef unsigned int crc = count_crc(frame, size)
    cdef unsigned int digit
    cdef int i
    for i in range(7, -1, -1):
        digit = crc & 15
        frame[AT_CRC + i] = <unsigned char>(digit + (48 if digit < 10 else 87))
        crc >>= 4


cdef int frame_peek(const unsigned char *p, Py_ssize_t size, FrameHead *h) noexcept nogil:
    """Check the shape of the header and read it. SOUND or a FAULT_*; after a fault `h` is undefined."""
    cdef unsigned char bad = 0
    cdef int i, k
    # A version is a letter or a digit, anything else is damage. What follows it may have any form and length.
    if size > AT_VERSION and p[0] == 70 and p[AT_VERSION] != 49 and _class[p[AT_VERSION]] & IN_VERSION:
        return FAULT_NEWER
    if size < F_HEADER:
        return FAULT_SHORT
    if p[0] != 70 or p[AT_VERSION] != 49:
        return FAULT_MAGIC
    for i in range(F_HEADER):
        bad |= <unsigned char>(p[i] - _low[i]) > _span[i]
    if bad or not all_in(p + AT_ID, F_ID, IN_ID) or not all_in(p + AT_CRC, 8, IN_HEX):
        return FAULT_SHAPE
    k = F_LANE_MAX
    while k and p[AT_LANE + k - 1] == 32:
        k -= 1
    if k == 0 or not all_in(p + AT_LANE, k, IN_LANE):
        return FAULT_SHAPE
    h.lane_bytes = k
    h.flags = p[AT_FLAGS] - 64
    h.base = <int>read_digits(p + AT_BASE, 3)
    h.n = <int>read_digits(p + AT_N, 4)
    h.run = <int>read_digits(p + AT_RUN, 5)
    h.total = <int>read_digits(p + AT_TOTAL, 4)
    h.attempts = <int>read_digits(p + AT_ATTEMPTS, 4)
    h.crashes = <int>read_digits(p + AT_CRASHES, 3)
    h.reaps = <int>read_digits(p + AT_REAPS, 3)
    h.unknowns = <int>read_digits(p + AT_UNKNOWNS, 3)
    h.boost_us = read_digits(p + AT_BOOST, 13)
    h.options_bytes = <int>read_digits(p + AT_OPTIONS_BYTES, 5)
    h.enqueued_us = read_digits(p + AT_ENQUEUED, 16)
    h.data = p
    h.size = size
    if h.n < 1 or h.total > F_JOBS_MAX or h.base + h.n > h.total:
        return FAULT_RANGE
    if ((h.flags & FLAG_OPTIONS) != 0) != (h.options_bytes != 0) or size - F_HEADER < h.options_bytes:
        return FAULT_OPTIONS
    return SOUND


cdef inline const unsigned char *next_job(const unsigned char *p, const unsigned char *end, JobRef *job) noexcept nogil:
    """Read the job at `p` and return where the next one begins; NULL when it does not lie before `end` whole."""
    cdef Py_ssize_t left = end - p
    cdef unsigned int word
    cdef int k
    if left < 1:
        return NULL
    k = p[0]
    if k < 1 or k > F_TYPE_MAX or left < k + 5:
        return NULL
    job.type = p + 1
    job.type_bytes = k
    p += k + 1
    word = p[0] | <unsigned int>p[1] << 8 | <unsigned int>p[2] << 16 | <unsigned int>p[3] << 24
    p += 4
    left -= k + 5
    job.options = p
    job.options_bytes = 0
    if word >> 31:
        if left < 2:
            return NULL
        k = p[0] | <int>p[1] << 8
        p += 2
        left -= 2
        if k == 0 or left < k:
            return NULL
        job.options = p
        job.options_bytes = k
        p += k
        left -= k
    k = <int>(word & F_PAYLOAD_MAX)
    if left < k:
        return NULL
    job.payload = p
    job.payload_bytes = k
    job.zstd = (word >> 30) & 1
    return p + k


cdef int frame_body(FrameHead *h, unsigned int *starts) noexcept nogil:
    """Check that the body is exactly n well-formed jobs; `starts`, if not NULL, gets the n + 1 offsets of their bounds."""
    cdef const unsigned char *p = h.data + F_HEADER + h.options_bytes
    cdef const unsigned char *end = h.data + h.size
    cdef const unsigned char *known = NULL
    cdef int known_bytes = 0
    cdef JobRef job
    cdef int i
    h.type_runs = 0
    for i in range(h.n):
        if starts != NULL:
            starts[i] = <unsigned int>(p - h.data)
        p = next_job(p, end, &job)
        if p == NULL:
            return FAULT_BODY
        # Neighbours mostly have the same type: look at its characters once.
        if job.type_bytes != known_bytes or memcmp(job.type, known, known_bytes) != 0:
            if not all_in(job.type, job.type_bytes, IN_TYPE):
                return FAULT_TYPE
            known = job.type
            known_bytes = job.type_bytes
            h.type_runs += 1
    if starts != NULL:
        starts[h.n] = <unsigned int>(p - h.data)
    return SOUND if p == end else FAULT_BODY


cdef int frame_check(const unsigned char *p, Py_ssize_t size, FrameHead *h, unsigned int *starts) noexcept nogil:
    """Check everything about a frame: header, checksum, body. SOUND or a FAULT_*."""
    cdef int fault = frame_peek(p, size, h)
    if fault != SOUND:
        return fault
    if read_crc(p) != count_crc(p, size):
        return FAULT_CRC
    # Offsets of jobs are 32 bits wide. Redis cannot hold a string of more than 512 MB.
    if size > <Py_ssize_t>0xFFFFFFFF:
        return FAULT_BODY
    return frame_body(h, starts)


cdef int frame_raise(int fault) except -1:
    if fault == FAULT_NEWER:
        raise NewerFrame(_FAULTS[fault])
    raise DamagedFrame(_FAULTS[fault])


cdef inline int frame_sound(bytes frame, FrameHead *h, unsigned int *starts) except -1:
    cdef int fault = frame_check(<octets>PyBytes_AS_STRING(frame), PyBytes_GET_SIZE(frame), h, starts)
    if fault != SOUND:
        return frame_raise(fault)
    return 0


cdef inline void edit_header(unsigned char *p, const Edit *e) noexcept nogil:
    if e.flags >= 0:
        p[AT_FLAGS] = <unsigned char>(64 | e.flags | ((p[AT_FLAGS] - 64) & FLAG_OPTIONS))
    if e.run >= 0:
        write_digits(p + AT_RUN, 5, e.run)
    if e.attempts >= 0:
        write_digits(p + AT_ATTEMPTS, 4, e.attempts)
    if e.crashes >= 0:
        write_digits(p + AT_CRASHES, 3, e.crashes)
    if e.reaps >= 0:
        write_digits(p + AT_REAPS, 3, e.reaps)
    if e.unknowns >= 0:
        write_digits(p + AT_UNKNOWNS, 3, e.unknowns)
    if e.boost_us >= 0:
        write_digits(p + AT_BOOST, 13, e.boost_us)


cdef bytes frame_part(const FrameHead *h, unsigned int start, unsigned int stop, int base, int n, const Edit *e):
    """A new frame of the jobs whose bytes are [start, stop) of a checked one."""
    cdef Py_ssize_t head = F_HEADER + h.options_bytes
    cdef Py_ssize_t size = head + (stop - start)
    cdef bytes out = PyBytes_FromStringAndSize(NULL, size)
    cdef unsigned char *p = <unsigned char *>PyBytes_AS_STRING(out)
    memcpy(p, h.data, <size_t>head)
    memcpy(p + head, h.data + start, stop - start)
    write_digits(p + AT_BASE, 3, base)
    write_digits(p + AT_N, 4, n)
    edit_header(p, e)
    seal(p, size)
    return out


cdef int64_t counter(object value, str name, int64_t most) except? -2:
    """A counter for the header. Stops at its field's end: an overflow must not keep a job from settling."""
    if value is None:
        return -1
    if value < 0:
        raise ValueError(f"{name} must not be negative")
    return most if value > most else value


cdef int edit_of(Edit *e, run, attempts, crashes, reaps, unknowns, boost_us, flags) except -1:
    if run is not None:
        if run < 0:
            raise ValueError("run must not be negative")
        # Wraps: what a lease's name needs is to differ from the ones shortly before it.
        run = run % 100000
    e.run = -1 if run is None else <int>run
    e.attempts = <int>counter(attempts, "attempts", 9999)
    e.crashes = <int>counter(crashes, "crashes", 999)
    e.reaps = <int>counter(reaps, "reaps", 999)
    e.unknowns = <int>counter(unknowns, "unknowns", 999)
    e.boost_us = counter(boost_us, "boost_us", 9999999999999)
    if flags is not None and (flags < 0 or flags & ~31):
        raise ValueError("flags must be a sum of the bits 1, 2, 4, 8 and 16")
    e.flags = -1 if flags is None else <int>flags & FLAGS_SETTABLE
    return 0


cdef int write_lane(unsigned char *p, str lane) except -1:
    cdef bytes name = lane.encode("utf-8", "surrogatepass")
    cdef int k = <int>min(len(name), F_LANE_MAX + 1)
    if k < 1 or k > F_LANE_MAX or not all_in(<octets>PyBytes_AS_STRING(name), k, IN_LANE):
        raise ValueError(f"a lane is named by 1 to 16 of a-z, 0-9, '_' and '-', not by {lane!r}")
    memset(p + AT_LANE, 32, F_LANE_MAX)
    memcpy(p + AT_LANE, PyBytes_AS_STRING(name), k)
    return 0


cdef int check_type(bytes name) except -1:
    cdef Py_ssize_t k = PyBytes_GET_SIZE(name)
    if k < 1 or k > F_TYPE_MAX or not all_in(<octets>PyBytes_AS_STRING(name), <int>k, IN_TYPE):
        raise ValueError(f"a type is named by 1 to 64 of A-Z, a-z, 0-9, '_', '.', ':' and '-', not by {name!r}")
    return 0


cdef int write_header(unsigned char *p, Py_ssize_t n, bytes frame_id, str lane, int flags, bytes options) except -1:
    """All of a new frame's header but what an edit adds and the seal; and its options."""
    cdef Py_ssize_t options_bytes = PyBytes_GET_SIZE(options)
    memcpy(p, _BLANK, F_HEADER)
    p[AT_FLAGS] = <unsigned char>(64 | flags | (FLAG_OPTIONS if options_bytes else 0))
    if PyBytes_GET_SIZE(frame_id) != F_ID or not all_in(<octets>PyBytes_AS_STRING(frame_id), F_ID, IN_ID):
        raise ValueError(f"a frame id is 26 characters of Crockford's base32, not {frame_id!r}")
    memcpy(p + AT_ID, PyBytes_AS_STRING(frame_id), F_ID)
    write_digits(p + AT_N, 4, n)
    write_digits(p + AT_TOTAL, 4, n)
    write_lane(p, lane)
    write_digits(p + AT_OPTIONS_BYTES, 5, options_bytes)
    memcpy(p + F_HEADER, PyBytes_AS_STRING(options), <size_t>options_bytes)
    return 0


cdef int check_count(Py_ssize_t n, bytes options) except -1:
    if n < 1 or n > F_JOBS_MAX:
        raise ValueError(f"a frame holds 1 to 1000 jobs, not {n}")
    if PyBytes_GET_SIZE(options) > F_OPTIONS_MAX:
        raise ValueError("the options of a frame are limited to 99999 bytes")
    return 0


cdef inline unsigned char *put_job(unsigned char *p, bytes name, Py_ssize_t payload_bytes, unsigned int bits) noexcept:
    """Write type and word of a job; what follows is options or payload."""
    cdef Py_ssize_t k = PyBytes_GET_SIZE(name)
    cdef unsigned int word = <unsigned int>payload_bytes | bits
    p[0] = <unsigned char>k
    memcpy(p + 1, PyBytes_AS_STRING(name), <size_t>k)
    p += k + 1
    p[0] = word & 255
    p[1] = (word >> 8) & 255
    p[2] = (word >> 16) & 255
    p[3] = word >> 24
    return p + 4


@cython.final
@cython.auto_pickle(False)
cdef class Header:
    """The header of a checked frame. Reads the fields from the frame when asked for them."""

    cdef FrameHead _head
    cdef bytes _frame

    def __cinit__(self):
        # header_of() sets it at once; this keeps a bare Header() from reading address 0.
        self._head.data = <octets>_BLANK

    @property
    def flags(self):
        return self._head.flags

    @property
    def frame_id(self):
        return PyBytes_FromStringAndSize(<const char *>self._head.data + AT_ID, F_ID)

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
    def total(self):
        return self._head.total

    @property
    def attempts(self):
        return self._head.attempts

    @property
    def crashes(self):
        return self._head.crashes

    @property
    def reaps(self):
        return self._head.reaps

    @property
    def unknowns(self):
        return self._head.unknowns

    @property
    def boost_us(self):
        return self._head.boost_us

    @property
    def lane(self):
        return PyUnicode_DecodeASCII(<const char *>self._head.data + AT_LANE, self._head.lane_bytes, NULL)

    @property
    def enqueued_us(self):
        return self._head.enqueued_us

    @property
    def options(self):
        return PyBytes_FromStringAndSize(<const char *>self._head.data + F_HEADER, self._head.options_bytes)

    @property
    def lease(self):
        return PyBytes_FromStringAndSize(<const char *>self._head.data + AT_ID, F_LEASE)

    def __repr__(self):
        return f"<Header {self.lease.decode()} total={self.total} lane={self.lane} flags={self.flags}>"


cdef tuple job_parts(const JobRef *job):
    return (
        PyBytes_FromStringAndSize(<const char *>job.type, job.type_bytes),
        PyBytes_FromStringAndSize(<const char *>job.payload, job.payload_bytes),
        PyBytes_FromStringAndSize(<const char *>job.options, job.options_bytes),
        True if job.zstd else False,
    )


cdef inline Header header_of(bytes frame, const FrameHead *h):
    cdef Header header = Header.__new__(Header)
    header._head = h[0]
    header._frame = frame  # keeps the memory that _head points to
    return header


def pack(list jobs not None, *, bytes frame_id not None, str lane not None, bint tracked, bytes options not None=b"",
         int flags=0, run=0, attempts=0, crashes=0, reaps=0, unknowns=0, boost_us=0, enqueued_us=0):
    """Make a frame of jobs, each (type, payload, options, zstd). `flags` adds bits to `tracked`."""
    cdef Py_ssize_t n = len(jobs)
    cdef Py_ssize_t size = F_HEADER + PyBytes_GET_SIZE(options)
    cdef bytes name, payload, own
    cdef tuple job
    cdef Edit e
    cdef unsigned char *p
    cdef unsigned int bits
    edit_of(&e, run, attempts, crashes, reaps, unknowns, boost_us, flags)
    e.flags |= FLAG_TRACKED if tracked else 0
    check_count(n, options)
    for job in jobs:
        name, payload, own, zstd = job
        if name is None or payload is None or own is None or not isinstance(zstd, bool):
            raise TypeError("a job is (type, payload, options, zstd): bytes, bytes, bytes, bool")
        check_type(name)
        if PyBytes_GET_SIZE(payload) > F_PAYLOAD_MAX:
            raise ValueError("a payload is limited to 1073741823 bytes")
        if PyBytes_GET_SIZE(own) > F_JOB_OPTIONS_MAX:
            raise ValueError("the options of a job are limited to 65535 bytes")
        size += 5 + PyBytes_GET_SIZE(name) + PyBytes_GET_SIZE(payload)
        if PyBytes_GET_SIZE(own):
            size += 2 + PyBytes_GET_SIZE(own)
    cdef bytes out = PyBytes_FromStringAndSize(NULL, size)
    cdef unsigned char *start = <unsigned char *>PyBytes_AS_STRING(out)
    write_header(start, n, frame_id, lane, 0, options)
    edit_header(start, &e)
    write_digits(start + AT_ENQUEUED, 16, counter(enqueued_us, "enqueued_us", 9999999999999999))
    p = start + F_HEADER + PyBytes_GET_SIZE(options)
    for job in jobs:
        name, payload, own, zstd = job
        bits = (<unsigned int>1 << 30) if zstd is True else 0
        if PyBytes_GET_SIZE(own):
            p = put_job(p, name, PyBytes_GET_SIZE(payload), bits | <unsigned int>1 << 31)
            p[0] = PyBytes_GET_SIZE(own) & 255
            p[1] = <unsigned char>(PyBytes_GET_SIZE(own) >> 8)
            memcpy(p + 2, PyBytes_AS_STRING(own), <size_t>PyBytes_GET_SIZE(own))
            p += 2 + PyBytes_GET_SIZE(own)
        else:
            p = put_job(p, name, PyBytes_GET_SIZE(payload), bits)
        memcpy(p, PyBytes_AS_STRING(payload), <size_t>PyBytes_GET_SIZE(payload))
        p += PyBytes_GET_SIZE(payload)
    seal(start, size)
    return out


cdef inline unsigned char *put_plain(unsigned char *p, bytes name, const char *payload, Py_ssize_t k) noexcept:
    """Write a job without options of its own or compression; where the next one begins."""
    p = put_job(p, name, k, 0)
    memcpy(p, payload, <size_t>k)
    return p + k


cdef inline Py_ssize_t payload_size(object payload) except -1:
    if not PyBytes_CheckExact(payload):
        raise TypeError("a payload is bytes")
    if PyBytes_GET_SIZE(payload) > F_PAYLOAD_MAX:
        raise ValueError("a payload is limited to 1073741823 bytes")
    return PyBytes_GET_SIZE(payload)


def pack_same(bytes type not None, list payloads not None, *, bytes frame_id not None, str lane not None, bint tracked,
              bytes options not None=b"", enqueued_us=0):
    """Make a frame of jobs of one type without options of their own or compression: the fast way in for bulk."""
    cdef Py_ssize_t n = PyList_GET_SIZE(payloads)
    cdef Py_ssize_t size, i
    cdef unsigned char *p
    check_type(type)
    check_count(n, options)
    size = F_HEADER + PyBytes_GET_SIZE(options) + n * (5 + PyBytes_GET_SIZE(type))
    for i in range(n):
        size += payload_size(<object>PyList_GET_ITEM(payloads, i))
    cdef bytes out = PyBytes_FromStringAndSize(NULL, size)
    cdef unsigned char *start = <unsigned char *>PyBytes_AS_STRING(out)
    write_header(start, n, frame_id, lane, FLAG_TRACKED if tracked else 0, options)
    write_digits(start + AT_ENQUEUED, 16, counter(enqueued_us, "enqueued_us", 9999999999999999))
    p = start + F_HEADER + PyBytes_GET_SIZE(options)
    for i in range(n):
        item = <object>PyList_GET_ITEM(payloads, i)
        p = put_plain(p, type, PyBytes_AS_STRING(item), PyBytes_GET_SIZE(item))
    seal(start, size)
    return out


def pack_mixed(list types not None, list payloads not None, *, bytes frame_id not None, str lane not None, bint tracked,
               bytes options not None=b"", enqueued_us=0):
    """The same for jobs of several types: payload i is one of type i."""
    cdef Py_ssize_t n = PyList_GET_SIZE(payloads)
    cdef Py_ssize_t size, i
    cdef unsigned char *p
    cdef bytes name
    cdef const void *known = NULL
    check_count(n, options)
    if PyList_GET_SIZE(types) != n:
        raise ValueError(f"there are {PyList_GET_SIZE(types)} types for {n} payloads")
    size = F_HEADER + PyBytes_GET_SIZE(options) + 5 * n
    for i in range(n):
        name = types[i]
        if name is None:
            raise TypeError("a type is bytes")
        if <const void *>name != known:  # the same object as before has been looked at
            check_type(name)
            known = <const void *>name
        size += PyBytes_GET_SIZE(name) + payload_size(<object>PyList_GET_ITEM(payloads, i))
    cdef bytes out = PyBytes_FromStringAndSize(NULL, size)
    cdef unsigned char *start = <unsigned char *>PyBytes_AS_STRING(out)
    write_header(start, n, frame_id, lane, FLAG_TRACKED if tracked else 0, options)
    write_digits(start + AT_ENQUEUED, 16, counter(enqueued_us, "enqueued_us", 9999999999999999))
    p = start + F_HEADER + PyBytes_GET_SIZE(options)
    for i in range(n):
        item = <object>PyList_GET_ITEM(payloads, i)
        p = put_plain(p, <bytes>PyList_GET_ITEM(types, i), PyBytes_AS_STRING(item), PyBytes_GET_SIZE(item))
    seal(start, size)
    return out


def pack_lines(bytes type not None, bytes lines not None, Py_ssize_t start, *, Py_ssize_t bytes_max,
               bytes frame_id not None, str lane not None, bint tracked, bytes options not None=b"", enqueued_us=0):
    """Make a frame like pack_same of the payloads in `lines` from `start` on, each with a newline behind it.

    It takes as many as fit in 1000 jobs and `bytes_max` bytes, at least one: (frame, jobs, where the next one begins).
    """
    cdef const char *text = PyBytes_AS_STRING(lines)
    cdef Py_ssize_t left = PyBytes_GET_SIZE(lines)
    cdef Py_ssize_t at = start, n = 0, k, i, size
    cdef Py_ssize_t sizes[F_JOBS_MAX]
    cdef unsigned char *p
    check_type(type)
    check_count(1, options)
    if start < 0 or start >= left or text[left - 1] != 10:
        raise ValueError("lines hold payloads from `start` on, and end with a newline")
    size = F_HEADER + PyBytes_GET_SIZE(options)
    while at < left and n < F_JOBS_MAX:
        k = <const char *>memchr(text + at, 10, <size_t>(left - at)) - (text + at)
        if k > F_PAYLOAD_MAX:
            raise ValueError("a payload is limited to 1073741823 bytes")
        if n and size + 5 + PyBytes_GET_SIZE(type) + k > bytes_max:
            break
        size += 5 + PyBytes_GET_SIZE(type) + k
        sizes[n] = k
        n += 1
        at += k + 1
    cdef bytes out = PyBytes_FromStringAndSize(NULL, size)
    cdef unsigned char *first = <unsigned char *>PyBytes_AS_STRING(out)
    write_header(first, n, frame_id, lane, FLAG_TRACKED if tracked else 0, options)
    write_digits(first + AT_ENQUEUED, 16, counter(enqueued_us, "enqueued_us", 9999999999999999))
    p = first + F_HEADER + PyBytes_GET_SIZE(options)
    at = start
    for i in range(n):
        p = put_plain(p, type, text + at, sizes[i])
        at += sizes[i] + 1
    seal(first, size)
    return out, n, at


def longest_line(bytes lines not None):
    """Bytes of the longest line, without its newline; what follows the last newline counts as a line."""
    cdef const char *p = PyBytes_AS_STRING(lines)
    cdef const char *end = p + PyBytes_GET_SIZE(lines)
    cdef const char *stop
    cdef Py_ssize_t most = 0
    while p < end:
        stop = <const char *>memchr(p, 10, <size_t>(end - p))
        if stop == NULL:
            stop = end
        if stop - p > most:
            most = stop - p
        p = stop + 1
    return most


def parse(bytes frame not None):
    """Check all of a frame (header, checksum, body); its header. Raises DamagedFrame or NewerFrame."""
    cdef FrameHead h
    frame_sound(frame, &h, NULL)
    return header_of(frame, &h)


def peek(bytes frame not None):
    """Check only the shape of the header and return it. Raises DamagedFrame or NewerFrame."""
    cdef FrameHead h
    cdef int fault = frame_peek(<octets>PyBytes_AS_STRING(frame), PyBytes_GET_SIZE(frame), &h)
    if fault != SOUND:
        frame_raise(fault)
    return header_of(frame, &h)


def walk(bytes frame not None):
    """The jobs of a frame: a list of (index, type, payload as stored, options, zstd)."""
    cdef FrameHead h
    cdef JobRef job
    cdef const unsigned char *p
    cdef const unsigned char *end
    cdef int i
    cdef list out = []
    frame_sound(frame, &h, NULL)
    memset(&job, 0, sizeof(job))
    p = h.data + F_HEADER + h.options_bytes
    end = h.data + h.size
    for i in range(h.base, h.base + h.n):
        p = next_job(p, end, &job)
        if p == NULL:
            frame_raise(FAULT_BODY)
        out.append((i,) + job_parts(&job))
    return out


def job_at(bytes frame not None, int index):
    """The job at an absolute index: (type, payload as stored, options, zstd)."""
    cdef FrameHead h
    cdef JobRef job
    cdef unsigned int starts[F_JOBS_MAX + 1]
    frame_sound(frame, &h, starts)
    if index < h.base or index >= h.base + h.n:
        raise ValueError(f"the range {index}, 1 does not lie in the frame's {h.base}, {h.n}")
    memset(&job, 0, sizeof(job))
    next_job(h.data + starts[index - h.base], h.data + h.size, &job)
    return job_parts(&job)


def cut(bytes frame not None, list ranges not None, *, run=None, attempts=None, crashes=None, reaps=None, unknowns=None,
        boost_us=None, flags=None):
    """Frames of the jobs in each range (base, n): absolute indexes, inside of the frame, without overlap.

    Keywords change these fields of all of them; what is not given is kept.
    """
    cdef FrameHead h
    cdef Edit e
    cdef unsigned int starts[F_JOBS_MAX + 1]
    cdef unsigned char taken[F_JOBS_MAX]
    cdef int base, n, i
    cdef list out = []
    edit_of(&e, run, attempts, crashes, reaps, unknowns, boost_us, flags)
    frame_sound(frame, &h, starts)
    memset(taken, 0, F_JOBS_MAX)
    for pair in ranges:
        base, n = pair
        if n < 1 or base < h.base or n > h.n or base - h.base > h.n - n:
            raise ValueError(f"the range {base}, {n} does not lie in the frame's {h.base}, {h.n}")
        base -= h.base
        for i in range(base, base + n):
            # A job in two parts would run twice.
            if taken[i]:
                raise ValueError(f"job {h.base + i} is in two ranges")
            taken[i] = 1
        out.append(frame_part(&h, starts[base], starts[base + n], h.base + base, n, &e))
    return out


def single(bytes frame not None, int index, *, run=None, attempts=None, crashes=None, reaps=None, unknowns=None,
           boost_us=None, flags=None):
    """The frame of one for the job at an absolute index, with the given fields changed."""
    cdef FrameHead h
    cdef Edit e
    cdef unsigned int starts[F_JOBS_MAX + 1]
    edit_of(&e, run, attempts, crashes, reaps, unknowns, boost_us, flags)
    frame_sound(frame, &h, starts)
    if index < h.base or index >= h.base + h.n:
        raise ValueError(f"the range {index}, 1 does not lie in the frame's {h.base}, {h.n}")
    return frame_part(&h, starts[index - h.base], starts[index - h.base + 1], index, 1, &e)


def rewrite(bytes frame not None, *, run=None, attempts=None, crashes=None, reaps=None, unknowns=None, boost_us=None,
            flags=None, str lane=None):
    """The same frame with the given fields of its header changed."""
    cdef FrameHead h
    cdef Edit e
    cdef bytes out
    cdef unsigned char *p
    edit_of(&e, run, attempts, crashes, reaps, unknowns, boost_us, flags)
    frame_sound(frame, &h, NULL)
    out = PyBytes_FromStringAndSize(<const char *>h.data, h.size)
    p = <unsigned char *>PyBytes_AS_STRING(out)
    edit_header(p, &e)
    if lane is not None:
        write_lane(p, lane)
    seal(p, h.size)
    return out


def types(bytes frame not None):
    """The types of a frame's jobs in order, run-length: "EMAIL*2;SMS*1"."""
    cdef FrameHead h
    cdef JobRef job
    cdef JobRef last
    cdef const unsigned char *p
    cdef int k = 0
    cdef list out = []
    frame_sound(frame, &h, NULL)
    p = h.data + F_HEADER + h.options_bytes
    memset(&job, 0, sizeof(job))
    memset(&last, 0, sizeof(last))
    for _ in range(h.n):
        p = next_job(p, h.data + h.size, &job)
        if p == NULL:
            frame_raise(FAULT_BODY)
        if k and (job.type_bytes != last.type_bytes or memcmp(job.type, last.type, job.type_bytes) != 0):
            out.append(f"{PyUnicode_DecodeASCII(<const char *>last.type, last.type_bytes, NULL)}*{k}")
            k = 0
        last = job
        k += 1
    out.append(f"{PyUnicode_DecodeASCII(<const char *>last.type, last.type_bytes, NULL)}*{k}")
    return ";".join(out)
