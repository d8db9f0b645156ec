"""Plain attributes of a module at one moment: what they hold, also in lists, sets and dicts."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sltt_ext.neuron import constant, tensors_in

__all__ = [
    "ABSENT",
    "Key",
    "as_constant",
    "holds_tensors",
    "is_record",
    "is_same",
    "leaves_of",
    "needs_gradient",
    "path_of",
    "plain_attributes",
    "put",
    "put_back_elements",
]

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
ABSENT: Any = object()
Key = tuple[nn.Module, tuple[Any, ...]]
"""A module, and the name of an attribute; for an entry of a dict, its keys as well."""


@dataclass(frozen=True, eq=False)
class _Contents:
    """A list, deque or set, and what it holds at the moment."""

    holder: Any
    elements: tuple[Any, ...]

    def put(self) -> None:
        """Make it hold that again: others may have a name for it, too."""
        if isinstance(self.holder, list):
            self.holder[:] = self.elements
        else:
            self.holder.clear()
            (self.holder.update if isinstance(self.holder, set) else self.holder.extend)(self.elements)


def plain_attributes(module: nn.Module) -> Iterator[tuple[Key, Any]]:
    """What a module keeps, but for parameters, buffers and modules; each entry of a dict by itself."""
    for name, value in vars(module).items():
        if name not in _OF_EVERY_MODULE:
            yield from _entries(module, (name,), value)


def _entries(module: nn.Module, path: tuple[Any, ...], value: Any) -> Iterator[tuple[Key, Any]]:
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _entries(module, (*path, key), entry)
    elif isinstance(value, (list, deque, set)):
        yield (module, path), _Contents(value, tuple(value))
    else:
        yield (module, path), value


def put(key: Key, value: Any) -> None:
    """Give an attribute the value that it had; ABSENT takes it away."""
    module, (*outer, last) = key
    holder: Any = vars(module)
    for name in outer:
        holder = holder.get(name)
        if not isinstance(holder, dict):
            return  # the dict is gone, and its entries with it
    if value is ABSENT:
        holder.pop(last, None)
    elif isinstance(value, _Contents):
        value.put()
        holder[last] = value.holder
    else:
        holder[last] = value


def put_back_elements(key: Key, cut: Any, before: Any) -> None:
    """Put tensors that were made constant, and that nobody has read, back among what a list holds now."""
    if not isinstance(cut, _Contents):
        return
    original = {id(element): first for element, first in zip(cut.elements, before.elements)}
    now = _Contents(cut.holder, tuple(original.get(id(element), element) for element in cut.holder))
    now.put()


def as_constant(value: Any) -> Any:
    """What an attribute holds, as constants for the gradient."""
    if isinstance(value, _Contents):
        return _Contents(value.holder, tuple(map(constant, value.elements)))
    return constant(value)


def is_record(value: Any) -> bool:
    """Whether a value is a list, deque or set, which others may fill, and empty."""
    return isinstance(value, _Contents)


def is_same(a: Any, b: Any) -> bool:
    """Whether two values are the same objects."""
    if isinstance(a, _Contents) and isinstance(b, _Contents):
        same_length = a.holder is b.holder and len(a.elements) == len(b.elements)
        return same_length and all(x is y for x, y in zip(a.elements, b.elements))
    return a is b


def holds_tensors(value: Any) -> bool:
    """Whether a value is a tensor, or has one in a tuple, list or set."""
    if isinstance(value, _Contents):
        return any(map(holds_tensors, value.elements))
    return isinstance(value, Tensor) or (isinstance(value, tuple) and any(map(holds_tensors, value)))


def needs_gradient(value: Any) -> bool:
    """Whether a tensor among what a value holds requires one."""
    return any(tensor.requires_grad for leaf in leaves_of(value) for tensor in tensors_in(leaf))


def leaves_of(value: Any) -> list[Any]:
    """All that a value holds, one by one."""
    return tree_leaves(value.elements if isinstance(value, _Contents) else value)


def path_of(net: nn.Module, key: Key) -> str:
    """The attribute's path, for a message."""
    module, (name, *keys) = key
    path = next(path for path, one in net.named_modules() if one is module)
    return f"{path}.{name}".lstrip(".") + "".join(f"[{one!r}]" for one in keys)
