"""What cannot be split or merged by rows is an error with its remedy, which changes nothing: the next step is right."""

from __future__ import annotations

import copy
import traceback
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune, rnn, spectral_norm, weight_norm

import fastdp

ROWS = 40  # so many that the trial on a few rows does not see row 17
DOUBLE = torch.float64


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def marked(rows: int = ROWS) -> torch.Tensor:
    """Inputs, of which row 17 is told by its last number."""
    x = numbers(rows, 4)
    x[:, 3] = 0
    x[17:18, 3] = 1
    return x


class Net(nn.Module):
    """A linear layer; `run(self)` may say what forward does instead."""

    def __init__(self, run=None):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3).double()
        self.run = run

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs) if self.run is not None else self.layer(*args, **kwargs)


class Recurrent(nn.Module):
    def __init__(self, total=None):
        super().__init__()
        torch.manual_seed(0)
        self.cell = nn.LSTM(4, 3, batch_first=True).double()
        self.total = total

    def forward(self, x, lengths):
        packed = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return rnn.pad_packed_sequence(self.cell(packed)[0], batch_first=True, total_length=self.total)[0]


class Packed(Recurrent):
    def forward(self, packed):
        return self.cell(packed)[0].data


def first_of(outputs, *targets):
    found = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
    return found.double().square().mean()


def special(x):
    return bool((x[:, 3] == 1).any())


class Tagged(torch.Tensor):
    pass


LENGTHS = torch.tensor([5, 3, 4, 2, 2, 1, 3])
EDGES = torch.tensor([[0, 1, 2], [3, 4, 5]])
SEVEN, TARGETS = numbers(7, 4), torch.arange(7) % 3
WEIGHTS = torch.tensor([0.5, 1.0, 2.0], dtype=DOUBLE)


def packed_sequence():
    return rnn.pack_padded_sequence(numbers(7, 5, 4), LENGTHS, batch_first=True, enforce_sorted=False)


def one_sequence():
    """As many rows in the data as in the lengths of steps."""
    return rnn.pack_padded_sequence(numbers(1, 5, 4), torch.tensor([5]), batch_first=True)


def weighted(outputs, target):
    return F.cross_entropy(outputs, target[0], weight=target[1])


def edges(net, x, e):
    found = net.layer(x)
    return found.index_add(0, e[1], found[e[0]])


# By name: the module, its arguments, the targets, the loss and the message.
REFUSED = {
    "packed sequence": (Packed, (packed_sequence(),), (), first_of, "PackedSequence.*pack them inside forward"),
    "one packed sequence": (Packed, (one_sequence(),), (), first_of, "PackedSequence.*pack them inside forward"),
    "lengths of a pack": (Recurrent, (numbers(7, 5, 4), LENGTHS), (), first_of, r"total_length=x\.shape\[1\]"),
    "none for some rows": (
        lambda: Net(lambda net, x: (net.layer(x), x.sum() if x[0, 0] > 0 else None)),
        (SEVEN,),
        (),
        first_of,
        "must be the same for any rows. Return a tensor in their place",
    ),
    "dtypes": (
        lambda: Net(lambda net, x: net.layer(x) if x[0, 0] > 0 else net.layer(x).float()),
        (SEVEN,),
        (),
        first_of,
        "torch.float32 and torch.float64 of shapes.*gpus=",
    ),
    "edges": (lambda: Net(edges), (SEVEN, EDGES), (), first_of, "edges of a graph.*one graph a row"),
    "images": (
        lambda: Net(lambda net, images: torch.stack([net.layer(one).std(0) for one in images])),
        ([numbers(2, 4), numbers(3, 4)],),
        (),
        first_of,
        "list of tensors.*Stack or pad",
    ),
    "detection targets": (
        lambda: Net(lambda net, x, boxes: net.layer(x) * torch.stack([one["boxes"].std() for one in boxes])[:, None]),
        (SEVEN, [{"boxes": numbers(i + 2, 4)} for i in range(7)]),
        (),
        first_of,
        "list of dicts.*Pad what is in them",
    ),
    "numbers in a list": (
        lambda: Net(lambda net, x, scale: net.layer(x) * torch.tensor(scale, dtype=DOUBLE)[:, None]),
        (SEVEN, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]),
        (),
        first_of,
        "list of numbers or strings goes to each device as a whole. Make it a tensor",
    ),
    "no rows": (Net, (SEVEN[:0],), (), first_of, "at least one row"),
    "no tensor": (
        lambda: Net(lambda net, scale: net.layer.weight * scale),
        (2.0,),
        (),
        first_of,
        "needs a tensor with rows.*Received: none.*model.module",
    ),
    "sparse": (
        lambda: Net(lambda net, x: x @ net.layer.weight.T),
        (SEVEN.to_sparse(),),
        (),
        first_of,
        "Received a tensor of layout torch.sparse_coo.*to_dense",
    ),
    "tensors of a subclass": (Net, (SEVEN.as_subclass(Tagged),), (), first_of, "Received a Tagged.*as_subclass"),
    "another device": (Net, (SEVEN.to("meta"),), (), first_of, r"host memory.*Received: a tensor on meta"),
    "any object": (lambda: Net(lambda net, x, o: net.layer(x)), (SEVEN, object()), (), first_of, "attribute"),
    "sparse output": (
        lambda: Net(lambda net, x: net.layer(x).to_sparse()),
        (SEVEN,),
        (),
        lambda o: o.to_dense().sum(),
        "outputs must be dense.*to_dense",
    ),
    "array": (
        lambda: Net(lambda net, x: (net.layer(x), x.numpy())),
        (SEVEN,),
        (),
        first_of,
        "ndarray.*Return tensors",
    ),
    "generator": (
        lambda: Net(lambda net, x: iter([net.layer(x)])),
        (SEVEN,),
        (),
        next,
        "Make it tensors in a tuple",
    ),
}


