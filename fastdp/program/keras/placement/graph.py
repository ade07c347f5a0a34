"""Runs the calls of a Functional model on the devices where `fastdp.device` placed them.

The model's graph is split into its calls. A call placed on another device of the replica is enqueued on that device's
worker and waits for the events of the calls whose outputs it reads. All other calls run on the replica's own worker,
which waits for an output only when it reads it. So branches run at the same time, and so do their backward passes: the
outputs of each call are detached from autograd's graph and become leaves of the next call's graph, and backward runs
call by call, each on its device. The reader of an input, variable or gradient moves it to its own device
(`fastdp.program.keras.placement.values`).

Random draws, losses and moments follow the order of the graph, regardless of the order in time. A layer that has state
(seeds, statistics) and is called twice is called in the order of the graph.
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
from fastdp.errors import NotCapturable
from fastdp.program.keras.placement.values import PlacedScope, PlacedValues
from fastdp.program.keras.replica import ReplicaContext, keras_device, replica_scope, running
from fastdp.runtime.queue import QueueDevice
from fastdp.tensors.device_copies import arrived
from fastdp.tensors.moments import Moments
from fastdp.tensors.threads import prepare_worker

PLACE = "_fastdp_place"


def graph_of(model: keras.Model) -> Any:
    """The graph of calls that a model runs; None if it has none."""
    if isinstance(model, keras.Sequential):
        return model._functional
    return model if isinstance(model, Function) else None


def placed_nodes(graph: Any) -> list[tuple[Any, int | None]]:
    """The calls of a graph that have a place, each with its place."""
    nodes = _nodes(graph) if graph is not None else []
    return [(node, _place(node)) for node in nodes if _has_place(node)]


def _nodes(graph: Any) -> list[Any]:
    """The calls of a graph in topological order."""
    by_depth = graph._nodes_by_depth
    nodes = [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth]]
    return [node for node in nodes if node.operation is not None and not node.is_input]


def _has_place(node: Any) -> bool:
    return PLACE in node.__dict__ or PLACE in getattr(node.operation, "__dict__", {})


def _place(node: Any) -> int | None:
    """The place of a call, or else of its layer."""
    return node.__dict__.get(PLACE, getattr(node.operation, "__dict__", {}).get(PLACE))


@dataclass(eq=False)
class _Call:
    """One call of the graph in one step, on a device of the replica.

    `results` are attached to autograd's graph, `outputs` are detached from it. `found` are the gradients, by id of the
    tensors that the call got.
    """

    number: int
    node: Any
    device: QueueDevice
    run: ReplicaContext
    scope: PlacedScope
    sources: list[_Call] = field(default_factory=list)
    takers: list[_Call] = field(default_factory=list)
    event: Any = None
    error: BaseException | None = None
    inputs: list[torch.Tensor] = field(default_factory=list)
    results: list[torch.Tensor] = field(default_factory=list)
    outputs: list[PlacedValues] = field(default_factory=list)
    found: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def state(self) -> set[int]:
        """The ids of its layers with state, which must not be called twice at a time."""
        layers = self.node.operation._flatten_layers() if isinstance(self.node.operation, keras.layers.Layer) else []
        return {id(layer) for layer in layers if layer._non_trainable_variables or layer._seed_generators}

    @property
    def rest(self) -> list[torch.Tensor]:
        """The differentiable tensors that the call got: inputs and variables."""
        return [*self.inputs, *(local for _, local in self.scope.read.values())]


class PlacedGraph:
    """One forward pass of a placed model, and its backward pass.

    Args:
        devices: the replica's devices. The worker of the first one runs this code, and its memory holds the variables.

    A call gets its inputs and variables on its own device, and the reader of an output moves it. On GPUs a device's
    stream waits for the events of the calls before. At the end of each pass the first device's stream waits for all
    calls, so later work on it cannot overwrite anything that a placed call still reads.
    """

    def __init__(self, devices: Sequence[QueueDevice]) -> None:
        self._devices = devices
        self._home = devices[0]
        self._calls: list[_Call] = []
        self._inputs: list[tuple[torch.Tensor, PlacedValues]] = []  # attached to autograd's graph, and detached
        self._timeout = 0.0
        self._threads = 1

    # Forward.

    def forward(
        self, graph: Any, inputs: Any, operation_fn: Callable[..., Any], run: ReplicaContext, scope: Any
    ) -> Any:
        """Keras's `_run_through_graph`, with each call on its device."""
        if run.draws is not None:
            raise NotCapturable("layers placed on several devices")
        if self._calls:
            raise NotImplementedError(
                "A model with layers placed by fastdp.device must not run through its layers more than once in a "
                "step. Place no layers, or let it run through them once."
            )
        home = self._home
        self._timeout, self._threads = run.context.rendezvous.timeout, torch.get_num_threads()
        given = zip(graph.inputs, keras.tree.flatten(inputs), strict=True)
        values = {id(x): self._cut_input(y) for x, y in given}
        variables = {key: PlacedValues(value, home) for key, value in scope.state_mapping.items()}
        self._calls = self._plan(graph, run, lambda device: PlacedScope(variables, scope.leaves, device))
        grad = torch.is_grad_enabled()

        def work(call: _Call) -> None:
            with torch.set_grad_enabled(grad), keras_device(call.device), replica_scope(call.run), call.scope:
                _forward(call, values, operation_fn)

        self._all(self._calls, lambda call: call.sources, work)
        # From here on the replica's own worker uses the results, on the first device.
        scope.state_mapping.update((key, spread.on(home)) for key, spread in variables.items())
        run.generators.join([call.run.generators for call in self._calls])
        for call in self._calls:
            run.moments += [(layer, self._moments_at_home(call, moments)) for layer, moments in call.run.moments]
            run.made_up |= call.run.made_up
            scope.losses += [loss.on(home) for loss in call.scope.losses]
        return keras.tree.pack_sequence_as(graph._outputs_struct, [values[id(x)].on(home) for x in graph.outputs])

    def _cut_input(self, value: Any) -> PlacedValues:
        """An input of the graph, detached from autograd's graph."""
        if not isinstance(value, torch.Tensor) or not value.requires_grad:
            return PlacedValues(value, self._home)
        self._inputs.append((value, PlacedValues(_without_graph(value), self._home)))
        return self._inputs[-1][1]

    def _moments_at_home(self, call: _Call, moments: Moments) -> Moments:
        """The moments that a call's BatchNormalization has seen, on the first device, where the step sums them."""
        if call.device is self._home:
            return moments
        return replace(moments, mean=arrived(moments.mean, self._home), variance=arrived(moments.variance, self._home))

    def _plan(self, graph: Any, run: ReplicaContext, scope_on: Callable[[QueueDevice], PlacedScope]) -> list[_Call]:
        """The calls of the graph, with their dependencies."""
        maker: dict[int, _Call] = {}
        last: dict[int, _Call] = {}
        calls = []
        nodes = _nodes(graph)
        generators = run.generators.branches(len(nodes))
        for number, node in enumerate(nodes):
            device = self._devices[_place(node) or 0]
            own = replace(run, moments=[], masks={}, met=Counter(), generators=generators[number])
            if device is not self._home:
                own.context = replace(run.context, device=device)
                if run.context.size > 1:
                    own.context.rendezvous = _NoMeeting(run.context.size, 0.0)
            call = _Call(number, node, device, own, scope_on(device))
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
        self, roots: Sequence[torch.Tensor], seeds: Sequence[Any], leaves: Sequence[torch.Tensor], retain: bool
    ) -> list[torch.Tensor | None]:
        """Gradients of the whole step, as from `torch.autograd.grad`; None for leaves that the roots do not use."""
        home, keep = self._home, {"allow_unused": True, "retain_graph": retain}
        cut = [seen for call in self._calls for out in call.outputs if (seen := out.seen(home)) is not None]
        cut += [spread.seen(home) for _, spread in self._inputs]
        direct = torch.autograd.grad(roots, [*cut, *leaves], seeds, **keep) if roots else ()
        first = {id(t): g for t, g in zip([*cut, *leaves], direct, strict=bool(roots)) if g is not None}
        self._all(self._calls[::-1], lambda call: call.takers, lambda call: _backward(call, home, first, keep))
        totals = {id(leaf): first.get(id(leaf)) for leaf in leaves}
        for call in self._calls:
            for spread, local in call.scope.read.values():
                leaf, gradient = id(spread.seen(home)), call.found.get(id(local))
                if leaf in totals and gradient is not None:
                    totals[leaf] = _sum(totals[leaf], arrived(gradient, home))
        pairs = [
            (value, total) for value, spread in self._inputs if (total := self._of_input(spread, first)) is not None
        ]
        if pairs:
            behind = torch.autograd.grad([v for v, _ in pairs], leaves, [g for _, g in pairs], **keep)
            for leaf_tensor, gradient in zip(leaves, behind, strict=True):
                totals[id(leaf_tensor)] = _sum(totals[id(leaf_tensor)], gradient)
        if not retain:  # frees the activations before the update
            self._calls, self._inputs = [], []
        return [totals[id(leaf)] for leaf in leaves]

    def _of_input(self, spread: PlacedValues, first: dict[int, torch.Tensor]) -> torch.Tensor | None:
        """The gradient of an input of the graph, summed over all calls that read it."""
        total = first.get(id(spread.seen(self._home)))
        for call in self._calls:
            gradient = call.found.get(id(spread.seen(call.device)))
            total = _sum(total, None if gradient is None else arrived(gradient, self._home))
        return total

    # Running calls on their devices.

    def _all(
        self, calls: Sequence[_Call], after: Callable[[_Call], list[_Call]], work: Callable[[_Call], None]
    ) -> None:
        """Run `work` for each call on its device, after the calls that `after` returns for it."""
        home = self._home
        left, begun = list(calls), set[_Call]()
        awaited = {other for call in calls if call.device is not home for other in after(call)}
        for call in calls:
            call.event = None
        start = home.compute.now()  # after the batch, the variables and the first gradients
        try:
            while left:
                for call in [c for c in left if c.device is not home]:
                    if begun.issuperset(after(call)):
                        self._enqueue(call, start, after(call), work)
                        begun.add(call)
                        left.remove(call)
                own = next((c for c in left if c.device is home and begun.issuperset(after(c))), None)
                if own is not None:
                    self._wait(after(own))
                    work(own)
                    own.event = home.compute.now() if own in awaited else None
                    begun.add(own)
                    left.remove(own)
        finally:  # when this returns, no other worker may still touch the step's state
            failed = self._settle(begun)
        if failed is not None:
            raise failed

    def _enqueue(self, call: _Call, start: Any, before: Sequence[_Call], work: Callable[[_Call], None]) -> None:
        """Enqueue a call on its device's worker. A failure is stored in the call, and the device stays usable."""
        stream = call.device.compute

        def run() -> None:
            call.error = next((other.error for other in before if other.error is not None), None)
            if call.error is not None:
                return
            try:
                prepare_worker(self._threads, call.device)
                work(call)
            # The replica's own worker raises it, KeyboardInterrupt and SystemExit included.
            except BaseException as error:  # noqa: BLE001
                call.error = error

        for event in [start, *(other.event for other in before if other.event is not None)]:
            stream.wait(event)
        stream.enqueue(run)
        call.event = stream.record()

    def _wait(self, calls: Sequence[_Call]) -> None:
        """Wait for calls on other devices, and raise their errors."""
        for call in calls:
            if call.device is not self._home:
                self._home.compute.follow(call.event, self._timeout)
            if call.error is not None:
                raise call.error

    def _settle(self, calls: set[_Call]) -> BaseException | None:
        """Wait for all enqueued calls. Returns the first error in the order of the graph."""
        for call in calls:
            if call.device is not self._home:
                self._home.compute.follow(call.event, self._timeout)
        return next((c.error for c in sorted(calls, key=lambda c: c.number) if c.error is not None), None)


