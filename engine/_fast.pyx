# cython: boundscheck=False, wraparound=False
"""The compiled fast path of the engine."""

COMPILED = True
