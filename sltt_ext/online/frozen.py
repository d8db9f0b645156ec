"""What a CUDA graph of an iteration freezes, and what forbids one.

A replay runs the captured kernels on the memory of the capture, and no Python. So a graph can be used for another iteration
only if all of that is the same (`Frozen`, `described`, `surroundings`). What is known to need Python is refused (`refuse`).
The iterations that run without a graph show what changes in each of them (`Watch`).
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from sltt_ext.errors import ConfigurationError, listed
from sltt_ext.forwards import has_hooks
from sltt_ext.neuron import StatefulModule
from sltt_ext.online.distributed import is_distributed
from sltt_ext.online.gradient_hooks import gradient_hooks

__all__ = ["Frozen", "Iteration", "Watch", "described", "generators", "refuse", "surroundings"]

_VERSIONS = 32  # of what is frozen, that are known again
_PLAIN = (bool, int, float, str, type(None))
_CANNOT = "graph=True cannot capture this iteration:"

Place = tuple[str, str]
"""Path of a module, and a name in it."""


@dataclass(frozen=True)
class Iteration:
    """One iteration of a trainer, as graphs need to know it.

    Attributes:
        net: The network, with its wrappers.
        loss_fn: The loss.
        leaves: Everything that it gives a gradient to.
        run: ``(x, target, counts) -> result`` without a graph: an `OnlineResult`.
        reset: Puts the neurons' states back to rest.
        is_settled: Whether the last run would be run the same way again, with nothing left to be measured.
        forbidden: What the trainer's options forbid, by name.
    """

    net: nn.Module
    loss_fn: Any
    leaves: Sequence[Tensor]
    run: Callable[[Any, Any, Mapping[int, float]], Any]
    reset: Callable[[], Any]
    is_settled: Callable[[], bool]
    forbidden: Mapping[str, str] = field(default_factory=dict)

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Everything that is called, by its path."""
        yield from self.net.named_modules()
        if isinstance(self.loss_fn, nn.Module):
            yield from self.loss_fn.named_modules(prefix="loss_fn")


class Frozen:
    """What a graph freezes of modules: where their tensors are, which of them are trained, and their plain attributes."""

    def __init__(self) -> None:
        self.states: set[Place] = set()
        self._known: dict[int, dict[Place, Any]] = {}
        self._latest = -1

    def version(self, one: Iteration) -> tuple[int, bool]:
        """A number for all that is frozen, the same for the same, and whether weights have moved since earlier versions."""
        now = self.held(one)
        for number, known in self._known.items():
            if known == now:
                return number, False
        moved = bool(self._known) and _weights(now) != _weights(self._known[self._latest])
        self._latest += 1
        self._known[self._latest] = now
        self._known.pop(self._latest - _VERSIONS, None)
        return self._latest, moved

    def held(self, one: Iteration) -> dict[Place, Any]:
        """All of it, but for what is known as state."""
        found: dict[Place, Any] = {}
        for path, module in one.modules():
            found[path, ""] = type(module)
            for store in (vars(module), module._parameters, module._buffers):
                for name, value in store.items():
                    if isinstance(value, Tensor):
                        found[path, name] = _Where(
                            value.data_ptr(), value.requires_grad, value.dtype, value.shape
                        )
                    elif isinstance(value, _PLAIN) and not name.startswith("_sltt"):
                        found[path, name] = value
        for place in self.states & found.keys():
            del found[place]
        return found


class _Where(NamedTuple):
    pointer: int
    requires_grad: bool
    dtype: torch.dtype
    shape: torch.Size


def _weights(held: Mapping[Place, Any]) -> dict[Place, int]:
    return {place: value.pointer for place, value in held.items() if isinstance(value, _Where)}


class Watch:
    """Sees, in the iterations that run without a graph, what a graph would not do: what changes in two of them, one after the other."""

    def __init__(self) -> None:
        self._changed: set[Place] = set()

    @contextmanager
    def watching(self, one: Iteration, given: Any, frozen: Frozen, device_type: str) -> Iterator[None]:
        """Surround an iteration.

        Raises:
            ConfigurationError: If it changes what a graph freezes.
        """
        one.reset()
        at_rest = frozen.held(one)
        one.reset()
        frozen.states |= _states(one, at_rest, frozen.held(one))
        before, draws, versions = frozen.held(one), _host_draws(device_type), _versions(given)
        yield
        if _versions(given) != versions:
            raise ConfigurationError(
                listed(_CANNOT, {"x": "the network or the loss changes it in place, and a graph has a copy"})
            )
        changed = _changed(before, frozen.held(one)) | {
            ("", name)
            for name, state in _host_draws(device_type).items()
            if not _same(state, draws.get(name))
        }
        again, self._changed = changed & self._changed, changed
        if again:
            raise ConfigurationError(listed(_CANNOT, {_named(place): _why(place) for place in again}))


