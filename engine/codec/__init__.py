"""The frame codec: the compiled one where it was built, else its plain-Python twin.

A frame is the byte string that Redis stores and moves; docs/WIRE_FORMAT.md describes it. The functions are
total: given any bytes they answer, or raise DamagedFrame or NewerFrame. Misuse by the caller (a lane that is
no name, a range outside of the frame) is a ValueError, another type than bytes a TypeError.
"""

from typing import TYPE_CHECKING, Final

FALLBACK_REASON: str = ""

if TYPE_CHECKING:
    from tqe import _fast as _backend
else:
    try:
        from tqe import _fast as _backend
    except ImportError as e:
        # Slower by two orders, but everything works; `tqe doctor` says so, with this reason.
        FALLBACK_REASON = str(e)
        from tqe import _pure as _backend

BACKEND: Final = "compiled" if _backend.COMPILED else "pure"

# Bits of Header.flags.
TRACKED: Final = 1  # has a snapshot
SCORED: Final = 2  # its boost was predicted: not scored again
SUSPECT: Final = 4  # its worker died or vanished: runs as frames of one, alone
STARTED: Final = 8  # a suspect that has begun: its next reap is charged as a crash
OPTIONS: Final = 16  # has options; follows from them

HEADER_BYTES: Final = _backend.HEADER_BYTES

Header = _backend.Header
pack = _backend.pack
pack_same = _backend.pack_same
pack_mixed = _backend.pack_mixed
pack_lines = _backend.pack_lines
pack_command = _backend.pack_command
longest_line = _backend.longest_line
parse = _backend.parse
peek = _backend.peek
walk = _backend.walk
job_at = _backend.job_at
cut = _backend.cut
single = _backend.single
rewrite = _backend.rewrite
types = _backend.types

__all__ = [
    "BACKEND",
    "FALLBACK_REASON",
    "HEADER_BYTES",
    "OPTIONS",
    "SCORED",
    "STARTED",
    "SUSPECT",
    "TRACKED",
    "Header",
    "cut",
    "job_at",
    "longest_line",
    "pack",
    "pack_command",
    "pack_lines",
    "pack_mixed",
    "pack_same",
    "parse",
    "peek",
    "rewrite",
    "single",
    "types",
    "walk",
]
