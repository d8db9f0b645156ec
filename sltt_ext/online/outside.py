"""State that the time loop does not know: neurons that are not converted, and tensors kept as plain attributes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sltt_ext.errors import ConfigurationError, SLTTWarning, listed
from sltt_ext.forwards import Looking
from sltt_ext.neuron import StatefulModule, constant, is_unconverted, tensors_in
from sltt_ext.online.passes import Call, Pass, SpeedUp

__all__ = ["KeptTensors", "unknown_neurons"]

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_ABSENT: Any = object()
_LOOKS = ("__get__", "is_inference", "untyped_storage")  # at .shape and the like: no numbers are read
Key = tuple[nn.Module, str]


def unknown_neurons(net: nn.Module) -> dict[str, str]:
    """Neurons of ``net`` that the time loop neither resets nor makes constant, each with the cure."""
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
                        f"{type(held).__name__} is no submodule: hold it in a torch.nn.ModuleList or ModuleDict, "
                        "and convert the network then"
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

    A tensor that one call has set, and a later one reads and sets again with a gradient, is state: it enters each step as a
    constant, and each pass starts from what it was before the first one. Who keeps one is warned of, as a tensor that was
    meant to stay from batch to batch does not. What the network detaches, such as a running mean, is left alone. Passes
    are watched until one has back-propagated a call after its first.
    """

    def __init__(self) -> None:
        self._net = nn.Module()
        self._watches = True
        self._has_seen = False  # a call that is back-propagated, after another
        self._calls = 0  # of this pass
        self._rest: dict[Key, Any] = {}  # what carried attributes are at rest
        self._left: dict[Key, Any] = {}  # and what the last pass has left in their place
        self._before: dict[nn.Module, dict[str, Any]] = {}  # this pass
        self._set: dict[Key, Any] = {}  # by an earlier call of this pass, while it is watched

    @contextmanager
    def around_pass(self, one: Pass) -> Iterator[None]:
        """Start from rest, and see what is carried."""
        self._net, self._calls, self._set, known = one.net, 0, {}, len(self._rest)
        for key in self._rest:
            self._put_back(*key)
        self._before = {module: _own(module) for module in one.net.modules()} if self._watches else {}
        one.replaced.at_end(self._end)
        one.replaced.if_cut_short(self._back_to_rest)
        yield
        self._say([*self._rest][known:])

    def _end(self) -> None:
        self._watches = self._watches and not self._has_seen
        self._left = {(module, name): vars(module).get(name, _ABSENT) for module, name in self._rest}
        self._before, self._set = {}, {}

    def _back_to_rest(self) -> None:
        """What the calls so far have set is nobody's rest."""
        for module, before in self._before.items():
            for name, value in _own(module).items():
                if value is not before.get(name, _ABSENT) and _holds_tensors(value):
                    _assign(module, name, before.get(name, _ABSENT))
        for (module, name), rest in self._rest.items():
            _assign(module, name, rest)

    @contextmanager
    def around_call(self, call: Call) -> Iterator[None]:
        """Make constant what earlier calls have set."""
        self._calls += 1
        for module, name in self._rest:
            if self._calls > 1 and name in vars(module):
                vars(module)[name] = constant(vars(module)[name])
        if not self._watches:
            yield
            return
        cut = {(module, name): constant(value) for (module, name), value in self._set.items()}
        for (module, name), value in cut.items():
            vars(module)[name] = value
        start = {module: _own(module) for module in self._before}
        with _Reads(cut) if cut else nullcontext() as reads:
            yield
        for module, own in start.items():
            for name, value in _own(module).items():
                if value is not own.get(name, _ABSENT) and _holds_tensors(value):
                    if reads is not None and (module, name) in reads.found and _needs_gradient(value):
                        self._rest[module, name] = self._before[module].get(name, _ABSENT)
                    self._set[module, name] = value
        self._has_seen |= call.selected and self._calls > 1
        if reads is not None:
            self._refuse_lost(cut, reads.found)

    def _put_back(self, module: nn.Module, name: str) -> None:
        """An attribute to what it is at rest, unless someone else has set it since the last pass: then that is its rest."""
        rest, found = self._rest[module, name], vars(module).get(name, _ABSENT)
        if found is not self._left.get((module, name)):
            self._rest[module, name] = found
        else:
            _assign(module, name, rest)

    def _refuse_lost(self, cut: dict[Key, Any], read: set[Key]) -> None:
        """What is computed in one step and read in later ones would have the gradient of the first step only."""
        for module, name in read:
            before = self._set[module, name]
            if vars(module).get(name) is cut[module, name] is not before:
                vars(module)[name] = before
                raise ConfigurationError(
                    f"{_path(self._net, module, name)} is computed with a gradient at one time step, kept, and read at a "
                    "later one, where it is a constant: compute it at each step, or without a gradient"
                )

    def _say(self, carried: list[Key]) -> None:
        if not carried:
            return
        paths = {module: path for path, module in self._net.named_modules()}
        kept = {
            f"{paths[module]}.{name}".lstrip("."): f"of a {type(module).__name__}" for module, name in carried
        }
        warnings.warn(
            listed(
                "tensors are kept from step to step as plain attributes, and taken for state: constant between two steps, "
                "and at the start of each iteration what they were before the first one. What is to stay over iterations "
                "has to be a buffer (register_buffer):",
                kept,
            ),
            SLTTWarning,
            stacklevel=2,
        )


class _Reads(Looking):
    """Sees which of the tensors that are kept are read."""

    def __init__(self, kept: dict[Key, Any]) -> None:
        super().__init__()
        self._keys = {id(leaf): key for key, value in kept.items() for leaf in tree_leaves(value)}
        self.found: set[Key] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in _LOOKS:
            read = map(id, tree_leaves((args, kwargs)))
            self.found |= {self._keys[one] for one in read if one in self._keys}
        return func(*args, **(kwargs or {}))


def _assign(module: nn.Module, name: str, value: Any) -> None:
    if value is _ABSENT:
        vars(module).pop(name, None)
    else:
        vars(module)[name] = value


def _path(net: nn.Module, module: nn.Module, name: str) -> str:
    path = next(path for path, one in net.named_modules() if one is module)
    return f"{path}.{name}".lstrip(".")


def _own(module: nn.Module) -> dict[str, Any]:
    """Plain attributes of a module that carries no state known to the time loop."""
    if isinstance(module, StatefulModule) or is_unconverted(module):
        return {}
    return {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}


def _holds_tensors(value: Any) -> bool:
    """Whether a value is a tensor, or a tuple with one; lists and dicts may be records that others read."""
    return isinstance(value, Tensor) or (isinstance(value, tuple) and any(map(_holds_tensors, value)))


def _needs_gradient(value: Any) -> bool:
    return any(tensor.requires_grad for tensor in tensors_in(value))
