"""The gradient through time within a call: from SLTT (calls of one step) to BPTT (one call of all steps).

The oracle is the original network under plain autograd, whose state is detached by hand after every C steps, and that of
some of its layers after every step.
"""

import copy
import warnings

import modules
import oracle
import pytest
import snntorch_neurons
import torch
from modules import T
from products import spread
from spikingjelly.activation_based import layer, neuron, rnn, surrogate
from temporal_oracle import (
    CLASSES,
    FRAMES,
    SEQUENCE,
    TARGETS,
    assert_equal,
    by_trainer,
    first,
    leaky_net,
    mixed,
    shorter,
    spiking,
    windows_by_hand,
)
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

import sltt_ext
import sltt_ext.snntorch.neurons
import sltt_ext.spikingjelly.fused
from sltt_ext.clock_driven import neuron as clock_driven
from sltt_ext.errors import ConfigurationError, SLTTWarning
from sltt_ext.snntorch import MultiStep, Stateful

pytestmark = pytest.mark.filterwarnings("ignore:Inhibition is an unstable feature")


class Gain(nn.Module):
    """In front of any neuron, something to learn that keeps the shape of its input."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.1))

    def forward(self, x):
        return self.gain * x


class Offset(nn.Module):
    """Behind any neuron, something that always has a gradient."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(0.0))

    def forward(self, returned):
        return first(returned) + self.offset


def weighted(output, weight):
    """A loss whose gradient is a number for each element, another one at each step."""
    return (output * weight).sum()


def converted(net, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SLTTWarning)
        return sltt_ext.convert(copy.deepcopy(net), **options)


def case_of(case):
    """A network around a neuron of SpikingJelly, its input and the weights of its loss."""
    net = nn.Sequential(Gain(), case.make(), Offset())
    torch.manual_seed(1)
    x_seq = 1.5 * torch.randn(T, *case.shape) + 0.5
    with torch.no_grad():
        output = first(copy.deepcopy(net)(x_seq[0]))
    return net, x_seq, torch.randn(T, *output.shape)


WINDOWS = [1, 2, 3, 4, 6]
MODES = [(step_mode, window) for step_mode in "sm" for window in WINDOWS]
IDENTITY = "ignore:the network (mixes|tells)"


@shorter
@pytest.mark.filterwarnings(IDENTITY)
@pytest.mark.parametrize(("case", "mode"), spread(modules.GENERIC, MODES, each=3))
def test_every_spikingjelly_neuron_is_that_of_windows(case, mode):
    step_mode, window = mode
    net, x_seq, weights = case_of(case)
    torch.manual_seed(2)
    expected = windows_by_hand(net, x_seq, weights, window, weighted)
    net[1].step_mode = step_mode
    torch.manual_seed(2)
    actual = by_trainer(converted(net, temporal="call"), x_seq, weights, weighted, chunk=window)
    if step_mode == "s":
        assert_equal(actual, expected)
    assert oracle.relative_error(actual, expected) < 1e-6  # of sequences, sums over time are in another order


OTHER_SEQUENCES = {  # in step mode 'm' the framework computes something else, or sums in another order
    "ILIFNode", "LIAFNode", "OTTTLIFNode", "SynapseFilter",
}  # fmt: skip


@pytest.mark.parametrize(
    "case", [case for case in modules.GENERIC if case.name not in OTHER_SEQUENCES], ids=str
)
def test_one_call_of_all_steps_is_the_frameworks_own_bptt_to_the_last_bit(case):
    net, x_seq, weights = case_of(case)
    net[1].step_mode = "m"
    by_hand, leaf = copy.deepcopy(net), x_seq.clone().requires_grad_()
    torch.manual_seed(2)
    losses = [weighted(output, weight) for output, weight in zip(by_hand(leaf), weights, strict=True)]
    (torch.stack(losses).sum() / T).backward()
    torch.manual_seed(2)
    actual = by_trainer(converted(net, temporal="call"), x_seq, weights, weighted, chunk=T)
    expected = [
        torch.zeros_like(one) if one.grad is None else one.grad for one in (leaf, *by_hand.parameters())
    ]
    assert_equal(actual, expected)


