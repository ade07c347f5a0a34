"""Scripts that do not wrap their modules, as strangers write them: several devices give the weights of one."""

from __future__ import annotations

import warnings

import pytest
import torch

from fastdp.options import Options
from fastdp.runtime.select import resolve
from fastdp.torch.script_calls import install, uninstall
from fastdp.torch.script_modules import plainly

HEAD = """
import copy
import torch
import torch.nn.functional as F
from torch import nn, optim
import fastdp

torch.manual_seed(1)
X, Y = torch.randn(23, 6, dtype=torch.float64), torch.randint(0, 3, (23,))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x))

def train(model, optimizer, criterion=nn.CrossEntropyLoss(), epochs=2):
    model.train()
    for _ in range(epochs):
        for x, y in zip(X.split(8), Y.split(8)):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
    return loss
"""
TAIL = """
result = [*(p.detach().clone() for m in models for p in (*m.parameters(), *m.buffers())), torch.get_rng_state()]
"""


def run(script, devices=None):
    """The results of a script, the lines of the summary, and the warnings."""
    place = {"__name__": "__main__"}
    installed = install(resolve(devices), Options(sync_batch_norm=True)) if devices else None
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            exec(compile(HEAD + script + TAIL, "script.py", "exec"), place)
        return place["result"], installed.summary() if installed else [], [str(one.message) for one in seen]
    finally:
        uninstall()


def compare(script, devices=3):
    plain, _, before = run(script)
    parallel, lines, after = run(script, devices)
    # The gradient of a bias before a BatchNorm is rounding alone, of 1e-17, which Adam divides by its epsilon of 1e-8.
    torch.testing.assert_close(parallel, plain, rtol=1e-9, atol=1e-9)
    return lines, [text for text in after if text not in before]


