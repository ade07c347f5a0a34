"""`PurePass`: what captured passes of a torch module have in common, with gradients or without."""

from __future__ import annotations

import hashlib
import re
import traceback
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import nn

from fastdp.capture.pure_step import Draw, Draws, Moved, ReplicaTensors
from fastdp.capture.trace import as_traced
from fastdp.comm.context import Context
from fastdp.errors import NotCapturable
from fastdp.program.torch.batch import Structure
from fastdp.program.torch.capture.lent_tensors import LentTensors
from fastdp.program.torch.capture.step_parts import ALONE, TOGETHER, NoTracedPeers, is_fake
from fastdp.program.torch.fast_paths import FAST_PATHS
from fastdp.program.torch.module import Slot
from fastdp.program.torch.random.checkpoints import REPEATED_DRAWS
from fastdp.program.torch.replica import ReplicaContext, ReplicaDraw
from fastdp.program.torch.shared_draws import SharedDraws
from fastdp.tensors.collectives import peers_scope
from fastdp.tensors.function_mode import ReplicaMode

OWN_COMPILATION = "torch.compile: the module runs its own compilation"


@dataclass(slots=True)
class RunningPass:
    """A pass that runs on tensors of its own: the replica, the module's tensors, and what was lent to the module."""

    running: ReplicaContext
    values: list[torch.Tensor]
    lent: LentTensors