@pytest.mark.parametrize("how", ["loop", "step"])
@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("kind", REFUSED)
def test_batches_and_outputs_that_cannot_be_split_are_refused_with_a_remedy(kind, devices, how):
    make, args, targets, loss_fn, message = REFUSED[kind]
    module = make()
    before = copy.deepcopy(module.state_dict())
    model = fastdp.wrap(module, gpus=devices)
    run = model.train_step(loss_fn, sgd) if how == "step" else lambda args, *targets: model(*args)
    with pytest.raises((ValueError, TypeError), match=f"(?s){message}"):
        run(args, *targets)
    torch.testing.assert_close(dict(module.state_dict()), dict(before), rtol=0, atol=0)


RIGHT = {
    "lengths of a pack": (lambda: Recurrent(5), (numbers(7, 5, 4), LENGTHS), (), first_of, None),
    "class weights": (Net, (SEVEN,), ((TARGETS, WEIGHTS),), weighted, None),
    "class weights that are named": (Net, (SEVEN,), ((TARGETS, WEIGHTS),), weighted, {"target[1]": "same"}),
    "class weights with a mark": (Net, (SEVEN,), ((TARGETS, fastdp.same(WEIGHTS.clone())),), weighted, None),
    "strings": (lambda: Net(lambda net, x, names: net.layer(x)), (SEVEN, ["a"] * 7), (), first_of, None),
    "numbers without axes": (
        lambda: Net(lambda net, x, a, b: net.layer(x) * a * b),
        (SEVEN, torch.tensor(2.0), np.float64(0.5)),
        (),
        first_of,
        None,
    ),
    "expanded": (Net, (SEVEN[:1].expand(7, 4),), (TARGETS,), F.cross_entropy, None),
    "every second column": (Net, (numbers(7, 8)[:, ::2],), (TARGETS,), F.cross_entropy, None),
    "conjugated": (
        lambda: Net(lambda net, x: net.layer((x * x).imag)),
        (torch.complex(SEVEN, SEVEN + 1).conj(),),
        (),
        first_of,
        None,
    ),
    "negated": (Net, (torch.complex(SEVEN, SEVEN).conj().imag,), (), first_of, None),
    "channels last": (
        lambda: nn.Sequential(nn.Conv2d(4, 3, 3), nn.Flatten()).double(),
        (numbers(7, 4, 5, 5).to(memory_format=torch.channels_last),),
        (),
        first_of,
        None,
    ),
    "keys that are numbers": (lambda: Net(lambda net, x: net.layer(x[0])), ({0: SEVEN},), (), first_of, None),
}


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", RIGHT)
def test_what_can_be_split_trains_as_on_one_device(kind, devices):
    make, args, targets, loss_fn, rows = RIGHT[kind]
    torch.manual_seed(0)
    module = make()
    reference = copy.deepcopy(module)
    model = fastdp.wrap(module, gpus=devices, rows=rows)
    step, optimizer = model.train_step(loss_fn, sgd), sgd(reference.parameters())
    for _ in range(2):
        expected = loss_fn(reference(*args), *targets)
        for found in (loss_fn(model(*args), *targets), step(args, *targets)):
            torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-12, atol=0)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
    for p, q in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