@shorter
@pytest.mark.parametrize(("case", "mode"), spread(modules.FUSED, MODES, each=2))
def test_every_fused_spikingjelly_neuron_is_that_of_windows(case, mode):
    step_mode, window = mode
    net, x_seq, weights = case_of(case)
    expected = windows_by_hand(net, x_seq, weights, window, weighted)
    net[1].step_mode = step_mode
    actual = by_trainer(converted(net, temporal="call"), x_seq, weights, weighted, chunk=window)
    assert oracle.relative_error(actual, expected) < 1e-6


def snntorch_case(cls, kwargs, shape):
    torch.manual_seed(0)
    kwargs = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    net = nn.Sequential(Gain(), cls(**kwargs, init_hidden=True), Offset())
    x_seq = 1.5 * torch.randn(T, *shape, generator=torch.Generator().manual_seed(1)) + 0.4
    with torch.no_grad():
        output = first(copy.deepcopy(net)(x_seq[0]))
    return net, x_seq, torch.randn(T, *output.shape)


SNNTORCH_MODES = [(form, window) for form in ("single", "multi") for window in (1, 4, 6)]


class Named(tuple):
    """A case of snnTorch, by its name."""

    def __str__(self):
        return snntorch_neurons.ids([self])[0]


def named(cases):
    return [Named(case) for case in cases]


@shorter
@pytest.mark.parametrize(("case", "mode"), spread(named(snntorch_neurons.CASES), SNNTORCH_MODES))
def test_every_snntorch_neuron_is_that_of_windows(case, mode):
    form, window = mode
    net, x_seq, weights = snntorch_case(*case)
    expected = windows_by_hand(net, x_seq, weights, window, weighted)
    net = converted(net, temporal="call")
    net = MultiStep(net) if form == "multi" else net
    actual = by_trainer(net, x_seq, weights, weighted, chunk=window)
    if form == "single" and any(case[1] is kwargs for _, kwargs, _ in snntorch_neurons.GENERIC):
        assert_equal(actual, expected)
    assert oracle.relative_error(actual, expected) < 1e-6


@shorter
@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("window", [2, 4, 6])
@pytest.mark.parametrize(("through_time", "stepwise"), [("1", "3"), ("3", "1")])
@pytest.mark.parametrize("node", [neuron.QIFNode, neuron.LIFNode])
def test_layers_through_time_are_chosen_one_by_one(node, through_time, stepwise, window, step_mode):
    expected = windows_by_hand(
        spiking(node=node), FRAMES, TARGETS, window, F.cross_entropy, stepwise=(stepwise,)
    )
    sltt = windows_by_hand(spiking(node=node), FRAMES, TARGETS, 1, F.cross_entropy)
    bptt = windows_by_hand(spiking(node=node), FRAMES, TARGETS, window, F.cross_entropy)
    net = mixed(spiking(step_mode, node), through_time)
    actual = by_trainer(net, FRAMES, TARGETS, F.cross_entropy, chunk=window)
    assert oracle.relative_error(actual, expected) < 1e-6
    assert oracle.relative_error(actual, sltt) > 1e-3
    assert oracle.relative_error(actual, bptt) > 1e-3


class Explicit(nn.Module):
    """A network that is passed its states, as snnTorch's tutorials have it."""

    def __init__(self):
        super().__init__()
        self.layers = leaky_net(init_hidden=False)

    def forward(self, x, state):
        mem1, mem2 = (None, None) if state is None else state
        fc1, lif1, fc2, lif2 = self.layers
        spk1, mem1 = lif1(fc1(x), mem1)
        _, mem2 = lif2(fc2(spk1), mem2)
        return mem2, (mem1, mem2)


