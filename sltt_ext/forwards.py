"""Replacing what a module does for a while: the only file that does.

Some speed-ups stand between a module and its ``forward``. Each of them is one layer around it::

    caller -> the user's hooks -> TIME -> STEPS -> PARTS -> ONCE -> OWN -> COMPILED -> the module's own forward

Layers are ordered by what they do, not by who came first. A layer is written down before it is put in place, and
taking it away twice does no harm: an exception at any moment leaves the module as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)

__all__ = [
    "HOOKS",
    "Around",
    "Layer",
    "Looking",
    "Replacements",
    "has_global_hooks",
    "has_hooks",
    "has_own_forward",
]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where a module has its hooks."""

Around = Callable[..., Any]
"""``around(module, forward, *args, **kwargs)`` stands in for ``forward(*args, **kwargs)`` of ``module``."""

_ABSENT: Any = object()


class Layer(IntEnum):
    """What a replacement is for, from the innermost to the outermost."""

    COMPILED = -1
    """Runs a compiled forward in the place of the module's own."""
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
    """What is changed inside of a ``with`` block; all of it is put back at the end, in reverse order.

    Examples:
        >>> import torch
        >>> double = torch.nn.Identity()
        >>> with Replacements() as replaced:
        ...     replaced.forward(double, Layer.OWN, lambda module, forward, x: 2 * forward(x))
        ...     double(3)
        6
        >>> double(3)
        3

        Ctrl-C may strike at any moment: between a change and the block that undoes it, or while things are put back. So what
        undoes a change is written down before the change is made, and a block of the time loop is entered twice, ``with replaced,
        replaced:``. What the inner end is kept from, the outer one does; and what even that one is kept from (by a second
        Ctrl-C), the next block that `begins_at` the same modules does.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], Any]] = []
        self._take_back: list[Callable[[], Any]] = []
        self._surroundings: list[_Surroundings] = []
        self._is_over = False

    def forward(self, module: nn.Module, layer: Layer, around: Around) -> None:
        """Put ``around`` around the forward of ``module``; of two on the same layer, the later one is outside."""
        stack = _Stack.of(module)
        entry = (layer, around)
        self.at_end(partial(stack.remove, entry))
        stack.add(entry)

    def attribute(self, module: Any, name: str, value: Any) -> None:
        """Give an attribute of ``module`` itself another value."""
        self.entry(vars(module), name, value)

    def entry(self, store: dict[str, Any], name: str, value: Any) -> None:
        """Give an entry of a dict of a module's, such as one of its parameters, another value."""
        self.at_end(partial(_put_back, store, name, store.get(name, _ABSENT)))
        store[name] = value

    def at_end(self, undo: Callable[[], Any]) -> None:
        """Call ``undo`` at the end, before what was given earlier; twice does no harm."""
        self._undo.append(undo)

    def if_cut_short(self, take_back: Callable[[], Any]) -> None:
        """Call ``take_back`` if the block ends with an exception, before anything else is put back; twice does no harm."""
        self._take_back.append(take_back)

    def begins_at(self, owners: Sequence[Any]) -> None:
        """Say that a block begins that has ``owners`` for itself, and undo what an interrupt has left of their latest one."""
        for owner in owners:
            latest = _LATEST.get(owner)
            if latest is not None and latest._is_over:
                latest.undo()
        _LATEST.update(dict.fromkeys(owners, self))

    def is_latest_at(self, owners: Sequence[Any]) -> bool:
        """Whether no other block has begun at ``owners`` since."""
        return all(_LATEST.get(owner) is self for owner in owners)

    def undo(self) -> None:
        """Put everything back; what an interrupt keeps it from is left for another time."""
        self._is_over = True
        _each(self._undo)

    def __enter__(self) -> Replacements:
        self._surroundings.append(_Surroundings())
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is not None:
                _each(self._take_back)
        finally:
            self.undo()
        if kind is not None:
            self._surroundings[-1].come_back()
        self._surroundings.pop()
        if not self._surroundings:
            self._take_back.clear()


_LATEST: WeakKeyDictionary[Any, Replacements] = WeakKeyDictionary()
"""The latest block at each module that one has begun at; nobody has to clear it, whatever ends a block."""


def _each(undo: list[Callable[[], Any]]) -> None:
    """Call each one, the last one first, and take it off the list; also after an error, but for an interrupt."""
    while undo:
        try:
            undo[-1]()
        except Exception:
            undo.pop()
            _each(undo)
            raise
        undo.pop()


class Looking(TorchFunctionMode):
    """A mode that only looks at what torch is called with.

    Torch takes such a mode off around each call, and Ctrl-C may keep it from putting it back, or have it do so once the
    block is over. It is left once, whatever happened, and one that is put back too late is taken off by the next block.
    """

    is_over = False

    def __exit__(self, *details: Any) -> None:
        self.is_over = True
        if self in _get_current_function_mode_stack():
            super().__exit__(*details)


class LookingAtOperators(TorchDispatchMode):
    """A mode that only looks at the operators that run.

    Torch takes such a mode off around each operator, and Ctrl-C may keep it from putting it back; or strike while torch
    leaves the mode. Leaving it does what is left to do, and once more does no harm.
    """

    def __exit__(self, *details: Any) -> None:
        if self not in _get_current_dispatch_mode_stack():
            _push_mode(self)
        if self.old_dispatch_mode_flags:
            super().__exit__(*details)
        else:
            _pop_mode()


class _Surroundings:
    """The modes of torch that code runs in: autograd's, and those on the stacks."""

    def __init__(self) -> None:
        while (modes := _get_current_function_mode_stack()) and getattr(modes[-1], "is_over", False):
            modes[-1].__exit__(None, None, None)
        self._grad = torch.is_grad_enabled()
        self._depths = [len(stack()) for stack in _MODES]

    def come_back(self) -> None:
        """Leave what was entered since."""
        for stack, depth in zip(_MODES, self._depths):
            while len(modes := stack()) > depth:
                modes[-1].__exit__(None, None, None)
        torch.set_grad_enabled(self._grad)  # which modes would see


_MODES: list[Callable[[], list[Any]]] = [_get_current_function_mode_stack, _get_current_dispatch_mode_stack]


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


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks of its own."""
    return any(getattr(module, name) for name in HOOKS)


def has_global_hooks() -> bool:
    """Whether there are hooks that see the calls of all modules."""
    return any(getattr(torch.nn.modules.module, f"_global{name}", None) for name in HOOKS)


def _put_back(own: dict[str, Any], name: str, before: Any) -> None:
    if before is _ABSENT:
        own.pop(name, None)
    else:
        own[name] = before