SPLIT = {
    "classifier with evaluation": (
        """
model = Net().double()
optimizer = optim.Adam(model.parameters(), lr=0.01)
train(model, optimizer)
model.eval()
with torch.no_grad():
    found = [model(x) for x in X.split(8)]
train(model, optimizer)
models = [model]
""",
        ["Net: 13 calls on 3 devices, 2 on one device."],
    ),
    "states of an LSTM": (
        """
class Special(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 1)
    def forward(self, x, state):
        y, state = self.lstm(x, state)
        return self.head(y), state
model, state = Special().double(), tuple(torch.zeros(1, 8, 4, dtype=torch.float64) for _ in range(2))
optimizer = optim.Adam(model.parameters())
for x in torch.randn(4, 8, 5, 6, dtype=torch.float64):
    y, state = model(x, tuple(s.detach() for s in state))
    optimizer.zero_grad()
    y.pow(2).mean().backward()
    optimizer.step()
models = [model]
""",
        ["Special: 3 calls on 3 devices, 1 on one device."],
    ),
    "sparse gradients": (
        """
model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(24, 3)).double()
X = X.abs().long().clamp(max=8)
optimizers = optim.SparseAdam(model[0].parameters()), optim.Adam(model[2].parameters())
for _ in range(3):
    F.cross_entropy(model(X), Y).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
models = [model]
""",
        ["Sequential: 2 calls on 3 devices, 1 on one device."],
    ),
    "GAN": (
        """
G = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.LeakyReLU(), nn.Linear(8, 6)).double()
D = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(), nn.Dropout(0.2), nn.Linear(8, 1)).double()
g, d = optim.Adam(G.parameters(), lr=0.01), optim.Adam(D.parameters(), lr=0.01)
bce = nn.BCEWithLogitsLoss()
for real in [*X.split(8), *X.split(8)]:
    ones, zeros = (f(len(real), 1, dtype=torch.float64) for f in (torch.ones, torch.zeros))
    fake = G(torch.randn(len(real), 4, dtype=torch.float64))
    d.zero_grad()
    (bce(D(real), ones) + bce(D(fake.detach()), zeros)).backward()
    d.step()
    g.zero_grad()
    bce(D(fake), ones).backward()
    g.step()
models = [G, D]
""",
        ["Sequential: 22 calls on 3 devices, 2 on one device."],
    ),
    "encoder and decoder in one optimizer": (
        """
class AE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 4), nn.Tanh())
        self.decoder = nn.Sequential(nn.Linear(4, 6))
model = AE().double()
optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for x in X.split(8):
    optimizer.zero_grad()
    F.mse_loss(model.decoder(model.encoder(x)), x).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
models = [model]
""",
        ["Sequential: 4 calls on 3 devices, 2 on one device."],
    ),
    "LBFGS and a schedule": (
        """
model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)).double()
optimizer = optim.LBFGS(model.parameters(), max_iter=4)
def closure():
    optimizer.zero_grad()
    loss = F.mse_loss(model(X), X.sum(1, keepdim=True))
    loss.backward()
    return loss
schedule = optim.lr_scheduler.StepLR(optimizer, 1)
for _ in range(2):
    optimizer.step(closure)
    schedule.step()
models = [model]
""",
        None,
    ),
    "average of weights and a copy": (
        """
model = Net().double()
ema = copy.deepcopy(model).requires_grad_(False)
optimizer = optim.SGD(model.parameters(), lr=0.1)
for _ in range(2):
    train(model, optimizer, epochs=1)
    for a, b in zip(ema.parameters(), model.parameters()):
        a.data.mul_(0.9).add_(b.data, alpha=0.1)
    ema(X)
models = [model, ema, copy.deepcopy(model)]
""",
        ["Net: 5 calls on 3 devices, 1 on one device."],
    ),
    "a counter and a cache in forward": (
        """
class Counts(Net):
    def __init__(self):
        super().__init__()
        self.calls, self.cache = 0, None
    def forward(self, x):
        self.calls += 1
        if self.cache is None:
            self.cache = torch.ones(6, dtype=x.dtype)
        return super().forward(x * self.cache) / self.calls
model = Counts().double()
train(model, optim.SGD(model.parameters(), lr=0.1), epochs=3)
models = [model]
X = X * model.calls
""",
        ["Counts: 7 calls on 3 devices, 2 on one device."],
    ),
    "another dtype in between": (
        """
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
X = X.float()
train(model, optim.SGD(model.parameters(), lr=0.0))
model.double()
X = X.double()
train(model, optim.SGD(model.parameters(), lr=0.1))
models = [model]
""",
        ["Sequential: 11 calls on 3 devices, 1 on one device."],
    ),
    "a loss with weights and a batch of one row": (
        """
class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
    def forward(self, y, target):
        return F.cross_entropy(y * self.scale, target)
model, criterion = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double(), Loss()
X, Y = X[:17], Y[:17]
train(model, optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.1), criterion)
models = [model, criterion]
""",
        None,
    ),
    "a gradient penalty": (
        """
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
optimizer = optim.SGD(model.parameters(), lr=0.1)
for x in X.split(8):
    x.requires_grad_()
    y = model(x)
    g, = torch.autograd.grad(y.sum(), x, create_graph=True)
    optimizer.zero_grad()
    (y.mean() + ((g.norm(dim=1) - 1) ** 2).mean()).backward()
    optimizer.step()
models = [model]
""",
        None,
    ),
    "its own wrap and a plain module": (
        """
model, other = Net().double(), Net().double()
parallel = fastdp.wrap(model, gpus=2, sync_batch_norm=True)
train(parallel, optim.SGD(parallel.parameters(), lr=0.1))
train(other, optim.SGD(other.parameters(), lr=0.1))
step = fastdp.wrap(other, gpus=2, sync_batch_norm=True).train_step(nn.CrossEntropyLoss(), torch.optim.SGD)
for _ in range(2):
    step(X, Y)
    other(X)
models = [model, other]
""",
        ["Net: 5 calls on 3 devices, 1 on one device."],
    ),
    "transforms and modes around calls": (
        """
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
train(model, optim.SGD(model.parameters(), lr=0.1), epochs=1)
named = {name: p.detach() * 2 for name, p in model.named_parameters()}
found = [functional_call(model, named, (X,)), vmap(model)(X)]
found += [grad(lambda n: functional_call(model, n, (X,)).sum())(named)["0.weight"]]
with FlopCounterMode(display=False) as flops:
    found.append(model(X))
checkpoint(model, X, use_reentrant=False).sum().backward()
found += [torch.tensor(flops.get_total_flops()), torch.jit.trace(model, X)(X), torch.fx.symbolic_trace(model)(X)]
with torch.inference_mode():
    found += [model(X).clone(), model(X).clone()]
class Result(nn.Module):
    def parameters(self): return [one.detach() for one in found]
models = [model, Result()]
""",
        None,
    ),
    "a language model with its loss inside": (
        """
class LM(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
    def forward(self, ids, targets=None):
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], dtype=torch.float64)
        logits = self.head(self.layer(self.embed(ids), mask, is_causal=True))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
model = LM().double()
optimizer = optim.AdamW(model.parameters(), lr=0.01)
ids = torch.randint(0, 11, (4, 8, 6))
for step, batch in enumerate([*ids, *ids]):
    targets = batch.roll(-1, 1)
    if step > 3:
        targets[step - 4 :, 3:] = -1
    logits, loss = model(batch, targets)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
with torch.no_grad():
    X = torch.stack([model(batch)[0] for batch in ids])
models = [model]
""",
        None,
    ),
    "another head, of the same shape": (
        """
model = Net().double()
train(model, optim.SGD(model.parameters(), lr=0.1))
model.head = nn.Linear(8, 3).double()
train(model, optim.SGD(model.parameters(), lr=0.1))
models = [model]
""",
        ["Net: 11 calls on 3 devices, 1 on one device."],
    ),
    "a part and then the whole": (
        """
model = Net().double()
head = nn.Linear(8, 3).double()
pretrained = nn.Sequential(model.body, head)
train(pretrained, optim.SGD(pretrained.parameters(), lr=0.1))
train(model, optim.SGD(model.parameters(), lr=0.1))
models = [model, head]
""",
        None,
    ),
}


