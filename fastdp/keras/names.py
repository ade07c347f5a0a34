"""Names of outputs."""

from __future__ import annotations

from collections.abc import Sequence


def unique_names(names: Sequence[str]) -> list[str]:
    """Names made unique: repeats get `_1`, `_2`, ... in order, and never a name that another output has.

    Example:
        >>> unique_names(["a", "a", "a_1", "a"])
        ['a', 'a_2', 'a_1', 'a_3']
    """
    taken = set(names)
    seen: set[str] = set()
    unique = []
    for name in names:
        candidate, number = name, 0
        while candidate in seen or (number and candidate in taken):
            number += 1
            candidate = f"{name}_{number}"
        seen.add(candidate)
        unique.append(candidate)
    return unique