# What forward returns for the rows of a device, by whether row 17 is among them.
DIFFERENT = {
    "fewer": (lambda net, x: (net.layer(x),) * (1 if special(x) else 2), r"`output\[1\]` is .*missing"),
    "none": (lambda net, x: (net.layer(x), x if special(x) else None), r"`output\[1\]` is .*None"),
    "number": (lambda net, x: (net.layer(x), float(special(x))), r"`output\[1\]` is (0\.0|1\.0) on"),
    "text": (lambda net, x: {"y": net.layer(x), "kind": str(special(x))}, r"`output\['kind'\]` is '"),
    "dtype": (lambda net, x: net.layer(x).float() if special(x) else net.layer(x), "`output` is .*float32"),
    "length": (lambda net, x: net.layer(x)[:, : 2 if special(x) else 3], r"\(1, 2\).*total_length"),
    "axes": (lambda net, x: net.layer(x).sum(1) if special(x) else net.layer(x), r"`output` is .*\(1,\)"),
}


@pytest.mark.parametrize("reduction", ["loop", None, "mean"])
@pytest.mark.parametrize("kind", DIFFERENT)
def test_outputs_of_other_forms_on_one_of_the_devices_are_refused(kind, reduction):
    run, message = DIFFERENT[kind]
    module, plain = Net(run), marked()
    plain[17, 3] = 0
    model = fastdp.wrap(module, gpus=8)
    how = None if reduction == "loop" else reduction
    step = model.train_step(lambda o: first_of(o["y"] if isinstance(o, dict) else o), sgd, reduction=how)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=f"must have one form on all devices.*{message}") as caught:
        model(marked()) if reduction == "loop" else step(marked())
    assert caught.value.rows[1] - caught.value.rows[0] == 5
    torch.testing.assert_close(dict(module.state_dict()), dict(before), rtol=0, atol=0)
    model(plain) if reduction == "loop" else step(plain)  # the next one is right again


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_class_weights_are_named_where_a_device_needs_its_own_targets(reduction):
    step = fastdp.wrap(Net(), gpus=3).train_step(weighted, sgd, reduction=reduction)
    with pytest.raises(ValueError, match=r"'target\[1\]': 3.*class weights.*\"target\[1\]\": \"same\".*fastdp.same"):
        step(SEVEN, (TARGETS, WEIGHTS))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_targets_in_a_list_are_whole_on_each_device_and_refused_where_it_needs_its_own(reduction):
    def loss_fn(outputs, targets):
        each = torch.stack([(o.sum() - t) ** 2 for o, t in zip(outputs, targets, strict=False)])
        return each.mean() if reduction == "mean" else each.sum()

    targets = [float(i) for i in range(7)]
    model = fastdp.wrap(Net(), gpus=3)
    with pytest.raises(ValueError, match=r"list of 7 values.*Make it a tensor, or use reduction=None"):
        model.train_step(loss_fn, sgd, reduction=reduction)(SEVEN, targets)
    for how, given in ((None, targets), (reduction, torch.tensor(targets, dtype=DOUBLE))):
        expected = loss_fn(model.module(SEVEN), targets).detach()
        found = model.train_step(loss_fn, sgd, reduction=how)(SEVEN, given)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


LOSSES = {
    "vector": (lambda o, t: (o - t).square().mean(1), ValueError, r"one number.*shape.*Reduce it"),
    "nothing": (lambda o, t: None, TypeError, "must return"),
    "float": (lambda o, t: float((o - t).sum().detach()), TypeError, "must return"),
    "detached": (lambda o, t: (o - t).detach().sum(), ValueError, r"without a gradient.*detach"),
    "integer": (lambda o, t: (o - t).argmax(), ValueError, "without a gradient"),
}


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("kind", LOSSES)
def test_losses_that_are_no_number_with_a_gradient_are_refused(kind, devices):
    loss_fn, error, message = LOSSES[kind]
    model = fastdp.wrap(Net(), gpus=devices)
    with pytest.raises(error, match=message):
        model.train_step(loss_fn, sgd)(SEVEN, numbers(7, 3))


