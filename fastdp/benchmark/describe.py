"""Tells what the model of the user's file is made of: `main()` takes FILE.py:FUNCTION from the command line."""

from __future__ import annotations

import sys

from fastdp.benchmark import user_file
from fastdp.benchmark.process import Process, module_command
from fastdp.benchmark.serve import private_streams, say

SECONDS = 600.0


def framework_of(target: str) -> str:
    """What the model of "file.py:function" is made of, found out in a process of its own.

    Raises:
        WayError: the user's file or function failed, or returned something else; the message has the reason.
    """
    process = Process(module_command("fastdp.benchmark.describe", target), {"CUDA_VISIBLE_DEVICES": ""}, SECONDS)
    process.close()
    return str(process.facts["framework"])


def main() -> None:
    """Build the model and print what it is made of."""
    named = user_file.split(sys.argv[1])
    assert named is not None
    path, function = named
    answers = private_streams()[1]
    made = user_file.make(path, function)[0]
    model = made[0] if isinstance(made, tuple) else made
    framework = user_file.framework_of(model)
    if framework is None:
        raise TypeError(
            f"{path.name}:{function} must return a keras.Model or a torch.nn.Module, or a pair of it and a loss. "
            f"Received: {type(model).__name__}"
        )
    say(answers, {"framework": framework})
