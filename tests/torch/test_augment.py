"""`augment=` of a torch module: each device transforms its rows, with the numbers of plain torch on the whole batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fastdp


@pytest.fixture(autouse=True)
def _devices():
    fastdp.set_virtual_devices(8)
    yield
    fastdp.set_virtual_devices(0)


class FlipAndNoise(nn.Module):
    """As torchvision's transforms for batches do: a draw for each row."""

    def forward(self, images):
        images = images.float() / 255
        turned = torch.rand(len(images), 1, 1) < 0.5
        images = torch.where(turned, images.flip(2), images)
        return images + 0.1 * torch.randn(len(images), 1, 1)


class Looks(nn.Module):
    """Gives back what it has got, times a weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return images * self.weight


IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (11, 4, 4)).astype("uint8"))


def outcome(gpus, transform=None, **options):
    """What the module gets in two calls in training mode, and one in evaluation; losses of train steps."""
    transform = transform or FlipAndNoise()
    parallel = fastdp.wrap(Looks(), gpus=gpus, augment=transform, **options)
    torch.manual_seed(3)
    seen = [parallel(IMAGES).detach() for _ in range(2)]
    parallel.eval()
    seen.append(parallel(IMAGES).detach())
    parallel.train()
    step = parallel.train_step(lambda y: y.square().mean(), lambda p: torch.optim.SGD(p, 0.1), reduction="mean")
    return seen, [float(step(IMAGES)) for _ in range(3)]


def by_hand():
    torch.manual_seed(3)
    transform, module = FlipAndNoise(), Looks()
    return [*(module(transform(IMAGES)).detach() for _ in range(2)), module(IMAGES).detach()]


@pytest.mark.parametrize("gpus", [1, 2, 3, 8])
def test_the_augmented_batch_is_that_of_plain_torch_to_the_bit(gpus):
    seen, losses = outcome(gpus)
    for found, expected in zip(seen, by_hand(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert losses == pytest.approx(outcome(1)[1], rel=1e-6)


def test_captured_steps_draw_the_same():
    assert outcome(3, compile="trace")[1] == pytest.approx(outcome(1)[1], rel=1e-6)


def test_wrapping_again_sets_another_transform_or_none():
    module = Looks()
    for transform in (FlipAndNoise(), lambda images: images.float() * 2, None):
        parallel = fastdp.wrap(module, gpus=2, augment=transform)
    torch.testing.assert_close(parallel(IMAGES.float()).detach(), IMAGES.float())


def test_what_mixes_rows_is_refused():
    with pytest.raises(ValueError, match="rows"):
        fastdp.wrap(Looks(), gpus=3, augment=lambda x: x.float() - x.float().mean())(IMAGES)


def test_what_is_no_transform_is_refused():
    with pytest.raises(TypeError, match=r"`augment` of a torch module must be.*Received: 'flip'"):
        fastdp.wrap(Looks(), gpus=2, augment="flip")
    with pytest.raises(ValueError, match=r"requires_grad_\(False\)"):
        fastdp.wrap(Looks(), gpus=2, augment=nn.Linear(2, 2))
    parallel = fastdp.wrap(Looks(), gpus=1, augment=FlipAndNoise())
    with pytest.raises(TypeError, match="by position"):
        parallel(images=IMAGES)
