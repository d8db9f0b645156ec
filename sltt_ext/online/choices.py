"""Which way to run an iteration is measured next, and which way is taken, from what was measured so far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sltt_ext.online.measured import Measured, Trial
from sltt_ext.online.plan import Way

__all__ = ["Choices"]

WITHIN = 1.15
"""How many times the fastest's seconds the leanest way may take."""
DOUBT = 1.03
"""Seconds that differ by less are those of the leaner way, where the fastest is asked for."""
WORTH = 0.98
"""Bytes that are not below so many times those of another way are not worth a measurement."""
ROUNDS, HOPELESS, ATTEMPTS = 2, 1.4, 2
SAMPLES = 3
"""Seconds of so many iterations decide between the fastest way and a leaner one, and where two ways are close."""


@dataclass(frozen=True)
class Choices:
    """The ways there are, and what is known of them.

    Attributes:
        measured: What was measured.
        part: How many steps the user's own calls have.
        automatic: Whether the number of back-propagated steps in a call is to be chosen.
        shares: Whether several of the user's own calls may be one.
        selects: Whether some steps are not back-propagated.
        multi_step: Whether the network takes sequences by itself.
        packs: What the user says of packing.
        caches: What the user says of evaluating once.
        budget: In bytes; None where it is not known yet.
        asks: The user's own budget.
        blocks: Whether the network may be run block by block.
    """

    measured: Measured
    part: int
    automatic: bool
    shares: bool
    selects: bool
    multi_step: bool
    packs: bool | str
    caches: bool | str
    budget: int | None
    asks: int | str | None
    blocks: bool = False

    def first_trial(self) -> Trial | None:
        """What the very first iteration is measured for; None where there is nothing to find out."""
        anything = self.automatic or "auto" in (self.packs, self.caches) or (self.selects and self.multi_step)
        return Trial(self._lean(), timed=False) if anything else None

    def next_trial(self, may_be_timed: bool) -> Trial | None:
        """What to measure in the iteration that begins; None where nothing is left to find out."""
        for trial in self._of_bytes():
            if self.measured.attempts.get(trial, 0) < ATTEMPTS and not self._is_known(trial):
                return trial
        if self.asks == "least":
            return self._in_blocks()
        if not may_be_timed:
            return None
        return self._of_seconds()

    def chosen(self) -> Way:
        """The way that is taken."""
        if not self.measured.needs:
            return self._lean()
        if self.asks == "least":
            return self.leanest()
        ways = {way: seconds for way in self._ways() if (seconds := self._seconds(way)) is not None}
        return self._best(ways) if ways else self._by_bytes()

    def leanest(self) -> Way:
        """The way that needs the least memory."""
        steps = self.leanest_in_steps()
        blocks = steps._replace(blocks=True)
        return blocks if self.blocks and 0 < self._bytes(blocks) < self._bytes(steps) else steps

    def leanest_in_steps(self) -> Way:
        """The one that needs the least where the network is run as a whole."""
        own = [
            self._lean()._replace(packs=packs, caches=caches)
            for packs in _values(self.packs, self.measured.packed, otherwise=self._packs())
            for caches in _values(self.caches, True)
        ]
        known = [way for way in own if self.measured.variant(way) in self.measured.needs]
        return min(known or [self._lean()], key=self._bytes)

    def _in_blocks(self) -> Trial | None:
        """An iteration whose bytes are counted as the network is run block by block: the second time, it is watched no more."""
        trial = Trial(self.leanest_in_steps()._replace(blocks=True), timed=False)
        tried = self.measured.attempts.get(trial, 0) >= ATTEMPTS
        return trial if self.blocks and not tried and self.measured.needs else None

    def is_leanest_known(self) -> bool:
        """Whether all has been counted that the leanest way is found by."""
        own = [trial for trial in self._of_bytes() if not trial.doubles]
        return all(self._is_known(trial) or self.measured.attempts.get(trial) for trial in own)

    def _lean(self, chunk: int | None = None, sequences: bool | None = None) -> Way:
        """Packed, evaluated once, as far as the user lets it."""
        return Way(
            self.part if chunk is None else chunk,
            self.multi_step if sequences is None else sequences,
            self._packs(),
            self.caches in (True, "auto"),
        )

    def _packs(self) -> bool:
        """Whether spikes are packed, if there are any to be seen, and the user lets it."""
        if isinstance(self.packs, bool):
            return self.packs
        return self.measured.packed or not self.measured.needs

    def _of_bytes(self) -> list[Trial]:
        """Iterations whose bytes are counted, in order."""
        lean, measured = self._lean(), self.measured
        if self.first_trial() is None:
            return []
        trials = [Trial(lean, timed=False)]
        if self.caches == "auto" and measured.modules:
            trials += [Trial(lean._replace(caches=False), timed=False)]
        if self.packs == "auto" and measured.packed:
            trials.append(Trial(lean._replace(packs=False), timed=False))
            if self.asks == "least" and self.caches == "auto" and measured.modules:
                trials.append(Trial(lean._replace(packs=False, caches=False), timed=False))
        if self.asks != "least" and self.shares:
            chunk = 2 * self.part if self.automatic else self.part
            trials.append(Trial(self._lean(chunk, sequences=True), timed=False, doubles=True))
        return trials

    def _is_known(self, trial: Trial) -> bool:
        measured, variant = self.measured, self.measured.variant(trial.way)
        need = measured.needs.get(variant)
        if not trial.doubles:
            never = not measured.longest.get(True)
            return never or (need is not None and variant not in measured.watched)
        longest, unselected, double = measured.longest, measured.unselected, 2 * self.part
        lacks = self.automatic and longest.get(True, 0) >= double and (need is None or need.steps < double)
        fewest = double if longest.get(False, 0) >= double else 1
        return not (lacks or (self.selects and (unselected is None or unselected.steps < fewest)))

    def _of_seconds(self) -> Trial | None:
        """The next iteration that is timed."""
        lean = [way for way in self._sizes() if self._fits(way)] or [self._lean()]
        variants = self._variants(min(lean, key=lambda way: self.measured.seconds_of(way) or 0.0))
        if len(lean) + len(variants) < 2:
            return None
        return (
            self._timed(lean)
            or self._timed(self._variants(min(lean, key=self._measured_seconds)))
            or self._last()
            or self._counted()
        )

    def _timed(self, ways: Sequence[Way]) -> Trial | None:
        """One of ``ways`` that was not timed often enough; they take turns."""
        for rounds in range(1, ROUNDS + 1):
            for way in ways:
                if len(self.measured.seconds.get(way, ())) < rounds and not self._is_hopeless(way):
                    return Trial(way, timed=True)
        return None

    def _last(self) -> Trial | None:
        """The way that would be taken, and the fastest, where they have not been timed enough to be told apart."""
        ways = {way: seconds for way in self._ways() if (seconds := self._seconds(way)) is not None}
        best = self._best(ways)
        fastest = min(ways, key=lambda way: ways[way])
        if (trial := self._timed([best])) is not None:
            return trial
        limit = ways[fastest] * self._within
        close = [
            way for way in ways if abs(ways[way] / limit - 1) < DOUBT - 1 and way in self.measured.seconds
        ]
        for way in [fastest, best, *close] if close or best != fastest else ():
            if len(self.measured.seconds.get(way, ())) < SAMPLES:
                return Trial(way, timed=True)
        return None

    def _counted(self) -> Trial | None:
        """A way that is fast enough, with the most steps in a call, of which shorter calls do not say what it needs."""
        ways = {way: seconds for way in self._ways() if (seconds := self._seconds(way)) is not None}
        fitting = {way: seconds for way, seconds in ways.items() if self._fits(way)}
        limit = min(fitting.values(), default=0.0) * self._within
        longest = max((way.chunk for way in fitting), default=0)
        for way in sorted(fitting, key=lambda way: fitting[way]):
            trial = Trial(way, timed=False, exact=True)
            if (
                longest == way.chunk > 2 * self.part
                and fitting[way] <= limit
                and trial not in self.measured.attempts
            ):
                return trial
        return None

    def _is_hopeless(self, way: Way) -> bool:
        seconds = self.measured.seconds_of(way)
        known = [self.measured.seconds_of(other) or 0.0 for other in self.measured.seconds]
        return seconds is not None and seconds > HOPELESS * min(known)

    def _sizes(self) -> list[Way]:
        """Lean ways with calls of one step up to all: T, half of it, and so on."""
        longest = self.measured.longest
        if not self.shares:
            return [self._lean()]
        ways = [self._lean()]
        if not self.multi_step and self.selects:
            ways.append(self._lean(sequences=True))
        if self.automatic and longest.get(True, 0) > self.part:
            calls, chunks = 1, set()
            while (chunk := -(-longest[True] // calls)) > self.part:
                chunks.add(-(-chunk // self.part) * self.part)
                calls *= 2
            ways += [self._lean(chunk, sequences=True) for chunk in sorted(chunks)]
        return ways

    def _variants(self, way: Way) -> list[Way]:
        """The same without packing, and without evaluating once, where these are a choice."""
        found = []
        if self.packs == "auto" and self.measured.packed and self._fits(way._replace(packs=False)):
            found.append(way._replace(packs=False))
        if self.caches == "auto" and self.measured.modules:
            other = way._replace(caches=False)
            if self._bytes(other) < WORTH * self._bytes(way):
                found.append(other)
        return found

    def _ways(self) -> list[Way]:
        """All ways."""
        return [
            size._replace(packs=packs, caches=caches)
            for size in self._sizes()
            for packs in _values(self.packs, self.measured.packed, otherwise=self._packs())
            for caches in _values(self.caches, bool(self.measured.modules))
        ]

    def _seconds(self, way: Way) -> float | None:
        """Seconds of a way, measured, or as those of another one that differs in the same."""
        measured = self.measured.seconds_of(way)
        if measured is not None:
            return measured
        lean = self._lean(way.chunk, way.sequences)
        seconds = self.measured.seconds_of(lean)
        for change in ({"packs": way.packs}, {"caches": way.caches}):
            if seconds is None or lean._replace(**change) == lean:
                continue
            factors = [
                theirs / ours
                for other in self.measured.seconds
                if other == self._lean(other.chunk, other.sequences)
                and (ours := self.measured.seconds_of(other))
                and (theirs := self.measured.seconds_of(other._replace(**change)))
            ]
            seconds = seconds * min(factors) if factors else None
        return seconds

    def _measured_seconds(self, way: Way) -> float:
        return self.measured.seconds_of(way) or float("inf")

    def _best(self, ways: Mapping[Way, float]) -> Way:
        fitting = {way: seconds for way, seconds in ways.items() if self._fits(way)}
        if not fitting:
            return self.leanest()
        limit = min(fitting.values()) * self._within
        return min((way for way in fitting if fitting[way] <= limit), key=self._bytes)

    @property
    def _within(self) -> float:
        return WITHIN if self.asks is None else DOUBT

    def _by_bytes(self) -> Way:
        """Where nothing was timed: with a budget as many steps as fit, without one what costs no time to speak of."""
        if self.asks is None:
            return self.leanest()._replace(caches=self.caches in (True, "auto"))
        fitting = [way for way in self._fitting_sizes() if self._fits(way)]
        return (
            max(fitting, key=lambda way: (way.caches, way.chunk, not way.packs))
            if fitting
            else self.leanest()
        )

    def _fitting_sizes(self) -> Iterable[Way]:
        """Ways with as many steps in a call as fit."""
        for way in self._ways():
            yield way
            need = self.measured.need(way)
            if self.automatic and need is not None and self.budget is not None and way.sequences:
                chunk = need.steps_within(self.budget) // self.part * self.part
                yield way._replace(
                    chunk=min(max(chunk, self.part), max(self.measured.longest.get(True, 0), self.part))
                )

    def _fits(self, way: Way) -> bool:
        return self.budget is None or self._bytes(way) <= self.budget

    def _bytes(self, way: Way) -> int:
        need = self.measured.need(way)
        return 0 if need is None else need.of(way.chunk)


def _values(option: bool | str, matters: bool, otherwise: bool = True) -> list[bool]:
    """What a choice may be."""
    if isinstance(option, bool):
        return [option]
    return [True, False] if matters else [otherwise]
