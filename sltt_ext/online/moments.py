"""Where the calls that run again start from: what the network held before each of them in the first run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sltt_ext.online.passes import Call, Pass, SpeedUp
from sltt_ext.online.snapshot import Snapshot

__all__ = ["Again", "Moments"]


class Moments(SpeedUp):
    """What the network held before each call that runs again, unless the call before it does."""

    def __init__(self) -> None:
        self._net: Any = None
        self._next = -1
        self._before: dict[int, Snapshot] = {}

    @contextmanager
    def around_pass(self, one: Pass) -> Iterator[None]:
        """See which network it is."""
        self._net = one.net
        yield

    @contextmanager
    def around_call(self, call: Call) -> Iterator[None]:
        """Take a snapshot where one is needed."""
        if call.differentiable and not call.keeps_graph:
            if call.start != self._next:
                self._before[call.start] = Snapshot(self._net, but_given=True)
            self._next = call.stop
        yield

    def written(self) -> set[int]:
        """The storages that going back writes to."""
        return {storage for before in self._before.values() for storage in before.storages}

    def return_to(self, call: Call) -> None:
        """Have the network hold what it held before a call, if it does not after the one before."""
        if call.start in self._before:
            self._before[call.start].restore()


class Again(SpeedUp):
    """The calls of a second run start from what they started from in the first, and leave no trace."""

    def __init__(self, moments: Moments) -> None:
        self._moments = moments

    @contextmanager
    def around_pass(self, one: Pass) -> Iterator[None]:
        """Put everything back at the end."""
        one.replaced.at_end(Snapshot(one.net, written=self._moments.written()).restore)
        yield

    @contextmanager
    def around_call(self, call: Call) -> Iterator[None]:
        """Go back to the moment of the first run."""
        self._moments.return_to(call)
        yield
