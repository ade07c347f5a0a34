"""The stages of check.py: what each runs, and for how long at most.

The DEFAULT stages together take less than eight minutes. Each other stage fits a short separate run; docs/hardware.md
lists them in the order of their value.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

MARGIN_SECONDS = 8.0  # a benchmark plans to end this long before its limit


@dataclass(frozen=True)
class Part:
    """One process of a stage.

    Attributes:
        name: unique within the stage.
        command: the command; the interpreter is prepended if it begins with "-" or a .py file. {seconds} is replaced
            by the time that a benchmark may plan with.
        seconds: time limit.
        tests: whether it runs pytest, whose results come through pytest_log.py.
        needs: a program that must be on the PATH; without it the part is skipped with that reason.
        environment: variables added to this process's environment.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    tests: bool = True
    needs: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    def within(self, seconds: float) -> Part:
        """The part, limited to the seconds that are left."""
        limit = min(self.seconds, seconds)
        planned = str(max(1.0, limit - MARGIN_SECONDS))
        return replace(self, seconds=limit, command=tuple(word.replace("{seconds}", planned) for word in self.command))


def _pytest(*arguments: str) -> tuple[str, ...]:
    """A pytest command in which warnings do not fail tests, and a test that hangs prints its stacks."""
    quiet = ("-q", "-W", "default", "-p", "no:cacheprovider", "-p", "bench.gpu.pytest_log")
    return ("-m", "pytest", *quiet, "-o", "faulthandler_timeout=60", *arguments)


def _gpu_tests(*files: str) -> tuple[str, ...]:
    """The tests of tests/gpu that need a GPU."""
    return _pytest("-m", "gpu", *(f"tests/gpu/{file}" for file in files))


def _sanitizer(tool: str) -> Part:
    """The kernel tests at small sizes under one compute-sanitizer tool."""
    tests = (*_gpu_tests("test_kernels.py"), "-k", "784 or 130 or out_of_range", "-x")
    command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "86", sys.executable, *tests)
    return Part(
        tool, command, 40, needs="compute-sanitizer", environment={"FASTDP_GPU_SMALL": "1", "FASTDP_GPU_ALONE": "1"}
    )


def _steps(name: str, seconds: float, *cases: str) -> Part:
    """Training steps of some cases of bench/gpu/cases.py."""
    return Part(name, ("bench/gpu/steps.py", "--seconds", "{seconds}", *cases), seconds, tests=False)


def _parts(seconds: float) -> Part:
    """Kernels, transfers, all-reduces and launches."""
    return Part("parts", ("bench/gpu/parts.py", "--seconds", "{seconds}"), seconds, tests=False)


# The exactness suite on the card: results of N devices that must equal those of one, by topic.
EXACTNESS = ("test_batch_norm", "test_losses", "test_side_effects", "test_masks_and_outputs", "test_random",
             "test_optimizers", "test_metrics")  # fmt: skip


def _exactness(seconds: float) -> Part:
    """The tests of tests/exactness in full fp32, with virtual devices and the plain Keras reference on the card."""
    return Part(
        "exactness",
        _pytest("-p", "bench.gpu.pytest_this_card", *(f"tests/exactness/{name}.py" for name in EXACTNESS)),
        seconds,
    )


STAGES: dict[str, tuple[Part, ...]] = {
    "kernels": (
        Part("tests", _gpu_tests("test_runtime.py", "test_kernels.py"), 70),
        _sanitizer("memcheck"),
        _sanitizer("racecheck"),
    ),
    "engine": (Part("tests", _gpu_tests("test_engine.py"), 70),),
    "keras": (Part("tests", _gpu_tests("test_models.py"), 80), _exactness(50)),
    "bench": (_parts(40), _steps("steps", 85, "mlp", "resnet50-bf16-32")),
    "exactness": (_exactness(300),),
    "kinds": (Part("tests", _gpu_tests("test_kinds.py"), 280),),
    "bench-parts": (_parts(110),),
    "bench-mlp": (_steps("steps", 110, "mlp"),),
    "bench-resnet": (_steps("steps", 300, "resnet50-bf16-32", "resnet50-tf32-32"),),
    "bench-resnet-large": (_steps("steps", 120, "resnet50-bf16-256"),),
    "bench-xception": (_steps("steps", 240, "xception-bf16-64"),),
    "bench-encoder": (_steps("steps", 200, "encoder-bf16-32"),),
}
DEFAULT = ("kernels", "engine", "keras", "bench")
