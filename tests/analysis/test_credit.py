"""What windows keep of the gradient, against the original network detached by hand every C steps."""

import copy
import functools
import re

import networks
import oracle
import pytest
import torch
import tutorials
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.analysis import gradient_similarity, memory_profile, temporal_credit
from sltt_ext.analysis.credit import Credit, TemporalCredit
from sltt_ext.errors import ConfigurationError, ConversionError, InputError

T = 6


def by_hand(net, x, target, window, stepwise=(), read=lambda output: output):
    """The gradient of the original, single-step network by windows; the modules in ``stepwise`` are cut at every step."""
    net = copy.deepcopy(net)
    functional.set_step_mode(net, "s")
    total = 0
    for t in range(T):
        for name, module in net.named_modules():
            if t % window == 0 or name in stepwise:
                oracle.detach_memories(module)
                tutorials.detach_states(module)
        total = total + F.cross_entropy(read(net(x)), target) / T
    total.backward()
    return torch.cat([gradient.double().flatten() for gradient in oracle.gradients(net)])


def alignment(a, b):
    return pytest.approx(((a @ b / a.norm() / b.norm()).item(), (a.norm() / b.norm()).item()), rel=1e-4)


def leaky_net():
    net = tutorials.strong(tutorials.fully_connected())
    return net, torch.rand(8, 12), torch.randint(5, (8,)), lambda output: output[-1]


def spiking_net(step_mode="s", node=neuron.LIFNode):
    return networks.conv_net(node, step_mode), *networks.images(), lambda output: output


CASES = {
    "single-step": spiking_net,
    "multi-step": lambda: spiking_net("m"),
    "multi-step, by the generic rule": lambda: spiking_net("m", neuron.IzhikevichNode),
    "snnTorch": leaky_net,
}


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
@pytest.mark.parametrize("converted", [False, True])
def test_agrees_with_windows_by_hand(make, converted):
    net, x, target, read = make()
    gradients = {window: by_hand(net, x, target, window, read=read) for window in (1, 2, 4, 6)}
    if converted:
        sltt_ext.convert(net)
    credit = temporal_credit(net, x, target, F.cross_entropy, T, output=read)
    rows = credit.select("network")
    assert [row.window for row in rows] == [1, 2, 4, 6]
    for row in rows:
        assert (row.cosine, row.norm_ratio) == alignment(gradients[row.window], gradients[T])
    assert rows[0].cosine < 0.999


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_only_one_part_goes_through_time(step_mode):
    net, x, target, _ = spiking_net(step_mode)
    credit = temporal_credit(net, x, target, F.cross_entropy, T, windows=(2, 6), through="3")
    for row in credit.select("network", through="3"):
        expected = by_hand(net, x, target, row.window, stepwise=("1",))
        assert (row.cosine, row.norm_ratio) == alignment(expected, by_hand(net, x, target, T))
    assert credit.select("network", through="3") != credit.select("network")


def normed_net(step_mode):
    """Its batch norm reads other numbers at each step."""
    net = networks.conv_net()
    net.insert(3, layer.BatchNorm2d(6))
    functional.set_step_mode(net, step_mode)
    return net


def run_in_windows(module, window, x_seq):
    steps = []
    for t, x in enumerate(x_seq):
        if t % window == 0:
            oracle.detach_memories(module)
        steps.append(module.single_step_forward(x))
    return torch.stack(steps)


@pytest.mark.parametrize("window", [2, 4])
def test_batch_norm_of_sequences_has_the_statistics_of_all_steps(window):
    net, (x, target) = normed_net("m"), networks.images()
    gradients = []
    for cut in (window, T):
        twin = copy.deepcopy(net)
        for module in twin.modules():
            if isinstance(module, neuron.LIFNode):
                module.forward = functools.partial(run_in_windows, module, cut)
        outputs = twin(x.expand(T, *x.shape))
        torch.stack([F.cross_entropy(output, target) for output in outputs]).mean().backward()
        gradients.append(torch.cat([gradient.double().flatten() for gradient in oracle.gradients(twin)]))
    (row,) = temporal_credit(net, x, target, F.cross_entropy, T, windows=window).select("network")
    assert (row.cosine, row.norm_ratio) == alignment(*gradients)


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_ends_are_sltt_and_bptt(step_mode):
    net, (x, target) = normed_net(step_mode), networks.images()
    net.insert(6, layer.Dropout(0.3, step_mode=step_mode))
    credit = temporal_credit(net, x, target, F.cross_entropy, T)
    similarity = gradient_similarity(net, x, target, F.cross_entropy, T)
    for level in ("network", "layer"):
        sltt = {row.name: (row.cosine, row.norm_ratio) for row in similarity.select(level)}
        rows = credit.select(level)
        for row in rows:
            if row.window == 1:
                assert (row.cosine, row.norm_ratio) == pytest.approx(sltt[row.name], rel=1e-4)
            if row.window == T:
                assert (row.cosine, row.norm_ratio) == pytest.approx((1, 1), rel=1e-5)
        assert {row.name for row in rows} == sltt.keys()


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_memory_is_that_of_the_window(step_mode):
    net, (x, target) = networks.conv_net(step_mode=step_mode), networks.images(n=32)
    credit, short = (temporal_credit(net, x, target, F.cross_entropy, steps) for steps in (8, 4))
    peaks, short_peaks = ([row.peak_bytes for row in c.select("network")] for c in (credit, short))
    assert peaks == sorted(set(peaks))
    assert peaks[:3] == pytest.approx(short_peaks, rel=0.05)
    profile = memory_profile(net, x, time_steps=(8,))
    assert peaks[0] == pytest.approx(profile.peak_bytes("sltt", 8), rel=0.05)
    assert credit.bptt_peak_bytes == pytest.approx(profile.peak_bytes("bptt", 8), rel=0.05)


