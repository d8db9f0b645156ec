"""Which plan the iterations follow, decided by what the first ones measure.

A few iterations are measured, and each runs in another way. First bytes are measured, with one step in a call and with two.
Then seconds are measured, in turns, for the ways that fit. Every way gives the same gradient, so nothing of these iterations
is lost. Then the leanest way is taken whose time is within 15 % of the fastest. With a budget it is the fastest way that
fits, and with the budget ``"least"`` the leanest. If seconds may not decide (fake tensors, deterministic algorithms), only
bytes do.

The next measurement depends only on the measurements so far (`choices`). So a resumed run continues like the one before it,
and processes that have exchanged their measurements agree without more messages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from sltt_ext.errors import ConfigurationError, warn
from sltt_ext.forwards import Replacements
from sltt_ext.online.capture import capturing
from sltt_ext.online.choices import ATTEMPTS, Choices
from sltt_ext.online.compiled import is_compiled
from sltt_ext.online.grouping import CallBytes, Grouping, in_bytes
from sltt_ext.online.measured import Measured, Trial
from sltt_ext.online.packing import PackedSpikes
from sltt_ext.online.passes import CallSizes
from sltt_ext.online.plan import Plan, Way, size_of
from sltt_ext.online.stopwatch import Stopwatch, may_be_timed
from sltt_ext.step_modes import Setting, sequence_form

__all__ = ["Asked", "Given", "Iteration", "Planner"]

DEFAULT_BUDGET = "0.8"


class Asked(NamedTuple):
    """What the user asks for.

    Attributes:
        chunk: A number of steps, or ``"auto"``.
        pack_spikes: True, False or ``"auto"``.
        cache_invariant: The same.
        memory_budget: See `OnlineTrainer`.
        explicit: Whether a ``"auto"`` of ``chunk`` was written by the user.
        updates: Whether weights are updated after every call: how often must not depend on memory.
        blocks: Whether the network may be run block by block.
    """

    chunk: int | str
    pack_spikes: bool | str
    cache_invariant: bool | str
    memory_budget: int | str | None
    explicit: bool
    updates: bool
    blocks: bool = False


class Given(NamedTuple):
    """What an iteration is given.

    Attributes:
        elements: Size of one frame; 0 where it is not known, or does not count.
        longest: How many consecutive steps are back-propagated (True), and are not, at most.
        selects: Whether some steps are not back-propagated, in this iteration or another one.
        multi_step: Whether the network takes sequences.
        frames: The frames of so many steps, as a network of single steps that is run on sequences is shown them; None where
            it cannot be.
        fixed: The sizes of calls where there is no choice.
        alone: Whether this is the only process that trains.
    """

    elements: int
    longest: Mapping[bool, int]
    selects: bool
    multi_step: bool
    frames: Callable[[int], Any] | None
    fixed: CallSizes | None
    alone: bool


@dataclass
class Iteration:
    """How an iteration is run, and what is measured of it.

    Attributes:
        given: What it is given.
        way: How it is run.
        sizes: How many steps share a call.
        settings: What tells the network's modules that they take sequences, if it is run so.
        measures: Whether it may be measured.
        trial: What it is measured for.
        bytes: What its calls needed.
        stopwatch: What times it, if anything does.
        packed: What keeps spikes as bits, in each of its passes.
    """

    given: Given
    way: Way
    sizes: CallSizes
    settings: list[Setting] = field(default_factory=list)
    measures: bool = False
    trial: Trial | None = None
    bytes: list[CallBytes] = field(default_factory=list)
    stopwatch: Stopwatch | None = None
    packed: list[PackedSpikes] = field(default_factory=list)

    def run_whole(self) -> None:
        """Run the network as a whole, and measure nothing."""
        self.way, self.trial = self.way._replace(blocks=False), None

    @property
    def counts_bytes(self) -> bool:
        """Whether the memory of its calls is counted."""
        return self.trial is not None and not self.trial.timed


class Planner:
    """The plan of a trainer.

    Args:
        asked: What the user asks for.
        time_steps: T.
        tries: ``(net, frames, time_steps) -> `` whether a network of single steps is the same on sequences.
        modules_once: ``net -> `` how many modules may be evaluated once.

    Attributes:
        grouping: Whether several of the user's own calls may be one.
        blocks: How many blocks the network has, where it runs block by block.
    """

    def __init__(
        self,
        asked: Asked,
        time_steps: int,
        tries: Callable[[nn.Module, Any, int], bool],
        modules_once: Callable[[nn.Module], int],
    ) -> None:
        self.grouping = Grouping(asked.explicit)
        self.blocks = 1
        self._asked = asked
        self._time_steps = time_steps
        self._tries = tries
        self._modules_once = modules_once
        self._part = asked.chunk if isinstance(asked.chunk, int) else 1
        self._measured = Measured()
        self._multi_step = self._selects = self._shares = False
        self._same_in_sequences: bool | None = None
        self._budget: int | None = None
        self._next: Trial | None = None
        self._is_decided = False
        self._warned = False
        self._held: Way | None = None
        self._kept_whole: str | None = None
        self._ran_out_at: int | None = None

    @property
    def tries_long_calls(self) -> bool:
        """Whether the next iteration is measured with more steps in a call than the user's own calls have."""
        trial = None if self._is_decided or self._held is not None else self._next
        return trial is not None and trial.way.chunk > self._part

    def ran_out(self, net: nn.Module) -> None:
        """Memory has run out in an iteration that `tries_long_calls`: nothing that needs as much is tried again."""
        trial = self._next
        assert trial is not None
        needs, way = self._measured.need(trial.way), trial.way
        self._measured.attempts[trial] = ATTEMPTS
        if needs is not None:
            longest = self._part if trial.doubles else way.chunk
            self._ran_out_at = needs.of(longest) + trial.doubles
            self._budget = min(self._budget or self._room(net), self._ran_out_at - 1)
        following = self._choices().next_trial(may_be_timed(net))
        self._next = None if following == trial else following  # never the same again
        self._is_decided = self._next is None
        warn(
            f"memory ran out while a plan was tried, with {way.chunk} of {self._time_steps} steps in a call. The iteration runs again with "
            "less, and plans that need as much are not tried again. memory_budget= bounds what is tried"
        )

    def hold(self, way: Way | None) -> None:
        """Run every iteration in this way from now on, and measure nothing; None: in the one that was decided."""
        self._held = way

    def keep_whole(self, reason: str) -> None:
        """Run the network as a whole from now on, and never block by block."""
        if self._is_decided and self._choices().chosen().blocks:
            warn(
                f"memory_budget='least' runs the network as a whole again, which needs more memory than block by block: {reason}"
            )
        self._kept_whole = reason

    def needs_less(self, bytes_: int) -> bool:
        """Whether so many bytes are less than the leanest way needs that runs the network as a whole."""
        choices = self._choices()
        way = choices.leanest_in_steps()
        need = self._measured.need(way)
        return need is None or bytes_ < need.of(way.chunk)

    def iteration(self, net: nn.Module, given: Given, measures: bool) -> Iteration:
        """How the iteration that begins is run.

        Args:
            net: The network.
            given: What it is given.
            measures: Whether it may be measured.
        """
        compiled = is_compiled(net)
        if compiled and given.multi_step and self._asked.explicit:
            raise ConfigurationError(
                "chunk='auto' counts the memory of every operator, and torch.compile hides them: give chunk a number"
            )
        opaque = compiled or capturing()
        self._is_decided |= compiled  # whose operators are hidden
        measures = measures and not opaque and self._held is None
        self._look_at(given)
        if self._is_decided and self._budget is None:  # resumed with another one
            self._budget = self._room(net)
        trial = None
        if self._held is not None:
            way = self._held
        elif opaque and not self._measured.needs:
            way = self._as_said()
        else:
            choices = self._choices()
            trial = (self._next or choices.first_trial()) if measures and not self._is_decided else None
            way = choices.chosen() if trial is None else trial.way
        settings: list[Setting] = []
        if (
            way.chunk > self._part
            or way.sequences != given.multi_step
            or (given.multi_step and given.selects)
        ):
            shares = not compiled and self._may_share(net, given)
            if shares and not given.multi_step and way.sequences:
                settings = sequence_form(net) or []
            if not shares or (way.sequences and not given.multi_step and not settings):
                way = way._replace(chunk=self._part, sequences=given.multi_step)
        sizes = given.fixed or self._sizes(way, trial, given)
        stopwatch = Stopwatch(net) if trial is not None and trial.timed else None
        return Iteration(given, way, sizes, settings, measures, trial, stopwatch=stopwatch)

    def learn(
        self, net: nn.Module, iteration: Iteration, combined: Callable[[list[float]], list[float]]
    ) -> None:
        """Take in what an iteration has measured, and decide what the next one is measured for.

        Args:
            net: The network.
            iteration: The iteration, which is over.
            combined: The largest numbers of all processes, of those of this one.
        """
        if not iteration.measures or self._is_decided:
            return
        measured, trial, given = self._measured, iteration.trial, iteration.given
        seconds = None if iteration.stopwatch is None else iteration.stopwatch.seconds()
        packed = any(one.has_packed for one in iteration.packed)
        measured.add(trial, iteration.bytes, seconds, packed, self._modules_once(net), combined)
        self._shares = self._may_share(net, given)
        said = [self.grouping.kept_apart is not None, self._same_in_sequences is False, not self._shares]
        apart, different, unshared, some, others = combined(
            [*map(float, said), *(float(given.longest[kind]) for kind in (True, False))]
        )
        if apart:
            self.grouping.keep_apart("an earlier run found this")
        if different:
            self._same_in_sequences = False
        self._shares = not unshared
        for kind, longest in ((True, some), (False, others)):
            measured.longest[kind] = max(measured.longest.get(kind, 0), int(longest))
        if self._budget is None:
            self._budget = -int(combined([-float(self._room(net))])[0])
        choices = self._choices()
        self._next = choices.next_trial(may_be_timed(net))
        self._is_decided = self._next is None
        self._say_what_it_needs(choices)

    def plan(self) -> Plan:
        """The plan, as far as it is known."""
        measured = self._measured
        choices = self._choices()
        way = choices.chosen() if self._held is None else self._held
        if self._is_decided and not measured.needs:
            way = self._as_said()
        need, given = measured.need(way), self._asked.memory_budget
        measuring = str(self._next or choices.first_trial() or "")
        return Plan(
            self._time_steps,
            min(way.chunk, self._time_steps),
            min(self._group(way, measured.longest.get(False, 0)), self._time_steps),
            way.sequences and not self._multi_step,
            way.packs,
            way.caches,
            measured.modules if way.caches else 0,
            None if need is None else need.of(way.chunk),
            None if given in (None, "least") else self._budget,
            measured.seconds_of(way),
            "" if self._is_decided or self._held is not None else measuring,
            self.blocks if way.blocks else 1,
            self._kept_whole or "",
        )

    def ways(self) -> list[Way]:
        """The ways that were timed."""
        return [*self._measured.seconds]

    def taken(self) -> Way:
        """The way that is taken, as far as it is known."""
        return self._choices().chosen()

    def state_dict(self) -> dict[str, Any]:
        """What was measured: a resumed run has to send the same calls."""
        following = self._next and (tuple(self._next.way), *self._next[1:])
        return {
            "budget": (self._asked.memory_budget, self._budget),
            "kept apart": self.grouping.kept_apart,
            "blocks": (self.blocks, self._kept_whole),
            "sequences": self._same_in_sequences,
            "seen": (self._multi_step, self._selects, self._shares),
            "decided": (self._is_decided, following),
            "measured": self._measured.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what was measured."""
        asked, bytes_ = state["budget"]
        self._budget = bytes_ if asked == self._asked.memory_budget else None
        self.grouping.kept_apart = state["kept apart"]
        self.blocks, self._kept_whole = state.get("blocks", (1, None))
        self._same_in_sequences = state["sequences"]
        self._multi_step, self._selects, self._shares = state["seen"]
        self._measured.load_state_dict(state["measured"])
        self._is_decided, following = state["decided"]
        self._next = following and Trial(Way(*following[0]), *following[1:])

    def _as_said(self) -> Way:
        """The way of one who asks for no plan, where nothing can be measured."""
        return Way(
            self._part, self._multi_step, self._asked.pack_spikes is True, bool(self._asked.cache_invariant)
        )

    def _look_at(self, given: Given) -> None:
        """Measure again where inputs have grown; one of several processes reckons with it, as the others may not know."""
        self._multi_step, self._selects = given.multi_step, given.selects
        if given.fixed is not None:
            self._part = given.fixed.part
        measured = self._measured
        if given.elements <= measured.elements or (
            not given.alone and measured.needs and not self._is_decided
        ):
            return
        if measured.needs and given.alone:
            self._measured = measured = Measured()
            self._budget, self._next, self._is_decided = None, None, False
        elif measured.needs:
            measured.scale(given.elements / measured.elements)
        measured.elements = given.elements

    def _choices(self) -> Choices:
        """What there is to choose from."""
        asked = self._asked
        return Choices(
            self._measured,
            part=self._part,
            automatic=asked.chunk == "auto" and not asked.updates,
            shares=self._shares,
            selects=self._selects,
            multi_step=self._multi_step,
            packs=asked.pack_spikes,
            caches=asked.cache_invariant,
            budget=self._budget,
            asks=asked.memory_budget,
            blocks=asked.blocks and self._kept_whole is None,
        )

    def _may_share(self, net: nn.Module, given: Given) -> bool:
        """Whether several of the user's own calls may be one."""
        automatic = self._asked.chunk == "auto" and not self._asked.updates
        if given.fixed is not None or not (automatic or (given.selects and given.multi_step)):
            return False
        if given.multi_step:
            return not self.grouping.keeps_apart(net, automatic)
        return automatic and self._is_same_in_sequences(net, given)

    def _is_same_in_sequences(self, net: nn.Module, given: Given) -> bool:
        """Whether a network of single steps may be run on sequences. It is tried once, after it was watched."""
        impossible = self._time_steps < 2 or given.frames is None or not self._measured.needs or capturing()
        if impossible or self._same_in_sequences is False or (settings := sequence_form(net)) is None:
            return False
        told = Replacements()
        with told, told:
            for setting in settings:
                told.entry(vars(setting.module), setting.name, setting.value)
            if self.grouping.keeps_apart(net, back_propagated=True, quietly=True):
                return False
        if self._same_in_sequences is None and given.frames is not None:
            self._same_in_sequences = self._tries(net, given.frames(self._time_steps), self._time_steps)
        return bool(self._same_in_sequences)

    def _sizes(self, way: Way, trial: Trial | None, given: Given) -> CallSizes:
        part = self._part
        if not way.sequences:
            return CallSizes(part, part, part)
        if trial is None or trial.timed:
            group = self._group(way, given.longest[False])
        else:
            group = 2 * part if trial.doubles else part
        return CallSizes(min(way.chunk, self._time_steps), min(max(group, way.chunk), self._time_steps), part)

    def _group(self, way: Way, longest: int) -> int:
        """How many steps without gradients need no more than a back-propagated call; in whole calls of the user's own."""
        need, unselected = self._measured.need(way), self._measured.unselected
        if not (self._shares and way.sequences) or need is None or unselected is None or not longest:
            return way.chunk
        fitting = unselected.steps_within(need.of(way.chunk))
        return max(fitting // self._part * self._part, way.chunk)

    def _room(self, net: nn.Module) -> int:
        asked, known = self._asked.memory_budget, 2**62 if self._ran_out_at is None else self._ran_out_at - 1
        if asked is not None and asked != "least":
            return min(in_bytes(asked, net), known)
        try:
            return min(in_bytes(DEFAULT_BUDGET, net), known)
        except ConfigurationError:
            if self._asked.explicit:
                raise
            return known  # nobody has asked, and it cannot be told

    def _say_what_it_needs(self, choices: Choices) -> None:
        """Warn, once, of a budget below the leanest way: it is taken all the same."""
        asked, budget = self._asked.memory_budget, self._budget
        if asked in (None, "least") or budget is None or self._warned or not choices.is_leanest_known():
            return
        way = choices.leanest()
        need = self._measured.need(way)
        if need is None or need.of(way.chunk) <= budget:
            return
        self._warned = True
        bits = ", spikes as bits" * (way.packs and self._measured.packed)
        warn(
            f"memory_budget={asked!r} ({size_of(budget)}) is less than the leanest plan needs, {size_of(need.of(way.chunk))} for "
            f"chunk {way.chunk} of {self._time_steps}{bits}. The leanest plan is taken; a smaller batch needs less"
        )
