"""The tests of `make test-quick`: for each package a few that start no process and compile no model.

`python tests/shared/quick.py` prints those whose libraries are installed; tests/test_quick.py holds that each package
has some.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]

# By package or module of fastdp/, and by folder of tests/ that belongs to none.
QUICK = {
    "errors": ("tests/keras/test_errors.py",),
    "warn": ("tests/test_warn.py",),
    "options": ("tests/test_options.py",),
    "patching": ("tests/test_patching.py",),
    "settings": ("tests/runtime/test_select.py",),
    "private_files": ("tests/test_private_files.py",),
    "shard": ("tests/test_shard.py",),
    "bfloat16": ("tests/test_bfloat16.py",),
    "buffers": ("tests/test_buffers.py",),
    "rendering": ("tests/rendering/test_rendering.py",),
    "launch": ("tests/cuda/test_fake.py",),
    "tracing": ("tests/tracing/test_nvtx.py",),
    "runtime": ("tests/runtime/test_host_streams.py", "tests/runtime/test_topology.py"),
    "comm": ("tests/comm/test_batch.py", "tests/comm/test_host_communicator.py", "tests/comm/test_algorithm.py"),
    "tensors": ("tests/tensors/test_sums.py", "tests/tensors/test_moments.py"),
    "replica": ("tests/torch/rows/test_collectives.py",),
    "capture": ("tests/capture/test_rewrites.py", "tests/capture/test_watch.py"),
    "data": ("tests/data/test_device_dataset.py",),
    "checkpoint": ("tests/checkpoint/test_compare.py", "tests/checkpoint/test_nest.py"),
    "program": ("tests/program/test_base.py",),
    "engine": ("tests/engine/test_accumulation.py", "tests/engine/test_report.py"),
    "monitoring": ("tests/monitoring/test_progress.py", "tests/monitoring/test_usage.py"),
    "keras": ("tests/keras/fit/test_array_batches.py", "tests/keras/test_errors.py"),
    "torch": (
        "tests/torch/test_step_results.py::test_outputs_and_the_norm_before_clipping_are_those_of_plain_torch",
        "tests/torch/test_step_results.py::test_steps_that_are_not_finite_change_weights_and_optimizer_on_no_device",
    ),
    "placement": (
        "tests/keras/test_placement.py::test_branches_run_at_the_same_time_forward_and_backward",
        "tests/keras/test_placement.py::test_dropout_losses_and_statistics_in_branches_equal_plain_keras",
    ),
    "api": ("tests/conformance/test_parallel_model.py",),
    "utils": ("tests/conformance/test_gpus.py",),
    "callbacks": ("tests/keras/callbacks/test_csv_log.py",),
    "backend": ("tests/keras/keras2",),
    "benchmark": ("tests/benchmark/test_batches.py", "tests/benchmark/test_figures.py"),
    "cli": ("tests/cli/test_plan.py",),
    "tests/exactness": (
        "tests/exactness/test_metrics.py::test_validation_data_and_validation_split_equal_one_device",
        "tests/exactness/test_metrics.py::test_metrics_that_a_layer_updates_by_numbers_of_the_batch_equal_one_device",
    ),
    "the rest": ("tests/test_quick.py",),
}


def files() -> list[str]:
    """Their paths, or those of single tests in them, each once."""
    return list(dict.fromkeys(file for found in QUICK.values() for file in found))


def installed(missing: Callable[[str], list[str]]) -> list[str]:
    """Those whose files, and the conftest.py beside them, import nothing that `missing` finds in their source.

    A whole run leaves such files out by itself. Named on the command line, they would be errors.
    """
    found = []
    for name in files():
        path = ROOT / name.partition("::")[0]
        folder = path if path.is_dir() else path.parent
        sources = [*folder.glob("conftest.py"), *([path] if path.is_file() else path.glob("test_*.py"))]
        if not any(missing(source.read_text(encoding="utf-8")) for source in sources):
            found.append(name)
    return found


if __name__ == "__main__":
    # By its path: with tests/ on sys.path, the folder tests/keras would be the library keras.
    conftest = runpy.run_path(str(ROOT / "tests" / "conftest.py"))
    sys.stdout.write("\n".join(installed(conftest["missing_needs"])) + "\n")
