"""What a step function may read beside its input and states: the tensors of its module, and constants.

A compiled step has its tensors as inputs, and every other value as a constant. The constants are found anew at each call, so
that a changed one makes another graph: plain values in the attributes of the module and of what is in it, and in the globals
and closures of the functions that the step calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from types import BuiltinMethodType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["constants_of", "tensors_of"]

Path = tuple[str, str, str]
"""Of a tensor: the module's path, the dictionary of the module that has it, its name there."""

_STORES = ("_parameters", "_buffers")
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_OF_MODULES = {name for name in vars(nn.Module()) if name != "training"}


def tensors_of(module: nn.Module, states: Collection[str]) -> dict[Path, Tensor]:
    """Parameters, buffers and tensors in plain attributes, but for the neuron's ``states``."""
    found = {}
    for path, store, values in _stores(module, states):
        found.update(
            {(path, store, name): value for name, value in values.items() if isinstance(value, Tensor)}
        )
    return found


def constants_of(step: Callable[..., Any], module: nn.Module, states: Collection[str]) -> Hashable:
    """All plain values that the step may read; two calls with equal ones are the same function of tensors."""
    own = tuple(
        (path, name, _constant(value))
        for path, store, values in _stores(module, states)
        for name, value in values.items()
        if not isinstance(value, (Tensor, nn.Module))
    )
    owners = tuple(dict.fromkeys(type(one) for one in module.modules()))
    return own, tuple(_constant(_value(place)) for place in _places(step, owners))


def _stores(module: nn.Module, states: Collection[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, one in module.named_modules():
        hidden = {"forward"} if path else {"forward", *states}
        attributes = {
            name: value
            for name, value in vars(one).items()
            if name not in _OF_MODULES and name not in hidden and not name.startswith(("_sltt_", "sltt_"))
        }
        yield path, "", attributes
        for store in _STORES:
            yield path, store, vars(one)[store]


def _constant(value: Any) -> Hashable:
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(_constant, value))
    if isinstance(value, dict):
        return dict, tuple((_constant(key), _constant(each)) for key, each in value.items())
    if isinstance(value, (Tensor, nn.Module)):
        return _Same(type(value))  # a tensor is an input, and a module's values are there themselves
    if isinstance(value, (type, ModuleType, FunctionType)):
        return _Same(value)
    own = getattr(value, "__dict__", {}).items()
    return _Same(value), tuple((name, each) for name, each in own if isinstance(each, _PLAIN))


class _Same:
    """An object that is compared by identity, and kept alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


Place = tuple[Any, str]
"""A dictionary, or the cell of a closure, and the name of a value in it."""


def _value(place: Place) -> Any:
    inside, name = place
    return inside.cell_contents if isinstance(inside, CellType) else inside.get(name)


@functools.cache
def _places(step: Callable[..., Any], owners: tuple[type, ...]) -> tuple[Place, ...]:
    """Globals, closures and class attributes read by a function, by what it calls, and by the methods of ``owners``."""
    places: list[Place] = []
    seen: set[int] = set()
    waiting: list[Any] = [step, *(getattr(owner, "forward", None) for owner in owners)]
    while waiting:
        function = _undecorated(waiting.pop())
        if isinstance(function, type):
            waiting += [vars(function).get(name) for name in ("forward", "backward", "setup_context")]
        if id(function) in seen or not isinstance(function, FunctionType) or _is_library(function.__module__):
            continue
        seen.add(id(function))
        names = _names_in(function.__code__)
        found: list[Place] = [(cell, "") for cell in function.__closure__ or ()]
        found += _named(names, function.__globals__)
        for owner in owners:
            found += [place for base in owner.__mro__ for place in _named(names, vars(base), base.__module__)]
        for value in [_value(place) for place in found]:
            if isinstance(value, ModuleType):
                found += _named(names, vars(value), value.__name__)
            elif isinstance(value, type):
                found += [
                    place for base in value.__mro__ for place in _named(names, vars(base), base.__module__)
                ]
            elif isinstance(value, nn.Module):
                found += [(vars(one), name) for one in value.modules() for name in vars(one)]
                waiting += [type(one).forward for one in value.modules()]
        places += found
        waiting += map(_value, found)
    return tuple(places)


def _named(names: Collection[str], inside: Mapping[str, Any], module: str = "") -> list[Place]:
    return [] if _is_library(module) else [(inside, name) for name in names if name in inside]


def _undecorated(function: Any) -> Any:
    """The function in a partial one, a method or a static one; of ``apply``, the `torch.autograd.Function`."""
    if isinstance(function, functools.partial):
        return function.func
    if isinstance(function, (staticmethod, classmethod)):
        return function.__func__
    return (
        getattr(function, "__self__", function)
        if isinstance(function, (MethodType, BuiltinMethodType))
        else function
    )


def _is_library(module: str) -> bool:
    return module.partition(".")[0] in ("torch", "sltt_ext")


@functools.cache
def _names_in(code: CodeType) -> tuple[str, ...]:
    inner = (each for each in code.co_consts if isinstance(each, CodeType))
    return (*code.co_names, *(name for one in inner for name in _names_in(one)))
