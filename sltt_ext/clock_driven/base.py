"""The base class of everything with a state, as SpikingJelly 0.0.0.0.12 has it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["MemoryModule"]


class MemoryModule(nn.Module):
    """A module whose states are registered by name, and read and written as attributes."""

    def __init__(self) -> None:
        super().__init__()
        self._memories: dict[str, Any] = {}
        self._memories_rv: dict[str, Any] = {}

    def register_memory(self, name: str, value: Any) -> None:
        """Add a state; ``value`` is what `reset` puts it back to."""
        assert not hasattr(self, name), f"{name} is an attribute already"
        self._memories[name] = value
        self.set_reset_value(name, value)

    def set_reset_value(self, name: str, value: Any) -> None:
        """Say what `reset` puts a state back to."""
        self._memories_rv[name] = copy.deepcopy(value)

    def reset(self) -> None:
        """Put all states back to rest."""
        self._memories.update(copy.deepcopy(self._memories_rv))

    def detach(self) -> None:
        """Make all states constant for the gradient."""
        for name, value in self._memories.items():
            if isinstance(value, Tensor):
                self._memories[name] = value.detach()

    def memories(self) -> Iterator[Any]:
        """The values of all states."""
        yield from self._memories.values()

    def named_memories(self) -> Iterator[tuple[str, Any]]:
        """Names and values of all states."""
        yield from self._memories.items()

    def __getattr__(self, name: str) -> Any:
        memories = self.__dict__.get("_memories", {})
        return memories[name] if name in memories else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_memories", ()):
            self._memories[name] = value
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in self._memories:
            del self._memories[name], self._memories_rv[name]
        else:
            super().__delattr__(name)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for states in (self._memories, self._memories_rv):
            states.update({name: fn(value) for name, value in states.items() if isinstance(value, Tensor)})
        return super()._apply(fn, recurse)

    def _replicate_for_data_parallel(self) -> Any:
        replica: Any = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._memories = dict(self._memories)
        return replica
