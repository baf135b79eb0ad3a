"""Every offset and size of the shared board, in one place.

The compiled code and its twin are handed these numbers; nobody else computes an address. See
docs/WIRE_FORMAT.md, section 6. All words are 64-bit, little endian, 8-byte aligned, so that a store is one
atomic write.
"""

from __future__ import annotations

from typing import Final

from tqe import formats

WORD: Final = 8
MAGIC: Final = 0x4452414F42455154  # b"TQEBOARD" read as a little-endian word

# Header page: the supervisor writes it before it forks, the steward's words belong to the steward.
HEADER_BYTES: Final = 4096
H_MAGIC: Final = 0
H_VERSION: Final = 8
H_SLOTS: Final = 16
H_SLOT_BYTES: Final = 24
H_SUPERVISOR_PID: Final = 32
H_STEWARD_PID: Final = 40
H_STEWARD_BEAT: Final = 48  # ns, CLOCK_BOOTTIME
H_STEWARD_STOP: Final = 56
H_LEASE_MS: Final = 64
# 1 once the steward has found that no job is left (burst mode); the supervisor then drains.
H_BURST_DONE: Final = 72
# Raised by the steward after `p model` has changed (a mode, a version, T) and what it names lies in the local
# folder, vetted by the canary. A worker that sees another number than its own reads the modes and reloads.
H_MODEL: Final = 80
H_RETIRING: Final = 88  # odd while the supervisor moves a life's counters from its slot to the retired ones
H_WANTED: Final = 96  # with autoscale, the number of workers that the steward has decided on, else 0
H_COUNTERS: Final = 128  # HOST_COUNTERS words
# The steward's: of each total of the queue two words, what Redis said last and what it has lost so far.
H_CLIMB: Final = 512
# Types whose features function has ended workers of this host: FEATURES_MAX entries of a count and a name.
# The steward writes, workers read. The last entry takes whatever found no other, and stands for all types.
H_FEATURES: Final = 800
H_RECOVERY: Final = 1024  # 32 bytes a slot: the recovery id that the steward uses for this slot's leases

RECOVERY_BYTES: Final = 32
FEATURES_MAX: Final = 3
FEATURES_BYTES: Final = 72
FEATURES_ALL: Final = "*"
FEATURES_DEATHS_MAX: Final = 2  # so many deaths turn a type's features function off on this host
# What happened on this host. A word has one writer, and outlives both.
HOST_COUNTERS: Final = (
    # the supervisor's
    "worker_restarts",
    "worker_crashes",
    "steward_restarts",
    # the steward's
    "recovered",
    "recovery_failures",
    "reaped",
    "orphans",
    "resynced",
    "withheld",
    "depth_corrections",
    "cancel_marks",
    "promoted",
    "snapshots_dropped",
    "cron_submitted",
    "cron_skipped",
    "scaled_up",
    "scaled_down",
    "taken_back",
)

SLOTS_MAX: Final = (HEADER_BYTES - H_RECOVERY) // RECOVERY_BYTES

# Control page of a slot.
CONTROL_BYTES: Final = 4096
# written by the supervisor
C_STATE: Final = 0
C_PID: Final = 8
C_NUMBER: Final = 16  # 0-based number of the worker among --procs
C_CPU: Final = 24  # pinned CPU + 1, 0 = not pinned
C_SIGNAL: Final = 32  # signal that killed it; 0 and C_EXIT = code otherwise
C_EXIT: Final = 40
C_STARTED_NS: Final = 48
C_STOP: Final = 56  # STOP_* word; any value but 0 ends the hot loop before the next start
C_CONDEMN_STEP: Final = 64  # the step that a soft limit or a cancel is meant for
C_CONDEMN_KIND: Final = 72
C_KILL_KIND: Final = 80  # why the supervisor killed it: KILL_*, with C_KILL_STEP
C_KILL_STEP: Final = 88
# written by the steward
C_LEASE_UNTIL: Final = 96  # ns, CLOCK_BOOTTIME; the worker raises it too after each fetch
C_CANCEL_ROW: Final = 104  # job that is to be cancelled while it runs: row + 1 << 32 | index
C_CANCEL_STEP: Final = 112  # its step if it is the one in user code, else 0; written before C_CANCEL_ROW
# 1 when the steward may have taken back what waits behind the job that runs: take over before all else. Not a
# stop word, since the supervisor overwrites that one.
C_TAKEN: Final = 120
# written by the worker
C_BEAT: Final = 128  # ns, CLOCK_BOOTTIME, of the loop's last turn
C_STEP: Final = 136  # counts every entry into user code
C_IN_USER: Final = 144  # the step while user code runs, else 0
C_ROW: Final = 152  # row of the job that runs or ran last
C_INDEX: Final = 160  # its index in its frame
C_TASK: Final = 168  # its task number
C_TIMEOUT_MS: Final = 176  # its soft limit, 0 = none
C_HARD_MS: Final = 184  # its hard limit, 0 = none
C_READY: Final = 192  # 1 once the worker has registered
C_PHASE: Final = 200  # PHASE_*: what the loop does, for people
# First 8 hex digits of the model's SHA-256 while it loads or predicts (1 if there is no such file), else 0:
# who dies with it set counts against that model.
C_SCORING: Final = 208
C_ASYNC: Final = 216  # jobs that run as coroutines or on the helper thread
C_RECYCLE: Final = 224  # RECYCLE_*: the worker asks to be replaced
C_HALF: Final = 232  # outcome half in use, 0 or 1
C_RETRIES: Final = 240  # retry rule of the job that runs: max_retries | backoff base ms << 12 | cap ms << 36
C_HELPER: Final = 248  # job on the helper thread: row + 1 << 32 | index, 0 = none
C_COUNTERS: Final = 256  # COUNTER_* words
C_INCARNATION: Final = 1024  # 26 bytes in 32
C_NEXT_INCARNATION: Final = 1056  # set while a takeover is under way
# Frame id (26 bytes in 32) of the job in C_CANCEL_ROW: a row is used again, so compare before acting.
C_CANCEL_ID: Final = 1088
C_SUSPECT: Final = 1120  # written by the worker: 1 while it runs a suspect, or is about to
C_FEATURES: Final = 1128  # by the worker: number of the task in whose features function it is, + 1; else 0
# Written by the steward: until then (ns, CLOCK_BOOTTIME) synchronous jobs stay off this worker's loop, even
# if no coroutine runs. It ends by itself, so that a steward that is gone leaves no role behind.
C_APART_UNTIL: Final = 1136

