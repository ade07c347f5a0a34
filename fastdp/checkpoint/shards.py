"""The number of shards in a checkpoint: a run that goes on with another one gets other bits, and is told so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdp.warn import warn_user

KEY = "shards"


def shards_of(model: Any) -> int | None:
    """`shards=` of a parallel model; None for any other model."""
    found: int | None = getattr(getattr(model, "_options", None), "shards", None)
    return found


def warn_of_others(place: Path, state: Mapping[str, Any], model: Any) -> None:
    """Warn if a checkpoint is of a model with another number of shards than this one. Earlier ones do not tell."""
    ours, theirs = shards_of(model), state.get(KEY, shards_of(model))
    if ours != theirs:
        warn_user(
            f"The checkpoint {place} is of a model with shards={theirs}, and the run goes on with shards={ours}: it "
            "ends with other bits than one that was never ended. To have the same, wrap the model with "
            f"shards={theirs}, on any number of devices."
        )
