"""`fastdp run` on torch scripts: plain torch's results, and a summary on the error stream."""

from __future__ import annotations

import importlib.util

import pytest
from scripts import fastdp_run, loaded_python, loaded_run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")

CLASSIFIER = """
import argparse
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.dropout = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.25)
        self.linear = nn.Linear(36, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        return F.log_softmax(self.linear(torch.flatten(self.dropout(x), 1)), dim=1)

def train(model, device, loader, optimizer):
    model.train()
    for data, target in loader:
        data, target = data.to(device), target.to(device)
        optimizer.zero_grad()
        F.nll_loss(model(data), target).backward()
        optimizer.step()

def test(model, device, loader):
    model.eval()
    with torch.no_grad():
        print(sum(F.nll_loss(model(x.to(device)), y.to(device), reduction="sum").item() for x, y in loader))

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--save")
    args = parser.parse_args()
    torch.manual_seed(3)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = TensorDataset(torch.randn(40, 1, 8, 8, dtype=torch.float64), torch.randint(0, 10, (40,)))
    model = Net().double().to(device)
    optimizer = torch.optim.Adadelta(model.parameters())
    for _ in range(args.epochs):
        train(model, device, DataLoader(data, 16, shuffle=True, num_workers=2), optimizer)
        test(model, device, DataLoader(data, 20))
    torch.save(model, args.save)

if __name__ == "__main__":
    main()
"""
COMPARE = """
import sys, torch
import train
sys.modules["__main__"].Net = train.Net
a, b = (torch.load(f, weights_only=False).state_dict() for f in ("plain.pt", "parallel.pt"))
torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
"""


def test_a_classifier_with_workers_ends_with_plain_torchs_weights(tmp_path):
    (tmp_path / "train.py").write_text(CLASSIFIER)
    plain = loaded_python("train.py", "--epochs", "2", "--save", "plain.pt", folder=tmp_path)
    parallel = loaded_run("--virtual", "3", "train.py", "--epochs", "2", "--save", "parallel.pt", folder=tmp_path)
    assert (plain.returncode, plain.stderr) == (parallel.returncode, "") == (0, "")
    assert parallel.stderr == "fastdp run: Net: 8 calls on 3 devices, 2 on one device.\n"
    numbers = [[float(line) for line in ran.stdout.split()] for ran in (plain, parallel)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-12)
    compared = loaded_python("-c", COMPARE, folder=tmp_path)
    assert compared.returncode == 0, compared.stderr


UNSPLIT = """
import sys, torch
import fastdp
print(sorted(name for name in sys.modules if name == "keras"))
print(len(fastdp.wrap(torch.nn.Linear(2, 2)).devices))
model = torch.nn.DataParallel(torch.nn.Linear(2, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(2):
    model(torch.ones(4, 2)).sum().backward()
    optimizer.step()
raise ValueError("at the end")
"""


def test_what_to_do_is_told_even_if_the_script_fails(tmp_path):
    (tmp_path / "train.py").write_text(UNSPLIT)
    ran = fastdp_run("--virtual", "3", "--gpus", "2", "train.py", folder=tmp_path)
    assert ran.stdout == "[]\n2\n"
    assert ran.returncode == 1
    warned, summary = (ran.stderr.partition(part)[2].splitlines()[0] for part in ("UserWarning: ", "fastdp run: "))
    assert summary.startswith("DataParallel: 2 calls on one device: it is parallel already. Leave DataParallel out")
    assert "calls of the module DataParallel run on one device" in warned
    assert "train.py:9: UserWarning" in ran.stderr
    assert ran.stderr.endswith("ValueError: at the end\n")


ELSEWHERE = """
import threading, torch
module = torch.nn.Linear(2, 1)
tensor = torch.ones(2, requires_grad=True)
def train():
    optimizer = torch.optim.SGD([*module.parameters(), tensor], lr=0.1)
    for _ in range(3):
        (module(torch.ones(4, 2)).sum() + tensor.sum()).backward()
        optimizer.step()
thread = threading.Thread(target=train)
thread.start()
thread.join()
"""


def test_a_script_that_trains_where_nothing_can_be_split_is_told_so(tmp_path):
    (tmp_path / "train.py").write_text(ELSEWHERE)
    ran = loaded_run("--virtual", "3", "train.py", folder=tmp_path)
    assert ran.returncode == 0
    assert ran.stderr.startswith(
        "fastdp run: nothing ran on 3 devices: no module that an optimizer of torch.optim trains"
    )


MIXED = """
import keras, torch
from torch import nn
keras.utils.set_random_seed(1)
layer = keras.layers.TorchModuleWrapper(nn.Linear(4, 4), output_shape=(None, 4))
inputs = keras.Input((4,))
kind = keras.Model(inputs, keras.layers.Dense(1)(layer(inputs)))
optimizers = [torch.optim.SGD(list(kind.parameters()), lr=0.1)]
module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
optimizers.append(torch.optim.SGD(module.parameters(), lr=0.1))
x = torch.linspace(-1, 1, 44).reshape(11, 4)
for _ in range(4):
    for model, optimizer in zip((kind, module), optimizers):
        optimizer.zero_grad()
        (model(x) ** 2).mean().backward()
        optimizer.step()
kind.compile("sgd", "mse")
kind.fit(x.numpy(), x.numpy()[:, :1], verbose=0)
print(type(kind.train_function).__name__)
print([round(float(p.detach().sum()), 4) for p in (*module.parameters(), *kind.parameters())])
"""


@pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="Keras is not installed")
def test_a_script_with_keras_and_torch_has_both_split(tmp_path):
    (tmp_path / "train.py").write_text(MIXED)
    plain = loaded_python("train.py", folder=tmp_path)
    parallel = loaded_run("--virtual", "3", "train.py", folder=tmp_path)
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.splitlines()[1:] == parallel.stdout.splitlines()[1:], parallel.stderr
    assert parallel.stdout.startswith("_ParallelFunction\n")
    assert parallel.stderr == "fastdp run: Sequential: 3 calls on 3 devices, 1 on one device.\n"


SHARDED = """
import hashlib, torch
torch.manual_seed(0)
parts = torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.Dropout(0.2), torch.nn.Linear(5, 2)
model = torch.nn.Sequential(*parts)
optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
for _ in range(4):
    optimizer.zero_grad()
    (model(torch.randn(21, 6)) ** 2).mean().backward()
    optimizer.step()
print(hashlib.sha256(b"".join(v.numpy().tobytes() for v in model.state_dict().values())).hexdigest())
"""


def test_with_shards_a_script_ends_with_the_same_bits_on_one_and_on_three_devices(tmp_path):
    (tmp_path / "train.py").write_text(SHARDED)
    runs = [
        loaded_run("--virtual", "3", "--gpus", gpus, "--shards", "4", "train.py", folder=tmp_path)
        for gpus in ("1", "3")
    ]
    assert [run.returncode for run in runs] == [0, 0], runs
    assert runs[0].stdout == runs[1].stdout != ""
    assert "calls on 1 device" in runs[0].stderr
    assert "calls on 3 devices" in runs[1].stderr
    wrong = loaded_run("--virtual", "3", "--shards", "2", "train.py", folder=tmp_path)
    assert wrong.returncode == 2
    assert "`shards` must be at least the number of devices" in wrong.stderr