COUNTERS: Final = (
    "completed",
    "failed",
    "fetches",
    "fetched",
    "settles",
    "fenced",
    "returned",
    "takeovers",
    "busy_ns",
    "wakes",
    "cancelled",
    "unknown",
    "loop_lag_us",
    "reconnects",
    "scored",
    "reordered",
    "fallback_columns",
    "fallback_library",
    "fallback_value",
    "fallback_slow",
    "fallback_error",
    "fallback_load",
    "fetch_us",
    "settle_us",
    "predictions",
    "prediction_off_us",
    "overtakes",
    "bound_hits",
)
GAUGES: Final = frozenset({"loop_lag_us"})  # among the counters: they say how it is now and are not summed

FREE, LIVE, DEAD, RECOVERED = 0, 1, 2, 3
STOP_NONE, STOP_DRAIN, STOP_NOW, STOP_RESYNC = 0, 1, 2, 3
KILL_NONE, KILL_HARD_LIMIT, KILL_DRAIN, KILL_STUCK = 0, 1, 2, 3
CONDEMN_NONE, CONDEMN_SOFT, CONDEMN_CANCEL = 0, 1, 2
PHASE_START, PHASE_IDLE, PHASE_BUSY, PHASE_DRAIN, PHASE_RESYNC = 0, 1, 2, 3, 4
RECYCLE_NONE, RECYCLE_JOBS, RECYCLE_MEMORY = 0, 1, 2
PHASES: Final = ("starting", "idle", "busy", "draining", "resyncing")

# Tasks: one block a task.
TASKS_MAX: Final = formats.TASKS_MAX
TASK_BYTES: Final = 512
TASK_NAME_BYTES: Final = 64
T_COMPLETED: Final = 64
T_FAILED: Final = 72
T_SUM_NS: Final = 80
T_WAIT_SUM_US: Final = 88
T_MEAN_NS: Final = 96  # running mean as this worker measures it
T_TIMED: Final = 104  # jobs behind the mean
T_RETRIED: Final = 112
T_DEAD: Final = 120
T_RUN_BINS: Final = 128  # BINS words: bin k counts run times in [2^k, 2^(k+1)) µs, bin 0 all below 2 µs
T_WAIT_BINS: Final = 320  # the same for waits
BINS: Final = 24

# Rows: one a lease as fetched.
ROWS: Final = 2048
ROW_BYTES: Final = 64
R_RANGE: Final = 0  # base | n << 16 | first << 32 | ROW_LIVE; one store commits or frees the row
R_BLOCK: Final = 8  # state block + 1, 0 = inline
R_ID: Final = 16  # 26 bytes
R_RUN: Final = 48
R_STATES: Final = 56  # eight inline state bytes
ROW_LIVE: Final = 1 << 48
INLINE_JOBS: Final = 8

BLOCKS: Final = 256
BLOCK_BYTES: Final = 1024

JOB_LEASED, JOB_STARTED, JOB_DONE, JOB_RECORDED, JOB_RETURNED = 0, 1, 2, 3, 4

# Outcome area: two halves of records.
HALVES: Final = 2
HALF_BYTES: Final = 524_288
RECORD_HEADER_BYTES: Final = 40
ROOM_BYTES: Final = 81_920  # that must be left before a job may start: its result, its error, the header
# record: u32 length, u32 row, u16 index, u8 status, u8 flags, u32 delay_ms, u64 started_ms, u64 finished_ms,
# u32 error, u32 result
RECORD_STRUCT: Final = "<IIHBBIQQII"
DELAY_MS_MAX: Final = (1 << 32) - 1
OUT_DONE, OUT_RETRY, OUT_DEAD, OUT_CANCELLED, OUT_EXPIRED, OUT_UNKNOWN, OUT_RETURNED = 1, 2, 3, 4, 5, 6, 7

O_TASKS: Final = CONTROL_BYTES
O_ROWS: Final = O_TASKS + TASKS_MAX * TASK_BYTES
O_BLOCKS: Final = O_ROWS + ROWS * ROW_BYTES
O_HALVES: Final = O_BLOCKS + BLOCKS * BLOCK_BYTES
SLOT_BYTES: Final = O_HALVES + HALVES * HALF_BYTES


# Behind the last slot, laid out as the beginning of one: counters and tasks of all lives that have ended.
RETIRED_BYTES: Final = O_ROWS


def board_bytes(slots: int) -> int:
    """Size of a board with so many slots, in bytes."""
    return HEADER_BYTES + slots * SLOT_BYTES + RETIRED_BYTES


def slot_offset(slot: int) -> int:
    """Where a slot begins, in bytes from the start of the board."""
    return HEADER_BYTES + slot * SLOT_BYTES
