"""A module that can be tried out in the place of another one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["aside", "copied", "seed", "twin_of"]

Result = TypeVar("Result")


def twin_of(module: nn.Module, cls: type[nn.Module]) -> Any:
    """A module of class ``cls`` with what ``module`` has, but for its hooks, and for what was put in the place of its forward.

    Whatever a forward of it changes, ``module`` stays as it is.
    """
    twin: Any = cls.__new__(cls)
    own = {
        name: value
        for name, value in vars(nn.Module()).items()
        if name not in ("training", "_parameters", "_buffers")
    }
    seen: dict[int, Any] = {id(module): twin}
    for name, value in vars(module).items():
        if name == "forward" or name.startswith(("_sltt_", "sltt_")) or (name in own and name != "_modules"):
            continue
        vars(twin)[name] = copied(value, seen)
    for name, value in own.items():
        vars(twin).setdefault(name, value)
    return twin


def copied(value: Any, seen: dict[int, Any] | None = None) -> Any:
    """``value`` with tensors, containers and plain objects of its own; what is callable stays the same.

    Tensors are constants. ``seen`` has what was copied before, by its id.
    """
    seen = {} if seen is None else seen
    twin = seen.get(id(value), value)
    if isinstance(value, Tensor):
        tensor = value.detach().clone()
        return nn.Parameter(tensor, value.requires_grad) if isinstance(value, nn.Parameter) else tensor
    if isinstance(value, nn.Module):
        return twin if twin is not value else copy.deepcopy(value)
    if isinstance(value, dict) and type(value) is dict:
        return {key: copied(each, seen) for key, each in value.items()}
    if type(value) in (list, set, tuple):
        return type(value)(copied(each, seen) for each in value)
    plain = hasattr(value, "__dict__") and not callable(value) and not isinstance(value, ModuleType)
    if plain and twin is value:
        twin = seen[id(value)] = copy.copy(value)
        vars(twin).update({name: copied(each, seen) for name, each in vars(value).items()})
    return twin


def seed(value: int, device: torch.device) -> None:
    """Seed the generators of the CPU and of ``device``, and none of devices that are not used."""
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(value)


def aside(trial: Callable[[], Result]) -> Result:
    """What ``trial`` returns in a thread of its own, where no mode and no hook on saved tensors of this one is in force."""
    with ThreadPoolExecutor(1) as clean:
        return clean.submit(trial).result()
