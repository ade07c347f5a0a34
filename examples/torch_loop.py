"""A torch script with the loop everybody writes, and one new line: `fastdp.wrap`.

    python examples/torch_loop.py
    python examples/torch_loop.py --devices 8 --epochs 20

Data, loss, optimizer, scheduler, clipping, evaluation and the file of weights are plain torch. It needs scikit-learn.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import fastdp


def main() -> None:
    """Train on digits, and tell the accuracy on those that were held back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=4, help="virtual ones where there are not so many GPUs")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64, help="of all devices together")
    options = parser.parse_args()
    if len(fastdp.devices()) < options.devices:
        fastdp.set_virtual_devices(options.devices)

    torch.manual_seed(0)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target))
    training, held_back = random_split(data, [0.9, 0.1])
    loader = DataLoader(training, batch_size=options.batch_size, shuffle=True)
    module = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(32 * 16, 10),
    )
    model = fastdp.wrap(module, gpus=options.devices)  # the new line
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.05)

    for epoch in range(options.epochs):
        model.train()
        total = 0.0
        for x, y in loader:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item() * len(y)
        scheduler.step()
        print(f"epoch {epoch + 1}: loss {total / len(training):.4f}")

    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(dim=1) == y).sum()) for x, y in DataLoader(held_back, batch_size=256))
    print(f"accuracy on {len(held_back)} images not trained on: {right / len(held_back):.3f}")
    torch.save(module.state_dict(), "digits.pt")  # names without a prefix: loads into the plain module


if __name__ == "__main__":
    main()