def _forward(call: _Call, values: dict[int, PlacedValues], operation_fn: Callable[..., Any]) -> None:
    """Call the layer, and detach its outputs and losses from autograd's graph."""
    given = {id(x): values[id(x)].on(call.device) for x in call.node.input_tensors}
    call.inputs = [t for t in given.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    args, kwargs = call.node.arguments.fill_in(given)
    made = keras.tree.flatten(operation_fn(call.node.operation)(*args, **kwargs))
    for x, result in zip(call.node.outputs, made, strict=True):
        values[id(x)] = _cut(call, result)
    call.scope.losses[:] = [_cut(call, loss) for loss in call.scope.losses]


def _cut(call: _Call, result: Any) -> PlacedValues:
    """A result, detached as a leaf for the calls that read it."""
    if not isinstance(result, torch.Tensor) or not result.requires_grad:
        return PlacedValues(result, call.device)
    call.results.append(result)
    call.outputs.append(PlacedValues(_without_graph(result), call.device))
    return call.outputs[-1]


def _without_graph(value: torch.Tensor) -> torch.Tensor:
    """A leaf of autograd on the same memory, with the tensor's Keras mask."""
    leaf = value.detach().requires_grad_()
    mask = getattr(value, "_keras_mask", None)
    if mask is not None:
        leaf._keras_mask = mask
    return leaf


def _backward(call: _Call, home: Any, first: dict[int, torch.Tensor], keep: dict[str, Any]) -> None:
    """Compute the gradients of a call's inputs and variables from those of its outputs.

    An output's gradient is the sum over the loss and all calls that read the output.
    """
    roots, seeds = [], []
    call.found = {}
    for result, output in zip(call.results, call.outputs, strict=True):
        parts = [first.get(id(output.seen(home)))]
        parts += [taker.found.get(id(output.seen(taker.device))) for taker in dict.fromkeys(call.takers)]
        total = None
        for part in parts:
            total = _sum(total, None if part is None else arrived(part, call.device))
        if total is not None:
            roots.append(result)
            seeds.append(total)
    wanted = list({id(t): t for t in call.rest}.values())
    if roots and wanted:
        found = torch.autograd.grad(roots, wanted, seeds, **keep)
        call.found = {id(t): g for t, g in zip(wanted, found, strict=True) if g is not None}


def _sum(total: torch.Tensor | None, more: torch.Tensor | None) -> torch.Tensor | None:
    """The sum of two gradients, where None counts as zero."""
    if total is None or more is None:
        return more if total is None else total
    return total + more


def gradients_of(
    run: ReplicaContext,
    roots: Sequence[torch.Tensor],
    seeds: Sequence[Any],
    leaves: Sequence[torch.Tensor],
    *,
    retain: bool = False,
) -> Sequence[torch.Tensor | None]:
    """Gradients of a step's leaves, across all devices of the replica. `retain` allows a second pass."""
    if run.placed is not None:
        return run.placed[1].gradients(roots, seeds, leaves, retain)
    if not roots or not leaves:
        return [None] * len(leaves)
    return torch.autograd.grad(roots, leaves, seeds, allow_unused=True, retain_graph=retain)


class _NoMeeting(Rendezvous):
    """Refuses an exchange with other replicas in the middle of a call: exchanges of two threads would get mixed up."""

    def exchange(self, rank: int, value: Any, place: object) -> list[Any]:
        """Refuse."""
        raise NotImplementedError(
            "A layer that fastdp.device placed on a further device of its replica cannot exchange values with other "
            "replicas (sync_batch_norm=True, equalization, draws by rows). Place it on the host, or use one replica."
        )


def run_through_graph(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Keras's walk through a graph: for a replica that spans devices, calls run on their devices."""

    def run(graph: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        state = running()
        if state is None or state.placed is None or state.placed[0] is not graph:
            return original(graph, inputs, *args, **kwargs)
        operation_fn = kwargs.get("operation_fn", args[0] if args else lambda op: op)
        scope = keras.src.backend.common.stateless_scope.get_stateless_scope()
        return state.placed[1].forward(graph, inputs, operation_fn, replace(state, placed=None), scope)

    return run
