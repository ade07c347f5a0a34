"""Calls on one device of the host: plain torch, or captured where that is faster and the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from fastdp.capture.kinds import CapturesByKind
from fastdp.capture.steps import Captures
from fastdp.comm.batch import Batch
from fastdp.comm.context import Context
from fastdp.comm.rendezvous import Rendezvous
from fastdp.engine.step_scope import alone_for
from fastdp.errors import DeviceTimeoutError
from fastdp.options import Options
from fastdp.program.torch.batch import Structure
from fastdp.program.torch.capture.call_kinds import CallKind, CallKinds
from fastdp.program.torch.capture.lone_loop import LoneLoop
from fastdp.program.torch.capture.plain_forward import OwnedCaptured, PlainForward
from fastdp.program.torch.capture.plain_replays import PlainReplays
from fastdp.program.torch.capture.replays import CHECKS
from fastdp.program.torch.nest import PLAIN, Nest
from fastdp.runtime.forks import LongLock
from fastdp.runtime.queue import QueueDevice
from fastdp.shard import Rows
from fastdp.tensors.arrays import to_tensor
from fastdp.torch.captured import is_observed

_NOBODY = Rendezvous(1, 1.0)
_MOST_SETTLED = 200


class PlainCalls:
    """Runs calls of a module on one device of the host. Any thread may call it.

    Args:
        module: the user's own.
        device: of the host.
        options: as in `fastdp.wrap`.

    Calls that are captured come one after the other. If a second thread calls meanwhile, it waits, and from then on all
    calls are plain torch, at the same time: a trace puts other tensors in the place of the module's own.
    """

    def __init__(self, module: nn.Module, device: QueueDevice, options: Options) -> None:
        self.module = module
        self._device, self._options = device, options
        self._parameters = list(module.parameters())
        self._kinds, self._replays = CallKinds(module), PlainReplays(module)
        self.captures: CapturesByKind[OwnedCaptured] = CapturesByKind(self._make)
        self._settled: set[Any] = set()  # shapes whose calls go on as plain torch
        self._specs: dict[int, Any] = {}
        self._lock, self._owner = LongLock(), 0
        self._plain = "compile=None" if options.compile is None else ""  # why all calls are plain torch
        self._loop: LoneLoop | None = None
        if options.compile is not None:
            self._loop = LoneLoop(
                module, device, options.compile, alone_for(options), deterministic=options.deterministic
            )

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's outputs. Arrays among the arguments are tensors for it."""
        if kwargs or not all(type(one) is torch.Tensor for one in args):
            args, kwargs = _without_arrays(args, kwargs)
        if self._plain or self._owner == threading.get_ident():  # a call inside of a call
            return self.module(*args, **kwargs)
        if not self._lock.acquire(blocking=False):
            return self._beside(args, kwargs)
        self._owner = threading.get_ident()
        try:
            return self._call(args, kwargs)
        finally:
            self._owner = 0
            self._lock.release()

    def _beside(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call while another thread is in one."""
        if not self._lock.acquire(timeout=self._options.timeout):
            raise DeviceTimeoutError(
                f"A call in another thread took longer than timeout={self._options.timeout} seconds."
            )
        self._plain = "calls come from several threads at once"
        self._lock.release()
        return self.module(*args, **kwargs)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        began = time.perf_counter()
        records = torch.is_grad_enabled()
        if records and any(one.requires_grad for one in self._parameters):
            return self._call_with_gradients(args, kwargs)
        leaves, spec = self._flat(args, kwargs)
        inference = torch.is_inference_mode_enabled()
        looks = [_look(leaf, inference) for leaf in leaves]
        shape = (self.module.training, records, inference, *looks)
        if None in looks or shape in self._settled or _is_around():
            return self.module(*args, **kwargs)
        looked = time.perf_counter() - began
        structure = Structure(Nest(spec, tuple(leaves), ()), inference=inference)
        batch = Batch([], structure, _rows_of(leaves))
        kind = self._kinds.of(structure)
        captures = self.captures.of(kind, kind.label)
        if captures is None:
            return self._settle(shape, args, kwargs)
        with _outside(inference):
            captures.prepare(batch, True)
        context = Context(0, Rows(0, batch.rows, batch.rows), 0, _NOBODY, 1, batch, structure, True, self._device)
        captured = captures.find(context)
        if captured is None or captured.disagreed:
            if captures.stays_eager(context):
                return self._settle(shape, args, kwargs)
            began = time.perf_counter() - looked  # what such a call takes once nobody asks any more
            outputs = self.module(*args, **kwargs)
        elif captured.checks:
            outputs = self._replays.compared(captured, args, kwargs, context)
        else:
            outputs = self._replays.replayed(captured, args, kwargs, context)
        captures.note(time.perf_counter() - began)
        return outputs

    def _call_with_gradients(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, spec = self._flat(args, kwargs)
        looks = [_look(leaf, False, gradients=True) for leaf in leaves]
        shape = (self.module.training, "gradients", *looks)
        if None in looks or shape in self._settled or _is_around():
            return self.module(*args, **kwargs)
        assert self._loop is not None
        structure = Structure(Nest(spec, tuple(leaves), ()))
        outputs, stays_plain = self._loop(Batch([], structure, _rows_of(leaves)), args, kwargs)
        if stays_plain and len(self._settled) < _MOST_SETTLED:
            self._settled.add(shape)
        return outputs

    @property
    def report(self) -> list[dict[str, Any]]:
        """As `CapturesByKind.report`."""
        if self._plain or self._loop is None:
            return [{"how": "eager", "why": self._plain}]
        return [*self.captures.report, *self._loop.captures.report]

    @property
    def compiling(self) -> bool:
        """As `CapturesByKind.compiling`."""
        return self.captures.compiling or (self._loop is not None and self._loop.captures.compiling)

    def wait(self, timeout: float | None = None) -> None:
        """As `CapturesByKind.wait`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self.captures.wait(timeout)
        if self._loop is not None:
            self._loop.captures.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))

    def _settle(self, shape: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call, after which those of its shape are plain torch without further questions."""
        if len(self._settled) < _MOST_SETTLED:
            self._settled.add(shape)
        return self.module(*args, **kwargs)

    def _flat(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Sequence[Any], Any]:
        """The leaves of the arguments, and their nest with no targets."""
        if kwargs or not all(type(one) is torch.Tensor for one in args):
            return pytree.tree_flatten((args, kwargs, ()))
        if len(args) not in self._specs:
            self._specs[len(args)] = pytree.tree_flatten((args, {}, ()))[1]
        return args, self._specs[len(args)]

    def _make(self, kind: CallKind) -> Captures[OwnedCaptured]:
        step, options = PlainForward(self.module, self._device, records=kind.records), self._options
        assert options.compile is not None
        return Captures(
            step,
            options.compile,
            1,
            alone=alone_for(options),
            deterministic=options.deterministic,
            checks=CHECKS,
            capture=OwnedCaptured,
        )


def _without_arrays(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with tensors in place of arrays; the same objects if there are none."""
    if any(isinstance(leaf, (np.ndarray, np.generic)) for leaf in pytree.tree_leaves((args, kwargs))):
        args, kwargs = pytree.tree_map(to_tensor, (args, kwargs))
    return args, kwargs


def _look(leaf: Any, inference: bool, *, gradients: bool = False) -> Any:
    """What a call depends on of an argument; None if it is of a kind that is not captured.

    `inference`: the call is in inference mode. `gradients`: the argument may want one.
    """
    if type(leaf) is torch.Tensor:
        strided = leaf.layout is torch.strided and leaf.is_cpu and not (leaf.is_nested or leaf.is_quantized)
        wants = leaf.requires_grad
        special = (
            (wants and not gradients) or leaf.is_conj() or leaf.is_neg() or (leaf.is_inference() and not inference)
        )
        return (leaf.shape, leaf.dtype, wants) if strided and not special else None
    if leaf is None or isinstance(leaf, (bool, str)):
        return (leaf,)
    return type(leaf) if isinstance(leaf, PLAIN) else None


def _rows_of(leaves: Sequence[Any]) -> int:
    """The number of rows for the report: the first length of the first tensor with axes."""
    return next((max(1, leaf.shape[0]) for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim), 1)


def _is_around() -> bool:
    """Whether something around the call sees the operations of a plain call, or changes them."""
    return bool(
        is_observed()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or parametrize._cache_enabled
    )


def _outside(inference: bool) -> AbstractContextManager[Any]:
    """Out of inference mode: its tensors cannot be traced."""
    if not inference:
        return nullcontext()
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.no_grad())
    return stack
