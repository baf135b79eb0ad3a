# cython: language_level=3, boundscheck=False, wraparound=False, autotestdict=False
"""The compiled fast path of the engine; its parts are included by noun."""

COMPILED = True

include "_crc.pxi"
include "_frame.pxi"
include "_payload.pxi"
include "_resp.pxi"
include "_board.pxi"
include "_dispatch.pxi"
