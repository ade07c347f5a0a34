"""LSTM and GRU over all time steps as single torch operations, forward and backward, in Keras's gate order.

    lstm_onednn   oneDNN's LSTM: float32 on a CPU, its rows in parts; gives outputs, the last h and the last c
    lstm_scan     the same by ATen operations on any device; gives all h and all c
    gru_scan      GRU by ATen operations, `reset_after` or not; gives all h

A trace sees one opaque operation forward and one backward. The scans project the inputs of all time steps by one
matrix product. They keep time first and rows last, (steps, units, rows), so that the gates of a step are contiguous.
Their backward first computes, by whole-array operations, the factors between the gradient of a step's output and the
gradients of its gates. Each step then needs only a matrix product and a few elementwise operations.

Shapes: x (rows, steps, features), h and c (rows, units), kernel (features, gates * units), recurrent (units,
gates * units), bias (gates * units); for gru_scan with `reset_after` recurrent_bias (gates * units), else ignored.
All float tensors have one dtype. Results own their memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.library import custom_op

from fastdp.tensors.at_once import is_small
from fastdp.tensors.rnn_layer import rnn_layer, rnn_layer_backward
from fastdp.tensors.threads import intra_op_threads

_LSTM = 2  # ATen's number for LSTM among its kinds of recurrent networks


def has_onednn(x: Tensor) -> bool:
    """Whether oneDNN's LSTM can take these inputs."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() > 0
        and torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
    )


# LSTM by oneDNN.


