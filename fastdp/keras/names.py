"""Makes the names of a model's outputs unique, as Keras 2's `multi_gpu_model` did."""

from __future__ import annotations

from collections.abc import Sequence


def numbered_names(names: Sequence[str]) -> list[str]:
    """Make names unique as Keras 2.3's `multi_gpu_model` did: all copies of a repeated name get numbers, from `_1`.

    A new name never equals the name of another output; Keras 2.3 refused such models.

    Example:
        >>> numbered_names(["a", "b", "a"])
        ['a_1', 'b', 'a_2']
    """
    taken = set(names)
    numbers: dict[str, int] = {}
    unique = []
    for name in names:
        candidate = name
        while names.count(name) > 1 and candidate in taken:
            numbers[name] = numbers.get(name, 0) + 1
            candidate = f"{name}_{numbers[name]}"
        taken.add(candidate)
        unique.append(candidate)
    return unique
