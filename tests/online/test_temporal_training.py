"""The gradient through time in training: draws of windows, over_time, options, exact resume, memory."""

import copy
import pickle
from functools import partial

import oracle
import pytest
import torch
from modules import T
from networks import images
from spikingjelly.activation_based import layer, neuron
from temporal_oracle import (
    CLASSES,
    FRAMES,
    SEQUENCE,
    TARGETS,
    assert_equal,
    by_trainer,
    detach,
    leaky_net,
    mixed,
    reset,
    shorter,
    spiking,
    windows_by_hand,
)
from torch import nn
from torch.nn import functional as F

import sltt_ext
import sltt_ext.snntorch.neurons
import sltt_ext.spikingjelly.fused
from sltt_ext.analysis import peak_activation_bytes
from sltt_ext.clock_driven import neuron as clock_driven
from sltt_ext.errors import ConfigurationError, LossError, SLTTWarning
from sltt_ext.legacy_spikingjelly import fused as legacy
from sltt_ext.neuron import SLTTNeuron
from sltt_ext.online import options
from sltt_ext.online.schedule import selected_steps

pytestmark = pytest.mark.filterwarnings("ignore:Inhibition is an unstable feature")


@shorter
@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("scale", ["mean", "paper"])
@pytest.mark.parametrize(
    ("window", "k", "full_output"), [(2, 1, True), (2, 2, False), (4, 1, True), (6, 1, True)]
)
def test_k_windows_are_drawn(window, k, full_output, scale, step_mode):
    net, seen = sltt_ext.convert(spiking(step_mode), temporal="call"), set()
    online = sltt_ext.OnlineTrainer(
        net, F.cross_entropy, T, k, window, time_dim=0, target_time_dim=0, scale=scale, full_output=full_output,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    for _ in range(6):
        net.zero_grad()
        steps = online.forward_backward(FRAMES, TARGETS).time_steps
        seen.add(steps)
        starts = {t // window * window for t in steps}
        assert len(starts) == k
        assert steps == tuple(t for t in range(T) if t // window * window in starts)
        expected = windows_by_hand(
            spiking(), FRAMES, TARGETS, window, F.cross_entropy, selected=starts,
            divisor=k * T / -(-T // window) if scale == "mean" else T,
        )  # fmt: skip
        assert oracle.relative_error(oracle.gradients(net), expected[1:]) < 1e-6
    assert len(seen) > 1 or window == T


@shorter
@pytest.mark.parametrize("way", ["trainer", "over_time"])
def test_windows_of_unequal_length_count_by_their_length(way):
    """The mean over all that can be drawn is the gradient of all windows."""
    drawn = {}
    for seed, k in ((0, None), *((seed, 1) for seed in range(1, 9))):
        net, generator = sltt_ext.convert(spiking(), temporal="call"), torch.Generator().manual_seed(seed)
        if way == "trainer":
            online = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, k, 4, time_dim=0, generator=generator)
            steps = online.forward_backward(FRAMES, TARGETS[0]).time_steps
        else:
            sltt_ext.over_time(net, time_dim=0, chunk=4, k=k, returns="sequence", generator=generator)
            SHOWN["sequence"](net(FRAMES) / T, TARGETS[0]).backward()
            generator.manual_seed(seed)
            steps = range(T) if k is None else selected_steps(options.selection(k, None, T, 4), T, generator)
        drawn[tuple(steps)] = oracle.gradients(net)
    whole = drawn.pop(tuple(range(T)))
    assert drawn.keys() == {(0, 1, 2, 3), (4, 5)}
    means = [sum(each) / 2 for each in zip(*drawn.values())]
    assert oracle.relative_error(means, whole) < 1e-6


def test_a_schedule_selects_steps_and_windows_begin_with_the_first_of_a_run():
    net = sltt_ext.convert(spiking(), temporal="call")
    online = sltt_ext.OnlineTrainer(
        net, F.cross_entropy, T, chunk=2, schedule=lambda *_: [1, 2, 3, 5], time_dim=0, target_time_dim=0
    )
    online.forward_backward(FRAMES, TARGETS)
    by_hand, window_ends = spiking(), {0, 2, 3, 4, 5}
    total = 0.0
    for t in range(T):
        loss = F.cross_entropy(by_hand(FRAMES[t]), TARGETS[t])
        if t in (1, 2, 3, 5):
            total = total + loss / 4
        if t in window_ends:
            if isinstance(total, torch.Tensor):
                total.backward()
            detach(by_hand)
            total = 0.0
    assert oracle.relative_error(oracle.gradients(net), oracle.gradients(by_hand)) < 1e-6


def one_graph_by_hand(net, x_seq, window, stepwise=()):
    """The outputs of all steps, in one graph that is cut every so many steps; in some layers at every step."""
    reset(net)
    outputs = []
    for t, x in enumerate(x_seq):
        outputs.append(net(x))
        for name in stepwise:
            detach(net.get_submodule(name))
        if (t + 1) % window == 0:
            detach(net)
    return torch.stack(outputs)


SHOWN = {"mean": lambda outputs, target: F.cross_entropy(outputs.mean(0), target)}
SHOWN["sequence"] = lambda outputs, target: sum(F.cross_entropy(output, target) for output in outputs)


@shorter
@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("returns", ["mean", "sequence"])
@pytest.mark.parametrize(("window", "stepwise"), [(1, ()), (2, ()), (4, ("1",)), (6, ()), (6, ("3",))])
@pytest.mark.parametrize("budget", [None, 2**30], ids=["run again", "kept graphs"])
def test_over_time(window, stepwise, returns, step_mode, budget):
    target = TARGETS[0]
    by_hand, x_seq = spiking(node=neuron.LIFNode), FRAMES.clone().requires_grad_()
    SHOWN[returns](one_graph_by_hand(by_hand, x_seq, window, stepwise), target).backward()
    net = mixed(spiking(step_mode, neuron.LIFNode), *({"1", "3"} - set(stepwise)))
    sltt_ext.over_time(net, time_dim=0, chunk=window, returns=returns, memory_budget=budget)
    for _ in range(2):  # how much room a graph takes is known after the first
        net.zero_grad()
        leaf = FRAMES.clone().requires_grad_()
        output = net(leaf)
        output = output if returns == "sequence" else output.unsqueeze(0)
        SHOWN[returns](output, target).backward()
        actual = [leaf.grad, *oracle.gradients(net)]
        assert oracle.relative_error(actual, [x_seq.grad, *oracle.gradients(by_hand)]) < 1e-6


class Loops(nn.Module):
    """A network with a loop over time of its own."""

    def __init__(self, step_mode="s"):
        super().__init__()
        self.T, self.body = T, spiking(step_mode, neuron.LIFNode)

    def forward(self, x):
        if self.body[0].step_mode == "m":
            return self.body(x.expand(self.T, *x.shape)).mean(0)
        return sum(self.body(x) for _ in range(self.T)) / self.T


@shorter
@pytest.mark.parametrize("window", [1, 4, 6])
@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("stepwise", [(), ("1",)])
def test_time_inside(stepwise, step_mode, window):
    x, target = images()
    by_hand = spiking(node=neuron.LIFNode)
    F.cross_entropy(one_graph_by_hand(by_hand, [x] * T, window, stepwise).mean(0), target).backward()
    net = mixed(Loops(step_mode), *({"body.1", "body.3"} - {f"body.{name}" for name in stepwise}))
    sltt_ext.over_time(net, time_inside="T", chunk=window)
    F.cross_entropy(net(x), target).backward()
    assert oracle.relative_error(oracle.gradients(net), oracle.gradients(by_hand)) < 1e-6


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_a_loss_of_the_mean(step_mode):
    x_seq, target = FRAMES.clone().requires_grad_(), TARGETS[0]
    by_hand = spiking()
    F.cross_entropy(one_graph_by_hand(by_hand, x_seq, 2).mean(0), target).backward()
    net, leaf = sltt_ext.convert(spiking(step_mode), temporal="call"), FRAMES.clone().requires_grad_()
    online = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, chunk=2, time_dim=0, loss_on="mean")
    result = online.forward_backward(leaf, target)
    assert (
        oracle.relative_error([leaf.grad, *oracle.gradients(net)], [x_seq.grad, *oracle.gradients(by_hand)])
        < 1e-6
    )
    torch.testing.assert_close(online.predict(FRAMES), result.output)


@pytest.mark.parametrize("options", [{}, {"k": 2, "chunk": 2}, {"chunk": 3, "pack_spikes": True}])
def test_static_images_and_speed_ups(options):
    """One image at every step; what is evaluated once, kept as bits or carried lean changes nothing."""
    x, target = images()
    plain = mixed(spiking(node=neuron.LIFNode), "3")
    fast = copy.deepcopy(plain)
    for net, more in ((plain, {"cache_invariant": False, "pack_spikes": False}), (fast, {})):
        generator = torch.Generator().manual_seed(3)
        online = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, generator=generator, **{**options, **more})
        for _ in range(3):
            net.zero_grad()
            online.forward_backward(x, target)
    assert oracle.relative_error(oracle.gradients(fast), oracle.gradients(plain)) < 1e-6


@pytest.mark.parametrize("node", [neuron.LIFNode, neuron.QIFNode])
def test_with_convert_alone_a_call_of_a_neuron_is_one(node):
    """Sequences have their own BPTT, and what the last call has left is a constant."""
    by_hand, net = spiking("m", node), sltt_ext.convert(spiking("m", node), temporal="call")
    for one in (by_hand, net):
        for half in FRAMES.split(T // 2):
            one(half).square().sum().backward()
            if one is by_hand:
                detach(one)
    assert oracle.relative_error(oracle.gradients(net), oracle.gradients(by_hand)) < 1e-6


def test_a_graph_of_an_earlier_call_does_not_live_on():
    net = sltt_ext.convert(neuron.QIFNode(), temporal="call")
    x = torch.ones(3, requires_grad=True)
    net(x)
    (gradient,) = torch.autograd.grad(net(torch.ones(3) + 0 * x).sum() + x.sum(), x)
    assert torch.equal(gradient, torch.ones(3))


def test_conversion_keeps_what_is_not_said():
    net = spiking()
    sltt_ext.convert(net[3], temporal="call")
    assert [neuron.sltt_temporal for neuron in (sltt_ext.convert(net)[1], net[3])] == ["step", "call"]
    again = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    assert [neuron.sltt_temporal for neuron in (again[1], again[3])] == ["step", "call"]
    assert [neuron.sltt_temporal for neuron in (sltt_ext.convert(net, temporal="call")[1], net[3])] == [
        "call"
    ] * 2
    assert net.state_dict().keys() == spiking().state_dict().keys()
    assert "sltt_temporal" not in vars(sltt_ext.revert(net)[3])
    assert sltt_ext.convert(net)[3].sltt_temporal == "step"


def test_delays_pass_their_gradient_on_within_a_call(recwarn):
    sltt_ext.convert(layer.Delay(1), temporal="call")
    assert not [one for one in recwarn if issubclass(one.category, SLTTWarning)]


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_a_run_goes_on_exactly(step_mode):
    def trainer(net):
        return sltt_ext.OnlineTrainer(
            net, F.cross_entropy, T, 2, 2, generator=torch.Generator().manual_seed(1)
        )

    net = sltt_ext.convert(spiking(step_mode), temporal="call")
    online = trainer(net)
    online.forward_backward(*images())
    other = trainer(sltt_ext.convert(spiking(step_mode), temporal="call"))
    other.load_state_dict(pickle.loads(pickle.dumps(online.state_dict())))
    for one in (online, other):
        one.net.zero_grad()
    results = [one.forward_backward(*images(seed=2)).time_steps for one in (online, other)]
    assert results[0] == results[1]
    assert_equal(oracle.gradients(other.net), oracle.gradients(net))


def of(step_mode="s", temporal="call", **options):
    net = sltt_ext.convert(spiking(step_mode), temporal=temporal)
    return sltt_ext.OnlineTrainer(net, F.cross_entropy, T, **options)


BAD = [
    (lambda: sltt_ext.convert(spiking(), temporal="window"), "temporal must be None, 'step' or 'call', got 'window'"),
    (lambda: sltt_ext.over_time(spiking(), T, temporal="all"), "temporal must be None, 'step' or 'call'"),
    (lambda: of(chunk="auto"), "chunk='auto' depends on memory"),
    (lambda: of("m", chunk="auto"), "give a number"),
    (lambda: of(chunk=7), "chunk=7 is longer than time_steps=6"),
    (lambda: sltt_ext.over_time(spiking(), T, temporal="call", chunk=7), "chunk=7 is longer than time_steps=6"),
    (lambda: of(chunk=2, k=4), "k=4 is more than the 3 windows of chunk=2"),
    (lambda: sltt_ext.over_time(spiking(), T, temporal="call", chunk=2, k=4), "k counts windows"),
    (lambda: of(temporal="step", chunk=2), "needs a multi-step network"),
    (lambda: sltt_ext.over_time(spiking(), T, chunk=2)(images()[0]), "needs a multi-step network"),
    (lambda: sltt_ext.over_time(spiking(), k=3, chunk=4, temporal="call", time_dim=0)(FRAMES), "k counts windows"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "says"), BAD)
def test_what_cannot_be(make, says):
    with pytest.raises(ConfigurationError, match=says):
        make()


def test_nothing_is_converted_by_a_bad_option():
    net = spiking()
    with pytest.raises(ConfigurationError):
        sltt_ext.over_time(net, T, temporal="call", chunk=7)
    assert not sltt_ext.is_converted(net)


@pytest.mark.parametrize(
    "make", [of, lambda **options: sltt_ext.over_time(spiking(), T, temporal="call", **options)]
)
def test_a_window_that_does_not_divide_is_said(make):
    with pytest.warns(SLTTWarning, match="through 4 steps, and in the last window through 2") as said:
        make(chunk=4)
    assert len(said) == 1


def test_another_conversion_needs_another_trainer():
    online, net = of(chunk=2), sltt_ext.over_time(spiking(), T)
    sltt_ext.convert(online.net, temporal="step")
    with pytest.raises(ConfigurationError, match="make a new trainer"):
        online.forward_backward(*images())
    sltt_ext.convert(net, temporal="call")
    with pytest.raises(ConfigurationError, match="call over_time again"):
        net(images()[0])


class Varies(nn.Module):
    """Returns other things at every other step."""

    def __init__(self):
        super().__init__()
        self.body, self.calls = spiking(), 0

    def forward(self, x):
        self.calls += 1
        return {"classes": self.body(x)} | ({"more": x} if self.calls % 2 else {})


def test_outputs_that_vary_in_a_window():
    net = sltt_ext.convert(Varies(), temporal="call")
    online = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, chunk=2, output=lambda returned: returned)
    with pytest.raises(LossError, match="other tensors at one step than at another"):
        online.forward_backward(*images())


@pytest.mark.parametrize(
    ("make", "room", "name"),
    [
        (lambda: spiking(node=neuron.LIFNode), sltt_ext.spikingjelly.fused, "run_lif"),
        (leaky_net, sltt_ext.snntorch.neurons, "run_leaky"),
        (lambda: nn.Sequential(nn.Linear(6, 5), clock_driven.LIFNode()), legacy, "run_lif"),
    ],
)
def test_fused_neurons_run_their_operator_through_time(make, room, name, monkeypatch):
    settings, run = [], getattr(room, name)
    monkeypatch.setattr(room, name, lambda *args, **kwargs: settings.extend(args) or run(*args, **kwargs))
    net = make()
    x = images()[0] if isinstance(net[0], nn.Conv2d) else SEQUENCE[0]
    sltt_ext.convert(net, temporal="call")(x)
    told = [one.through_time for one in settings if hasattr(one, "through_time")]
    assert told == [True] * sum(isinstance(module, SLTTNeuron) for module in net)


@pytest.mark.parametrize("through_time", [("1", "3"), ("1",)])
def test_compiled_windows(through_time):
    plain = by_trainer(mixed(leaky_net(), *through_time), SEQUENCE, CLASSES, F.cross_entropy, chunk=3)
    torch._dynamo.reset()
    net = torch.compile(mixed(leaky_net(), *through_time), backend="eager")
    compiled = by_trainer(net, SEQUENCE, CLASSES, F.cross_entropy, chunk=3)
    assert oracle.relative_error(compiled, plain) < 1e-6


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_a_window_needs_the_memory_of_its_steps_whatever_t_is(step_mode):
    torch.manual_seed(0)
    net = nn.Sequential(
        *(module for _ in range(4) for module in (layer.Linear(32, 32), neuron.LIFNode(step_mode=step_mode)))
    )
    sltt_ext.convert(net, temporal="call")
    x = torch.rand(16, 32)
    peaks = []
    for time_steps in (8, 32):
        online = sltt_ext.OnlineTrainer(net, lambda output, _: output.mean(), time_steps, chunk=8)
        online.forward_backward(x, None)
        peaks.append(peak_activation_bytes(partial(online.forward_backward, x, None), net))
    assert peaks[1] <= 1.05 * peaks[0]
