"""A script that trains: DEVICES KIND FOLDER RESULT. It is killed, and started again by the same command."""
# ruff: noqa: NPY002, T201

import sys
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import fastdp
from fastdp.checkpoint import folders

devices, kind, folder, result = int(sys.argv[1]), *sys.argv[2:5]
slow = folders._sync


def sync(path):
    """A slow disk."""
    time.sleep(0.01)
    slow(path)


folders._sync = sync
fastdp.set_virtual_devices(3)
torch.manual_seed(0)
np.random.seed(0)
module = nn.Sequential(
    nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 3)
).double()
data = torch.utils.data.TensorDataset(torch.randn(90, 6).double(), torch.randint(0, 3, (90,)))
loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True)
model = fastdp.wrap(module, gpus=devices, sync_batch_norm=True, compile=None)
if kind == "step":
    train = model.train_step(F.cross_entropy, lambda p: torch.optim.Adam(p, lr=0.01), accumulate=2)
    optimizer, parts = train.optimizer, {"step": train}
else:
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    parts = {"optimizer": optimizer}

    def train(x, y):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [7, 13], 0.5)
with fastdp.Checkpoint(folder, model=model, scheduler=scheduler, every_steps=2, keep=2, **parts) as checkpoint:
    print("from", checkpoint.restore())
    for _epoch in checkpoint.epochs(3):
        for x, y in checkpoint.batches(loader):
            train(x + float(np.random.normal()) * 0.01, y)
            scheduler.step()
            checkpoint.step()
            print("step", checkpoint.position.step)
torch.save({"module": module.state_dict(), "optimizer": optimizer.state_dict()}, result)
