"""A process whose step hangs ends soon, and says what it leaves."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import time
import numpy as np
import fastdp
from fastdp.program.functions import FunctionProgram

def train(parameters, batch):
    if batch[0][0, 0] == 1:
        time.sleep(300)
    return 0.0, {"w": parameters["w"]}, []

fastdp.set_virtual_devices(2)
program = FunctionProgram({"w": np.zeros((1, 1), "f4")}, train, lambda p, s, g: (p, s), lambda p, batch: batch)
engine = fastdp.DataParallel(program, 2, timeout=0.5, shards=SHARDS)
try:
    engine.train([np.array([[0], [1]], "f4")])
except fastdp.DeviceTimeoutError as error:
    print(str(error).splitlines()[0])
"""


@pytest.mark.parametrize("shards", [None, 2])
def test_a_device_on_which_a_step_was_given_up_is_not_waited_for_again(shards):
    script = SCRIPT.replace("SHARDS", repr(shards))
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "virtual:1" in ran.stdout
    assert "was still busy after timeout=1.0 seconds. It is left as it is." in ran.stderr


EXITS = """
import atexit
import sys
import numpy as np
import fastdp
from fastdp.program.functions import FunctionProgram

def train(parameters, batch):
    if batch[0][0, 0] == 1:
        sys.exit(3)
    return 0.0, {"w": parameters["w"] + 1}, []

def update(parameters, slots, gradients):
    return {"w": parameters["w"] - gradients["w"]}, slots

fastdp.set_virtual_devices(2)
program = FunctionProgram({"w": np.zeros((1, 1), "f4")}, train, update, lambda p, batch: batch)
engine = fastdp.DataParallel(program, 2)
atexit.register(lambda: print(program.state_dict()["parameters"]["w"].tolist()))
engine.train([np.array([[0], [0]], "f4")])
engine.train([np.array([[0], [1]], "f4")])
print("went on")
"""


def test_an_exit_in_a_replica_ends_the_program_with_its_status_and_the_weights_of_the_step_before():
    ran = subprocess.run([sys.executable, "-c", EXITS], capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (3, "[[-1.0]]\n", "")
