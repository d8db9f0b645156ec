"""What a pass through time changes besides gradients, so that it can run twice as if it ran once."""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sltt_ext.neuron import StatefulModule
from sltt_ext.online.storages import storage_of

__all__ = ["Snapshot", "drawn", "random_numbers", "without_modes"]

without_modes = torch._C._DisableTorchDispatch
"""A context without dispatch modes, entered and left in C: torch's own takes the modes off, and Ctrl-C may keep them off."""


_NOT_TAKEN = frozenset({*vars(nn.Module()), "forward"})  # which is replaced by whoever runs the pass
_DEPTH = 2  # a list or dict that is an attribute, and one in that
_ABSENT: Any = object()


class Snapshot:
    """What a network holds and draws from at one moment: buffers, carried states, plain attributes, random numbers.

    Lists and dicts are taken with what is in them. Objects of other kinds are taken as they are. Parameters, hooks and
    what has a graph are not taken.

    Args:
        net: The network.
        but_given: Whether to leave alone what has a gradient, for which something else may stand in when it is restored.
        written: Where others are about to take the place of the states that neurons carry: which storages are written to
            meanwhile. The states are not copied then, but for those in them.

    Attributes:
        storages: Those that `restore` writes to.
    """

    def __init__(
        self, net: nn.Module, but_given: bool = False, written: Collection[int] | None = None
    ) -> None:
        self._but_given = but_given
        self._written = written
        self.storages: set[int] = set()
        self._undo: list[Callable[[], Any]] = []
        modules = list(net.modules())
        stores = [
            store for module in modules if isinstance(module, StatefulModule) for store in module.stores()
        ]
        self._stores = {id(store) for store in stores}
        for module in modules:
            buffers: Any = module._buffers
            self._keep(buffers, buffers)
            own = vars(module)
            self._keep(own, {name: value for name, value in own.items() if name not in _NOT_TAKEN})
        for store in stores:
            self._keep(store, store, is_state=True)
        self._undo.append(random_numbers(net))

    @torch.no_grad()
    def restore(self) -> None:
        """Make everything what it was."""
        for undo in self._undo:
            undo()

    def _keep(
        self, store: dict[Any, Any], now: dict[Any, Any], depth: int = _DEPTH, is_state: bool = False
    ) -> None:
        """Take what is ``now`` in a dict."""
        before = {
            name: value
            for name, value in now.items()
            if not (self._but_given and isinstance(value, Tensor) and value.requires_grad)
        }
        self._undo.append(partial(_put_back, store, before, {*now}))
        for name, value in now.items():
            if not (is_state and isinstance(value, Tensor) and self._stays(value)):
                self._keep_content(value, partial(store.__setitem__, name), depth)

    def _stays(self, state: Tensor) -> bool:
        return self._written is not None and storage_of(state) not in self._written

    def _keep_content(self, value: Any, put: Callable[[Any], Any], depth: int) -> None:
        """Take what a value holds; ``put`` exchanges the value."""
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter) and _can_change(value):
                self.storages.add(storage_of(value))
                self._undo.append(partial(_write, value, value.detach().clone(), value.requires_grad, put))
        elif isinstance(value, torch.Generator):
            self._undo.append(partial(value.set_state, value.get_state()))
        elif id(value) in self._stores:
            return  # which are taken once
        elif depth and type(value) is list:
            self._undo.append(partial(_refill, value, list(value)))
            for place, element in enumerate(value):
                self._keep_content(element, partial(value.__setitem__, place), depth - 1)
        elif depth and isinstance(value, dict):
            self._keep(value, value, depth - 1)
        elif depth and dataclasses.is_dataclass(value) and not isinstance(value, type):
            for field in dataclasses.fields(value):
                exchange = partial(object.__setattr__, value, field.name)
                self._keep_content(getattr(value, field.name), exchange, depth - 1)


def random_numbers(net: nn.Module) -> Callable[[], None]:
    """A function that has the generators draw the same again: those of torch, of Python, and of NumPy where it is used."""
    devices = {parameter.device for parameter in net.parameters() if parameter.device.type == "cuda"}
    with without_modes():  # real states also where the network runs on fake tensors
        state = torch.get_rng_state()
        cuda = {device: torch.cuda.get_rng_state(device) for device in devices}
    python, numpy = random.getstate(), getattr(sys.modules.get("numpy"), "random", None)
    numbers = None if numpy is None else numpy.get_state()

    def draw_again() -> None:
        with without_modes():
            torch.set_rng_state(state)
            for device, of_device in cuda.items():
                torch.cuda.set_rng_state(of_device, device)
        random.setstate(python)
        if numpy is not None:
            numpy.set_state(numbers)

    return draw_again


def drawn(net: nn.Module) -> list[Any]:
    """Where the generators of random numbers are: those of torch, of Python, and of NumPy where it is used."""
    devices = {parameter.device for parameter in net.parameters() if parameter.device.type == "cuda"}
    numpy = getattr(sys.modules.get("numpy"), "random", None)
    state = None if numpy is None else numpy.get_state()[1:3]
    with without_modes():  # real states also where the network runs on fake tensors
        torchs = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
        return [random.getstate(), state and (state[0].tolist(), state[1]), *(one.tolist() for one in torchs)]


def _put_back(store: dict[Any, Any], before: dict[Any, Any], names: set[Any]) -> None:
    """Give a dict the entries that it had, and take others off; what is of every module stays as it is."""
    for name in [name for name in store if name not in names and name not in _NOT_TAKEN]:
        del store[name]
    for name, value in before.items():
        if store.get(name, _ABSENT) is not value:
            store[name] = value


def _refill(kept: list[Any], before: list[Any]) -> None:
    kept[:] = before


def _write(tensor: Tensor, value: Tensor, had_graph: bool, put: Callable[[Any], Any]) -> None:
    if tensor.requires_grad and not had_graph:  # it was written over, and belongs to a graph since
        put(value.clone())
    else:
        tensor.data.copy_(value)  # unseen by autograd: a graph may need the tensor as it was


def _can_change(tensor: Tensor) -> bool:
    """Whether a tensor can be written to: not one of inference mode, nor one that repeats its memory."""
    if tensor.is_inference() or tensor.layout is not torch.strided:
        return False
    return all(stride or size < 2 for stride, size in zip(tensor.stride(), tensor.shape))
