"""The plain-Python twin of the compiled fast path."""

COMPILED = False
