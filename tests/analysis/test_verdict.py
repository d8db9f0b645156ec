"""The answer of an analysis: made-up numbers, and what is said of them."""

from dataclasses import replace

import pytest

from sltt_ext.analysis.activity import FiringRates, LayerActivity
from sltt_ext.analysis.analyze import Analysis
from sltt_ext.analysis.credit import Credit, TemporalCredit
from sltt_ext.analysis.draws import DrawnSteps
from sltt_ext.analysis.memory_profile import MemoryProfile, PeakMemory
from sltt_ext.analysis.similarity import Alignment, GradientSimilarity
from sltt_ext.analysis.timing import Benchmark, IterationCost
from sltt_ext.analysis.verdict import cautions, number, take, verdict

T = 6


def analysis(
    cosine=0.998,
    layers=(("conv", 0.99, 0.9),),
    windows=((1, 0.998), (2, 0.999), (6, 1.0)),
    spread=0.5,
    dead=0,
    costs=(("BPTT", 1.0), ("SLTT", 0.8), ("SLTT-2", 0.5)),
):
    alignments = [Alignment("network", "", None, cosine, 0.0, 0.9, 0.0)]
    alignments += [Alignment("layer", name, None, kept, 0.0, norm, 0.0) for name, kept, norm in layers]
    credit = [Credit(window, "", "network", "", kept, 1.0, 20 * window) for window, kept in windows]
    return Analysis(
        about={},
        notes=(),
        similarity=GradientSimilarity(tuple(alignments), T, 1, 0.0),
        credit=TemporalCredit(tuple(credit), T, 100),
        draws=DrawnSteps(T, spread),
        timing=Benchmark(tuple(IterationCost(name, s, s, 1, 1.0, s, s) for name, s in costs), T, 5, "cpu"),
        operations=(),
        memory=MemoryProfile((PeakMemory("BPTT", T, 100), PeakMemory("SLTT", T, 31)), (), False),
        activity=FiringRates(
            (LayerActivity("lif1", 8, 0.1, 0, 0), LayerActivity("lif2", 8, 0.1, dead, 0)), T, 4
        ),
    )


def test_a_network_that_sltt_is_right_for():
    said = " ".join(verdict(analysis(spread=0.75)))
    assert said == (
        "SLTT keeps 0.998 of the gradient's direction, at 31% of BPTT's memory and 80% of its time. Take K = 2 to save time: "
        "2 of 6 steps keep 0.903 of SLTT's direction, at 50% of BPTT's time."
    )
    assert take(analysis(spread=0.75)) == "K = 2"


def test_where_steps_differ_all_of_them_are_taken():
    assert verdict(analysis(spread=30.0))[1:] == [
        "Back-propagate all steps: with fewer, the gradient would be too different."
    ]
    assert take(analysis(spread=30.0)) == "SLTT"


def test_fewer_steps_that_save_no_time_are_not_advised():
    found = analysis(spread=0.75, costs=(("BPTT", 1.0), ("SLTT", 2.2), ("SLTT-2", 2.1)))
    assert verdict(found)[1:] == [
        "With one step in a call, it takes longer than BPTT here, as is usual for small networks and batches: use it for its memory. "
        "sltt plan times faster plans.",
        "Back-propagate all steps: fewer of them save no time here.",
    ]
    assert take(found) == "SLTT"


def test_a_window_is_advised_where_sltt_keeps_too_little():
    found = analysis(cosine=0.72, windows=((1, 0.72), (2, 0.96), (6, 1.0)))
    assert verdict(found) == [
        "SLTT keeps only 0.72 of the gradient's direction, at 31% of BPTT's memory and 80% of its time.",
        "Take windows of 2 steps, convert(net, temporal='call') and chunk=2: they keep 0.96, at 40% of the memory.",
    ]
    assert take(found) == "windows of 2"


def test_a_window_of_one_step_is_no_advice():
    """The first batch may be kinder than all of them."""
    assert take(analysis(cosine=0.88, windows=((1, 0.96), (2, 0.97), (6, 1.0)))) == "windows of 2"


def test_bptt_is_advised_where_no_window_keeps_enough():
    found = analysis(cosine=0.72, windows=((1, 0.72), (2, 0.8), (6, 1.0)))
    assert verdict(found)[1].startswith("No shorter window keeps 0.95.")
    assert take(found) == "BPTT"


def test_without_bptt_nothing_is_said_of_the_gradient():
    found = replace(analysis(), similarity=None, credit=None, timing=None)
    assert verdict(found) == [
        "SLTT takes 31% of BPTT's memory. BPTT does not fit into memory, so the gradients could not be compared."
    ]


def test_a_network_without_a_gradient():
    assert verdict(analysis(cosine=float("nan")))[0].startswith("Both gradients are zero")


@pytest.mark.parametrize(
    ("row", "named"), [(("c", 0.63, 0.9), True), (("c", 0.99, 0.23), True), (("c", 0.95, 0.9), False)]
)
def test_a_layer_that_keeps_little_is_named(row, named):
    found = cautions(analysis(layers=(("a", 0.99, 0.9), row)))
    said = [text for text in found if text.startswith("The layer c keeps least: ")]
    assert bool(said) == named


def test_layers_that_never_fire_are_named_and_single_neurons_are_not():
    assert cautions(analysis(dead=7)) == []
    (said,) = cautions(analysis(dead=8))
    assert said.startswith("No neuron has fired in the layer lif2, with 4 samples")


@pytest.mark.parametrize(("value", "text"), [(0.9998, "0.999"), (1.0, "1"), (0.72, "0.72"), (0.31, "0.31")])
def test_numbers_are_not_rounded_up(value, text):
    assert number(value) == text
