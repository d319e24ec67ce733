"""Comparing shapes that may hold symbolic sizes."""

from collections.abc import Sequence


def differ(got: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether two shapes are known to differ. Symbolic sizes are trusted: to compare them would fix them."""
    known = [(a, b) for a, b in zip(got, wanted, strict=False) if type(a) is int and type(b) is int]
    return len(got) != len(wanted) or any(a != b for a, b in known)