def _changed(before: Mapping[Place, Any], after: Mapping[Place, Any]) -> set[Place]:
    return {place for place in after if after[place] != before.get(place)}


def _states(one: Iteration, before: Mapping[Place, Any], after: Mapping[Place, Any]) -> set[Place]:
    """The tensors that a reset alone has put in the place of others: the time loop knows them, and no graph has to."""
    modules = dict(one.modules())
    return {
        (path, name) for path, name in _changed(before, after) if isinstance(modules[path], StatefulModule)
    }


def _named(place: Place) -> str:
    return ".".join(filter(None, place))


def _why(place: Place) -> str:
    path, name = place
    if path == "" and name in _HOST_DRAWS:
        return f"every iteration draws from {name}, and a graph would freeze the draw: draw on the device, with torch"
    return (
        "every iteration gives it another value, and a graph would freeze the first one: count in a tensor, changed in place "
        "(self.count.add_(1)), or register the state of a neuron (SpikingJelly: register_memory)"
    )


_HOST_DRAWS = ("torch's generator on the CPU", "Python's random", "NumPy's random")


def _host_draws(device_type: str) -> dict[str, Any]:
    """States of the generators that are not the device's."""
    numpy = getattr(sys.modules.get("numpy"), "random", None)
    states = (
        torch.get_rng_state() if device_type != "cpu" else None,
        random.getstate(),
        None if numpy is None else numpy.get_state(legacy=False)["state"],
    )
    return dict(zip(_HOST_DRAWS, states))


def _same(state: Any, before: Any) -> bool:
    if isinstance(state, Tensor):
        return torch.equal(state, before)
    if isinstance(state, dict):
        return all(bool((state[name] == before[name]).all() if hasattr(state[name], "all") else state[name] == before[name]) for name in state)  # fmt: skip
    return bool(state == before)


def _versions(given: Any) -> list[int]:
    tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def described(x: Any, target: Any) -> Hashable:
    """What a graph freezes of its input and its target."""
    leaves, structure = tree_flatten((x, target))
    return str(structure), tuple(
        (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
        for leaf in leaves
    )


def surroundings(device_type: str) -> Hashable:
    """What a graph freezes of torch's own settings."""
    return (
        torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type), torch.is_autocast_cache_enabled(),
        torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(), torch.get_default_dtype(),
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic,
    )  # fmt: skip


def generators(one: Iteration) -> dict[Place, torch.Generator]:
    """The generators that modules have for themselves."""
    return {
        (path, name): value
        for path, module in one.modules()
        for name, value in vars(module).items()
        if isinstance(value, torch.Generator)
    }


def refuse(one: Iteration, x: Any, target: Any, device_type: str) -> torch.device:
    """The device of an iteration, if nothing is known to forbid a graph of it.

    Raises:
        ConfigurationError: If something does; all of it is named.
    """
    found = dict(one.forbidden)
    if is_distributed(one.net):
        found["several processes"] = "their exchange of gradients is not captured: leave graph=True out there"
    devices = {leaf.device for leaf in one.leaves}
    if len(devices) != 1 or next(iter(devices)).type != device_type:
        where = ", ".join(sorted(map(str, devices)))
        found["the device"] = (
            f"network, loss and input have to be on one {device_type.upper()} device, and are on {where}"
        )
    for path, module in one.modules():
        if has_hooks(module):
            found[path or "the network"] = (
                "its hooks are Python, and a replay calls none: remove them, or graph=True"
            )
        for name, parameter in module._parameters.items():
            if parameter is not None and gradient_hooks(parameter):
                found[_named((path, name))] = "a hook waits for its gradient, and a replay calls none"
    for place, generator in generators(one).items():
        if generator.device.type != device_type:
            found[_named(place)] = (
                f"it is a generator on the {generator.device.type.upper()}, and a graph would freeze what it draws"
            )
    found |= _refused_data("x", x, (dict,)) | _refused_data("target", target, (dict, tuple, list))
    if found:
        raise ConfigurationError(listed(_CANNOT, found))
    return devices.pop()


def _refused_data(name: str, value: Any, containers: tuple[type, ...]) -> dict[str, str]:
    if not isinstance(value, (Tensor, *containers, *_PLAIN)):
        return {
            name: f"it is a {type(value).__name__}, and has to be a tensor or {containers[0].__name__} of tensors"
        }
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            if leaf.requires_grad:
                return {name: "it requires a gradient, which a graph gives to its copy: detach() it"}
        elif not isinstance(leaf, _PLAIN):
            return {name: f"there is a {type(leaf).__name__} in it, but a graph reads tensors only"}
    return {}
