"""A replica that spans several devices: the calls of a Functional model run where `fastdp.device` placed them.

The model's graph is cut into its calls. A call that is placed on another device of the replica is enqueued on that
device's worker, behind the events of the calls whose outputs it takes; everything else runs on the replica's own
worker, which waits for an output only where it takes it. So branches run at the same time, and so do their backward
passes: the outputs of each call are cut off the graph of autograd and become leaves of the next one's, and the
gradient goes back call by call, each on its device.

Random draws, losses and moments are put in the order of the graph, whatever the order in time. A layer that is called
twice and that has state (seeds, statistics) is called in the order of the graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import keras
import torch
from keras.src.ops.function import Function

from fastdp.comm.rendezvous import Rendezvous
from fastdp.program.keras_memory import ReplicaScope
from fastdp.program.keras_replica import NotCapturable, Running, replica_scope, running

PLACE = "_fastdp_place"


def graph_of(model: keras.Model) -> Any:
    """The graph of calls that a model runs, None if it has none."""
    if isinstance(model, keras.Sequential):
        return model._functional
    return model if isinstance(model, Function) else None


def placed_nodes(graph: Any) -> list[tuple[Any, int | None]]:
    """The calls of a graph that have a place, and the place."""
    nodes = _nodes(graph) if graph is not None else []
    return [(node, _place(node)) for node in nodes if _has_place(node)]


def _nodes(graph: Any) -> list[Any]:
    """The calls of a graph, each after those whose outputs it takes."""
    by_depth = graph._nodes_by_depth
    nodes = [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth]]
    return [node for node in nodes if node.operation is not None and not node.is_input]


def _has_place(node: Any) -> bool:
    return PLACE in node.__dict__ or PLACE in getattr(node.operation, "__dict__", {})


def _place(node: Any) -> int | None:
    """A call's own place, or else that of its layer."""
    return node.__dict__.get(PLACE, getattr(node.operation, "__dict__", {}).get(PLACE))


def on_device(value: Any, device: Any) -> Any:
    """A tensor where a device computes. The one seam between devices: virtual ones share the host's memory."""
    where = getattr(device, "torch_device", None)
    return value if where is None or not isinstance(value, torch.Tensor) else value.to(where, non_blocking=True)


@dataclass(eq=False)
class _Call:
    """One call of the graph in one step. `results` still have their graph, `outputs` are cut off it."""

    number: int
    node: Any
    device: Any
    run: Running
    scope: ReplicaScope
    sources: list[_Call] = field(default_factory=list)
    takers: list[_Call] = field(default_factory=list)
    event: Any = None
    error: BaseException | None = None
    inputs: list[torch.Tensor] = field(default_factory=list)
    results: list[torch.Tensor] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)
    leaves: list[torch.Tensor] = field(default_factory=list)
    found: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def state(self) -> set[int]:
        """What of it must not be called twice at a time."""
        layers = self.node.operation._flatten_layers() if isinstance(self.node.operation, keras.layers.Layer) else []
        return {id(layer) for layer in layers if layer._non_trainable_variables or layer._seed_generators}


