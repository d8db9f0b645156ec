import copy
import math

import networks
import oracle
import pytest
import snntorch
import torch
import tutorials
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.analysis import gradient_similarity
from sltt_ext.data import load_digits
from sltt_ext.demo.training import network as demo_network
from sltt_ext.errors import ConfigurationError, ConversionError, InputError
from sltt_ext.snntorch import MultiStep, Stateful

T = 4


def atan_slope(distance):
    return 1 / (1 + (math.pi * distance) ** 2)  # SpikingJelly's ATan with alpha = 2


def by_hand(w1, w2, x, tau):
    """Two LIF neurons in a row, soft reset, T = 2, loss the mean of the second's spikes: (SLTT, BPTT) as (dw1, dw2)."""
    leak = 1 - 1 / tau
    h1, s1, h2, s2 = [0.0] * 2, [0.0] * 2, [0.0] * 2, [0.0] * 2
    h1[0] = w1 * x
    s1[0] = float(h1[0] >= 1)
    h1[1] = leak * (h1[0] - s1[0]) + w1 * x
    s1[1] = float(h1[1] >= 1)
    h2[0] = w2 * s1[0]
    s2[0] = float(h2[0] >= 1)
    h2[1] = leak * (h2[0] - s2[0]) + w2 * s1[1]
    slope1, slope2 = [atan_slope(h - 1) for h in h1], [atan_slope(h - 1) for h in h2]

    local2 = [slope2[0] / 2, slope2[1] / 2]
    local1 = [slope1[0] * w2 * local2[0], slope1[1] * w2 * local2[1]]
    full2 = [local2[0] + local2[1] * leak * (1 - slope2[0]), local2[1]]
    last = slope1[1] * w2 * full2[1]
    full1 = [slope1[0] * w2 * full2[0] + last * leak * (1 - slope1[0]), last]
    sltt = (x * (local1[0] + local1[1]), local2[0] * s1[0] + local2[1] * s1[1])
    bptt = (x * (full1[0] + full1[1]), full2[0] * s1[0] + full2[1] * s1[1])
    return sltt, bptt


def two_neurons(w1, w2, tau):
    def lif():
        return neuron.LIFNode(
            tau=tau, decay_input=False, v_reset=None, surrogate_function=surrogate.ATan(alpha=2.0)
        )

    net = nn.Sequential(layer.Linear(1, 1, bias=False), lif(), layer.Linear(1, 1, bias=False), lif())
    with torch.no_grad():
        net[0].weight.fill_(w1)
        net[2].weight.fill_(w2)
    return net


@pytest.mark.parametrize(("w1", "w2", "x", "tau"), [(0.8, 0.7, 1.5, 2.0), (1.1, -0.6, 1.2, 4.0)])
def test_agrees_with_the_computation_by_hand(w1, w2, x, tau):
    (a1, a2), (b1, b2) = by_hand(w1, w2, x, tau)
    similarity = gradient_similarity(
        two_neurons(w1, w2, tau), torch.tensor([[x]]), None, lambda output, target: output.mean(), 2
    )
    cosine = (a1 * b1 + a2 * b2) / (math.hypot(a1, a2) * math.hypot(b1, b2))
    assert similarity.overall.cosine == pytest.approx(cosine, rel=1e-5)
    assert similarity.overall.norm_ratio == pytest.approx(math.hypot(a1, a2) / math.hypot(b1, b2), rel=1e-5)
    ratios = {row.name: row.norm_ratio for row in similarity.select("layer")}
    assert ratios == pytest.approx({"0": abs(a1 / b1), "2": abs(a2 / b2)}, rel=1e-5)


def cosine(a, b):
    a, b = (torch.cat([g.double().flatten() for g in gradients]) for gradients in (a, b))
    return (a @ b / a.norm() / b.norm()).item(), (a.norm() / b.norm()).item()


def bptt_gradients(net, x, target, weights):
    net = copy.deepcopy(net)
    functional.set_step_mode(net, "s")
    functional.reset_net(net)
    sum(weight * F.cross_entropy(net(x), target) for weight in weights).backward()
    return oracle.gradients(net)


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("node", [neuron.LIFNode, neuron.ParametricLIFNode, neuron.IzhikevichNode])
@pytest.mark.parametrize("converted", [False, True])
def test_agrees_with_the_gradients_of_loops(node, step_mode, converted):
    x, target = networks.images()
    net = networks.conv_net(node, step_mode)
    sltt = oracle.sltt_gradients(net, [x] * T, target, F.cross_entropy)
    expected = cosine(sltt, bptt_gradients(net, x, target, [1 / T] * T))
    similarity = gradient_similarity(
        sltt_ext.convert(net) if converted else net, x, target, F.cross_entropy, T
    )
    overall = similarity.overall
    assert (overall.cosine, overall.norm_ratio) == pytest.approx(expected, rel=1e-4)
    assert similarity.output_difference < 1e-6


