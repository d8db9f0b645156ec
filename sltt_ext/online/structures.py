"""Tensors in whatever a network takes or returns: dicts, tuples, lists and dataclasses, also nested."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

__all__ = ["Rebuild", "flatten"]

Rebuild = Callable[[Sequence[Tensor]], Any]
"""The same structure with other tensors."""


def flatten(value: Any) -> tuple[list[Tensor], Rebuild]:
    """The tensors in a value, in order, and how to make the value again of others.

    Examples:
        >>> import torch
        >>> tensors, rebuild = flatten({"logits": torch.zeros(2), "name": "net"})
        >>> rebuild([torch.ones(2)])
        {'logits': tensor([1., 1.]), 'name': 'net'}
    """
    tensors: list[Tensor] = []
    return tensors, _visit(value, tensors)


def _visit(value: Any, tensors: list[Tensor]) -> Rebuild:
    if isinstance(value, Tensor):
        index = len(tensors)
        tensors.append(value)
        return lambda others: others[index]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        parts = {name: _visit(part, tensors) for name, part in fields.items()}
        return lambda others: dataclasses.replace(
            value, **{name: part(others) for name, part in parts.items()}
        )
    if isinstance(value, dict):
        return _dict(value, {key: _visit(part, tensors) for key, part in value.items()})
    if isinstance(value, (tuple, list)):
        elements = [_visit(part, tensors) for part in value]
        named = hasattr(value, "_fields")
        return lambda others: (
            type(value)(*(part(others) for part in elements))
            if named
            else type(value)(part(others) for part in elements)
        )
    return lambda others: value


def _dict(value: dict[Any, Any], parts: dict[Any, Rebuild]) -> Rebuild:
    def rebuild(others: Sequence[Tensor]) -> Any:
        new = copy.copy(value)  # of its own kind, such as an OrderedDict
        new.update({key: part(others) for key, part in parts.items()})
        return new

    return rebuild