class PlacedGraph:
    """One forward pass of a placed model, and its backward pass.

    Args:
        devices: of the replica; the first is the one whose worker runs this.
    """

    def __init__(self, devices: Sequence[Any]) -> None:
        self._devices = devices
        self._calls: list[_Call] = []
        self._timeout = 0.0

    # Forward.

    def forward(self, graph: Any, inputs: Any, operation_fn: Callable[..., Any], run: Running, scope: Any) -> Any:
        """Keras's `_run_through_graph`, with each call on its device."""
        if run.draws is not None:
            raise NotCapturable("layers placed on several devices")
        self._timeout = run.context.rendezvous.timeout
        values = {id(x): y for x, y in zip(graph.inputs, keras.tree.flatten(inputs), strict=True)}
        self._calls = self._plan(graph, run, scope)
        grad, threads = torch.is_grad_enabled(), torch.get_num_threads()

        def work(call: _Call) -> None:
            with torch.set_grad_enabled(grad), replica_scope(call.run), call.scope:
                _forward(call, values, operation_fn)

        self._all(self._calls, lambda call: call.sources, work, threads)
        for call in self._calls:
            run.moments += call.run.moments
            run.made_up |= call.run.made_up
            scope.losses += call.scope.losses
        return keras.tree.pack_sequence_as(graph._outputs_struct, [values[id(x)] for x in graph.outputs])

    def _plan(self, graph: Any, run: Running, scope: ReplicaScope) -> list[_Call]:
        """The calls of the graph, and which waits for which."""
        maker: dict[int, _Call] = {}
        last: dict[int, _Call] = {}
        calls = []
        for number, node in enumerate(_nodes(graph)):
            place = _place(node)
            device = self._devices[place] if place else None
            own = replace(run, moments=[], masks={}, met=Counter(), unseeded=1000 * number)
            if device is not None and run.context.size > 1:
                own.context = replace(run.context, rendezvous=_NoMeeting(run.context.size, 0.0))
            call = _Call(number, node, device, own, scope.shared())
            for source in [maker[id(x)] for x in node.input_tensors if id(x) in maker]:
                call.sources.append(source)
                source.takers.append(call)
            for key in call.state:
                call.sources += [last[key]] if key in last else []
                last[key] = call
            maker.update((id(x), call) for x in node.outputs)
            calls.append(call)
        return calls

    # Backward.

    def gradients(
        self, roots: Sequence[torch.Tensor], seeds: Sequence[Any], leaves: Sequence[torch.Tensor]
    ) -> list[torch.Tensor | None]:
        """`torch.autograd.grad` of the whole step; None for leaves that the roots do not depend on."""
        cut = [output for call in self._calls for output in call.outputs]
        direct = torch.autograd.grad(roots, [*cut, *leaves], seeds, allow_unused=True) if roots else ()
        first = {id(t): g for t, g in zip([*cut, *leaves], direct, strict=bool(roots)) if g is not None}
        self._all(self._calls[::-1], lambda call: call.takers, lambda call: _backward(call, first))
        totals = {id(leaf): first.get(id(leaf)) for leaf in leaves}
        for call in self._calls:
            for leaf in call.leaves:
                if id(leaf) in call.found and id(leaf) in totals:
                    totals[id(leaf)] = _sum(totals[id(leaf)], call.found[id(leaf)])
        return [totals[id(leaf)] for leaf in leaves]

    # Running calls on their devices.

    def _all(
        self,
        calls: Sequence[_Call],
        after: Callable[[_Call], list[_Call]],
        work: Callable[[_Call], None],
        threads: int | None = None,
    ) -> None:
        """Run `work` for each call, on its device, after those that `after` names."""
        left, begun = list(calls), set[_Call]()
        for call in calls:
            call.event = None
        try:
            while left:
                for call in [c for c in left if c.device is not None]:
                    if begun.issuperset(after(call)):
                        self._enqueue(call, after(call), work, threads)
                        begun.add(call)
                        left.remove(call)
                own = next((c for c in left if c.device is None and begun.issuperset(after(c))), None)
                if own is not None:
                    self._wait(after(own))
                    work(own)
                    begun.add(own)
                    left.remove(own)
        finally:  # nobody else may touch the step's state once this is over
            failed = self._settle(begun)
        if failed is not None:
            raise failed

    def _enqueue(
        self, call: _Call, before: Sequence[_Call], work: Callable[[_Call], None], threads: int | None
    ) -> None:
        """Hand a call to its device's worker. Its failure is kept, and the device stays usable."""
        stream = call.device.compute

        def run() -> None:
            try:
                if any(other.error is not None for other in before):
                    return
                if threads is not None:
                    torch.set_num_threads(threads)
                work(call)
            # Handed to the replica's own worker, which raises it: KeyboardInterrupt and SystemExit too.
            except BaseException as error:  # noqa: BLE001
                call.error = error

        for other in before:
            if other.event is not None:
                stream.wait(other.event)
        stream.enqueue(run)
        call.event = stream.record()

    def _wait(self, calls: Sequence[_Call]) -> None:
        """Wait for calls on other devices; raise what went wrong there."""
        for call in calls:
            if call.event is not None:
                call.event.finish(self._timeout)
            if call.error is not None:
                raise call.error

    def _settle(self, calls: set[_Call]) -> BaseException | None:
        """Wait for what was enqueued; the first failure by the order of the graph."""
        for call in calls:
            if call.event is not None:
                call.event.finish(self._timeout)
        return next((c.error for c in sorted(calls, key=lambda c: c.number) if c.error is not None), None)


