"""The gradient through time within a call: from SLTT (calls of one step) to BPTT (one call of all steps).

The oracle is the original network under plain autograd, whose state is detached by hand after every C steps, and that of
some of its layers after every step.
"""

import copy
import pickle
import warnings
from functools import partial

import modules
import oracle
import pytest
import snntorch
import snntorch_neurons
import torch
from modules import T
from networks import conv_net, images
from products import spread
from spikingjelly.activation_based import base, layer, neuron, rnn, surrogate
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

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


def first(returned):
    return returned if isinstance(returned, torch.Tensor) else returned[0]


def weighted(output, weight):
    """A loss whose gradient is a number for each element, another one at each step."""
    return (output * weight).sum()


def detach(net):
    """What the modules of either framework carry, as a constant."""
    oracle.detach_memories(net)
    for module in net.modules():
        if isinstance(module, snntorch.SpikingNeuron):
            own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
            for store, values in ((vars(module), own), (module._buffers, module._buffers)):
                store.update({name: tree_map(_constant, value) for name, value in values.items()})


def _constant(value):
    return value.detach() if isinstance(value, torch.Tensor) and value.grad_fn is not None else value


def reset(net):
    for module in net.modules():
        if isinstance(module, base.MemoryModule):
            module.reset()
        elif hasattr(module, "reset_mem"):
            module.reset_mem()


def windows_by_hand(net, x_seq, targets, window, loss_fn, stepwise=(), selected=None, divisor=None):
    """The gradients of a network and its input by windows; the layers named in ``stepwise`` are detached at every step."""
    net, x_seq = copy.deepcopy(net), x_seq.clone().requires_grad_()
    net.zero_grad()
    reset(net)
    selected = range(T) if selected is None else selected
    for start in range(0, T, window):
        steps = range(start, min(start + window, T))
        outputs = []
        for t in steps:
            outputs.append(first(net(x_seq[t])))
            for name in stepwise:
                detach(net.get_submodule(name))
        losses = [loss_fn(output, targets[t]) for t, output in zip(steps, outputs, strict=True)]
        total = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        if start in selected and total.requires_grad:
            (total / (divisor or len(selected))).backward()
        detach(net)
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in (x_seq, *net.parameters())]


def by_trainer(net, x_seq, targets, loss_fn, **options):
    """The same by an `OnlineTrainer`."""
    x_seq = x_seq.clone().requires_grad_()
    net.zero_grad()
    online = sltt_ext.OnlineTrainer(
        net, loss_fn, T, time_dim=0, target_time_dim=0, **{"output": first, **options}
    )
    online.forward_backward(x_seq, targets)
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in (x_seq, *net.parameters())]


def converted(net, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SLTTWarning)
        return sltt_ext.convert(copy.deepcopy(net), **options)


def assert_equal(actual, expected):
    for got, want in zip(actual, expected, strict=True):
        assert torch.equal(got, want)


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
LAST_IS_SHORTER = "does not divide time_steps"
shorter = pytest.mark.filterwarnings(f"ignore:chunk=4 {LAST_IS_SHORTER}")
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


def mixed(net, *through_time):
    """The network with these layers alone through time."""
    net = copy.deepcopy(net)
    for name in through_time:
        sltt_ext.convert(net.get_submodule(name), temporal="call")
    return sltt_ext.convert(net)


def spiking(step_mode="s", node=neuron.QIFNode):
    """Two spiking layers without norms; the neurons run by the generic rule."""
    return conv_net(node, step_mode, surrogate_function=surrogate.ATan())


FRAMES = torch.stack([images(seed=t)[0] for t in range(T)])
TARGETS = torch.stack([images(seed=t)[1] for t in range(T)])


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


def leaky_net(init_hidden=True):
    torch.manual_seed(0)
    neurons = [snntorch.Leaky(beta=0.9, init_hidden=init_hidden) for _ in range(2)]
    return nn.Sequential(nn.Linear(6, 8), neurons[0], nn.Linear(8, 5), neurons[1])


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


SEQUENCE = 2 * torch.rand(T, 4, 6, generator=torch.Generator().manual_seed(3))
CLASSES = torch.randint(5, (T, 4), generator=torch.Generator().manual_seed(4))


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
    (lambda: of(chunk="auto"), "chunk='auto' asks memory"),
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
