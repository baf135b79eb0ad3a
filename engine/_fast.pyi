"""Types of the compiled fast path."""

COMPILED: bool