def _forward(call: _Call, values: dict[int, Any], operation_fn: Callable[..., Any]) -> None:
    """Call the layer, and cut its outputs and losses off its graph."""
    operation = call.node.operation
    taken = [values[id(x)] for x in call.node.input_tensors]
    call.inputs = [t for t in taken if isinstance(t, torch.Tensor) and t.requires_grad]
    given = {id(x): on_device(values[id(x)], call.device) for x in call.node.input_tensors}
    args, kwargs = call.node.arguments.fill_in(given)
    made = keras.tree.flatten(operation_fn(operation)(*args, **kwargs))
    for x, result in zip(call.node.outputs, made, strict=True):
        values[id(x)] = _cut(call, result)
    call.scope.losses[:] = [_cut(call, loss) for loss in call.scope.losses]
    variables = operation.trainable_variables if isinstance(operation, keras.layers.Layer) else []
    now = [call.scope.get_current_value(v) for v in variables]
    call.leaves = [leaf for leaf in now if leaf is not None and leaf.requires_grad]


def _cut(call: _Call, result: Any) -> Any:
    """A result without its graph, as a leaf of whatever takes it."""
    if not isinstance(result, torch.Tensor) or not result.requires_grad:
        return result
    output = result.detach().requires_grad_()
    mask = getattr(result, "_keras_mask", None)
    if mask is not None:
        output._keras_mask = mask
    call.results.append(result)
    call.outputs.append(output)
    return output


def _backward(call: _Call, first: dict[int, torch.Tensor]) -> None:
    """Gradients of a call's inputs and leaves, from those of its outputs: of the loss, and of all who took them."""
    roots, seeds = [], []
    for result, output in zip(call.results, call.outputs, strict=True):
        total = first.get(id(output))
        for taker in dict.fromkeys(call.takers):
            total = _sum(total, taker.found.get(id(output)))
        if total is not None:
            roots.append(result)
            seeds.append(total)
    wanted = list({id(t): t for t in (*call.inputs, *call.leaves)}.values())
    if roots and wanted:
        found = torch.autograd.grad(roots, wanted, seeds, allow_unused=True)
        call.found = {id(t): g for t, g in zip(wanted, found, strict=True) if g is not None}


def _sum(total: torch.Tensor | None, more: torch.Tensor | None) -> torch.Tensor | None:
    """A sum in which None is nothing."""
    if total is None or more is None:
        return more if total is None else total
    return total + more


def gradients_of(
    run: Running, roots: Sequence[torch.Tensor], seeds: Sequence[Any], leaves: Sequence[torch.Tensor]
) -> Sequence[torch.Tensor | None]:
    """Gradients of a step's leaves, through the replica's devices if it has several."""
    if run.placed is not None:
        return run.placed[1].gradients(roots, seeds, leaves)
    return torch.autograd.grad(roots, leaves, seeds, allow_unused=True) if roots else [None] * len(leaves)


class _NoMeeting(Rendezvous):
    """Refuses layers that meet their like of other replicas in the middle of a call: two threads would mix them up."""

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """Refuse."""
        raise NotImplementedError(
            "A layer that fastdp.device placed on another device of its replica exchanges values with the other "
            "replicas (sync_batch_norm=True, equalization, draws by rows). Place it on the host, or use one replica."
        )


def run_through_graph(original: Callable[..., Any]) -> Callable[..., Any]:
    """Keras's walk through a graph; that of a replica which spans devices goes to them."""

    def run(graph: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        state = running()
        if state is None or state.placed is None or state.placed[0] is not graph:
            return original(graph, inputs, *args, **kwargs)
        operation_fn = kwargs.get("operation_fn", args[0] if args else lambda op: op)
        scope = keras.src.backend.common.stateless_scope.get_stateless_scope()
        return state.placed[1].forward(graph, inputs, operation_fn, replace(state, placed=None), scope)

    return run