@pytest.mark.parametrize("devices", [1, 3])
def test_forgotten_targets_and_modules_that_cannot_train_are_named(devices):
    model = fastdp.wrap(Net(), gpus=devices)
    for loss_fn in (F.mse_loss, nn.CrossEntropyLoss(), lambda o, t: (o - t).sum()):
        with pytest.raises(TypeError, match=r"must get the targets.*step\(x, y\)"):
            model.train_step(loss_fn, sgd)(SEVEN)
    model.train_step(first_of, sgd)(SEVEN)
    step = model.train_step(first_of, sgd)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing to train.*frozen"):
        step(SEVEN)
    model.requires_grad_(True)
    assert float(step(SEVEN)) > 0


def test_a_failure_in_the_users_code_names_device_and_rows_and_keeps_its_traceback():
    def fails_late(net, x):
        return {}["my key"] if special(x) else net.layer(x)

    model = fastdp.wrap(Net(fails_late), gpus=8)
    for run in (model, model.train_step(first_of, sgd)):
        with pytest.raises(KeyError, match=r"virtual:3 \(rows 15 to 20 of the batch's 40\).*my key") as caught:
            run(marked())
        assert "fails_late" in "".join(traceback.format_exception(caught.value))
        assert (caught.value.device, caught.value.rows) == ("virtual:3", (15, 20))


# Loops, whose errors are torch's own.


def run_loop(model):
    return F.mse_loss(model(SEVEN), numbers(7, 3)), sgd(model.parameters())


def test_torchs_own_errors_of_loops_come_as_on_one_device():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double()
    for model in (fastdp.wrap(copy.deepcopy(module), gpus=3), module):
        loss, _ = run_loop(model)
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()
        outputs = model(SEVEN)
        outputs.sum().backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            outputs.square().sum().backward()
        loss, optimizer = run_loop(model)
        loss.backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_train_step_between_forward_and_backward_is_torchs_error_and_so_is_none_in_a_window():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double()
    model = fastdp.wrap(module, gpus=3)
    step = model.train_step(F.mse_loss, sgd)
    loss, _ = run_loop(model)
    step(SEVEN, numbers(7, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    window = model.train_step(F.mse_loss, sgd, accumulate=2)
    reference = copy.deepcopy(module)
    window(SEVEN, numbers(7, 3))
    run_loop(model)[0].backward()
    window(SEVEN, numbers(7, 3))
    ours = copy.deepcopy(module)
    loss, optimizer = run_loop(reference)
    loss.backward()
    optimizer.step()
    for p, q in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


# Modules.


def quantized():
    net = Net()
    with warnings.catch_warnings():  # torch warns once in a process
        warnings.simplefilter("ignore", UserWarning)
        net.register_buffer("q", torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))
    return net


def on_meta():
    with torch.device("meta"):
        return nn.Linear(4, 3)


MODULES = {
    "parallel": (lambda: nn.DataParallel(nn.Linear(4, 3)), r"DataParallel. Wrap the module inside it: \.module"),
    "wrapped": (lambda: fastdp.wrap(Net(), gpus=2), "parallel already. Wrap its module"),
    "synchronized": (lambda: nn.Sequential(nn.SyncBatchNorm(3)), "SyncBatchNorm.*sync_batch_norm=True"),
    "lazy": (lambda: nn.LazyLinear(3), "lazy.*Call the model on one batch"),
    "meta": (on_meta, r"on meta. Call model.to\('cpu'\) first"),
    "quantized": (quantized, "'q' is quantized.*Train the module before"),
}


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("kind", MODULES)
def test_modules_that_cannot_be_wrapped_are_refused_with_a_remedy(kind, devices):
    make, message = MODULES[kind]
    module = make()
    with pytest.raises(ValueError, match=message):
        fastdp.wrap(module, gpus=devices)


def test_a_module_that_was_moved_to_meta_is_named_and_can_be_filled_again():
    module = Net()
    saved = copy.deepcopy(module.state_dict())
    model = fastdp.wrap(module, gpus=3)
    expected = model(SEVEN)
    module.to("meta")
    with pytest.raises(RuntimeError, match=r"`layer.weight` of the module is on the device meta.*to_empty"):
        model(SEVEN)
    module.to_empty(device="cpu")
    module.load_state_dict(saved)
    torch.testing.assert_close(model(SEVEN), expected, rtol=1e-12, atol=0)


def test_a_functional_call_of_a_parallel_module_is_refused_and_changes_no_weights():
    module = Net()
    model, before = fastdp.wrap(module, gpus=3), copy.deepcopy(module.state_dict())
    others = {name: (p.detach() * 2).requires_grad_() for name, p in module.named_parameters()}
    expected = torch.func.functional_call(module, others, (SEVEN,))
    for tensors in (others, {name: nn.Parameter(p.detach() * 2) for name, p in module.named_parameters()}):
        for around in (torch.enable_grad, torch.inference_mode):
            with around(), pytest.raises(NotImplementedError, match=r"functional_call.*model\.module"):
                torch.func.functional_call(model, tensors, (SEVEN,))
    torch.testing.assert_close(dict(module.state_dict()), dict(before), rtol=0, atol=0)
    torch.testing.assert_close(torch.func.functional_call(model.module, others, (SEVEN,)), expected, rtol=0, atol=0)
    module.layer._parameters["weight"] = others["layer.weight"]
    with pytest.raises(RuntimeError, match=r"`layer.weight` .*in place of its parameter.*model\.module"):
        model(SEVEN)


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=None)
        self.double()

    def forward(self, x):
        return self.norm(self.layer(x))


