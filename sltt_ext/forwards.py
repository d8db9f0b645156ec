"""Replacing what a module does for a while: the only file that does.

Some speed-ups stand between a module and its ``forward``. Each of them is one layer around it::

    caller -> the user's hooks -> TIME -> STEPS -> PARTS -> ONCE -> OWN -> the module's own forward

Layers are ordered by what they do, not by who came first. A layer is written down before it is put in place, and
taking it away twice does no harm: an exception at any moment leaves the module as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from functools import partial
from typing import Any

from torch import nn

__all__ = ["Around", "Layer", "Replacements", "has_own_forward"]

Around = Callable[..., Any]
"""``around(module, forward, *args, **kwargs)`` stands in for ``forward(*args, **kwargs)`` of ``module``."""

_ABSENT: Any = object()


class Layer(IntEnum):
    """What a replacement is for, from the innermost to the outermost."""

    OWN = 0
    """Reads what the module itself returns, before any hook of the user's changes it."""
    ONCE = 1
    """Evaluates what does not depend on time once."""
    PARTS = 2
    """Splits a call of several steps into the calls that it stands for."""
    STEPS = 3
    """Unfolds time from the batch."""
    TIME = 4
    """Runs the network over time."""


class Replacements:
    """What is replaced inside of a ``with`` block; all of it is put back at the end, in reverse order.

    >>> import torch
    >>> double = torch.nn.Identity()
    >>> with Replacements() as replaced:
    ...     replaced.forward(double, Layer.OWN, lambda module, forward, x: 2 * forward(x))
    ...     double(3)
    6
    >>> double(3)
    3
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def forward(self, module: nn.Module, layer: Layer, around: Around) -> None:
        """Put ``around`` around the forward of ``module``; of two on the same layer, the later one is outside."""
        stack = _Stack.of(module)
        entry = (layer, around)
        self._undo.append(partial(stack.remove, entry))
        stack.add(entry)

    def attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Give an attribute of ``module`` itself another value."""
        self.entry(vars(module), name, value)

    def entry(self, store: dict[str, Any], name: str, value: Any) -> None:
        """Give an entry of a dict of a module's, such as one of its parameters, another value."""
        self._undo.append(partial(_put_back, store, name, store.get(name, _ABSENT)))
        store[name] = value

    def undo(self) -> None:
        """Put everything back, also when an interrupt comes in between."""
        try:
            while self._undo:
                self._undo[-1]()
                self._undo.pop()
        finally:
            if self._undo:
                self.undo()

    def __enter__(self) -> Replacements:
        return self

    def __exit__(self, *_: Any) -> None:
        self.undo()


class _Stack:
    """Stands in the place of a module's forward, with the layers around it."""

    def __init__(self, module: nn.Module) -> None:
        self.before = vars(module).get("forward", _ABSENT)
        self._module = module
        self._forward: Callable[..., Any] = module.forward
        self._layers: list[tuple[Layer, Around]] = []
        self._composed = self._forward

    @staticmethod
    def of(module: nn.Module) -> _Stack:
        """The one that stands there already, or a new one."""
        standing = vars(module).get("forward")
        return standing if isinstance(standing, _Stack) else _Stack(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._composed(*args, **kwargs)

    def add(self, entry: tuple[Layer, Around]) -> None:
        self._layers = sorted(
            [*self._layers, entry], key=lambda entry: entry[0]
        )  # stable: the later one outside
        self._compose()
        vars(self._module)["forward"] = self

    def remove(self, entry: tuple[Layer, Around]) -> None:
        """Take a layer away. Who has put something over the stack meanwhile still calls the module's own forward."""
        self._layers = [kept for kept in self._layers if kept is not entry]
        self._compose()
        if not self._layers and vars(self._module).get("forward") is self:
            _put_back(vars(self._module), "forward", self.before)

    def _compose(self) -> None:
        composed = self._forward
        for _, around in self._layers:
            composed = partial(around, self._module, composed)
        self._composed = composed


def has_own_forward(module: nn.Module) -> bool:
    """Whether someone else has replaced the forward of this very module."""
    standing = vars(module).get("forward", _ABSENT)
    return standing is not _ABSENT and not (isinstance(standing, _Stack) and standing.before is _ABSENT)


def _put_back(own: dict[str, Any], name: str, before: Any) -> None:
    if before is _ABSENT:
        own.pop(name, None)
    else:
        own[name] = before
