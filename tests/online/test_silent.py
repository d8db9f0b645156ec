"""Layers that never fire are said once, after the first iterations, and what is there for its potential is not."""

import warnings

import pytest
import snntorch
import torch
from spikingjelly.activation_based import neuron
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import sltt_ext
from sltt_ext.errors import SilentLayersWarning
from sltt_ext.online.silent import ITERATIONS
from sltt_ext.snntorch import Stateful

T, N = 3, 4
TARGET = torch.tensor([0, 1, 2, 1])


class Net(nn.Module):
    """Two layers of neurons. The second one gets a tenth of what it needs."""

    def __init__(self, first=neuron.LIFNode, second=neuron.LIFNode, gain=0.1):
        super().__init__()
        self.first, self.second, self.head = first(), second(), nn.Linear(6, 3)
        self.weight, self.gain = nn.Parameter(torch.ones(6)), gain

    def forward(self, x):
        return self.head(self.second(self.gain * self.first(self.weight * x)))


class Potential(Net):
    """Its second layer is read by its potential."""

    def forward(self, x):
        self.second(self.gain * self.first(self.weight * x))
        return self.head(self.second.v)


class Pair(Net):
    """As snnTorch has it: spikes and potentials of the last layer."""

    def forward(self, x):
        spikes, potentials = self.second(self.gain * self.first(self.weight * x))
        return self.head(spikes), self.head(potentials)


class States(Net):
    """Its second layer is given its state, and the network returns it."""

    def forward(self, x, potentials=None):
        spikes, potentials = self.second(self.gain * self.first(self.weight * x), potentials)
        return potentials[:, :3] + 0 * self.head(spikes), potentials


def leaky(**options):
    return lambda: snntorch.Leaky(**{"beta": 0.5, "init_hidden": True, **options})


def synaptic(**options):
    return lambda: snntorch.Synaptic(alpha=0.5, beta=0.5, init_hidden=True, **options)


def learn(net, iterations=ITERATIONS, x=None, **options):
    online = sltt_ext.OnlineTrainer(sltt_ext.convert(net), F.cross_entropy, T, **options)
    return lambda: said(
        lambda: online.forward_backward(4 * torch.ones(N, 6) if x is None else x, TARGET), iterations
    )


