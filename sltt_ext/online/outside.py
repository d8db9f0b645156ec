"""State that the time loop does not know: neurons that are not converted, and tensors kept as plain attributes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sltt_ext.errors import ConfigurationError, listed, warn
from sltt_ext.forwards import Looking
from sltt_ext.neuron import StatefulModule, is_unconverted
from sltt_ext.online.attributes import (
    ABSENT,
    Key,
    as_constant,
    holds_tensors,
    is_record,
    is_same,
    leaves_of,
    needs_gradient,
    path_of,
    plain_attributes,
    put,
    put_back_elements,
)
from sltt_ext.online.passes import Call, Pass, SpeedUp

__all__ = ["KeptTensors", "UnknownNeurons"]

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_LOOKS = ("__get__", "is_inference", "untyped_storage")  # at .shape and the like: no numbers are read


class UnknownNeurons:
    """Neurons that are neither reset nor made constant, said once each.

    Args:
        who: Who does not know them.
    """

    def __init__(self, who: str) -> None:
        self._who = who
        self._said: dict[str, str] = {}

    def say(self, net: nn.Module) -> None:
        """Warn of those in ``net`` that are new."""
        found = _unknown_neurons(net)
        if found.keys() - self._said.keys():
            message = (
                f"neurons carry their state on from batch to batch, because {self._who} does not know them:"
            )
            warn(listed(message, found))
        self._said |= found


def _unknown_neurons(net: nn.Module) -> dict[str, str]:
    """Neurons of ``net`` that the time loop does not know, each with the cure."""
    found: dict[str, str] = {}
    inside = set(net.modules())
    for path, module in net.named_modules():
        if is_unconverted(module):
            found[path] = (
                f"{type(module).__name__} is not converted: convert the whole network, once it is complete"
            )
        for name, value in vars(module).items():
            if name in _OF_EVERY_MODULE or not isinstance(value, (nn.Module, list, tuple, dict)):
                continue
            for held in _modules_in(value):
                if held not in inside and (isinstance(held, StatefulModule) or is_unconverted(held)):
                    found[f"{path}.{name}".lstrip(".")] = (
                        f"{type(held).__name__} is not a submodule: put it into a torch.nn.ModuleList or ModuleDict, "
                        "then convert the network"
                    )
    return found


def _modules_in(value: Any) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield from value.modules()
    elif isinstance(value, (list, tuple, dict)):
        for element in value.values() if isinstance(value, dict) else value:
            yield from _modules_in(element)


class KeptTensors(SpeedUp):
    """Tensors that modules without a state of their own keep, as plain attributes, from step to step.

    A tensor that one call has set, and a later one reads and sets again with a gradient, is state, in a list, dict or set of
    a module, too: it enters each step as a constant, and each pass starts from what it was before the first one. Who keeps
    one is warned of, as a tensor that was meant to stay from batch to batch does not. What the network detaches, such as a
    running mean, is left alone, and so are records that nobody reads. Passes are watched until one has back-propagated a
    call after its first.
    """

    def __init__(self) -> None:
        self._net = nn.Module()
        self._watches = True
        self._has_seen = False  # a call that is back-propagated, after another
        self._calls = 0  # of this pass
        self._carries = False  # on from the last pass
        self._rest: dict[Key, Any] = {}  # what carried attributes are at rest
        self._left: dict[Key, Any] = {}  # and what the last pass has left in their place
        self._before: dict[Key, Any] = {}  # the passes that are watched, and what they have left
        self._set: dict[Key, Any] = {}  # by an earlier call of this pass, while it is watched
        self._stale: dict[Key, Any] = {}  # with the graph of the last pass, while nothing tells what it is

    def has_left(self, tensor: Tensor) -> bool:
        """Whether the last pass has left a tensor, which is nobody's input then."""
        left = (*self._stale.values(), *self._left.values())
        return any(leaf is tensor for value in left for leaf in leaves_of(value))

    @contextmanager
    def around_pass(self, one: Pass) -> Iterator[None]:
        """Start from rest, and see what is carried."""
        self._net, self._calls, known = one.net, 0, len(self._rest)
        self._carries = not (one.from_rest or one.again)
        self._set = self._still_left() if self._carries else {}
        for key in self._rest if one.from_rest else ():
            self._put_back(key)
        if self._stale and one.from_rest:
            now = self._now()
            for key, value in self._stale.items():
                if is_same(now.get(key, ABSENT), value):
                    put(key, self._before.get(key, ABSENT))
        if self._watches:
            now = self._now()
            stays = {
                key for key in self._before if is_same(now.get(key, ABSENT), self._left.get(key, ABSENT))
            }
            self._before = now | {key: self._before[key] for key in stays}
        one.replaced.at_end(partial(self._end, one))
        if not one.again:
            one.replaced.if_cut_short(self._back_to_rest)
        yield
        self._say([*self._rest][known:])

    def _end(self, one: Pass) -> None:
        self._watches = self._watches and not self._has_seen
        if not one.again:  # what runs again leaves no trace
            now = self._now() if self._watches or self._rest else {}
            self._left = {
                key: now.get(key, ABSENT) for key in (now.keys() if self._watches else ()) | self._rest.keys()
            }
            self._stale = {
                key: value
                for key, value in self._set.items()
                if needs_gradient(value) and not is_record(value)
            }
        self._set = {}
        if not self._watches and not self._stale:
            self._before = {}

    def _back_to_rest(self) -> None:
        """What the calls so far have set is nobody's rest."""
        for key, value in self._now().items() if self._watches else ():
            before = self._before.get(key, ABSENT)
            if not is_same(value, before) and holds_tensors(value) and not is_record(value):
                put(key, before)
        for key, rest in self._rest.items():
            put(key, rest)
        self._set = {}

    @contextmanager
    def around_call(self, call: Call) -> Iterator[None]:
        """Make constant what earlier calls have set."""
        self._calls += 1
        if self._rest and (self._calls > 1 or self._carries):
            for key, value in _attributes({module for module, _ in self._rest}):
                if key in self._rest:
                    put(key, as_constant(value))
        if not self._watches:
            yield
            return
        now = (
            self._now() if self._set else {}
        )  # a call that runs again may start from what another one has set
        cut = {
            key: as_constant(value)
            for key, value in self._set.items()
            if is_same(now.get(key, ABSENT), value)
        }
        for key, value in cut.items():
            put(key, value)
        start = self._now()
        with _Reads(cut) if cut else nullcontext() as reads:
            yield
        found = set() if reads is None else reads.found
        for key in cut.keys() - found:
            put_back_elements(key, cut[key], self._set[key])
        for key, value in self._now().items():
            if not is_same(value, start.get(key, ABSENT)) and holds_tensors(value):
                if key in found and (needs_gradient(value) or needs_gradient(self._set[key])):
                    self._rest[key] = self._before.get(key, ABSENT)
                self._set[key] = value
        self._has_seen |= call.selected and self._calls > 1
        self._refuse_lost(cut, found)

    def _still_left(self) -> dict[Key, Any]:
        """What the last pass has set and nobody since, where a pass goes on from there."""
        now = self._now() if self._stale else {}
        return {key: value for key, value in self._stale.items() if is_same(now.get(key, ABSENT), value)}

    def _now(self) -> dict[Key, Any]:
        """Plain attributes of modules that carry no state known to the time loop."""
        modules = self._net.modules()
        return dict(
            _attributes(m for m in modules if not (isinstance(m, StatefulModule) or is_unconverted(m)))
        )

    def _put_back(self, key: Key) -> None:
        """An attribute to what it is at rest, unless someone else has set it since the last pass: then that is its rest."""
        found = dict(_attributes([key[0]])).get(key, ABSENT)
        if not is_same(found, self._left.get(key)):
            self._rest[key] = found
        else:
            put(key, self._rest[key])

    def _refuse_lost(self, cut: dict[Key, Any], read: set[Key]) -> None:
        """What is computed in one step and read in later ones would have the gradient of the first step only."""
        now = self._now() if read else {}
        for key in read:
            before = self._set[key]
            if is_same(now.get(key), cut[key]) and not is_same(cut[key], before):
                put(key, before)
                raise ConfigurationError(
                    f"{path_of(self._net, key)} is computed with a gradient at one time step, kept, and read at a "
                    "later one, where it is a constant: compute it at each step, or without a gradient"
                )

    def _say(self, carried: list[Key]) -> None:
        if not carried:
            return
        kept = {path_of(self._net, key): f"of a {type(key[0]).__name__}" for key in carried}
        warn(
            listed(
                "tensors are kept from step to step as plain attributes, so they are taken for state: no gradient goes "
                "through them to an earlier step, and each iteration starts from their values before the first one. Register "
                "what has to outlast an iteration as a buffer (register_buffer):",
                kept,
            )
        )


def _attributes(modules: Iterable[nn.Module]) -> Iterator[tuple[Key, Any]]:
    """What modules keep as plain attributes, which may be set meanwhile."""
    for module in modules:
        yield from list(plain_attributes(module))


class _Reads(Looking):
    """Sees which of the tensors that are kept are read."""

    def __init__(self, kept: dict[Key, Any]) -> None:
        super().__init__()
        self._keys: dict[int, list[Key]] = {}
        for key, value in kept.items():
            for leaf in leaves_of(value):
                self._keys.setdefault(id(leaf), []).append(key)
        self.found: set[Key] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in _LOOKS:
            for leaf in tree_leaves((args, kwargs)):
                self.found.update(self._keys.get(id(leaf), ()))
        return func(*args, **(kwargs or {}))
