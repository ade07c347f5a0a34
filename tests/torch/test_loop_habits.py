"""What users write between forward and step: in each case losses, gradients and weights are those of one device."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdp

each_number = pytest.mark.parametrize("devices", [1, 2, 3, 8])


def mlp(dropout: float = 0.0, inputs: int = 6, outputs: int = 4) -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Linear(inputs, 16), nn.Tanh(), nn.Dropout(dropout), nn.BatchNorm1d(16), nn.Linear(16, outputs)
    ).double()


def data(rows: int = 13, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=generator).double()
    return x, torch.randint(0, 4, (rows,), generator=generator)


def check(loop, devices, *make, **options):
    """Compare what a loop over modules returns, and their states and gradients, with those of plain torch."""
    modules = [one() for one in make or (mlp,)]
    references = copy.deepcopy(modules)
    torch.manual_seed(3)
    ours = loop(*(fastdp.wrap(one, gpus=devices, sync_batch_norm=True, **options) for one in modules))
    torch.manual_seed(3)
    theirs = loop(*references)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    for module, reference in zip(modules, references, strict=True):
        expected = reference.state_dict()
        torch.testing.assert_close(dict(module.state_dict()), dict(expected), rtol=1e-9, atol=1e-11)
        for p, q in zip(module.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11)


@each_number
def test_a_gradient_scaler_that_meets_an_overflow_skips_and_halves_its_scale(devices):
    def loop(model):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        scaler, told = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2), []
        for i in range(6):
            x, y = data(seed=i)
            x[3] *= 1e200 if i == 2 else 1.0
            optimizer.zero_grad()
            loss = (model(x) * 1e150).square().mean() if i == 2 else F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            told.append((scaler.get_scale(), bool(norm.isfinite())))
        assert [finite for _, finite in told] == [True, True, False, True, True, True]
        assert {float(state["step"]) for state in optimizer.state.values()} == {5.0}
        return [scale for scale, _ in told]

    check(loop, devices, lambda: nn.Sequential(nn.Linear(6, 4)).double())


@each_number
def test_a_generator_and_a_discriminator_in_turn(devices):
    def loop(generator, critic):
        optimizers = [torch.optim.Adam(one.parameters(), lr=0.01) for one in (generator, critic)]
        losses = []
        for i in range(3):
            x, _ = data(seed=i)
            fake = generator(torch.randn(13, 6).double())
            optimizers[1].zero_grad()
            real, made = critic(x), critic(fake.detach())
            loss = F.softplus(-real).mean() + F.softplus(made).mean()
            loss.backward()
            optimizers[1].step()
            optimizers[0].zero_grad()
            for p in critic.parameters():
                p.requires_grad_(False)
            other = F.softplus(-critic(fake)).mean()
            other.backward()
            for p in critic.parameters():
                p.requires_grad_(True)
            optimizers[0].step()
            losses += [loss.detach(), other.detach()]
        return losses

    check(loop, devices, lambda: mlp(0.2, outputs=6), lambda: mlp(0.2, outputs=1))


class Sharpness(torch.optim.Optimizer):
    """Sharpness-aware minimization as its users write it: two steps around another optimizer."""

    def __init__(self, parameters, base, rho=0.05):
        super().__init__(parameters, {"rho": rho})
        self.base = base(self.param_groups)

    @torch.no_grad()
    def first_step(self):
        found = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in found]).norm()
        for p in found:
            self.state[p]["old"] = p.data.clone()
            p.add_(0.05 * p.grad / (norm + 1e-12))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["old"]
        self.base.step()
        self.zero_grad()


@each_number
def test_sharpness_aware_minimization_by_two_passes_with_dropout(devices):
    def loop(model):
        optimizer = Sharpness(model.parameters(), lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9))
        for i in range(3):
            x, y = data(seed=i)
            F.cross_entropy(model(x), y).backward()
            optimizer.first_step()
            F.cross_entropy(model(x), y).backward()
            optimizer.second_step()

    check(loop, devices, lambda: mlp(0.3))


@each_number
def test_closures_of_lbfgs_without_a_search_and_of_adam_with_dropout(devices):
    def loop(model):
        losses = []
        for optimizer in (
            torch.optim.LBFGS(model.parameters(), lr=0.3, max_iter=5, history_size=3),
            torch.optim.Adam(model.parameters(), lr=0.01),
        ):
            for i in range(2):
                x, y = data(seed=i)

                def closure(x=x, y=y, optimizer=optimizer):
                    optimizer.zero_grad()
                    loss = F.cross_entropy(model(x), y)
                    loss.backward()
                    return loss

                losses.append(optimizer.step(closure).detach())
        return losses

    check(loop, devices, lambda: mlp(0.2))


@each_number
def test_adversarial_inputs_and_their_gradients(devices):
    def loop(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for i in range(2):
            x, y = data(seed=i)
            x.requires_grad_()
            F.cross_entropy(model(x), y).backward()
            attacked = (x + 0.1 * x.grad.sign()).detach()
            optimizer.zero_grad()
            F.cross_entropy(model(attacked), y).backward()
            optimizer.step()
        return x.grad

    check(loop, devices)


@each_number
def test_losses_of_single_rows_with_weights_and_a_gradient_of_ones(devices):
    def loop(model):
        x, y = data()
        rows = F.cross_entropy(model(x), y, reduction="none")
        rows.backward(torch.linspace(0, 1, len(y)).double())
        hardest = F.cross_entropy(model(x), y, reduction="none").topk(5).values
        penalty = sum(p.square().sum() for p in model.parameters())
        (hardest.mean() + 1e-3 * penalty).backward()
        return rows.detach(), hardest.detach()

    check(loop, devices)


@each_number
def test_two_losses_whose_gradients_are_projected_onto_each_other(devices):
    def loop(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x, y = data()
        out = model(x)
        parameters = list(model.parameters())
        one = torch.autograd.grad(F.cross_entropy(out, y), parameters, retain_graph=True)
        two = torch.autograd.grad(out.square().mean(), parameters)
        dot = sum((a * b).sum() for a, b in zip(one, two, strict=True))
        length = sum(b.square().sum() for b in two)
        for p, a, b in zip(parameters, one, two, strict=True):
            p.grad = a + b - dot.clamp(max=0) / length * b
        optimizer.step()
        return dot

    check(loop, devices)


@each_number
def test_backward_to_some_parameters_and_gradients_that_are_set_to_zero(devices):
    def loop(model):
        x, y = data()
        head = list(model.parameters())[-2:]
        F.cross_entropy(model(x), y).backward(inputs=head)
        model.zero_grad(set_to_none=False)
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for p in model.parameters():
                p.grad.nan_to_num_().mul_(0.5).add_(p, alpha=0.01)
        nn.utils.clip_grad_value_(model.parameters(), 0.05)
        torch.optim.SGD(model.parameters(), lr=0.1).step()

    check(loop, devices)


@each_number
def test_a_teacher_that_averages_the_students_weights(devices):
    def loop(student, teacher):
        optimizer, losses = torch.optim.AdamW(student.parameters(), lr=0.01), []
        teacher.requires_grad_(False)
        for i in range(3):
            x, _ = data(seed=i)
            with torch.no_grad():
                wanted = teacher(x).softmax(1)
            optimizer.zero_grad()
            loss = F.cross_entropy(student(x), wanted)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                    slow.mul_(0.9).add_(fast, alpha=0.1)
            losses.append(loss.detach())
        return losses

    check(loop, devices, lambda: mlp(0.2), mlp)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.gru, self.head = nn.GRU(6, 5, num_layers=2, batch_first=True).double(), nn.Linear(5, 4).double()

    def forward(self, x, state):
        out, state = self.gru(x, state)
        return self.head(out), state


@each_number
def test_backpropagation_through_time_that_cuts_the_state_after_each_part(devices):
    def loop(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        text = torch.randn(9, 12, 6, generator=torch.Generator().manual_seed(1)).double()
        state = torch.zeros(2, 9, 5).double()
        for part in text.split(4, dim=1):
            optimizer.zero_grad()
            out, state = model(part, state.detach())
            (out.square().mean() + 0.1 * state.square().sum()).backward()
            optimizer.step()
        return state.detach()

    check(loop, devices, Recurrent, rows={"state": 1, "output[1]": 1})


@each_number
def test_a_loop_goes_on_from_a_file_of_ddp_and_writes_one_that_torch_reads(devices, tmp_path):
    """Weights with "module." in front of each name, an optimizer's state, and the generator's."""

    def begin(model):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for i in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(data(seed=i)[0]), data(seed=i)[1]).backward()
            optimizer.step()
        return optimizer

    def go_on(model, file):
        saved = torch.load(file)
        model.load_state_dict(saved["model"])
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["draws"])
        begin_again = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        for i in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data(seed=i)[0]), data(seed=i)[1])
            loss.backward()
            optimizer.step()
            begin_again.step(loss.detach())
        return optimizer.param_groups[0]["lr"]

    first = mlp(0.2)
    optimizer = begin(first)
    weights = {f"module.{name}": value for name, value in first.state_dict().items()}
    state = {"model": weights, "optimizer": optimizer.state_dict(), "draws": torch.get_rng_state()}
    torch.save(state, tmp_path / "ddp.pt")
    module, reference = mlp(0.2), mlp(0.2)
    model = fastdp.wrap(module, gpus=devices, sync_batch_norm=True)
    state["model"] = first.state_dict()
    torch.save(state, tmp_path / "plain.pt")
    assert go_on(model, tmp_path / "ddp.pt") == go_on(reference, tmp_path / "plain.pt")
    torch.save(model.state_dict(), tmp_path / "ours.pt")
    read = mlp()
    read.load_state_dict(torch.load(tmp_path / "ours.pt"))
    torch.testing.assert_close(dict(read.state_dict()), dict(reference.state_dict()), rtol=1e-9, atol=1e-11)
