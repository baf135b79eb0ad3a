"""Puts made tables between their marks in a document, and writes figures as they stand there."""

from __future__ import annotations


def put(text: str, into: str, begin: str, end: str, *, gap: str = "\n\n") -> str:
    """The document with what stands between the marks replaced. Raises SystemExit where it lacks them."""
    if begin not in into or end not in into:
        raise SystemExit(f"the document lacks the marks {begin} and {end}")
    before, _, rest = into.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}{gap}{text}{gap}{end}{after}"


def three(value: float) -> str:
    """A figure in three digits, or whole where it has more."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
