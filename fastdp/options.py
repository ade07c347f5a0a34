"""The options of a parallel model: one checked object that travels whole from `fastdp.wrap` to the engine."""

from __future__ import annotations

from dataclasses import dataclass

COMPILE_MODES = (None, "trace", "inductor", "auto")
# "bucket" means "auto", but also warns where there is nothing to record.
GRAPHS = ("auto", "bucket", "step", None)
UPDATES = ("first", "each", None)
ROW_POLICIES = (None, "merge", "replica")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The keyword arguments of `fastdp.wrap`, checked once. `fastdp.wrap` documents each of them.

    The defaults are those of `fastdp.wrap`, `fastdp.multi_gpu_model` and `fastdp.DataParallel`. The code that holds the
    devices resolves what depends on them: which device merges, and what None means on GPUs.

    Raises:
        ValueError: an unknown `compile`, `graph`, `update` or `rows`.
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

    def __post_init__(self) -> None:
        if self.compile not in COMPILE_MODES:
            raise ValueError(f"`compile` must be one of {COMPILE_MODES}. Received: compile={self.compile!r}")
        if self.graph not in GRAPHS:
            raise ValueError(f"`graph` must be one of {GRAPHS}. Received: graph={self.graph!r}")
        if self.update not in UPDATES:
            raise ValueError(f'`update` must be "first" or "each". Received: update={self.update!r}')
        if not isinstance(self.rows, dict) and self.rows not in ROW_POLICIES:
            raise ValueError(f"`rows` must be one of {ROW_POLICIES}. Received: rows={self.rows!r}")

    @property
    def row_policy(self) -> str | None:
        """`rows` of a Keras model.

        Raises:
            ValueError: it is a dict, which only torch modules take.
        """
        if isinstance(self.rows, dict):
            raise ValueError(f"`rows` as a dict is for torch modules. Received: rows={self.rows!r} for a Keras model.")
        return self.rows


def one_of(options: Options | None, keywords: Options) -> Options:
    """Return `options`, or `keywords` if there is no such object.

    Raises:
        TypeError: both were given, so the keywords would be lost.
    """
    if options is not None and keywords != Options():
        raise TypeError(f"`options` holds all options. Leave the keywords out. Received along with it: {keywords}")
    return options or keywords
