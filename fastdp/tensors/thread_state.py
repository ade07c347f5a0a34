"""What Python and torch keep for the user's thread around a step: it counts on replicas' threads, or is refused.

Torch keeps autocast, hooks on saved tensors, modes and more for each thread, and Python its context variables. Replicas
run on threads of their own, where a step has to find what one device would.
"""

from __future__ import annotations

import contextvars
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.autograd import forward_ad, graph
from torch.nn.utils import parametrize
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fastdp.patching import Patch
from fastdp.tensors.function_mode import ReplicaMode
from fastdp.tensors.thread_locals import ThreadLocals
from fastdp.tensors.threads import end_pool

P = ParamSpec("P")
ResultT = TypeVar("ResultT")
_SMALLEST, _ONE = 5e-324, 1.0
_OWN_RECOMPUTATION = "torch.utils.checkpoint"


class _Replica(threading.local):
    """Whether the calling thread runs one of several replicas."""

    runs = False


_replica = _Replica()


class _NoCache(dict[Any, Any]):
    """The cache of parametrizations while several replicas run: refuses them, and serves other threads.

    Torch's keys are those of the module that was parametrized first, also in copies of it.
    """

    def get(self, key: Any, default: Any = None) -> Any:
        """Called by torch for a parametrized tensor inside of `cached()`."""
        if _replica.runs:
            raise NotImplementedError(_CACHED)
        return super().get(key, default)


def _but_not_by_compilers(set_rng_state: Callable[[torch.Tensor], None]) -> Callable[[torch.Tensor], None]:
    """Torch's function, which does nothing for the compiler in a replica's thread.

    The compiler draws nothing, and restores the generator's state afterwards: other replicas may have drawn meanwhile.
    """

    def called(new_state: torch.Tensor) -> None:
        if not _replica.runs or not str(sys._getframe(1).f_globals.get("__name__")).startswith("torch._dynamo"):
            set_rng_state(new_state)

    return called


_draws_stay = Patch([(torch.random, "set_rng_state", _but_not_by_compilers)])


class ThreadState:
    """What is kept for one thread: context variables, hooks on saved tensors, and how subnormal numbers are taken.

    Args:
        several: whether several replicas will run.
        thread_locals: objects of `threading.local` whose attributes the replicas' threads have too.
        variables: context variables of the user's, besides those that are globals.
    """

    __slots__ = (
        "_around",
        "_context",
        "_flushes",
        "_locals",
        "_lock",
        "_no_hooks",
        "_saved",
        "_several",
        "_thread",
        "_variables",
    )

    def __init__(
        self,
        *,
        several: bool = False,
        thread_locals: Sequence[threading.local] = (),
        variables: Sequence[contextvars.ContextVar[Any]] = (),
    ) -> None:
        self._several, self._variables = several, variables
        self._locals = ThreadLocals(thread_locals)
        self._thread, self._lock = threading.get_ident(), threading.Lock()
        self._context = contextvars.copy_context()
        self._flushes = flushes_subnormals()
        self._saved: tuple[Any, Any] | None = torch._C._autograd._top_saved_tensors_default_hooks(False)
        self._no_hooks: str | None = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
        self._around = bool(self._saved is not None or self._no_hooks is not None or thread_locals)

    def run(self, work: Callable[P, ResultT], *args: P.args, **kwargs: P.kwargs) -> ResultT:
        """Run `work` on another thread as on the one that the state is of.

        Raises:
            RuntimeError: `work` changes a context variable or an attribute of a `threading.local`, which the other
                thread would not see.
            NotImplementedError: `work` caches parametrizations, and several replicas run.
        """
        if threading.get_ident() == self._thread:
            return work(*args, **kwargs)
        context = self._context.copy()
        if not self._around and self._flushes == flushes_subnormals():
            result = self._in_context(context, work, *args, **kwargs)
        else:
            with _subnormals(flushed=self._flushes), self._saved_tensors(), self._locals.applied():
                result = self._in_context(context, work, *args, **kwargs)
        if len(context) or len(self._context):
            self._check_unchanged(context)
        return result

    def _in_context(
        self, context: contextvars.Context, work: Callable[P, ResultT], *args: P.args, **kwargs: P.kwargs
    ) -> ResultT:
        """Run `work` as a replica."""
        _replica.runs = self._several
        try:
            return context.run(work, *args, **kwargs)
        finally:
            _replica.runs = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold this while replicas run."""
        if not self._several:
            yield
            return
        before = parametrize._cache
        parametrize._cache = ours = _NoCache(before)
        try:
            with _draws_stay if "torch._dynamo" in sys.modules else nullcontext():
                yield
        finally:
            if parametrize._cache is ours:
                parametrize._cache = before

    def _check_unchanged(self, context: contextvars.Context) -> None:
        for variable in (*context, *self._context):
            same = context.get(variable, _GONE) is self._context.get(variable, _GONE)
            if not same and (variable in self._variables or _is_the_users(variable)):
                raise RuntimeError(
                    f"The module changes the context variable {variable.name!r} in forward, and each device has its "
                    "own context, which ends with the pass. Return the value instead, or keep it in a registered "
                    "buffer; a value that only forward itself needs can be reset there (ContextVar.reset)."
                )

    @contextmanager
    def _saved_tensors(self) -> Iterator[None]:
        """Apply the hooks on saved tensors."""
        if self._no_hooks is not None:
            with graph.disable_saved_tensors_hooks(self._no_hooks):
                yield
            return
        # A checkpoint around the call keeps nothing of the replicas' graphs, which repeat nothing.
        if self._saved is None or getattr(self._saved[0], "__module__", "") == _OWN_RECOMPUTATION:
            yield
            return
        with graph.saved_tensors_hooks(*map(self._in_turn, self._saved)):
            yield

    def _in_turn(self, hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """A hook that one replica calls at a time, as on one device. Torch's own need no turns."""
        if getattr(hook, "__module__", "").startswith("torch."):
            return hook
        lock = self._lock

        def called(value: Any) -> Any:
            with lock:
                return hook(value)

        return called


