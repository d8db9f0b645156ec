"""Where a network holds the number of steps that it runs: attributes of modules, and global variables that its code reads."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any, TypeGuard

from torch import nn

from sltt_ext.errors import ConfigurationError
from sltt_ext.online.inputs import TimeDims

__all__ = ["check_axis", "given_names", "globals_with", "is_number", "matches", "numbers_of"]

_FRAMEWORKS = {"torch", "spikingjelly", "snntorch", "sltt_ext"}


def given_names(names: Any) -> tuple[str, ...]:
    """``time_inside`` as names.

    Raises:
        ConfigurationError: If it is something else.
    """
    given = [names] if isinstance(names, str) else names
    if not isinstance(given, Sequence) or not given or not all(isinstance(name, str) for name in given):
        raise ConfigurationError(
            f"time_inside must be the name of what holds the number of steps, such as 'T', or a list of names, got {names!r}; if the "
            "network runs a single step in its forward, give time_steps="
        )
    return tuple(given)


def check_axis(name: str, forward: Sequence[str], time_dim: TimeDims) -> None:
    """See that it is known where an argument of ``forward`` has its time.

    Raises:
        ConfigurationError: If it is not.
    """
    axes = time_dim if isinstance(time_dim, Mapping) else {forward[0]: time_dim}
    if axes.get(name) is None:
        wanted = "0" if name == forward[0] else f"{{{name!r}: 0}}"
        raise ConfigurationError(
            f"time_inside={name!r} takes the number of steps from that argument of forward: say which of its axes is time, "
            f"time_dim={wanted} for [T, N, ...]"
        )


def numbers_of(net: nn.Module, of_the_user: bool = False) -> Iterator[tuple[str, int]]:
    """Whole numbers that modules hold, by path; of the frameworks' own modules, too, or not."""
    for path, module in net.named_modules():
        if of_the_user and not _is_of_the_user(type(module)):
            continue
        for name, value in vars(module).items():
            if is_number(value) and not name.startswith("_sltt_"):
                yield f"{path}.{name}".lstrip("."), value


def is_number(value: Any) -> TypeGuard[int]:
    """Whether a value may be a number of steps."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def globals_with(net: nn.Module, name: str) -> list[dict[str, Any]]:
    """The global variables among which the network's own code reads a number of this name."""
    own = {base for module in net.modules() for base in type(module).__mro__ if _is_of_the_user(base)}
    found = {id(store): store for cls in own for store in _globals_read(cls, name)}
    return [store for store in found.values() if is_number(store.get(name))]


@lru_cache(maxsize=256)
def _globals_read(cls: type, name: str) -> list[dict[str, Any]]:
    """The global variables of the functions of a class that read something of this name."""
    methods = [inspect.unwrap(value) for value in vars(cls).values() if callable(value)]
    functions = [method for method in methods if isinstance(method, FunctionType)]
    return [function.__globals__ for function in functions if _reads(function.__code__, name)]


def _reads(code: CodeType, name: str) -> bool:
    """Whether a function, or one inside of it, reads something of this name."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return name in code.co_names or any(_reads(one, name) for one in inner)


def _is_of_the_user(cls: type) -> bool:
    return cls.__module__.partition(".")[0] not in _FRAMEWORKS


def matches(path: str, name: str) -> bool:
    """Whether an attribute is named; ``"*.T"`` is that of the network itself, too."""
    return fnmatchcase(path, name) or fnmatchcase(f".{path}", name)
