"""The options of a parallel model: one checked object that travels whole from `fastdp.wrap` to the engine."""

from __future__ import annotations

import operator
import os
from dataclasses import dataclass
from typing import Any

COMPILE_MODES = (None, "trace", "inductor", "auto")
# "bucket" means "auto", but also warns where there is nothing to record.
GRAPHS = ("auto", "bucket", "step", None)
UPDATES = ("first", "each", None)
GRAD_DTYPES = (None, "bfloat16", "float16")
ROW_POLICIES = (None, "merge", "replica")
MOST_SHARDS = 1024
NONFINITE = (None, "raise", "skip")
ON_OOM = ("raise", "split")
ON_DEVICE_LOSS = ("raise", "continue", "continue_stalled")
_CHOICES = {
    "compile": COMPILE_MODES,
    "graph": GRAPHS,
    "update": UPDATES,
    "on_nonfinite": NONFINITE,
    "on_oom": ON_OOM,
    "on_device_loss": ON_DEVICE_LOSS,
    "grad_dtype": GRAD_DTYPES,
}
_FLAGS = ("cpu_merge", "cpu_relocation", "sync_batch_norm", "deterministic", "check_replicas", "shard_optimizer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The keyword arguments of `fastdp.wrap`, checked once. `fastdp.wrap` documents each of them.

    The defaults are those of `fastdp.wrap`, `fastdp.multi_gpu_model` and `fastdp.DataParallel`. The code that holds the
    devices resolves what depends on them: which device merges, and what None means on GPUs.

    Raises:
        ValueError: an unknown `compile`, `graph`, `update`, `rows`, `on_nonfinite`, `grad_dtype`, `on_oom` or
            `on_device_loss`; `shards` that is no whole number from 1 to 1024; a `timeout` that is not above 0;
            `update` beside `shard_optimizer`.
        TypeError: `fingerprint` that is no path; `merge_device` that is no whole number; a flag that is neither True
            nor False ("no" would count as True).

    `shards` sets `deterministic`: bits that depend on the clock would not be those of another number of devices.
    """

    cpu_merge: bool = True
    cpu_relocation: bool = False
    merge_device: int = 0
    sync_batch_norm: bool = False
    compile: str | None = "auto"
    graph: str | None = "auto"
    update: str | None = None
    deterministic: bool = False
    timeout: float = 1800.0
    check_replicas: bool = False
    rows: str | dict[str, int | str] | None = None
    shards: int | None = None
    on_nonfinite: str | None = None
    fingerprint: str | os.PathLike[str] | None = None
    grad_dtype: str | None = None
    shard_optimizer: bool = False
    augment: Any = None
    on_oom: str = "raise"
    on_device_loss: str = "raise"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, (str, type(None))) or value not in choices:  # an array is equal to none of them
                raise ValueError(f"`{name}` must be one of {choices}. Received: {name}={value!r}")
        for name in _FLAGS:
            check_flag(name, getattr(self, name))
        if not hasattr(type(self.merge_device), "__index__"):
            raise TypeError(f"`merge_device` must be an index. Received: merge_device={self.merge_device!r}")
        if isinstance(self.timeout, bool) or not isinstance(self.timeout, (int, float)) or not self.timeout > 0:
            raise ValueError(f"`timeout` must be a number of seconds above 0. Received: timeout={self.timeout!r}")
        if not isinstance(self.rows, dict) and not (
            isinstance(self.rows, (str, type(None))) and self.rows in ROW_POLICIES
        ):
            raise ValueError(f"`rows` must be one of {ROW_POLICIES}. Received: rows={self.rows!r}")
        if self.fingerprint is not None and not isinstance(self.fingerprint, (str, os.PathLike)):
            raise TypeError(f"`fingerprint` must be a path. Received: {self.fingerprint!r}")
        if self.shard_optimizer and self.update is not None:
            raise ValueError(
                f"`update` says where one optimizer runs, and with shard_optimizer=True each device updates its part. "
                f"Received: update={self.update!r}. Leave `update` out."
            )
        if self.shards is not None:
            object.__setattr__(self, "shards", _number_of_shards(self.shards))
            object.__setattr__(self, "deterministic", True)

    @property
    def survives(self) -> bool:
        """Whether training goes on after a device has run out of memory or was lost."""
        return self.on_oom == "split" or self.on_device_loss != "raise"

    @property
    def row_policy(self) -> str | None:
        """`rows` of a Keras model.

        Raises:
            ValueError: it is a dict, which only torch modules take.
        """
        if isinstance(self.rows, dict):
            raise ValueError(f"`rows` as a dict is for torch modules. Received: rows={self.rows!r} for a Keras model.")
        return self.rows


def check_flag(name: str, value: object) -> None:
    """Check an argument that is True or False; 1 and 0 will do.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, int) or value not in (0, 1):
        raise TypeError(f"`{name}` must be True or False. Received: {name}={value!r}")


def _number_of_shards(value: object) -> int:
    """`shards` as an int, if it is a whole number in range."""
    try:
        shards = 0 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        shards = 0
    if not 1 <= shards <= MOST_SHARDS:
        raise ValueError(
            f"`shards` must be None or a whole number from 1 to {MOST_SHARDS}: the parts that every global batch is "
            f"cut into. Received: shards={value!r}"
        )
    return shards


def one_of(options: Options | None, keywords: Options) -> Options:
    """Return `options`, or `keywords` if there is no such object.

    Raises:
        TypeError: both were given, so the keywords would be lost.
    """
    if options is not None and keywords != Options():
        raise TypeError(f"`options` holds all options. Leave the keywords out. Received along with it: {keywords}")
    return options or keywords
