"""What was measured of the ways to run an iteration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, NamedTuple

from sltt_ext.online.grouping import CallBytes, Need
from sltt_ext.online.plan import Way
from sltt_ext.online.stopwatch import CallSeconds

__all__ = ["Measured", "Trial"]


class Trial(NamedTuple):
    """An iteration that is measured.

    Attributes:
        way: How it is run.
        timed: Whether its seconds are measured, and not its bytes.
        doubles: Whether its calls have twice as many steps as the user's own.
        exact: Whether its bytes are those of this way alone: longer calls may need less than shorter ones let expect.
    """

    way: Way
    timed: bool
    doubles: bool = False
    exact: bool = False

    def __str__(self) -> str:
        bits, once = ", spikes as bits" * self.way.packs, ", nothing once" * (not self.way.caches)
        blocks = ", block by block" * self.way.blocks
        return f"{'seconds' if self.timed else 'bytes'} of chunk {self.way.chunk}{bits}{once}{blocks}"


_KINDS = [(learns, graph) for learns in (False, True) for graph in (False, True)]

Variant = tuple[bool, bool]
"""Whether spikes are packed, and what does not depend on time is evaluated once."""


@dataclass
class Measured:
    """What was measured.

    Attributes:
        elements: Of inputs of so many numbers in a frame.
        longest: The most consecutive steps that were back-propagated (True), and were not.
        needs: What back-propagated calls needed, by variant.
        watched: The variants of iterations that watched modules, which needs memory of its own.
        unselected: What calls without gradients needed.
        exact: What single ways needed, where others let expect something else.
        in_blocks: What an iteration needed that went block by block.
        seconds: By way, those of each iteration.
        attempts: How often an iteration was run for its bytes.
        modules: How many modules may be evaluated once.
        packed: Whether there was anything to keep as bits.
    """

    elements: int = 0
    longest: dict[bool, int] = field(default_factory=dict)
    needs: dict[Variant, Need] = field(default_factory=dict)
    watched: set[Variant] = field(default_factory=set)
    unselected: Need | None = None
    exact: dict[Way, int] = field(default_factory=dict)
    in_blocks: int | None = None
    seconds: dict[Way, list[CallSeconds]] = field(default_factory=dict)
    attempts: dict[Trial, int] = field(default_factory=dict)
    modules: int = 0
    packed: bool = False

    def add(
        self,
        trial: Trial | None,
        calls: Sequence[CallBytes],
        seconds: CallSeconds | None,
        packed: bool,
        modules: int,
        combined: Callable[[list[float]], list[float]],
    ) -> None:
        """Take in an iteration.

        Args:
            trial: What it was measured for.
            calls: What its calls needed.
            seconds: What they took.
            packed: Whether there was anything to keep as bits.
            modules: How many modules may be evaluated once.
            combined: The largest numbers of all processes, of those of this one.
        """
        numbers = combined(
            [
                float(packed),
                float(modules),
                *_largest(calls, True),
                *_largest(calls, False),
                *(float(one) for kind in _KINDS for one in (seconds or {}).get(kind, (0.0, 0))),
            ]
        )
        self.packed, self.modules = self.packed or numbers[0] > 0, int(numbers[1])
        if trial is None:
            return
        if trial.timed:
            taken = {kind: (numbers[14 + 2 * i], int(numbers[15 + 2 * i])) for i, kind in enumerate(_KINDS)}
            self.seconds.setdefault(trial.way, []).append(
                {kind: one for kind, one in taken.items() if one[1]}
            )
            return
        self.attempts[trial] = self.attempts.get(trial, 0) + 1
        peak = max((call[1] for call in _calls(numbers[2:8])), default=None)
        if trial.way.blocks:  # the first time it is watched, which needs memory of its own
            self.in_blocks = peak
            return
        if trial.exact:
            if peak is not None:
                self.exact[trial.way] = peak
            return
        self._add_bytes(self.variant(trial.way), _calls(numbers[2:8]))
        for call in _calls(numbers[8:14]):
            self.unselected = Need(*call) if self.unselected is None else self.unselected.with_another(*call)

    def _add_bytes(self, variant: Variant, calls: Sequence[tuple[int, int, int]]) -> None:
        if not calls:
            return
        if variant in self.watched:
            self.needs.pop(variant, None)
            self.watched.discard(variant)
        elif not self.needs and variant[1] and self.modules:
            self.watched.add(variant)
        for call in calls:
            known = self.needs.get(variant)
            self.needs[variant] = Need(*call) if known is None else known.with_another(*call)

    def variant(self, way: Way) -> Variant:
        """What tells the memory of ``way`` apart from that of others with as many steps in a call."""
        return way.packs and self.packed, way.caches

    def need(self, way: Way) -> Need | None:
        """What a back-propagated call of ``way`` needs, as far as it is known.

        A variant that was counted in short calls alone adds as much more to each step of a longer one; or as much less
        once, as what it spares may be there once.
        """
        exact = self.in_blocks if way.blocks else self.exact.get(way)
        if way.blocks or exact is not None:
            return None if exact is None else Need(way.chunk, exact, exact)
        longest = max(self.needs, key=lambda variant: self.needs[variant].steps, default=None)
        if longest is None:
            return None
        variant = self.variant(way)
        reference, known = self.needs[longest], self.needs.get(variant)
        if known is not None and known.steps == reference.steps:
            return known
        more, steps = self._shortest(variant, longest)[1] - reference.shortest[1], reference.shortest[0]
        fewer = None if reference.fewer is None else (steps, reference.shortest[1] + more)
        of_all = more * reference.steps // steps if more > 0 else more
        return Need(reference.steps, reference.peak + of_all, reference.own, fewer)

    def _shortest(self, variant: Variant, otherwise: Variant) -> tuple[int, int]:
        """Steps and bytes of the shortest call of a variant, or what those that differ in one thing let expect."""
        known = self.needs.get(variant, self.needs[otherwise]).shortest
        packs, caches = variant
        if variant in self.needs:
            return known
        sides = [
            self.needs[side].shortest[1] - known[1]
            for side in ((packs, not caches), (not packs, caches))
            if side in self.needs
        ]
        return known[0], known[1] + sum(sides)

    def seconds_of(self, way: Way) -> float | None:
        """Seconds of an iteration run in a way: the least of a few, of each kind of call."""
        found = self.seconds.get(way)
        if not found:
            return None
        total = 0.0
        for kind, steps in self._steps().items():
            rates = [taken[kind][0] / taken[kind][1] for taken in found if kind in taken]
            if rates:
                total += min(rates) * steps
        return total

    def _steps(self) -> dict[Any, float]:
        """How many steps of each kind an iteration has, on average; of the kinds that every way has had."""
        every = [taken for found in self.seconds.values() for taken in found]
        common = [
            kind
            for kind in {kind for taken in every for kind in taken}
            if all(any(kind in taken for taken in found) for found in self.seconds.values())
        ]
        return {kind: sum(taken.get(kind, (0.0, 0))[1] for taken in every) / len(every) for kind in common}

    def scale(self, factor: float) -> None:
        """Reckon with inputs that are so many times as large."""
        self.needs = {variant: need.scaled(factor) for variant, need in self.needs.items()}
        self.unselected = self.unselected and self.unselected.scaled(factor)
        self.exact = {way: int(bytes_ * factor) for way, bytes_ in self.exact.items()}
        self.in_blocks = None if self.in_blocks is None else int(self.in_blocks * factor)

    def state_dict(self) -> dict[str, Any]:
        """As plain numbers, for files that are read with ``weights_only=True``."""
        return {
            "elements": self.elements,
            "longest": [self.longest.get(kind, 0) for kind in (False, True)],
            "needs": [(variant, astuple(need)) for variant, need in self.needs.items()],
            "watched": sorted(self.watched),
            "unselected": self.unselected and astuple(self.unselected),
            "exact": [(tuple(way), bytes_) for way, bytes_ in self.exact.items()],
            "in blocks": self.in_blocks,
            "seconds": [
                (tuple(way), [[(kind, one) for kind, one in taken.items()] for taken in found])
                for way, found in self.seconds.items()
            ],
            "attempts": [(tuple(trial.way), *trial[1:], n) for trial, n in self.attempts.items()],
            "modules": self.modules,
            "packed": self.packed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave."""
        self.elements, self.modules, self.packed = state["elements"], state["modules"], state["packed"]
        self.longest = dict(zip((False, True), state["longest"]))
        self.needs = {_pair(variant): _need(need) for variant, need in state["needs"]}
        self.watched = {_pair(variant) for variant in state["watched"]}
        self.unselected = state["unselected"] and _need(state["unselected"])
        self.exact = {Way(*way): bytes_ for way, bytes_ in state.get("exact", ())}
        self.in_blocks = state.get("in blocks")
        self.seconds = {
            Way(*way): [{_pair(kind): (one[0], one[1]) for kind, one in taken} for taken in found]
            for way, found in state["seconds"]
        }
        self.attempts = {Trial(Way(*way), *how): n for way, *how, n in state["attempts"]}


def _largest(calls: Sequence[CallBytes], selected: bool) -> list[float]:
    """Of the calls of one kind: steps, peak and own bytes of the longest, and of the shorter ones."""
    found: list[float] = []
    of_kind = [call for call in calls if call.selected is selected]
    steps = sorted({call.steps for call in of_kind}, reverse=True)[:2]
    for number in (*steps, *[0] * (2 - len(steps))):
        same = [call for call in of_kind if call.steps == number]
        found += [
            float(number),
            float(max((call.peak for call in same), default=0)),
            float(min((call.own for call in same), default=0)),
        ]
    return found


def _calls(numbers: Sequence[float]) -> list[tuple[int, int, int]]:
    """Steps, peak and own bytes of calls, the shortest first."""
    calls = [(int(numbers[i]), int(numbers[i + 1]), int(numbers[i + 2])) for i in range(0, len(numbers), 3)]
    return sorted(call for call in calls if call[0])


def _need(numbers: Sequence[Any]) -> Need:
    steps, peak, own, fewer = numbers
    return Need(steps, peak, own, None if fewer is None else (fewer[0], fewer[1]))


def _pair(values: Sequence[bool]) -> tuple[bool, bool]:
    return bool(values[0]), bool(values[1])
