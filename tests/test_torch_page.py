"""The page about torch modules: its code runs and does what the text says."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdp

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "torch.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(autouse=True)
def four_virtual_devices() -> Iterator[None]:
    fastdp.set_virtual_devices(4)
    torch.manual_seed(0)
    yield
    fastdp.set_virtual_devices(0)


def names(module: nn.Module, **more: Any) -> dict[str, Any]:
    """What the code of the page takes as given."""
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(x, x.argmax(dim=1) % 3)
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    given = {"fastdp": fastdp, "torch": torch, "loader": loader, "criterion": F.cross_entropy, "x": x[:8]}
    return {**given, "module": module, **more}


def weights(module: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach()


def test_the_loop_trains_as_it_does_without_fastdp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = nn.Linear(6, 3)
    alone = copy.deepcopy(module)
    exec(CODE[0], names(module))
    exec(CODE[0].replace("fastdp.wrap(module, gpus=4)", "module"), names(alone))
    torch.testing.assert_close(weights(module), weights(alone), rtol=1e-4, atol=1e-6)
    assert set(torch.load("weights.pt")) == {"weight", "bias"}


def test_the_fast_way_trains_as_the_loop_and_its_checkpoint_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = nn.Linear(6, 3)
    alone = copy.deepcopy(module)
    found = names(module)
    exec(CODE[1], found)
    exec(CODE[0], names(alone))
    torch.testing.assert_close(weights(module), weights(alone), rtol=1e-4, atol=1e-6)
    found["y"] = found["y"][:8]
    found["x"] = found["x"][: len(found["y"])]
    exec(CODE[7], found)
    assert any("linear" in event.key for event in found["profiler"].key_averages())
    exec(CODE[9], found)
    found["model"].load_state_dict({f"module.{name}": value for name, value in alone.state_dict().items()})
    torch.testing.assert_close(weights(module), weights(alone), rtol=0, atol=0)


def test_the_result_of_a_step_has_losses_outputs_and_the_norm(capsys):
    module = nn.Linear(6, 3)
    found = names(module, make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    found["model"] = fastdp.wrap(module, gpus=4)
    exec(CODE[2], found)
    *_, printed = capsys.readouterr().out.splitlines()
    told = found["told"]
    assert printed == f"{told.losses['ce']:.3f}, norm {told.grad_norm:.2f} "
    assert told.updated
    assert found["right"].shape == (6,)


class Stateful(nn.Module):
    """An LSTM whose state has the layers first, and a mask of the same (steps, steps) for all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.GRU(6, 6, 2, batch_first=True)

    def forward(self, x: torch.Tensor, state: torch.Tensor, mask: torch.Tensor) -> Any:
        output, state = self.lstm(mask @ x, state)
        return output, fastdp.rows(state, axis=1)


@pytest.mark.parametrize("code", [CODE[3], CODE[4]])
def test_declared_and_marked_rows_give_the_outputs_of_one_device(code):
    module = Stateful()
    x, state, mask = torch.randn(8, 5, 6), torch.randn(2, 8, 6), torch.ones(5, 5).tril()
    wanted = module(x, state, mask)
    found = names(module, state=state, mask=mask) | {"x": x}
    exec(code, found)
    torch.testing.assert_close((found["output"], found["state"]), wanted, rtol=1e-5, atol=1e-6)


def test_the_modules_that_ask_for_all_rows_give_the_values_of_one_device():
    made = names(nn.Identity())
    exec(CODE[5], made)
    contrast, mean = made["Contrast"](), made["MaskedMean"]()
    images, texts = torch.randn(10, 6), torch.randn(10, 6)
    alone = copy.deepcopy(contrast)
    for module in (fastdp.wrap(contrast, gpus=4), alone):
        F.cross_entropy(module(images, texts), torch.arange(10)).backward()
    for one, other in zip(contrast.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
    mask = (torch.arange(10) < 2).float()[:, None]
    torch.testing.assert_close(fastdp.wrap(mean, gpus=4)(images, mask), mean(images, mask), rtol=1e-5, atol=1e-6)


def test_captured_steps_train_as_the_loop_does_without_fastdp(capsys):
    module = nn.Linear(6, 3)
    alone = copy.deepcopy(module)
    exec(CODE[8], names(module))
    assert "traced" in capsys.readouterr().out
    optimizer = torch.optim.AdamW(alone.parameters())
    for x, y in names(alone)["loader"]:
        optimizer.zero_grad()
        F.cross_entropy(alone(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(weights(module), weights(alone), rtol=1e-4, atol=1e-6)


def test_what_a_hook_keeps_counts_in_the_loss_of_the_loop():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x))

    module = Net()
    alone = copy.deepcopy(module)
    y = torch.arange(8) % 3
    ours, theirs = (names(net, y=y) for net in (module, alone))
    exec(CODE[6], ours)
    exec(CODE[6].replace("fastdp.wrap(module, gpus=4)", "module"), theirs)
    assert ours["features"]["body"].shape == (8, 5)
    for one, other in zip(module.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_every_piece_of_code_is_run_here():
    assert len(CODE) == 11


def test_every_example_and_name_on_the_page_exists():
    for example in re.findall(r"`(\w+\.py)`", PAGE):
        assert (ROOT / "examples" / "pytorch" / example).is_file()
    for name in set(re.findall(r"fastdp\.((?:replica\.)?[a-z]\w+)", PAGE)):
        thing: Any = fastdp
        for part in name.split("."):
            thing = getattr(thing, part)


def test_the_training_for_those_who_come_from_elsewhere_is_that_of_one_device(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = [code for code in CODE if "64 rows in all" in code]
    assert PAGE.index("64 rows in all") > PAGE.index("## Coming from DataParallel, DDP, Accelerate, Fabric")
    module = nn.Linear(6, 3)
    alone = copy.deepcopy(module)
    for each, start in ((module, "fastdp.wrap(module, gpus=4)"), (alone, "module")):
        torch.manual_seed(1)
        given = names(each)
        exec(code.replace("fastdp.wrap(module, gpus=4)", start), given | {"data": given["loader"].dataset})
    torch.testing.assert_close(weights(module), weights(alone), rtol=1e-4, atol=1e-6)
    assert capsys.readouterr().out.count("\n") == 4
    assert set(torch.load("weights.pt")) == {"weight", "bias"}