class PurePass:
    """The members of `fastdp.capture.pure_step.PureStep` that all passes of a torch module share.

    Args:
        module: the user's own.
        slots: its parameters and buffers; their numbers are those of the variables.
        replicas: by rank; the program adds them.
        sync_batch_norm: as in `TorchProgram`.
        devices: the number of devices.

    A subclass has `compute`, which runs the module within `lent_pass`, and `flatten`, `watch` and `own_code`.
    """

    spans_devices = False

    def __init__(
        self,
        module: nn.Module,
        slots: Sequence[Slot],
        replicas: Mapping[int, ReplicaTensors],
        *,
        sync_batch_norm: bool,
        devices: int,
    ) -> None:
        self.name = type(module).__name__
        self.trained: list[int] = []
        self.replicas = replicas
        self.most_replicas = devices
        self._module, self._slots = module, slots
        self._sync_batch_norm = sync_batch_norm
        self._written: frozenset[int] = frozenset()  # the buffers that forward writes to
        self._told: set[str] = set()

    @property
    def variables(self) -> list[torch.Tensor]:
        """As `PureStep.variables`."""
        return [slot.tensor.detach() for slot in self._slots]

    def why_never(self) -> str:
        """As `PureStep.why_never`."""
        if self._compiles_itself():
            return OWN_COMPILATION
        return "" if self._slots else "a module without parameters"

    def _compiles_itself(self) -> bool:
        return any(is_compiled(part) for part in self._module.modules())

    def prepare(self) -> None:
        """As `PureStep.prepare`."""

    def key(self, context: Context) -> tuple[Hashable, ...]:
        """As `PureStep.key`."""
        strides = (
            () if all(one.flags.c_contiguous for one in context.batch) else tuple(a.strides for a in context.batch)
        )
        return context.structure.kind, strides

    def shape_name(self, context: Context) -> str:
        """The name of what a graph depends on, the same in each process."""
        rows, structure = context.rows, context.structure
        kind = structure.kind[:-1]  # without the identity of what a trial has found
        key = rows.count, rows.total, context.wants_outputs, context.batch.shapes, kind, self.key(context)[1]
        return hashlib.sha256(re.sub(r"0x[0-9a-f]+", "", repr(key)).encode()).hexdigest()

    def structure(self) -> str:
        """As `PureStep.structure`."""
        parts = [type(part).__qualname__ for part in self._module.modules()]
        return repr((type(self).__name__, parts, [(tuple(v.shape), v.dtype) for v in self.variables]))

    def rows(self, batch: Sequence[Any], context: Context) -> list[torch.Tensor]:
        """As `PureStep.rows`: the arrays, and the tensors that all rows share."""
        structure: Structure = context.structure
        return [dense(tensor) for tensor in structure.tensors(batch, context.torch_device)]

    def draw(
        self, draws: Sequence[Draw], variables: Sequence[torch.Tensor], context: Context
    ) -> tuple[list[torch.Tensor], Moved]:
        """As `PureStep.draw`."""
        running = ReplicaContext(context, context.rows)
        if context.rows.count < context.rows.total:
            context.structure.draws.begin()
        return [draw.make(running).contiguous() for draw in draws if isinstance(draw, ReplicaDraw)], []

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """As `PureStep.tracing`. Draws of a trace leave torch's generators as they were."""
        devices = sorted({one.device.index for one in self.variables if one.is_cuda})
        with torch.random.fork_rng(devices):
            try:
                yield
            except NotCapturable as error:
                cause = error.__cause__
                place = self._place(error.__traceback__) or (self._place(cause.__traceback__) if cause else "")
                raise NotCapturable(f"{error}{place}") from error

    # For `compute`.

    @contextmanager
    def lent_pass(self, variables: Sequence[torch.Tensor], context: Context, draws: Draws) -> Iterator[RunningPass]:
        """Within this the module runs on copies of `variables`, in the functions of a replica with these rows."""
        if self._compiles_itself():  # since `why_never` was asked
            raise NotCapturable(OWN_COMPILATION)
        draws_of_trace = SharedDraws()  # not those of the pass that follows
        draws_of_trace.places = context.structure.draws.places
        context = replace(context, structure=replace(context.structure, draws=draws_of_trace))
        values = self._own_copies(variables)
        alone = context.rows.count == context.rows.total
        running = ReplicaContext(context, context.rows, self._sync_batch_norm, told=self._told)
        running.traced, running.draws_by = True, _NoDraws() if alone and values[0].is_cuda else draws
        lent = LentTensors(self._module, self._slots, values)
        with ExitStack() as stack:
            stack.enter_context(as_traced())  # around forward alone there is the autocast of the pass
            stack.enter_context(lent.lent())
            if not alone:
                stack.enter_context(peers_scope(NoTracedPeers()))
            stack.enter_context(REPEATED_DRAWS)
            stack.enter_context(FAST_PATHS)
            stack.enter_context(ReplicaMode(running, ALONE if alone else TOGETHER))
            yield RunningPass(running, values, lent)

    def _nested(self, rows: Sequence[torch.Tensor], structure: Structure) -> Any:
        """The nest `(args, kwargs, targets)` over a replica's rows.

        Raises:
            NotCapturable: there are objects in it that are neither tensors nor plain values.
        """
        if structure.has_objects:
            raise NotCapturable("a batch with objects in it that are neither tensors nor plain values")
        return structure.nested(rows[: structure.count])

    def _own_copies(self, variables: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors that the module gets: those that it may write to are copies."""
        fake = is_fake(variables)
        values = []
        for i, (slot, variable) in enumerate(zip(self._slots, variables, strict=True)):
            value = (
                variable.detach()
                if fake and (slot.is_parameter or i not in self._written)
                else variable.detach().clone()
            )
            values.append(value.requires_grad_() if slot.is_parameter and slot.tensor.requires_grad else value)
        return values

    def _changed(self, ran: RunningPass, variables: Sequence[torch.Tensor]) -> list[int]:
        """The numbers of the buffers that forward has changed.

        Raises:
            NotCapturable: it has changed a parameter, or in the trace another buffer than before it.
        """
        written = set(ran.lent.written)
        if is_fake(variables):
            others = sorted(written - self._written)
            written |= self._written
        else:
            pairs = zip(ran.values, variables, strict=True)
            written |= {i for i, (one, then) in enumerate(pairs) if not same_values(one, then)}
            others = sorted(i for i in written if self._slots[i].is_parameter)
            self._written = frozenset(written)
        if others:
            raise NotCapturable(f"`{self._slots[others[0]].name}`, which forward changes")
        return sorted(written)

    def _place(self, trace: TracebackType | None) -> str:
        """The innermost part of the module in a traceback, as the end of a sentence."""
        names = {id(part): name for name, part in self._module.named_modules() if name}
        found = [id(frame.f_locals.get("self")) for frame, _ in traceback.walk_tb(trace)]
        inner = [names[one] for one in found if one in names]
        return f", in the part `{inner[-1]}`" if inner else ""


class _NoDraws:
    """Refuses draws on one GPU, whose own generator makes them in eager steps."""

    def take(self, draw: Draw) -> torch.Tensor:
        """Refused."""
        raise NotCapturable("random draws on a single GPU, which torch's kernels make there")


def is_compiled(part: nn.Module) -> bool:
    """Whether a part of a module is compiled by torch.compile."""
    return type(part).__name__ == "OptimizedModule" or getattr(part, "_compiled_call_impl", None) is not None


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in memory without gaps, its axes in the order that they have."""
    if tensor.is_contiguous():
        return tensor
    order = sorted(range(tensor.ndim), key=lambda axis: (-tensor.stride(axis), axis))
    permuted = tensor.permute(order)
    back = [order.index(axis) for axis in range(tensor.ndim)]
    return tensor if permuted.is_contiguous() else permuted.contiguous().permute(back)


def same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same values, NaNs included."""
    return torch.equal(one, other) or bool(torch.eq(one, other).logical_or(one.isnan() & other.isnan()).all())


def classes_of(value: Any) -> Any:
    """The classes in a nest of tuples, lists and dicts."""
    if isinstance(value, dict):
        return type(value), [(key, classes_of(one)) for key, one in value.items()]
    return (type(value), [*map(classes_of, value)]) if isinstance(value, (tuple, list)) else type(value)
