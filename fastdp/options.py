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


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The keyword arguments of `fastdp.wrap`, checked once. `fastdp.wrap` documents each of them.

    The defaults are those of `fastdp.wrap`, `fastdp.multi_gpu_model` and `fastdp.DataParallel`. The code that holds the
    devices resolves what depends on them: which device merges, and what None means on GPUs.

    Raises:
        ValueError: an unknown `compile`, `graph`, `update`, `rows`, `on_nonfinite`, `grad_dtype`, `on_oom` or
            `on_device_loss`; `shards` that is no whole number from 1 to 1024; a `timeout` that is not above 0;
            `update` beside `shard_optimizer`.
        TypeError: `fingerprint` that is no path; `shard_optimizer` that is no bool.

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
        if self.compile not in COMPILE_MODES:
            raise ValueError(f"`compile` must be one of {COMPILE_MODES}. Received: compile={self.compile!r}")
        if self.graph not in GRAPHS:
            raise ValueError(f"`graph` must be one of {GRAPHS}. Received: graph={self.graph!r}")
        if self.update not in UPDATES:
            raise ValueError(f'`update` must be "first" or "each". Received: update={self.update!r}')
        if self.on_nonfinite not in NONFINITE:
            raise ValueError(f"`on_nonfinite` must be one of {NONFINITE}. Received: on_nonfinite={self.on_nonfinite!r}")
        if self.on_oom not in ON_OOM:
            raise ValueError(f"`on_oom` must be one of {ON_OOM}. Received: on_oom={self.on_oom!r}")
        if self.on_device_loss not in ON_DEVICE_LOSS:
            raise ValueError(
                f"`on_device_loss` must be one of {ON_DEVICE_LOSS}. Received: on_device_loss={self.on_device_loss!r}"
            )
        if self.grad_dtype not in GRAD_DTYPES:
            raise ValueError(f"`grad_dtype` must be one of {GRAD_DTYPES}. Received: grad_dtype={self.grad_dtype!r}")
        if isinstance(self.timeout, bool) or not isinstance(self.timeout, (int, float)) or not self.timeout > 0:
            raise ValueError(f"`timeout` must be a number of seconds above 0. Received: timeout={self.timeout!r}")
        if not isinstance(self.rows, dict) and self.rows not in ROW_POLICIES:
            raise ValueError(f"`rows` must be one of {ROW_POLICIES}. Received: rows={self.rows!r}")
        if self.fingerprint is not None and not isinstance(self.fingerprint, (str, os.PathLike)):
            raise TypeError(f"`fingerprint` must be a path. Received: {self.fingerprint!r}")
        if not isinstance(self.shard_optimizer, bool):
            raise TypeError(f"`shard_optimizer` must be True or False. Received: {self.shard_optimizer!r}")
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