def test_similarity_is_sltts_of_a_network_that_goes_through_time():
    net, (x, target) = networks.conv_net(step_mode="m"), networks.images()
    expected = gradient_similarity(net, x, target, F.cross_entropy, T).overall
    assert gradient_similarity(
        sltt_ext.convert(net, temporal="call"), x, target, F.cross_entropy, T
    ).overall == (expected)


class ReadsPotentials(nn.Module):
    """Its output is what its last neuron has recorded of a sequence, or carries after a step."""

    def __init__(self):
        super().__init__()
        self.body = networks.conv_net(step_mode="m")
        self.last = neuron.LIFNode(step_mode="m")
        self.last.store_v_seq = True

    def forward(self, x):
        self.last(self.body(x))
        return self.last.v_seq if self.last.step_mode == "m" else self.last.v


@pytest.mark.filterwarnings("ignore:the network mixes time steps")
def test_recorded_potentials_are_of_all_steps():
    net, (x, target) = ReadsPotentials(), networks.images()
    (row,) = temporal_credit(net, x, target, F.cross_entropy, T, windows=2).select("network")
    assert (row.cosine, row.norm_ratio) == alignment(*(by_hand(net, x, target, window) for window in (2, T)))


@pytest.mark.skipif(not hasattr(layer, "TemporalEffectiveBatchNorm1d"), reason="SpikingJelly 2 has it")
def test_a_module_that_takes_its_whole_sequence_has_one_window():
    net = nn.Sequential(
        layer.Linear(4, 6), layer.TemporalEffectiveBatchNorm1d(T, 6), neuron.LIFNode(), layer.Linear(6, 3)
    )
    functional.set_step_mode(net, "m")
    given = net, torch.rand(5, 4), torch.randint(3, (5,)), F.cross_entropy, T
    (row,) = temporal_credit(*given).select("network")
    assert (row.window, row.cosine) == (T, pytest.approx(1))
    with pytest.raises(ConfigurationError, match="takes its whole sequence in one call"):
        temporal_credit(*given, windows=2)


def made(*cosines, steps=4):
    rows = [Credit(2**i, "", "network", "", cosine, 1.0, 100 * 2**i) for i, cosine in enumerate(cosines)]
    return TemporalCredit(tuple(rows), steps, 800)


@pytest.mark.parametrize(
    ("credit", "window", "sentence"),
    [
        (made(0.995, 0.999, 1.0), 1, "Windows of 1 of the 4 time steps, which is SLTT, keep 0.9950 .* at 0.12 of its"),
        (made(0.5, 0.99, 1.0), 2, "Windows of 2 of the 4 time steps keep 0.9900 .* at 0.25 of its memory"),
        (made(0.5, 0.98, 1.0), 4, "No measured window shorter than all 4 time steps keeps 0.99"),
        (made(0.5, float("nan")), None, "No measured window shorter than all 4 time steps keeps 0.99"),
    ],
)  # fmt: skip
def test_advice_is_the_smallest_window_that_keeps_enough(credit, window, sentence):
    row = credit.smallest()
    assert (row and row.window) == window
    assert re.match(sentence, credit.advice())


def test_result_as_dataframe_and_plot():
    credit = temporal_credit(networks.conv_net(), *networks.images(), F.cross_entropy, 2)
    assert len(credit.to_dataframe()) == 2 * (1 + 3)
    axes = credit.plot().axes[0]
    assert [line.get_ydata()[-1] for line in axes.lines[:2]] == pytest.approx([1, 1])


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"time_steps": 0}, ConfigurationError, "time_steps must be a positive integer"),
        ({"windows": 3}, ConfigurationError, "windows must be an integer from 1 to time_steps=2, got 3"),
        ({"windows": (1, 0)}, ConfigurationError, "windows must be an integer from 1 to time_steps=2, got 0"),
        ({"windows": "auto"}, ConfigurationError, "windows must be an integer from 1"),
        ({"windows": ()}, ConfigurationError, "at least one window"),
        ({"through": "stage4"}, ConfigurationError, "through='stage4' is not a part of the network"),
        ({"through": "0"}, ConversionError, "no spiking neuron"),
        ({"net": nn.Linear(2, 2)}, ConversionError, "no spiking neuron"),
        ({"x": iter([])}, InputError, "through the network several times"),
        ({"x": torch.ones(0, 1, 8, 8)}, InputError, "empty"),
    ],
)
def test_bad_input(change, error, match):
    x, target = networks.images()
    settings = {"net": networks.conv_net(), "x": x, "target": target, "loss_fn": F.cross_entropy}
    with pytest.raises(error, match=match):
        temporal_credit(**{**settings, "time_steps": 2, **change})