@pytest.mark.parametrize("name", SPLIT)
def test_a_script_is_split_and_ends_with_the_weights_of_one_device(name):
    script, expected = SPLIT[name]
    lines, messages = compare(script)
    known = ("gradients of gradients", "module Loss", "functional_call")
    assert [text for text in messages if not any(part in text for part in known)] == []
    assert any("on 3 devices" in line for line in lines)
    assert expected in (None, lines)


def one(module, forward, **attributes):
    """A script that trains a module whose forward does something special."""
    start = "".join(f"        self.{key} = {value}\n" for key, value in attributes.items())
    return f"""
class Special(Net):
    def __init__(self):
        super().__init__()
{start or "        pass"}
    def forward(self, x):
        {module}
        {forward}
model = Special().double()
LOOP
models = [model]
"""


LOOP = "train(model, optim.SGD(model.parameters(), lr=0.1))"
KEEPS = "keeps values in the attribute Special."
PLAIN = {
    "an attribute": (
        one("y = super().forward(x)", "self.aux = y.pow(2).mean(); return y", aux=0).replace(
            "LOOP", LOOP.replace("))", "), lambda y, t: F.cross_entropy(y, t) + model.aux)")
        ),
        KEEPS + "aux",
    ),
    "the number of rows": (one("self.n = len(x)", "return super().forward(x)", n=0).replace("LOOP", LOOP), KEEPS + "n"),
    "a list": (one("self.seen.append(len(x))", "return super().forward(x)", seen=[]).replace("LOOP", LOOP), KEEPS),
    "a dict inside": (
        one("self.seen['x'] = x.mean()", "return super().forward(x)", seen={}).replace("LOOP", LOOP),
        KEEPS + "seen",
    ),
    "a tensor in place": (
        one(
            "self.seen += x.detach().sum()", "return super().forward(x)", seen="torch.zeros((), dtype=torch.float64)"
        ).replace("LOOP", LOOP),
        KEEPS + "seen",
    ),
    "Python numbers": (
        one("y = super().forward(x)", "return y, len(x)").replace(
            "LOOP", LOOP.replace("))", "), lambda y, t: F.cross_entropy(y[0], t) * y[1])")
        ),
        "besides tensors",
    ),
    "rows that are mixed": (
        one("y = super().forward(x)", "return y - y.mean(0)").replace("LOOP", LOOP),
        "cannot be merged",
    ),
    "hooks": (
        """
seen = []
model = Net().double()
model.body.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
train(model, optim.SGD(model.parameters(), lr=0.1))
models = [model]
X = seen[-1]
""",
        "hooks",
    ),
    "DataParallel": (
        "model = nn.DataParallel(Net().double())\n" + LOOP + "\nmodels = [model]",
        "Leave DataParallel out",
    ),
    "a compiled module": (
        "model = torch.compile(Net().double(), backend='eager')\n" + LOOP + "\nmodels = [model]",
        "Leave torch.compile out",
    ),
    "layers called by a method": (
        """
class Special(Net):
    def act(self, x):
        return self.head(x.repeat(1, 2)[:, :8])
model = Special().double()
optimizer = optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    optimizer.zero_grad()
    model.act(X).pow(2).mean().backward()
    optimizer.step()
models = [model]
""",
        "Call the module",
    ),
    "no optimizer": (
        """
model = Net().double()
for _ in range(3):
    F.cross_entropy(model(X), Y).backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad
            p.grad = None
models = [model]
""",
        "no optimizer of torch.optim",
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_cannot_be_split_runs_on_one_device_and_is_told(name):
    script, why = PLAIN[name]
    lines, messages = compare(script)
    assert len(lines) == 1
    assert why in lines[0]
    assert "devices" not in lines[0].partition(":")[2].partition(":")[0]
    assert len(messages) <= 1
    assert all(why in text for text in messages)


def test_calls_in_other_threads_are_plain_torch():
    script = """
import threading
model = Net().double()
optimizer = optim.SGD(model.parameters(), lr=0.1)
train(model, optimizer, epochs=1)
worker = threading.Thread(target=train, args=(model, optimizer))
worker.start()
worker.join()
models = [model]
"""
    lines, messages = compare(script)
    assert (lines, messages) == (["Net: 2 calls on 3 devices, 1 on one device."], [])


def test_a_module_that_fails_raises_its_own_error_and_goes_on():
    script = """
class Picky(Net):
    def forward(self, x):
        if (x > 99).any():
            raise KeyError("too large")
        return super().forward(x)
model = Picky().double()
optimizer = optim.SGD(model.parameters(), lr=0.1)
train(model, optimizer, epochs=1)
try:
    model(X * 1e4)
except KeyError as error:
    assert error.args == ("too large",)
else:
    assert False
train(model, optimizer, epochs=1)
models = [model]
"""
    lines, messages = compare(script)
    assert messages == []
    assert lines == ["Picky: 5 calls on 3 devices, 1 on one device."]


def test_without_it_modules_are_plain_again():
    before = torch.nn.Module.__call__, torch.nn.Module.__setattr__, torch.optim.Optimizer.add_param_group
    install(resolve(2), Options())
    assert torch.nn.Module.__call__ is not before[0]
    install(resolve(3), Options())
    uninstall()
    uninstall()
    assert (torch.nn.Module.__call__, torch.nn.Module.__setattr__, torch.optim.Optimizer.add_param_group) == before


def test_modules_are_freed_when_their_optimizers_are():
    script = """
import gc, weakref
gone = []
for _ in range(3):
    model = Net().double()
    train(model, optim.SGD(model.parameters(), lr=0.1), epochs=1)
    gone.append(weakref.ref(model))
gc.collect()
models = [model]
X = torch.tensor([one() is None for one in gone])
assert gone[0]() is None, gone
"""
    compare(script)


def test_on_a_device_plain_calls_take_host_tensors():
    seen = []

    def call(module, x):
        seen.append(x.device.type)
        return torch.ones(2)

    assert plainly(call, torch.nn.Linear(2, 2, device="meta"), (torch.ones(3, 2),), {}).device.type == "cpu"
    plainly(call, torch.nn.Linear(2, 2), (torch.ones(3, 2),), {})
    plainly(call, torch.nn.Linear(2, 2, device="meta"), (torch.ones(3, 2, device="meta"),), {})
    assert seen == ["meta", "cpu", "meta"]
