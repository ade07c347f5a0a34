"""Notes which way the code of a forward pass goes where it asks a tensor (`if ops.max(x) > 4:`).

One device asks once, of all rows. If replicas get different answers, they go different ways, and a trial has to tell
whether that matters: a loop that ends when all rows are done does not mind.
"""

from __future__ import annotations

from typing import Any

import torch

READ_AS_BOOL = (torch.Tensor.__bool__, torch.Tensor.item)
_MOST = 10_000  # answers of a pass


def branch_noted(state: Any, function: Any, args: Any, kwargs: Any) -> Any:
    """Ask a tensor, and note the answer if it is true or false."""
    answer = function(*args, **kwargs)
    if isinstance(answer, bool) and len(state.branches) < _MOST:
        state.branches.append(answer)
    return answer
