"""What is measured, and which way is taken: on tables of bytes and seconds in the place of networks."""

import random

import pytest

from sltt_ext.online.choices import WITHIN, Choices
from sltt_ext.online.grouping import CallBytes
from sltt_ext.online.measured import Measured
from sltt_ext.online.plan import Way

LEARNS = (True, True)


def alone(numbers):
    return numbers


class Machine:
    """Seconds and bytes of a network on some machine, and a trainer's choices there.

    Args:
        calls: Seconds of a call, whatever it has.
        step: Seconds of a step.
        packing: By how much packing multiplies them, and how many bytes a step has less.
        caching: The same of evaluating once; bytes may be more.
        in_blocks: Bytes of an iteration that goes block by block.
        whole: Bytes of an iteration whose steps all share one call; None: what the shorter ones let expect.
    """

    def __init__(
        self,
        T=8,
        calls=1.0,
        step=1.0,
        packing=(1.0, 40),
        caching=(0.8, -10),
        noise=0.0,
        in_blocks=0,
        whole=None,
        **options,
    ):
        self.T, self.calls, self.step, self.packing, self.caching = T, calls, step, packing, caching
        self.in_blocks, self.whole = in_blocks, whole
        self.noise, self.draw = noise, random.Random(0)
        self.measured, self.trials = Measured(longest={True: T, False: 0}), []
        self.options = {
            "part": 1, "automatic": True, "shares": True, "selects": False, "multi_step": True,
            "packs": "auto", "caches": "auto", "budget": None, "asks": None, **options,
        }  # fmt: skip

    @property
    def choices(self):
        return Choices(self.measured, **self.options)

    def seconds(self, way):
        seconds = self.calls * -(-self.T // way.chunk) + self.step * self.T
        seconds *= self.packing[0] ** way.packs * self.caching[0] ** way.caches
        return seconds * (1 + self.noise * self.draw.random())

    def bytes(self, way):
        if way.blocks:
            return self.in_blocks
        if self.whole is not None and way.chunk == self.T:
            return self.whole
        return 100 + (100 - self.packing[1] * way.packs) * way.chunk - self.caching[1] * way.caches

    def decide(self, timed=True):
        trial = self.choices.first_trial()
        while trial is not None:
            self.trials.append(trial)
            assert len(self.trials) < 40
            calls, seconds = [], None
            if trial.timed:
                seconds = {LEARNS: (self.seconds(trial.way), self.T)}
            else:
                own = (100 - self.packing[1] * trial.way.packs) * trial.way.chunk
                calls = [CallBytes(True, trial.way.chunk, self.bytes(trial.way), own)]
            self.measured.add(trial, calls, seconds, bool(self.packing[1]), 1, alone)
            trial = self.choices.next_trial(timed)
        return self.choices.chosen()

    def ways(self):
        sizes = [1, 2, 4, 8][: self.T.bit_length()]
        return [Way(c, True, p, o) for c in sizes for p in (True, False) for o in (True, False)]


def test_the_leanest_of_those_that_are_about_as_fast():
    assert Machine(calls=0.0).decide() == Way(1, True, True, True)
    assert Machine(calls=10.0).decide() == Way(8, True, True, True)
    assert Machine(calls=0.3).decide() == Way(2, True, True, True)


def test_packing_that_costs_too_much_time_is_left_out():
    assert Machine(calls=0.0, packing=(1.3, 40)).decide() == Way(1, True, False, True)
    assert Machine(calls=0.0, packing=(1.1, 40)).decide() == Way(1, True, True, True)


def test_what_is_evaluated_once_costs_memory_and_is_worth_it_or_not():
    assert not Machine(calls=0.0, caching=(0.95, -50)).decide().caches
    assert Machine(calls=0.0, caching=(0.8, -50)).decide().caches


def test_with_a_budget_the_fastest_that_fits():
    machine = Machine(calls=10.0, budget=400, asks=400)
    way = machine.decide()
    assert (way.chunk, machine.bytes(way) <= 400) == (4, True)
    assert Machine(calls=10.0, budget=10**9, asks=10**9, packing=(1.1, 40)).decide() == Way(
        8, True, False, True
    )


def test_of_two_that_are_as_fast_a_budget_takes_the_leaner():
    assert Machine(calls=10.0, budget=10**9, asks=10**9, packing=(1.01, 40)).decide().packs


def test_nothing_fits():
    machine = Machine(calls=10.0, budget=1, asks=1)
    assert machine.decide() == Way(1, True, True, False)
    assert machine.choices.is_leanest_known()


def test_the_leanest_there_is_needs_no_seconds():
    machine = Machine(calls=10.0, asks="least")
    assert machine.decide() == Way(1, True, True, False)
    assert not any(trial.timed or trial.doubles for trial in machine.trials)


@pytest.mark.parametrize(("in_blocks", "taken"), [(140, True), (160, False), (170, False)])
def test_block_by_block_where_that_needs_less(in_blocks, taken):
    machine = Machine(asks="least", in_blocks=in_blocks, blocks=True)
    way = machine.decide()
    assert way == Way(1, True, True, False, taken)
    assert machine.trials[-1].way.blocks
    assert machine.choices.leanest_in_steps() == Way(1, True, True, False)
    again = Measured()
    again.load_state_dict(machine.measured.state_dict())
    assert again == machine.measured
    assert again.need(way).of(1) == min(in_blocks, 160)
    again.scale(2.0)
    assert again.need(way).of(1) == 2 * min(in_blocks, 160)


def test_nothing_goes_block_by_block_that_may_not():
    for options in ({"asks": "least"}, {"asks": 10**9, "budget": 10**9, "blocks": True}, {"blocks": True}):
        machine = Machine(in_blocks=1, **options)
        assert not machine.decide().blocks
        assert not any(trial.way.blocks for trial in machine.trials)


def test_evaluating_once_that_saves_memory_is_part_of_the_leanest():
    assert Machine(asks="least", caching=(0.9, 10)).decide() == Way(1, True, True, True)


def test_without_seconds_bytes_decide():
    assert Machine(calls=10.0).decide(timed=False) == Way(1, True, True, True)
    assert Machine(calls=10.0, budget=10**9, asks=10**9).decide(timed=False) == Way(8, True, False, True)
    assert (
        Machine(calls=10.0, budget=560, asks=560).decide(timed=False).chunk == 7
    )  # with bits, as many as fit


def test_what_is_fast_enough_is_counted_itself():
    machine = Machine(calls=0.3, whole=150)
    assert machine.decide() == Way(8, True, True, True)
    assert sum(trial.exact for trial in machine.trials) <= 4
    assert machine.choices.measured.need(Way(8, True, True, True)).of(8) == 150
    again = Measured()
    again.load_state_dict(machine.measured.state_dict())
    assert again == machine.measured
    again.scale(2.0)
    assert again.need(Way(8, True, True, True)).of(8) == 300
    assert Machine(calls=0.3, whole=10**6).decide() == Way(2, True, True, True)


def test_what_needs_more_than_expected_and_no_longer_fits():
    machine = Machine(calls=10.0, budget=700, asks=700, whole=701)
    assert machine.decide().chunk == 4


@pytest.mark.parametrize("options", [{"packs": False}, {"packs": True}, {"caches": False}, {"caches": True}])
def test_what_the_user_says_holds(options):
    way = Machine(calls=0.3, packing=(1.4, 1), caching=(1.4, -50), **options).decide()
    assert all(getattr(way, name) is value for name, value in options.items())


def test_a_network_that_keeps_to_its_own_calls():
    machine = Machine(calls=10.0, shares=False)
    assert machine.decide().chunk == 1
    assert len(machine.trials) <= 12


def test_nothing_to_choose_is_not_measured():
    machine = Machine(automatic=False, shares=False, packs=False, caches=True)
    machine.decide()
    assert not machine.trials


def test_the_rule_holds_on_random_machines():
    """Within 15 % of the fastest of all ways, and no leaner one of those that were timed is."""
    draw = random.Random(1)
    for _ in range(200):
        machine = Machine(
            calls=draw.choice([0.0, 0.1, 0.5, 2.0]),
            packing=(draw.uniform(0.95, 1.3), draw.choice([10, 60])),
            caching=(draw.uniform(0.5, 1.05), draw.choice([-80, -10, 20])),
        )
        way = machine.decide()
        fastest = min(map(machine.seconds, machine.ways()))
        assert machine.seconds(way) <= WITHIN * fastest * 1.0001
        timed = {trial.way for trial in machine.trials if trial.timed}
        known = machine.choices._bytes
        leaner = [one for one in timed if known(one) < known(way)]
        assert all(machine.seconds(one) > WITHIN * fastest * 0.9999 for one in leaner)


@pytest.mark.parametrize("seed", range(5))
def test_a_leaner_plan_is_taken_once_it_and_the_fastest_were_timed_three_times(seed):
    draw = random.Random(seed)
    machine = Machine(calls=draw.random(), step=1.0, packing=(1.0 + draw.random() / 10, 40))
    taken, seconds = machine.decide(), machine.measured.seconds
    fastest = min(seconds, key=machine.measured.seconds_of)
    assert taken == fastest or len(seconds[taken]) == len(seconds[fastest]) == 3


def test_noise_ends_as_well():
    for seed in range(50):
        machine = Machine(calls=0.3, noise=0.5)
        machine.draw.seed(seed)
        machine.decide()
        assert len(machine.trials) < 35


def test_a_measurement_is_what_it_was_in_a_file():
    machine = Machine(calls=0.3)
    machine.decide()
    other = Measured()
    other.load_state_dict(machine.measured.state_dict())
    assert other == machine.measured


def test_nothing_to_pack_is_not_packed():
    machine = Machine(calls=0.3, packing=(1.4, 0))
    assert not machine.decide().packs
    assert all(trial.way.packs is (trial is machine.trials[0]) for trial in machine.trials)