def said(iteration, iterations):
    """After which iterations something was said, and what."""
    told = []
    for number in range(1, iterations + 1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            iteration()
        told += [(number, str(one.message)) for one in caught if one.category is SilentLayersWarning]
    return told


def layers_said(told):
    """The layers in the one thing that was said."""
    ((number, message),) = told
    assert number == ITERATIONS
    return [line.partition(":")[0].strip() for line in message.splitlines()[1:]]


SILENT = {
    "a layer": Net,
    "an integrate-and-fire neuron": lambda: Net(second=neuron.IFNode, gain=1e-3),
    "by the generic rule": lambda: Net(second=lambda: neuron.QIFNode(v_threshold=5.0)),
    "snnTorch": lambda: Net(leaky(), leaky()),
    "snnTorch, by the generic rule": lambda: Net(leaky(), synaptic()),
    "spikes are read, and the potentials are there": lambda: Pair(leaky(), leaky(output=True)),
    "several steps in a call": lambda: Net(
        lambda: neuron.LIFNode(step_mode="m"), lambda: neuron.LIFNode(step_mode="m")
    ),
}  # fmt: skip


@pytest.mark.parametrize("make", SILENT.values(), ids=SILENT)
def test_a_silent_layer_is_said_once(make):
    assert layers_said(learn(make(), 2 * ITERATIONS)()) == ["second"]


def test_all_layers_of_a_silent_network_are_said_in_order():
    assert layers_said(learn(Net(), x=0.1 * torch.ones(N, 6))()) == ["first", "second"]


def test_one_loss_of_all_steps():
    assert layers_said(learn(Net(), loss_on="mean")()) == ["second"]


def test_a_network_over_time():
    net = sltt_ext.over_time(Net(), time_steps=T)
    assert layers_said(said(lambda: net(4 * torch.ones(N, 6)).sum().backward(), 2 * ITERATIONS)) == ["second"]


def test_a_stream_is_given_time():
    """State is kept from call to call, and a neuron may charge over many of them."""
    net = sltt_ext.over_time(Net(), time_steps=1, carry=True)
    ((number, _),) = said(lambda: net(4 * torch.ones(N, 6)).sum().backward(), 120)
    assert number == 100


READ_OUT = {
    "a threshold of infinity": (lambda: Net(second=lambda: neuron.LIFNode(v_threshold=float("inf"))), {}),
    "a threshold out of reach": (lambda: Net(second=lambda: neuron.IFNode(v_threshold=1e6)), {}),
    "no reset": (lambda: Net(leaky(), leaky(reset_mechanism="none")), {}),
    "the potential of SpikingJelly's neuron": (Potential, {}),
    "of one by the generic rule": (lambda: Potential(second=lambda: neuron.QIFNode(v_threshold=5.0)), {}),
    "of snnTorch's": (lambda: Pair(leaky(), leaky(output=True)), {"output": "membrane"}),
    "of one by the generic rule, snnTorch": (
        lambda: Pair(leaky(), lambda: snntorch.Lapicque(beta=0.5, init_hidden=True, output=True)), {"output": "membrane"},
    ),
    "a state that is passed": (
        lambda: Stateful(States(leaky(), leaky(init_hidden=False))), {},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "options"), READ_OUT.values(), ids=READ_OUT)
def test_what_is_there_for_its_potential_need_not_fire(make, options):
    assert learn(make(), **options)() == []


def test_a_hidden_layer_that_returns_its_potential_is_said():
    """The potential goes to nobody but the next step."""

    class Hidden(Net):
        def forward(self, x):
            return self.head(self.second(self.gain * self.first(self.weight * x))[0])

    assert layers_said(learn(Hidden(leaky(), leaky(output=True)))()) == ["second"]


def test_a_layer_that_fires_at_last_is_not_said():
    net = Net()
    online = sltt_ext.OnlineTrainer(sltt_ext.convert(net), F.cross_entropy, T)
    x = 4 * torch.ones(N, 6)
    assert said(lambda: online.forward_backward(x, TARGET), ITERATIONS - 1) == []
    net.gain = 10.0
    assert said(lambda: online.forward_backward(x, TARGET), 2 * ITERATIONS) == []


def test_one_neuron_that_fires_once_is_enough():
    class Sparse(Net):
        def forward(self, x):
            scale = torch.full((len(x), 6), 0.1)
            scale[-1, -1] = 10.0
            return self.head(self.second(scale * self.first(self.weight * x)))

    assert learn(Sparse())() == []


def test_predictions_are_no_iterations():
    net = Net()
    online = sltt_ext.OnlineTrainer(sltt_ext.convert(net), F.cross_entropy, T)
    assert said(lambda: online.predict(torch.ones(N, 6)), 2 * ITERATIONS) == []


def test_it_is_said_of_the_line_that_trains():
    online = sltt_ext.OnlineTrainer(sltt_ext.convert(Net()), F.cross_entropy, T)
    net = sltt_ext.over_time(Net(), time_steps=T)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(ITERATIONS):
            online.forward_backward(torch.ones(N, 6), TARGET)
            net(torch.ones(N, 6)).sum().backward()
    assert [one.filename for one in caught if one.category is SilentLayersWarning] == 2 * [__file__]


def test_it_can_be_switched_off():
    iteration = learn(Net())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", SilentLayersWarning)
        online = sltt_ext.OnlineTrainer(sltt_ext.convert(Net()), F.cross_entropy, T)
        for _ in range(ITERATIONS + 1):
            online.forward_backward(torch.ones(N, 6), TARGET)
    assert layers_said(iteration())


def test_as_an_error_it_leaves_gradients_and_states_as_they_were():
    net = Net()
    online = sltt_ext.OnlineTrainer(sltt_ext.convert(net), F.cross_entropy, T)
    x = 4 * torch.ones(N, 6)
    for _ in range(ITERATIONS - 1):
        online.forward_backward(x, TARGET)
    before = net.head.bias.grad.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error", SilentLayersWarning)
        with pytest.raises(SilentLayersWarning):
            online.forward_backward(x, TARGET)
    assert torch.equal(net.head.bias.grad, before)
    assert "forward" not in vars(net.second)
    assert said(lambda: online.forward_backward(x, TARGET), ITERATIONS) == []


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("gain", "iterations"), [(0.1, ITERATIONS), (10.0, 2)], ids=["silent", "firing"])
def test_afterwards_nothing_is_looked_at_and_nothing_read_back(gain, iterations):
    """A network that fires is left alone from the second iteration on (the first prediction is watched for its steps)."""
    online = sltt_ext.OnlineTrainer(sltt_ext.convert(Net(gain=gain)), F.cross_entropy, T)
    x = 4 * torch.ones(N, 6)
    counts = []
    for _ in range(iterations + 1):
        with Operators() as operators, warnings.catch_warnings():
            warnings.simplefilter("ignore", SilentLayersWarning)
            online.forward_backward(x, TARGET)
        counts.append([operators.names.count(name) for name in ("any", "_local_scalar_dense", "is_nonzero")])
    assert counts[0][0]
    assert counts[-1] == [0, 0, 0]


def test_without_numbers_nothing_is_said():
    with FakeTensorMode():
        net, x, target = Net(), torch.ones(N, 6), torch.zeros(N, dtype=torch.int64)
        online = sltt_ext.OnlineTrainer(sltt_ext.convert(net), F.cross_entropy, T)
        assert said(lambda: online.forward_backward(x, target), 2 * ITERATIONS) == []
