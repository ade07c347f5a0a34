"""`profile_batch` of the TensorBoard callback: which batches it asks for."""

from __future__ import annotations

from typing import Any


def profiled_batches(asked: Any) -> tuple[int, int] | None:
    """The first and the last batch to profile, counted from 1; None for none. Takes what Keras takes.

    Raises:
        ValueError: it is neither a number nor a pair of numbers, or they are not in order.
    """
    try:
        parts = asked.split(",") if isinstance(asked, str) else asked
        numbers = [int(part) for part in parts] if isinstance(parts, (list, tuple)) else [int(parts)]
    except (TypeError, ValueError):
        numbers = []
    if (
        len(numbers) not in (1, 2)
        or numbers[0] < 0
        or numbers[-1] < numbers[0]
        or (len(numbers) == 2 and not numbers[0])
    ):
        raise ValueError(
            "`profile_batch` must be 0, the number of a batch (from 1), or a pair of them: (10, 20). "
            f"Received: {asked!r}."
        )
    return (numbers[0], numbers[-1]) if numbers[0] else None
