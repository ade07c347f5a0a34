"""Decides which calls of a model's layers run on all devices; says once why others do not, and counts both."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import keras

from fastdp.engine.data_parallel import DataParallel
from fastdp.errors import ReplicaError
from fastdp.keras.steps.call_arguments import CallArguments, DealtCall, Roles
from fastdp.keras.steps.call_bridge import on_devices
from fastdp.keras.steps.call_checks import check_is_undecided, is_hooked, why_not_here
from fastdp.program.keras.layer_calls import CallProgram
from fastdp.program.keras.rows.call_probe import LayerEffects
from fastdp.program.keras.rows.known_layers import keeps_rows_apart, why_overwritten
from fastdp.tensors.row_effects import NotByRowsError, refusal
from fastdp.warn import warn_user

# Kinds of calls that are remembered: bounded, so that arguments that are new each time do not fill the memory.
_KINDS = 256
# How often roles are searched for again when the values of a batch do not decide them.
_TRIES = 3


@dataclass(slots=True)
class Count:
    """How many calls of a layer ran on all devices, how many on one, and the latest reason."""

    split: int = 0
    one_device: int = 0
    why: str = ""


@dataclass(slots=True)
class Attempt:
    """The result of a call: its outputs on all devices, or why it cannot run there.

    `open` says that the next call of the kind may succeed.
    """

    outputs: Any = None
    why_not: str | None = None
    open: bool = False


@dataclass(slots=True)
class _Kind:
    """What is known about one kind of calls.

    `open` says that the next call is tried again, and `tries` counts the calls tried so far.
    """

    effects: LayerEffects | None = None
    roles: Roles = ()
    why_not: str | None = None
    open: bool = True
    tries: int = 0
    kept: list[Any] = field(default_factory=list)


class LayerCalls:
    """Runs the calls of a model's layers on an engine.

    Attributes:
        counts: by the layer's name, without calls with a single row and calls of layers without weights.
        postponed: whether a call ran on one device because its values left open whether it can be split.
    """

    # Whether outputs computed from one another are refused, since autograd may need the gradient between them.
    cuts_outputs = False

    def __init__(self, engine: DataParallel[CallProgram]) -> None:
        self.engine = engine
        self.program = engine.program
        self.counts: dict[str, Count] = {}
        self.told = False
        self.postponed = False
        self._own = {id(layer) for layer in self.program.model._flatten_layers()}
        self._parts: dict[int, tuple[list[Any], list[Any]]] = {}
        self._kinds: OrderedDict[Any, _Kind] = OrderedDict()
        self._never_rows: dict[Any, set[int]] = {}
        self._said: set[tuple[str, str]] = set()

    @property
    def has_others(self) -> bool:
        """Whether there are several devices: on one, calls that stay where they are need no word."""
        return len(self.engine.devices) > 1

    @property
    def count(self) -> int:
        """Calls that ran on all devices."""
        return sum(count.split for count in self.counts.values())

    @property
    def refused(self) -> dict[str, str]:
        """The layers with a call that ran on one device, and why."""
        return {name: count.why for name, count in self.counts.items() if count.one_device}

    @property
    def report(self) -> list[dict[str, Any]]:
        """The counts, one entry per layer in the order of their first calls."""
        return [{"layer": name, **asdict(count)} for name, count in self.counts.items()]

    def run(self, layer: Any, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run one call of a layer from a custom step: on all devices if possible, else as plain Keras."""
        if not layer.built or not layer.weights:  # too little to compute, and its inputs are on the host
            return original(layer, *args, **kwargs)
        call = CallArguments(layer, original, args, kwargs)
        if call.symbolic or call.most_rows < 2:
            return original(layer, *args, **kwargs)
        attempt = self.attempt(call)
        count = self.counts.setdefault(layer.name, Count())
        if attempt.why_not is None:
            count.split += 1
            return attempt.outputs
        outputs = original(layer, *args, **kwargs)
        count.one_device, count.why = count.one_device + 1, attempt.why_not
        known = (layer.name, attempt.why_not)
        # After the call, so that a call that fails does not warn too.
        if known not in self._said and not attempt.open and self.has_others:
            self._said.add(known)
            warn_user(
                f"fastdp: calls of {layer.name!r} from the model's own step run on one device: {attempt.why_not}."
            )
        return outputs

    def attempt(self, call: CallArguments) -> Attempt:
        """Try one call on all devices."""
        why_not = self.why_not(call.layer)
        if why_not is not None:
            return Attempt(why_not=why_not)
        kind = self._kind(call)
        dealt = call.dealt(kind.roles) if kind.why_not is None else None
        if dealt is None:
            self.postponed = self.postponed or kind.open
            return Attempt(why_not=kind.why_not or _UNFIT_MASK, open=kind.open and kind.tries < 2)
        assert kind.effects is not None
        if kind.effects.asks_of_size(dealt.batch.rows) and not self._is_alike(kind.effects, dealt):
            kind.why_not = kind.effects.refused
            return Attempt(why_not=kind.why_not)
        try:
            try:
                return Attempt(on_devices(self, kind.effects, dealt))
            except (NotByRowsError, ReplicaError) as error:  # before anything was assigned
                check_is_undecided(error)
                if self.program.later.wrote or not self._is_alike(kind.effects, dealt):
                    raise
            self.program.later.tried(every_row=True)
            return Attempt(on_devices(self, kind.effects, dealt))
        except (NotByRowsError, ReplicaError) as error:
            kind.why_not = refusal(error)
            return Attempt(why_not=kind.why_not)

    def _is_alike(self, effects: LayerEffects, dealt: DealtCall) -> bool:
        """Whether the devices' rows give what all rows of this call give."""
        parts = dealt.batch.deal(len(self.engine.devices))
        effects.check_at_size(dealt.on_rows, dealt.batch.arrays, dealt.batch.structure, dealt.shared, parts)
        return effects.refused is None

    def note_second_gradient(self) -> None:
        """Do nothing: a step's second gradients on one device are not reported."""

    def why_not(self, layer: keras.Layer) -> str | None:
        """Why no call of a layer can be split at present; None where one can."""
        if id(layer) not in self._own:
            return "it is not a layer of the model; assign it to an attribute of the model"
        if id(layer) not in self._parts:  # never stale: a new layer or variable makes a new engine
            self._parts[id(layer)] = list(layer.variables), layer._flatten_layers()
        variables, parts = self._parts[id(layer)]
        if not self.program.knows(variables):
            return "it has weights that the replicas do not have"
        refused = why_overwritten(variables)
        if refused is not None:
            return refused[:-1]
        hooked = next((part for part in parts if is_hooked(part)), None)
        if hooked is not None:
            return f"a torch hook on {hooked.name!r} sees the whole batch only on one device"
        return why_not_here()

    def _kind(self, call: CallArguments) -> _Kind:
        """What is known about calls of this kind. The key does not contain the number of rows."""
        if self.program.later.has_changed():
            self._kinds.clear()
        key = call.key, call.lengths
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = _Kind(kept=call.kept)
            if len(self._kinds) > _KINDS:
                self._kinds.popitem(last=False)
        if kind.open:
            self._look(call, kind)
            if kind.why_not is None:
                self._never_rows.setdefault(call.key, set()).update(call.unlike(kind.roles))
        return kind

    def _look(self, call: CallArguments, kind: _Kind) -> None:
        """Find out how the call can be split, for the first of its candidate numbers of rows that works."""
        kind.tries += 1
        first: _Kind | None = None
        for choice in call.choices():
            found = [one for roles in choice if (one := self._tried(call, roles, sole=len(choice) == 1)) is not None]
            passed = [one for one in found if one.why_not is None]
            if len(passed) > 1:  # a call with another number of rows may have decided it
                never = self._never_rows.get(call.key, set())
                passed = [one for one in passed if not any(one.roles[i] for i in never)] or passed
            if len(passed) == 1:
                kind.effects, kind.roles, kind.why_not, kind.open = passed[0].effects, passed[0].roles, None, False
                return
            if passed:
                kind.why_not, kind.open = _IN_DOUBT, kind.tries < _TRIES
                return
            first = first or next(iter(found), None)
        kind.why_not, kind.open = (first.why_not, first.open) if first is not None else (_UNFIT_MASK, False)

    def _tried(self, call: CallArguments, roles: Roles, *, sole: bool) -> _Kind | None:
        """Try the call with these roles; None where they are impossible."""
        dealt = call.dealt(roles)
        if dealt is None:
            return None
        effects = self.program.effects_of(call.layer)
        if sole and self._is_known(call):
            effects.take_as_known()
            return _Kind(effects, roles, open=False)
        rows = effects.try_call(dealt.on_rows, dealt.batch.arrays, dealt.batch.structure, dealt.shared)
        if effects.refused is None and not sole and not self._is_part(effects, rows, call, dealt):
            effects.refused = "its outputs for two rows differ from those rows of its outputs for the whole batch"
        if effects.refused is None and self.has_others:
            parts = dealt.batch.deal(len(self.engine.devices))
            effects.check_at_size(dealt.on_rows, dealt.batch.arrays, dealt.batch.structure, dealt.shared, parts)
        return _Kind(effects, roles, effects.refused, open=not effects.tried)

    @staticmethod
    def _is_part(effects: LayerEffects, rows: Any, call: CallArguments, dealt: DealtCall) -> bool:
        return effects.is_part_of(rows, call.plain, dealt.batch.arrays, dealt.batch.structure)

    @staticmethod
    def _is_known(call: CallArguments) -> bool:
        """Whether no trial is needed: a model made of known layers, called on its inputs."""
        return call.is_plain and isinstance(call.layer, keras.Model) and keeps_rows_apart(call.layer)


_UNFIT_MASK = "the Keras mask of an argument does not have the argument's number of rows"
_IN_DOUBT = "several of its arguments are as long as the batch, and their values do not show which of them have rows"
