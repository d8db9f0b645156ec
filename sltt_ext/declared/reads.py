"""What a step function may read beside its input and states: the tensors of its module, and constants.

A compiled step has its tensors as inputs, and every other value as a constant. The constants are found anew at each call, so
that a changed one makes another graph: plain values in the attributes of the module and of what is in it, and in the globals
and closures of the functions that the step calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Hashable, Iterator
from types import CodeType, FunctionType, ModuleType
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
    return own, tuple(_read_by(step, set()))


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
    own = getattr(value, "__dict__", None)
    inner = tuple((name, each) for name, each in (own or {}).items() if isinstance(each, _PLAIN))
    return _Same(value), () if isinstance(value, (type, ModuleType)) else inner


class _Same:
    """An object that is compared by identity, and kept alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _read_by(function: Any, seen: set[int]) -> Iterator[Hashable]:
    """Values of the globals and closures of a function, and of those that it calls."""
    if id(function) in seen:
        return
    seen.add(id(function))
    if isinstance(function, functools.partial):
        yield from map(_constant, (function.args, function.keywords))
        yield from _read_by(function.func, seen)
    elif isinstance(getattr(function, "__self__", None), type):  # the apply of a torch.autograd.Function
        for name in ("forward", "backward", "setup_context"):
            yield from _read_by(getattr(function.__self__, name, None), seen)
    if not isinstance(function, FunctionType) or function.__module__.partition(".")[0] == "torch":
        return
    yield from map(_constant, (function.__defaults__, function.__kwdefaults__))
    names = _names_in(function.__code__)
    found = [(name, function.__globals__[name]) for name in names if name in function.__globals__]
    for cell, name in zip(function.__closure__ or (), function.__code__.co_freevars):
        found.append((name, cell.cell_contents))
    for name, value in found:
        yield name, _constant(value)
        if isinstance(value, ModuleType) and value.__name__.partition(".")[0] != "torch":
            yield from ((name, _constant(vars(value)[name])) for name in names if name in vars(value))
        elif isinstance(value, nn.Module):
            yield constants_of(type(value).forward, value, ())
        elif isinstance(value, type) and issubclass(value, torch.autograd.Function):
            yield from _read_by(value.apply, seen)
        else:
            yield from _read_by(value, seen)


@functools.cache
def _names_in(code: CodeType) -> tuple[str, ...]:
    inner = (each for each in code.co_consts if isinstance(each, CodeType))
    return (*code.co_names, *(name for one in inner for name in _names_in(one)))
