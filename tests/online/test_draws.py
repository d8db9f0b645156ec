"""The steps of SLTT-K: how often each is drawn, and that the expected gradient is SLTT's.

A draw is a function of a few numbers: going through all of them, on a grid that is fine enough, gives the exact distribution.
"""

import copy
import functools
import itertools
from collections import Counter
from fractions import Fraction

import networks
import oracle
import products
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.errors import ConfigurationError
from sltt_ext.online import draws
from sltt_ext.online.draws import DRAWS, chances, last_steps, probabilities
from sltt_ext.online.schedule import selected_steps

GRIDS = {(2, 4): 2, (2, 5): 40, (3, 4): 12, (3, 3): 1}
"""For K and T: how many points a stratum's grid has."""
SMALL = [(k, time_steps) for time_steps in range(1, 9) for k in range(1, time_steps + 1)]
CASES = [("random", 2, 4), *(("stratified", *case) for case in GRIDS), ("early", 1, 4), ("early", 2, 4), ("early", 3, 5)]  # fmt: skip


def points(number):
    """The middles of so many parts of the numbers that a draw is made of."""
    return [(2 * n + 1) * 2**52 // number for n in range(number)]


def drawn_with(numbers, name, k, time_steps):
    """The draw that comes of these numbers, ``((t, how many times it counts), ...)``."""
    given = iter(numbers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draws, "_numbers", lambda *_: next(given))
        return tuple(selected_steps(DRAWS[name](k), time_steps, None).items())


@functools.cache
def distribution(name, k, time_steps):
    """Each draw, and its probability."""
    found = Counter()
    if name == "random":
        for order in itertools.permutations(range(time_steps)):
            found[drawn_with([list(order)], name, k, time_steps)] += 1
    elif name == "stratified":
        for numbers in itertools.product(points(GRIDS[k, time_steps]), repeat=k):
            found[drawn_with([numbers], name, k, time_steps)] += 1
    else:
        # as random, but weighted: a draw with the last step t, by how far t is from the last that is possible
        for steps in itertools.combinations(range(time_steps), k):
            weight = 2 * time_steps - k - 1 - steps[-1]
            below = sum(last_steps(k, time_steps)[t] for t in range(k - 1, steps[-1]))
            number = int((below + last_steps(k, time_steps)[steps[-1]] / 2) * 2**53)
            others = [*steps[:-1], *(t for t in range(steps[-1]) if t not in steps)]
            found[drawn_with([[number], others], name, k, time_steps)] += weight
    total = sum(found.values())
    return {draw: Fraction(count, total) for draw, count in found.items()}


@pytest.mark.parametrize(("name", "k", "time_steps"), CASES)
def test_each_step_counts_by_the_inverse_of_its_probability(name, k, time_steps):
    drawn, counted = Counter(), Counter()
    for draw, probability in distribution(name, k, time_steps).items():
        assert len(draw) == k
        for t, count in draw:
            drawn[t] += probability
            counted[t] += probability * Fraction(count)
    assert all(abs(counted[t] - Fraction(k, time_steps)) < 1e-15 for t in range(time_steps))
    if name == "early":
        assert drawn[time_steps - 1] < drawn[k - 1] <= drawn[0]
    else:
        assert set(drawn.values()) == {Fraction(k, time_steps)}


@pytest.mark.parametrize(("k", "time_steps"), SMALL)
def test_strata_draw_each_step_at_most_once_and_all_equally_often(k, time_steps):
    """For every K and T: the tree of all draws, with exact numbers."""
    paths = {(): Fraction(1)}
    for stratum in range(k):
        longer = Counter()
        for path, probability in paths.items():
            own = chances(stratum, k, time_steps, [*path])
            assert sum(own.values()) == 1
            for t, chance in own.items():
                longer[(*path, t)] += probability * chance
        paths = {path: probability for path, probability in longer.items() if probability}
    drawn = Counter()
    for path, probability in paths.items():
        assert len(set(path)) == k
        drawn.update(dict.fromkeys(path, probability))
    assert drawn == dict.fromkeys(range(time_steps), Fraction(k, time_steps))


@pytest.mark.parametrize(("k", "time_steps"), SMALL)
def test_early_draws_have_the_probabilities_that_they_are_weighted_by(k, time_steps):
    drawn, total = Counter(), 0
    for steps in itertools.combinations(range(time_steps), k):
        weight = 2 * time_steps - k - 1 - steps[-1]  # twice as much where it is as short as can be
        total += weight
        drawn.update(dict.fromkeys(steps, weight))
    assert probabilities(k, time_steps) == tuple(
        Fraction(drawn[t], total) if k < time_steps else 1 for t in range(time_steps)
    )


@pytest.mark.parametrize("name", DRAWS)
@given(time_steps=st.integers(1, 20), data=st.data())
def test_k_different_steps_in_order(name, time_steps, data):
    k = data.draw(st.integers(1, time_steps))
    steps = selected_steps(DRAWS[name](k), time_steps, None)
    assert list(steps) == sorted(set(steps))
    assert len(steps) == k
    assert set(steps) <= set(range(time_steps))


@pytest.mark.parametrize("name", DRAWS)
def test_drawn_numbers_reach_every_step(name):
    """The real source of numbers, in whose place the others here give their own."""
    generator = torch.Generator().manual_seed(0)
    counts = Counter(t for _ in range(3000) for t in selected_steps(DRAWS[name](2), 6, generator))
    expected = probabilities(2, 6) if name == "early" else [Fraction(2, 6)] * 6
    assert all(abs(counts[t] - 3000 * expected[t]) < 150 for t in range(6))


def test_stratified_steps_are_one_of_each_part():
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        first, second = selected_steps(DRAWS["stratified"](2), 6, generator)
        assert first < 3 <= second


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_is_not_captured_in_a_cuda_graph(monkeypatch, name):
    """Every replay would back-propagate the same steps."""
    monkeypatch.setattr(draws, "capturing", lambda: True)
    with pytest.raises(ConfigurationError, match="capture without k"):
        DRAWS[name](2)(6, None)


WAYS = {
    "a loss of each step": {},
    "calls of several steps": {"chunk": 3},
    "the tail left out": {"full_output": False},
    "loss / T": {"scale": "paper"},
    "a loss of the mean": {"loss_on": "mean"},
    "a loss of the mean, calls of several steps": {"loss_on": "mean", "chunk": 3},
    "a loss of the sequence": {"loss_on": "sequence", "chunk": 2},
}


def network(step_mode):
    net = networks.conv_net(step_mode=step_mode).double()
    return sltt_ext.convert(net)


def loss_over_time(output, target):
    """Of one step, or of a mean or a sequence."""
    return sum(F.cross_entropy(step, target) for step in (output if output.dim() == 3 else [output]))


def sequence(time_steps):
    x, target = networks.images()
    return torch.stack([x.double() + t / 3 for t in range(time_steps)]), target


def gradients_and_loss(time_steps, options, **more):
    x, target = sequence(time_steps)
    net = network("m" if "chunk" in options else "s")
    online = sltt_ext.OnlineTrainer(net, loss_over_time, time_steps, time_dim=0, **options, **more)
    loss = online.forward_backward(x, target).loss
    return [*oracle.gradients(net), loss]


@pytest.mark.parametrize(("way", "case"), products.spread(WAYS, CASES, each=2))
def test_the_expected_gradient_is_sltts(way, case):
    """And so is the expected loss, which with a loss of the mean or the sequence is the same for all draws."""
    (name, k, time_steps), options = case, WAYS[way]
    expected = gradients_and_loss(time_steps, options)
    if way == "a loss of each step":
        x, target = sequence(time_steps)
        by_hand = oracle.sltt_gradients(networks.conv_net().double(), list(x), target, F.cross_entropy)
        assert oracle.relative_error(expected[:-1], by_hand) < 1e-12
    actual = [torch.zeros_like(part) for part in expected]
    for draw, probability in distribution(name, k, time_steps).items():
        parts = gradients_and_loss(time_steps, options, schedule=lambda *_, draw=draw: dict(draw))
        actual = [sum_ + float(probability) * part for sum_, part in zip(actual, parts, strict=True)]
    if way == "loss / T":
        actual = [part * time_steps / k for part in actual]
    assert oracle.relative_error(actual, expected) < 1e-12


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize(
    ("returns", "lengths"), [("mean", None), ("mean", (4, 2, 3)), ("sequence", None)], ids=str
)
def test_the_expected_gradient_over_time_is_sltts(returns, lengths, chunk):
    x, target = networks.images()
    given = {} if lengths is None else {"lengths": torch.tensor(lengths)}

    def gradients(**options):
        net = sltt_ext.over_time(
            network("m" if chunk > 1 else "s"), 4, chunk=chunk, returns=returns, **options
        )
        output = net(x.double(), **given)
        F.cross_entropy(output.square().mean(0) if returns == "sequence" else output, target).backward()
        return oracle.gradients(net)

    expected = gradients()
    actual = [torch.zeros_like(part) for part in expected]
    for draw, probability in distribution("early", 1, 4).items():
        parts = gradients(schedule=lambda *_, draw=draw: dict(draw))
        actual = [sum_ + float(probability) * part for sum_, part in zip(actual, parts, strict=True)]
    assert oracle.relative_error(actual, expected) < 1e-12


@pytest.mark.parametrize("name", DRAWS)
def test_a_name_is_the_schedule_of_that_name(name):
    expected = gradients_and_loss(6, {}, schedule=DRAWS[name](2), generator=torch.Generator().manual_seed(1))
    actual = gradients_and_loss(6, {}, k=2, schedule=name, generator=torch.Generator().manual_seed(1))
    assert all(map(torch.equal, actual, expected))


def test_random_is_the_default():
    """The published one, drawn as in earlier versions."""
    generator = torch.Generator().manual_seed(1)
    online = sltt_ext.OnlineTrainer(network("s"), F.cross_entropy, 6, k=2, generator=generator)
    expected = torch.randperm(6, generator=torch.Generator().manual_seed(1))[:2].tolist()
    assert online._steps() == dict.fromkeys(sorted(expected), 1.0)


@pytest.mark.parametrize("name", DRAWS)
def test_draws_go_on_where_the_saved_trainer_left_off(name):
    def trainer():
        return sltt_ext.OnlineTrainer(
            network("s"), F.cross_entropy, 6, k=2, schedule=name, generator=torch.Generator().manual_seed(4)
        )

    whole, broken, resumed = trainer(), trainer(), trainer()
    expected = [whole._steps() for _ in range(10)]
    actual = [broken._steps() for _ in range(5)]
    resumed.load_state_dict(copy.deepcopy(broken.state_dict()))
    assert actual + [resumed._steps() for _ in range(5)] == expected


BAD = {
    "a name without k": ({"schedule": "early"}, r"schedule='early' draws k of the time steps: say how many with k="),
    "no such name": ({"k": 2, "schedule": "late"}, "'random', 'stratified', 'early' or a function of your own, got 'late'"),
    "no name": ({"k": 2, "schedule": [0, 1]}, "or a function of your own"),
    "k and a function": ({"k": 2, "schedule": lambda *_: [0]}, "not both"),
    "k above T": ({"k": 7, "schedule": "stratified"}, "k must be an integer from 1 to time_steps=6, got 7"),
}  # fmt: skip


WITH_OPTIONS = {
    "trainer": lambda options: sltt_ext.OnlineTrainer(network("s"), F.cross_entropy, 6, **options),
    "over_time": lambda options: sltt_ext.over_time(networks.conv_net(), 6, **options),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("way", WITH_OPTIONS)
def test_bad_options(case, way):
    options, message = BAD[case]
    with pytest.raises(ConfigurationError, match=message):
        WITH_OPTIONS[way](options)


def test_k_above_the_steps_of_an_input_of_any_length():
    net = sltt_ext.over_time(networks.conv_net(), time_dim=0, k=3, schedule="stratified")
    with pytest.raises(ConfigurationError, match="k must be"):
        net(networks.images()[0].expand(2, 3, 1, 8, 8))


@pytest.mark.parametrize("count", [0, -1.0, float("nan"), float("inf"), "1", None, torch.ones(())])
def test_a_step_counts_a_positive_number_of_times(count):
    with pytest.raises(ConfigurationError, match="positive number"):
        selected_steps(lambda *_: {0: count}, 2, None)


def test_a_step_that_counts_twice_has_twice_its_gradient():
    once = gradients_and_loss(6, {}, schedule=lambda *_: [3])
    twice = gradients_and_loss(6, {}, schedule=lambda *_: {3: 2})
    assert all(torch.equal(2 * one, two) for one, two in zip(once, twice, strict=True))


def test_the_names_copy_with_the_network():
    net = sltt_ext.over_time(nn.Sequential(*networks.conv_net()), 6, k=2, schedule="early")
    copied = copy.deepcopy(net)
    torch.manual_seed(0)
    expected = net._sltt_time_loop._steps(net, 6)
    torch.manual_seed(0)
    assert copied._sltt_time_loop._steps(copied, 6) == expected