def explicit_by_hand(window, stepwise=()):
    net, x_seq = Explicit(), SEQUENCE.clone().requires_grad_()
    state = None
    for start in range(0, T, window):
        losses = []
        for t in range(start, min(start + window, T)):
            output, state = net(x_seq[t], state)
            losses.append(F.cross_entropy(output, CLASSES[t]))
            state = tuple(mem.detach() if i in stepwise else mem for i, mem in enumerate(state))
        (sum(losses) / T).backward()
        state = tuple(mem.detach() for mem in state)
    return [x_seq.grad, *oracle.gradients(net)]


@shorter
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("stepwise", [(), (0,), (1,), (0, 1)])
def test_states_that_are_passed_go_through_time_as_those_that_are_kept(stepwise, window):
    net = Stateful(mixed(Explicit(), *(f"layers.{1 + 2 * i}" for i in (0, 1) if i not in stepwise)))
    if stepwise == (0, 1) and window > 1:
        with pytest.raises(ConfigurationError, match="needs a multi-step network"):
            by_trainer(net, SEQUENCE, CLASSES, F.cross_entropy, chunk=window)
        return
    expected = explicit_by_hand(window, stepwise)
    assert (
        oracle.relative_error(by_trainer(net, SEQUENCE, CLASSES, F.cross_entropy, chunk=window), expected)
        < 1e-6
    )


class Shared(nn.Module):
    """One neuron at two places of a step, and another one."""

    def __init__(self, step_mode="s"):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = neuron.QIFNode(step_mode=step_mode), neuron.LIFNode(step_mode=step_mode)
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return self.b(self.fc(self.a(self.fc(self.a(x)))))


@pytest.mark.filterwarnings("ignore:the trainer calls the network for each time step")
@pytest.mark.parametrize("through_time", [("a", "b"), ("a",), ("b",)])
@pytest.mark.parametrize("window", [2, 3, 6])
def test_a_neuron_at_two_places_of_a_step(window, through_time):
    stepwise = {"a", "b"} - set(through_time)
    expected = windows_by_hand(Shared(), SEQUENCE, CLASSES, window, F.cross_entropy, stepwise=stepwise)
    actual = by_trainer(mixed(Shared(), *through_time), SEQUENCE, CLASSES, F.cross_entropy, chunk=window)
    assert oracle.relative_error(actual, expected) < 1e-6


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "VanillaRNN"])
@pytest.mark.parametrize("window", [1, 2, 6])
def test_recurrent_cells(kind, window):
    torch.manual_seed(0)
    cell = getattr(rnn, f"Spiking{kind}Cell")(6, 5)
    expected, x_seq = copy.deepcopy(cell), SEQUENCE.clone().requires_grad_()
    state = None
    for start in range(0, T, window):
        losses = []
        for t in range(start, start + window):
            state = expected(x_seq[t], state)
            losses.append(F.cross_entropy(first(state), CLASSES[t]))
        (sum(losses) / T).backward()
        state = tree_map(torch.Tensor.detach, state)
    net = Stateful(sltt_ext.convert(cell, temporal="call"), step=lambda cell, x, state: (cell(x, state),) * 2)
    actual = by_trainer(net, SEQUENCE, CLASSES, F.cross_entropy, chunk=window)
    assert oracle.relative_error(actual, [x_seq.grad, *oracle.gradients(expected)]) < 1e-6


def gated():
    return nn.Sequential(neuron.GatedLIFNode(T=T, inplane=3))


def recurrent_network():
    return nn.Sequential(rnn.SpikingLSTM(6, 5, 2), Offset())


def stateful_container():
    inner = nn.Sequential(nn.Linear(6, 6), neuron.LIFNode(), nn.Linear(6, 5), neuron.QIFNode())
    return nn.Sequential(layer.MultiStepContainer(inner), Offset())


WHOLE = [
    (recurrent_network, SEQUENCE),
    (stateful_container, SEQUENCE),
    *[(gated, torch.rand(T, 4, 3, 5, 5, generator=torch.Generator().manual_seed(5)))]
    * hasattr(neuron, "GatedLIFNode"),
]