def test_agrees_with_loops_on_the_demos_network():
    torch.manual_seed(0)
    net, data = demo_network(8), load_digits()
    x, target = data.train_images[:32], data.train_labels[:32]
    sltt = oracle.sltt_gradients(net, [x] * T, target, F.cross_entropy)
    bptt = bptt_gradients(net, x, target, [1 / T] * T)
    similarity = gradient_similarity(net, x, target, F.cross_entropy, T)
    assert (similarity.overall.cosine, similarity.overall.norm_ratio) == pytest.approx(
        cosine(sltt, bptt), rel=1e-4
    )
    names = [name for name, _ in net.named_parameters()]
    for row in similarity.select("parameter"):
        index = names.index(row.name)
        expected = cosine(sltt[index : index + 1], bptt[index : index + 1])
        assert (row.cosine, row.norm_ratio) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_the_loss_of_each_step(step_mode):
    x, target = networks.images()
    net = networks.conv_net(step_mode=step_mode, detach_reset=True)
    rows = gradient_similarity(net, x, target, F.cross_entropy, T, per_step=True).select("network", True)
    assert [row.time_step for row in rows] == list(range(T))
    for t, row in enumerate(rows):
        sltt = oracle.sltt_gradients(net, [x] * T, target, F.cross_entropy, selected=(t,), divisor=T)
        bptt = bptt_gradients(net, x, target, [float(i == t) / T for i in range(T)])
        assert (row.cosine, row.norm_ratio) == pytest.approx(cosine(sltt, bptt), rel=1e-4)


def test_whole_loss_is_the_same_with_and_without_the_steps():
    x, target = networks.images()
    whole, by_step = (
        gradient_similarity(networks.conv_net(), x, target, F.cross_entropy, T, per_step=per_step)
        for per_step in (False, True)
    )
    assert by_step.overall.cosine == pytest.approx(whole.overall.cosine, rel=1e-5)


def test_mean_and_spread_over_batches():
    batches = [networks.images(seed=seed) for seed in range(3)]
    net = networks.conv_net()
    single = [gradient_similarity(net, *batch, F.cross_entropy, T).overall.cosine for batch in batches]
    overall = gradient_similarity(net, *batches[0], F.cross_entropy, T, more_batches=batches[1:]).overall
    spread, mean = torch.std_mean(torch.tensor(single, dtype=torch.double), correction=0)
    assert (overall.cosine, overall.cosine_std) == pytest.approx((mean.item(), spread.item()), rel=1e-6)


def test_one_step_has_no_temporal_gradient():
    similarity = gradient_similarity(networks.conv_net(), *networks.images(), F.cross_entropy, 1)
    assert all(row.cosine == pytest.approx(1) == row.norm_ratio for row in similarity.rows)


def test_falls_as_tau_grows():
    x, target = networks.images(n=16)
    cosines = [
        gradient_similarity(
            networks.conv_net(tau=tau, decay_input=False, v_reset=None, detach_reset=True),
            x,
            target,
            F.cross_entropy,
            6,
        ).overall.cosine
        for tau in (1.0001, 1.1, 2.0, 8.0)
    ]
    assert cosines[0] > 0.9999
    assert cosines == sorted(cosines, reverse=True)
    assert cosines[-1] < 0.9


def explicit():
    net = tutorials.strong(tutorials.StatesPassed())
    return net, Stateful(net), "membrane"


def kept():
    net = tutorials.strong(tutorials.fully_connected())
    return net, net, "membrane"


def whole_sequences():
    net = tutorials.strong(tutorials.fully_connected())
    return net, MultiStep(sltt_ext.convert(net)), "membrane"


@pytest.mark.parametrize("make", [explicit, kept, whole_sequences])
def test_snntorch(make):
    x, target = torch.rand(8, 12), torch.randint(5, (8,))
    net, measured, output = make()
    original = sltt_ext.revert(copy.deepcopy(net))
    if make is whole_sequences:
        assert sltt_ext.is_converted(net)
    sltt, bptt = (snntorch_gradients(original, x, target, detach) for detach in (True, False))
    overall = gradient_similarity(measured, x, target, F.cross_entropy, T, output=output).overall
    assert (overall.cosine, overall.norm_ratio) == pytest.approx(cosine(sltt, bptt), rel=1e-4)
    assert overall.cosine < 0.999


def snntorch_gradients(net, x, target, detach):
    net = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, snntorch.SpikingNeuron):
            module.reset_mem()
    state, total = None, 0
    for _ in range(T):
        if isinstance(net, tutorials.StatesPassed):
            state = tuple(s.detach() for s in state) if detach and state else state
            output, state = net(x, state)
        else:
            if detach:
                tutorials.detach_states(net)
            output = net(x)
        total = total + F.cross_entropy(output[1], target) / T
    total.backward()
    return oracle.gradients(net)


def test_layers_without_gradient_are_nan():
    net = networks.conv_net()
    net.unused = nn.Linear(2, 2)
    net.forward = net[:7].forward
    rows = {r.name: r for r in gradient_similarity(net, *networks.images(), F.cross_entropy, 2).rows}
    assert math.isnan(rows["unused"].cosine)
    assert rows["0"].cosine > 0


def test_result_as_dataframe_and_plot():
    similarity = gradient_similarity(
        networks.conv_net(), *networks.images(), F.cross_entropy, 2, per_step=True
    )
    table = similarity.to_dataframe()
    assert len(table) == 3 * (1 + 3 + 6)
    assert "SLTT to BPTT" in similarity.plot().axes[0].get_xlabel()
    assert "time step" in similarity.plot_over_time().axes[0].get_xlabel()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"time_steps": 0}, ConfigurationError, "time_steps must be a positive integer"),
        ({"net": nn.Linear(2, 2)}, ConversionError, "no spiking neuron"),
        ({"x": iter([])}, InputError, "through the network several times"),
        ({"x": torch.ones(0, 1, 8, 8)}, InputError, "empty"),
    ],
)
def test_bad_input(change, error, match):
    x, target = networks.images()
    settings = {"net": networks.conv_net(), "x": x, "target": target, "loss_fn": F.cross_entropy}
    with pytest.raises(error, match=match):
        gradient_similarity(**{**settings, "time_steps": 2, **change})