_GONE = object()
_LIBRARIES = frozenset({"torch", "numpy", *sys.stdlib_module_names})
_CACHED = (
    "The module runs `torch.nn.utils.parametrize.cached()` in forward. It is one cache for the whole process, so "
    "replicas in several threads would use and clear each other's. Compute a parametrized tensor once and keep it in a "
    "variable (`weight = self.layer.weight`), or use gpus=[0]."
)


@functools.cache
def _is_the_users(variable: contextvars.ContextVar[Any]) -> bool:
    """Whether a context variable is a global of other code than torch, NumPy and Python, which set their own."""
    modules = [module for name, module in list(sys.modules.items()) if name.split(".")[0] not in _LIBRARIES]
    return any(variable is value for module in modules for value in list(getattr(module, "__dict__", {}).values()))


@contextmanager
def _subnormals(*, flushed: bool) -> Iterator[None]:
    """Flush subnormal numbers to zero, or do not: a setting of each thread."""
    before = flushes_subnormals()
    if before == flushed:
        yield
        return
    end_pool()  # new helpers take over the setting
    torch.set_flush_denormal(flushed)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
        end_pool()


def flushes_subnormals() -> bool:
    """Whether this thread flushes subnormal numbers to zero."""
    return _SMALLEST * _ONE == 0.0


def check_around(module: nn.Module, what: str) -> None:
    """Refuse what is around a call on several devices and cannot count on the replicas' threads. Called before it.

    Args:
        module: the user's.
        what: the call, for messages: "a train step".

    Raises:
        NotImplementedError: something is; the message names it and the remedy.
    """
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        _check_modes(what)
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            f"{what} inside a transform of torch.func (grad, vmap, jvp), which does not reach the threads of several "
            "devices. Transform the module itself, model.module, or use gpus=[0]."
        )
    if forward_ad._current_level >= 0:
        raise NotImplementedError(
            f"{what} inside torch.autograd.forward_ad.dual_level: tangents do not reach the threads of several "
            "devices. Call the module itself, model.module, or use gpus=[0]."
        )
    if torch._C._get_tracing_state() is not None:
        raise NotImplementedError(
            f"{what} inside torch.jit.trace or torch.onnx.export, which does not see the threads of several devices. "
            "Trace the module itself, model.module."
        )
    if parametrize._cache_enabled and any(parametrize.is_parametrized(part) for part in module.modules()):
        raise NotImplementedError(
            f"{what} inside torch.nn.utils.parametrize.cached(), which is one cache for the whole process: devices "
            "would use each other's values. Leave it out, or use gpus=[0]."
        )


def _check_modes(what: str) -> None:
    """Refuse modes of this thread, except a default device that is the host."""
    for mode in (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()):
        if isinstance(mode, ReplicaMode):
            raise NotImplementedError(
                f"{what} inside the forward of another parallel module, whose devices are busy. Keep the plain module "
                "in its place: model.module"
            )
        if isinstance(mode, DeviceContext):
            if mode.device.type != "cpu":
                raise NotImplementedError(
                    f"{what} with the default device {str(mode.device)!r} (torch.set_default_device, or `with "
                    "torch.device`): several devices each have their own. Make tensors in forward on the device of an "
                    "input (device=x.device), and set the default device to None."
                )
        else:
            name = type(mode).__name__.lstrip("_")
            raise NotImplementedError(
                f"{what} inside the mode {name}, which torch keeps for the calling thread: it would not see the "
                "operations of several devices. Run the module itself in the mode, model.module (FLOPs, for example, "
                "are the same), enter the mode inside forward, or use gpus=[0]."
            )