def _onednn_weights(kernel: Tensor, recurrent: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return kernel.t().contiguous(), recurrent.t().contiguous(), bias, torch.zeros_like(bias)


def _lstm_onednn(
    x: Tensor, h: Tensor, c: Tensor, kernel: Tensor, recurrent: Tensor, bias: Tensor, train: bool, parts: int
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    options: tuple[Any, ...] = (False, [], _LSTM, h.shape[1], 1, True, False, False, train)
    weights = _onednn_weights(kernel, recurrent, bias)
    outputs, last_h, last_c, workspaces = rnn_layer(x.transpose(0, 1), weights, h, c, options, parts, train)
    return outputs, last_h.reshape(h.shape), last_c.reshape(c.shape), workspaces


@functools.cache
def _workspace_bytes(
    rows: int, steps: int, features: int, units: int, train: bool, parts: int
) -> list[tuple[int, ...]]:
    """The shapes of oneDNN's workspaces, which only oneDNN knows."""
    with unset_fake_temporarily(), torch.no_grad():
        shapes = ((rows, steps, features), (rows, units), (rows, units), (features, 4 * units), (units, 4 * units))
        zeros = [torch.zeros(shape, dtype=torch.float32) for shape in (*shapes, (4 * units,))]
        x, h, c, kernel, recurrent, bias = zeros
        return [tuple(one.shape) for one in _lstm_onednn(x, h, c, kernel, recurrent, bias, train, parts)[3]]


def _lstm_onednn_fake(
    x: Tensor, h: Tensor, c: Tensor, kernel: Tensor, recurrent: Tensor, bias: Tensor, train: bool, parts: int
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    sizes = [int(size) for size in (*x.shape, h.shape[1])]  # no symbols: only oneDNN knows its workspace
    workspaces = [x.new_empty(shape, dtype=torch.uint8) for shape in _workspace_bytes(*sizes, train, parts)]
    return x.new_empty(sizes[1], *h.shape), x.new_empty(h.shape), x.new_empty(c.shape), workspaces


def _lstm_onednn_backward(
    inputs: list[Tensor], results: list[Tensor], gradients: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, h, c, kernel, recurrent, bias = inputs
    options: tuple[Any, ...] = (False, _LSTM, h.shape[1], 1, True, True, False, [], False)
    weights = _onednn_weights(kernel, recurrent, bias)
    found = rnn_layer_backward(x.transpose(0, 1), weights, (h, c), results[:3], gradients, options, results[3:])
    dx, dkernel, drecurrent, dbias, _, dh, dc = found
    dx = dx.transpose(0, 1).contiguous()
    return dx, dh.reshape(h.shape), dc.reshape(c.shape), dkernel.t().contiguous(), drecurrent.t().contiguous(), dbias


def _like(tensors: list[Tensor], *_: Any) -> tuple[Tensor, ...]:
    """Gradients have the shapes of their tensors, and are contiguous."""
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)


# LSTM by ATen operations.


def _project(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """(steps, gates * units, rows): the inputs' part of all gates."""
    steps = x.shape[1]
    return torch.baddbmm(bias[:, None], kernel.t().contiguous().expand(steps, -1, -1), x.permute(1, 2, 0))


def _before(first: Tensor, all_after: Tensor) -> Tensor:
    """(steps, units, rows): the states before each step."""
    return torch.cat([first.t()[None], all_after[:-1]])


def _lstm_scan(
    x: Tensor, h: Tensor, c: Tensor, kernel: Tensor, recurrent: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gates, units = _project(x, kernel, bias), h.shape[1]
    all_h, all_c = (gates.new_empty(gates.shape[0], units, gates.shape[2]) for _ in range(2))
    weights, h, c = recurrent.t().contiguous(), h.t().contiguous(), c.t().contiguous()
    of_steps = zip(gates.unbind(), all_h.unbind(), all_c.unbind(), strict=True)
    for gate, next_h, next_c in of_steps:
        gate.addmm_(weights, h)
        i, f, g, o = gate.split(units)
        gate[: 2 * units].sigmoid_()
        g.tanh_()
        o.sigmoid_()
        torch.mul(f, c, out=next_c).addcmul_(i, g)
        torch.tanh(next_c, out=next_h).mul_(o)
        h, c = next_h, next_c
    return all_h, all_c, gates


def _lstm_scan_fake(
    x: Tensor, h: Tensor, c: Tensor, kernel: Tensor, recurrent: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    states = (x.shape[1], h.shape[1], x.shape[0])
    return x.new_empty(states), x.new_empty(states), x.new_empty(states[0], kernel.shape[1], states[2])


def _lstm_scan_backward(
    inputs: list[Tensor], results: list[Tensor], gradients: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, h, c, kernel, recurrent, _ = inputs
    all_h, all_c, gates = results
    units = h.shape[1]
    i, f, g, o = gates.split(units, 1)
    tanh_c = all_c.tanh()
    dgates = torch.empty_like(gates)
    di, df, dg, do = dgates.split(units, 1)
    torch.addcmul(i, i, i, value=-1, out=di).mul_(g)
    torch.addcmul(f, f, f, value=-1, out=df).mul_(_before(c, all_c))
    torch.addcmul(i, i, g.square(), value=-1, out=dg)
    torch.addcmul(o, o, o, value=-1, out=do).mul_(tanh_c)
    c_by_h = torch.addcmul(o, o, tanh_c.square(), value=-1)
    dh, dc = torch.zeros_like(all_h[0]), torch.zeros_like(all_h[0])
    to_c = dgates[:, : 3 * units].unflatten(1, (3, units)).unbind()
    for t in reversed(range(len(to_c))):
        dh.add_(gradients[0][t])
        dc.add_(gradients[1][t]).addcmul_(dh, c_by_h[t])
        to_c[t].mul_(dc)
        do[t].mul_(dh)
        torch.mm(recurrent, dgates[t], out=dh)
        dc.mul_(f[t])
    return _lstm_inputs_gradients(x, _before(h, all_h), kernel, dgates, dh, dc)


def _lstm_inputs_gradients(
    x: Tensor, before: Tensor, kernel: Tensor, dgates: Tensor, dh: Tensor, dc: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, dkernel, dbias = _project_backward(x, kernel, dgates)
    return dx, dh.t().contiguous(), dc.t().contiguous(), dkernel, _products(before, dgates), dbias


def _products(left: Tensor, right: Tensor) -> Tensor:
    """The sum over steps and rows of the outer products of both tensors' units."""
    left, right = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (left, right))
    return left.t() @ right


def _project_backward(x: Tensor, kernel: Tensor, dgates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    flat = dgates.transpose(1, 2).flatten(0, 1)
    dx = (flat @ kernel.t()).view(x.shape[1], x.shape[0], -1).transpose(0, 1).contiguous()
    return dx, x.transpose(0, 1).flatten(0, 1).t() @ flat, flat.sum(0)


# GRU by ATen operations.


def _gru_scan(
    x: Tensor, h: Tensor, kernel: Tensor, recurrent: Tensor, bias: Tensor, recurrent_bias: Tensor, reset_after: bool
) -> tuple[Tensor, Tensor, Tensor]:
    gates, units = _project(x, kernel, bias), h.shape[1]
    all_h, inner = (gates.new_empty(gates.shape[0], units, gates.shape[2]) for _ in range(2))
    weights, h = recurrent.t().contiguous(), h.t().contiguous()
    gates[:, : 2 * units].add_(recurrent_bias[: 2 * units, None] if reset_after else 0.0)
    of_gates, of_new, bias_new = weights[: 2 * units], weights[2 * units :], recurrent_bias[2 * units :, None]
    for gate, next_h, q in zip(gates.unbind(), all_h.unbind(), inner.unbind(), strict=True):
        gate[: 2 * units].addmm_(of_gates, h).sigmoid_()
        z, r, new = gate.split(units)
        if reset_after:
            torch.addmm(bias_new, of_new, h, out=q)
            new.addcmul_(r, q).tanh_()
        else:
            torch.mul(r, h, out=q)
            new.addmm_(of_new, q).tanh_()
        torch.lerp(new, h, z, out=next_h)
        h = next_h
    return all_h, inner, gates


def _gru_scan_fake(
    x: Tensor, h: Tensor, kernel: Tensor, recurrent: Tensor, bias: Tensor, recurrent_bias: Tensor, reset_after: bool
) -> tuple[Tensor, Tensor, Tensor]:
    states = (x.shape[1], h.shape[1], x.shape[0])
    return x.new_empty(states), x.new_empty(states), x.new_empty(states[0], kernel.shape[1], states[2])


def _gru_scan_backward(
    inputs: list[Tensor], results: list[Tensor], gradients: list[Tensor], reset_after: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, h, kernel, recurrent, _, _ = inputs
    all_h, inner, gates = results
    units, before = h.shape[1], _before(h, all_h)
    z, r, new = gates.split(units, 1)
    # The factors that turn the gradient of a step's output into the gradients of z, r, the inner product, and `new`.
    factors = gates.new_empty(len(gates), 4, *all_h.shape[1:])
    by_z, by_r, by_inner, by_new = factors.unbind(1)
    torch.addcmul(z, z, z, value=-1, out=by_z).mul_(before - new)
    by_new.copy_((1 - z) * (1 - new.square()))
    torch.addcmul(r, r, r, value=-1, out=by_r)
    if reset_after:
        by_r.mul_(by_new).mul_(inner)
        torch.mul(by_new, r, out=by_inner)
        dh = _gru_steps_after(factors, z, recurrent, gradients[0])
        dgates = torch.cat([by_z, by_r, by_new], 1)
        to_recurrent = factors[:, :3].flatten(1, 2)
        drecurrent, dinner_bias = _products(before, to_recurrent), to_recurrent.sum((0, 2))
    else:
        by_r.mul_(before)
        dh = _gru_steps_before(factors, z, r, recurrent, gradients[0])
        dgates = torch.cat([by_z, by_r, by_new], 1)
        drecurrent = torch.cat([_products(before, dgates[:, : 2 * units]), _products(inner, by_new)], 1)
        dinner_bias = dgates.new_zeros(dgates.shape[1])
    dx, dkernel, dbias = _project_backward(x, kernel, dgates)
    return dx, dh.t().contiguous(), dkernel, drecurrent, dbias, dinner_bias


def _gru_steps_after(factors: Tensor, z: Tensor, recurrent: Tensor, gradient: Tensor) -> Tensor:
    """Turn factors into gradients in place, the last step first. Returns the gradient of the first state."""
    dh = torch.zeros_like(factors[0, 0])
    of_recurrent = factors[:, :3].flatten(1, 2).unbind()
    for t in reversed(range(len(of_recurrent))):
        dh.add_(gradient[t])
        factors[t].mul_(dh)
        dh.mul_(z[t]).addmm_(recurrent, of_recurrent[t])
    return dh


def _gru_steps_before(factors: Tensor, z: Tensor, r: Tensor, recurrent: Tensor, gradient: Tensor) -> Tensor:
    """The same for a reset gate that acts before the product with the recurrent weights."""
    dh = torch.zeros_like(factors[0, 0])
    units = len(dh)
    of_gates, of_new = recurrent[:, : 2 * units].contiguous(), recurrent[:, 2 * units :].contiguous()
    dinner = torch.empty_like(dh)
    for t in reversed(range(len(factors))):
        dh.add_(gradient[t])
        by_z, by_r, _, by_new = factors[t].unbind()
        by_z.mul_(dh)
        torch.mm(of_new, by_new.mul_(dh), out=dinner)
        by_r.mul_(dinner)
        dh.mul_(z[t]).addcmul_(dinner, r[t]).addmm_(of_gates, factors[t, :2].flatten(0, 1))
    return dh


# Registration.

_SIX = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
_LSTM_INPUTS = "Tensor x, Tensor h, Tensor c, Tensor kernel, Tensor recurrent, Tensor bias"
_GRU_INPUTS = "Tensor x, Tensor h, Tensor kernel, Tensor recurrent, Tensor bias, Tensor recurrent_bias"
_LISTS = "Tensor[] inputs, Tensor[] results, Tensor[] gradients"


def _with_few_threads(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, on one thread if a time step is too small to pay for synchronizing several."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        rows, units = (args if isinstance(args[0], Tensor) else args[0])[1].shape
        alone = torch.get_num_threads() > 1 and is_small(rows, units)
        with intra_op_threads(1) if alone else nullcontext():
            return function(*args)

    return run


def _registered(name: str, forward: Any, fake: Any, backward: Any, inputs: str, options: str, outputs: int) -> Any:
    """The operation and its backward, registered with torch.

    Args:
        options: the schema's arguments after the six differentiated tensors.
        outputs: how many results are differentiable; the others are kept for backward.
    """
    results = "Tensor, Tensor, Tensor" + (", Tensor[]" if name == "lstm_onednn" else "")
    if name != "lstm_onednn":  # whose parts see to it themselves
        forward, backward = _with_few_threads(forward), _with_few_threads(backward)
    op: Any = custom_op(f"fastdp::{name}", forward, mutates_args=(), schema=f"({inputs}{options}) -> ({results})")
    op.register_fake(fake)
    takes_options = options if name == "gru_scan" else ""
    backward_op: Any = custom_op(
        f"fastdp::{name}_backward", backward, mutates_args=(), schema=f"({_LISTS}{takes_options}) -> {_SIX}"
    )
    backward_op.register_fake(_like)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.save_for_backward(*inputs[:6], *output[:3], *(one for more in output[3:] for one in more))
        ctx.options = inputs[6:] if takes_options else ()
        ctx.ignored = len(inputs) - 6

    def differentiate(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        found = backward_op(list(saved[:6]), list(saved[6:]), list(gradients[:outputs]), *ctx.options)
        return (*found, *[None] * ctx.ignored)

    op.register_autograd(differentiate, setup_context=keep)
    return op


lstm_onednn = _registered(
    "lstm_onednn", _lstm_onednn, _lstm_onednn_fake, _lstm_onednn_backward, _LSTM_INPUTS, ", bool train, int parts", 3
)
lstm_scan = _registered("lstm_scan", _lstm_scan, _lstm_scan_fake, _lstm_scan_backward, _LSTM_INPUTS, "", 2)
gru_scan = _registered("gru_scan", _gru_scan, _gru_scan_fake, _gru_scan_backward, _GRU_INPUTS, ", bool reset_after", 1)
