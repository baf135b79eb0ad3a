"""The version numbers of what outlives a process, and the sizes that those formats fix.

A number here is raised when the thing it names can no longer be read by what was released before.
"""

from typing import Final

# The three versions. They stand nowhere else.
FRAME: Final = "1"  # first byte of meaning in a frame's header; a newer one is parked, never executed
SCRIPTS: Final = 1  # what the Lua scripts expect in KEYS and ARGV, and what they answer
BOARD: Final = 3  # layout of the shared memory between supervisor, workers and steward

# Ids: `<frame id>.<index>`; a frame id is time, randomness, shard, in Crockford's base 32.
ID_TIME_CHARS: Final = 10
ID_RANDOM_CHARS: Final = 14
ID_SHARD_CHARS: Final = 2
FRAME_ID_CHARS: Final = ID_TIME_CHARS + ID_RANDOM_CHARS + ID_SHARD_CHARS

# A frame is closed at whichever limit comes first; a single larger job still makes a frame of one.
FRAME_JOBS_MAX: Final = 1_000
FRAME_BYTES_MAX: Final = 64 * 1024

# Lanes: the name rides in each header in a field of fixed width, padded.
LANE_NAME_CHARS_MAX: Final = 16
LANES_MAX: Final = 16

# Idempotency keys: longer ones than the second figure are stored as their hash.
IDEMPOTENCY_KEY_BYTES_MAX: Final = 256
IDEMPOTENCY_KEY_PLAIN_BYTES_MAX: Final = 64

# What one fetch may bring, and what one worker may hold: takeover returns a worker's whole hash in one reply,
# so what is in flight must stay bounded. A first frame is always taken, however large.
FETCH_FRAMES_MAX: Final = 1_000
FETCH_BYTES_MAX: Final = 1024 * 1024
IN_FLIGHT_FRAMES_MAX: Final = 2_000
IN_FLIGHT_BYTES_MAX: Final = 4 * 1024 * 1024
# A reply to a worker or a producer is never longer: at most it is a hold that is half full and one frame of
# one with the largest payload that settings allow (16 MiB). What claims to be longer is not Redis talking.
REPLY_BYTES_MAX: Final = 64 * 1024 * 1024

# What one app may have: the board keeps a block for each task, the hot path calls with that many arguments.
TASKS_MAX: Final = 512
PARAMETERS_MAX: Final = 255

# A settled result lives in one half of a worker's outcome area until Redis has it, so it cannot be larger.
RESULT_BYTES_CEILING: Final = 64 * 1024