def with_hook(change):
    def make():
        net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        change(net[0])
        return net

    return make


STATEFUL = {
    "weight_norm of old": with_hook(weight_norm),
    "spectral_norm of old": with_hook(spectral_norm),
    "pruning": with_hook(lambda layer: prune.l1_unstructured(layer, "weight", 0.3)),
    "running means of all batches": Normalized,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("devices", [1, 2, 3, 7])
@pytest.mark.parametrize("kind", STATEFUL)
def test_modules_that_compute_weights_or_average_all_batches_train_as_on_one_device(kind, devices):
    found = []
    for parallel in (True, False):
        torch.manual_seed(0)
        module = STATEFUL[kind]()
        if parallel:
            model = fastdp.wrap(module, gpus=devices, sync_batch_norm=True)
            step, optimizer = model.train_step(F.mse_loss, sgd), sgd(model.parameters())
        else:
            model, optimizer = module, sgd(module.parameters())
        losses = []
        for i in range(4):
            x, y = numbers(7, 4, seed=i), numbers(7, 3, seed=9 + i)
            if parallel and i % 2:
                losses.append(float(step(x, y)))
                continue
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        found.append((losses, dict(module.state_dict())))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


class Remembers(nn.Module):
    """A cache of keys, one row for each row of the batch, in a list or in a buffer."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.layer, self.where, self.cache = nn.Linear(4, 4).double(), where, []
        self.register_buffer("state", torch.zeros(7, 4, dtype=DOUBLE) if where == "state" else None)

    def forward(self, x):
        if self.where == "state":
            self.state = torch.tanh(self.layer(x) + self.state).detach()
            return self.state
        self.cache.append(self.layer(x))
        return torch.stack(self.cache).sum(0)


@pytest.mark.parametrize(("where", "name"), [("cache", r"cache\[0\]"), ("state", "state")])
def test_a_state_by_rows_that_forward_reads_is_named_with_its_remedy(where, name):
    model = fastdp.wrap(Remembers(where), gpus=2)
    if where == "cache":
        model(SEVEN)
    with pytest.raises(ValueError, match=rf"holds `{name}`.*pass it as an argument and return the new"):
        model(SEVEN)


def test_buffers_that_share_memory_say_what_to_register():
    module = nn.Linear(4, 3)
    module.register_buffer("table", torch.zeros(5, 3))
    module.register_buffer("first", module.table[0])
    with pytest.raises(ValueError, match=r"'table'.*share memory.*same tensor under both names.*self\.table\[0\]"):
        fastdp.wrap(module, gpus=2)