@pytest.mark.parametrize("trainer", [True, False], ids=["trainer", "convert alone"])
@pytest.mark.parametrize(("make", "x_seq"), WHOLE)
def test_modules_with_a_loop_of_their_own_have_bptt_in_one_call(make, x_seq, trainer):
    torch.manual_seed(0)
    net = make()
    weights = torch.randn(T, *first(copy.deepcopy(net)(x_seq)).shape[1:])
    through_time, leaf = converted(net, temporal="call"), x_seq.clone().requires_grad_()
    (weighted(net(leaf), weights) / T).backward()
    if trainer:
        actual = by_trainer(through_time, x_seq, weights, weighted, chunk=T)
    else:
        x_seq = x_seq.clone().requires_grad_()
        (weighted(through_time(x_seq), weights) / T).backward()
        actual = [x_seq.grad, *oracle.gradients(through_time)]
    assert oracle.relative_error(actual, [leaf.grad, *oracle.gradients(net)]) < 1e-6


class Linear(nn.Module):
    """Of a step or of all, around a neuron that takes one or the other."""

    def __init__(self, inner):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.inner = nn.Linear(6, 5), inner

    def forward(self, x):
        return self.inner(self.fc(x))


def held_by_hand(make, window):
    """A network whose neuron takes single steps, and keeps its state in ``_memories``."""
    net, x_seq = Linear(make()), SEQUENCE.clone().requires_grad_()
    for start in range(0, T, window):
        losses = [F.cross_entropy(net(x_seq[t]), CLASSES[t]) for t in range(start, start + window)]
        (sum(losses) / T).backward()
        net.inner._memories["v"] = net.inner._memories["v"].detach()
    return [x_seq.grad, *oracle.gradients(net)]


@pytest.mark.parametrize("window", [1, 3, 6])
@pytest.mark.parametrize("name", ["IFNode", "LIFNode", "ParametricLIFNode", "EIFNode"])
def test_neurons_of_the_old_spikingjelly(name, window):
    def make(prefix=""):
        return getattr(clock_driven, prefix + name)(v_threshold=0.5)

    expected = held_by_hand(make, window)
    for prefix in ("", "MultiStep"):
        net = sltt_ext.convert(Linear(make(prefix)), temporal="call")
        actual = by_trainer(net, SEQUENCE, CLASSES, F.cross_entropy, chunk=window)
        assert oracle.relative_error(actual, expected) < 1e-6


class Declared(nn.Module):
    """Of no framework: its own loop over time, from rest or from what it is given."""

    def __init__(self):
        super().__init__()
        self.decay = nn.Parameter(torch.tensor(0.6))

    def one(self, x, mem):
        mem = x if mem is None else self.decay * mem + x
        spike = surrogate.ATan()(mem - 0.5)
        return spike, mem * (1 - spike)

    def forward(self, x_seq, mem=None):
        spikes = []
        for x in x_seq:
            spike, mem = self.one(x, mem)
            spikes.append(spike)
        self.left = mem.detach()
        return torch.stack(spikes)


class Kept(Declared):
    """The same neuron for single steps."""

    mem = None

    def forward(self, x):
        spike, self.mem = self.one(x, self.mem)
        return spike


sltt_ext.declare_neuron(Declared, time_dim=0)(lambda module, x, mem: module.one(x, mem))
sltt_ext.declare_neuron(Kept, state=("mem",))


@pytest.mark.parametrize("window", [1, 3, 6])
@pytest.mark.parametrize("cls", [Declared, Kept])
def test_declared_neurons(cls, window):
    net, x_seq, mem = Linear(Declared()), SEQUENCE.clone().requires_grad_(), None
    for start in range(0, T, window):
        outputs = net.inner(net.fc(x_seq[start : start + window]), mem)
        losses = [F.cross_entropy(output, CLASSES[start + t]) for t, output in enumerate(outputs)]
        (sum(losses) / T).backward()
        mem = net.inner.left
    through_time = sltt_ext.convert(Linear(cls()), temporal="call")
    actual = by_trainer(through_time, SEQUENCE, CLASSES, F.cross_entropy, chunk=window)
    assert oracle.relative_error(actual, [x_seq.grad, *oracle.gradients(net)]) < 1e-6
