"""What the driver asks of a worker process, and what the process answers: requests, prepared ways and rounds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

FRAMEWORKS = ("keras", "torch")
LIBRARIES = ("fastdp", "torch", "ddp", "keras", "keras-jax", "keras-tensorflow")
KINDS = ("gpu", "virtual", "cpu")
MODES = ("auto", "eager", "traced", "compiled", "graph")
PRECISIONS = ("float32", "bf16", "fp16")
SYNTHETIC = "synthetic"


@dataclass(frozen=True, kw_only=True)
class Request:
    """One way to train one model, as the driver asks for it. Travels to the worker process as JSON.

    Args:
        target: name of a built-in model, perhaps with sizes (`resnet50:size=64`); absolute path of a `.keras` file; or
            "/abs/file.py:function".
        framework: what the model is made of, "keras" or "torch".
        library: what trains it. "keras" is Keras's own `fit` on torch; "torch" is torch's loop in one process.
        devices: number of replicas.
        kind: "gpu"; "virtual" for virtual devices of fastdp in host memory; "cpu" for everything else on the host.
        mode: how steps run, for fastdp and torch. "auto" lets the library decide.
        batch: rows of the global batch.
        precision: "float32", or mixed precision by "bf16" or "fp16".
        data: "synthetic", or the absolute path of an HDF5 file, with ":x,y" behind it to name its data sets.
        loss: name of a loss; None for that of the model, or a default.
        optimizer: name of an optimizer; None for that of the model, or a default.
        seed: of weights and synthetic data.

    Raises:
        ValueError: a value that is none of the known ones, or a count below 1.
    """

    target: str
    framework: str
    library: str = "fastdp"
    devices: int = 1
    kind: str = "cpu"
    mode: str = "auto"
    batch: int = 32
    precision: str = "float32"
    data: str = SYNTHETIC
    loss: str | None = None
    optimizer: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        known = {
            "framework": FRAMEWORKS,
            "library": LIBRARIES,
            "kind": KINDS,
            "mode": MODES,
            "precision": PRECISIONS,
        }
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {choices}. Received: {name}={getattr(self, name)!r}")
        for name in ("devices", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1. Received: {name}={getattr(self, name)!r}")

    @property
    def name(self) -> str:
        """What tables call this way: library, devices, and the mode where there is one."""
        count = "1 device" if self.devices == 1 else f"{self.devices} devices"
        titles = {"ddp": "DDP", "keras": "Keras fit", "keras-jax": "Keras JAX", "keras-tensorflow": "Keras TF"}
        form = " torch" if self.library == "fastdp" and self.framework == "torch" else ""
        mode = "" if self.mode == "auto" else f", {self.mode}"
        return f"{titles.get(self.library, self.library)}{form}, {count}{mode}"

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Request:
        """The request of a line that `to_json` made.

        Raises:
            ValueError: the text is no such line.
        """
        found = json.loads(text)
        known = {one.name for one in fields(Request)}
        if not isinstance(found, dict) or not set(found) <= known:
            raise ValueError(f"a request must be a JSON object with some of {sorted(known)}. Received: {text!r}")
        return Request(**found)


@dataclass
class Round:
    """Some training steps, from the first batch until all of them are done.

    Attributes:
        steps: how many.
        seconds: wall-clock time of all of them.
        report: what the way says about its steps so far (`Prepared.report`).
        joules: energy that the GPUs used; None where NVML does not tell.
        utilization: per GPU, the part of the time in which it was busy; None where NVML does not tell.
    """

    steps: int
    seconds: float
    report: dict[str, Any] = field(default_factory=dict)
    joules: float | None = None
    utilization: list[float] | None = None


def _nothing() -> dict[str, Any]:
    return {}


@dataclass
class Prepared:
    """A way that is ready to train: the model is built, and its first step has run.

    Attributes:
        round: trains so many steps and waits until they are done.
        facts: `parameters` (trainable numbers), `inputs` (name, shape without rows, dtype), `loss`, `optimizer`,
            `title`; seconds of the first step (`first_step_seconds`), of tracing and recording (`capture_seconds`), of
            the compiler (`compile_seconds`); `how` steps run and `why`. All optional but `parameters`.
        report: what is known after some rounds: `verbs` (per device: device, rows, seconds by verb, nbytes by kind,
            peak_nbytes), `between_seconds`, `overhead_seconds`, `peak_host_nbytes`, `buckets` (bytes of each), and
            `how`, `why` as of now. All optional.
        settled: whether steps run as they will from now on: no compiler is at work. The warm-up waits for it.
        trace: writes a Chrome trace of a few steps to a path; None where the library has none.
        close: frees devices and ends child processes.
    """

    round: Callable[[int], Round]
    facts: dict[str, Any]
    report: Callable[[], dict[str, Any]] = _nothing
    settled: Callable[[], bool] = lambda: True
    trace: Callable[[str], None] | None = None
    close: Callable[[], None] = lambda: None
