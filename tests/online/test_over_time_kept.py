"""`over_time` and what modules keep outside of their state: computed attributes, tensors of the step before, written weights."""

import networks
import oracle
import pytest
import torch
from spikingjelly.activation_based import functional, neuron
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.errors import LossError

T = 4
X, TARGET = networks.images()
BUDGETS = [None, 30_000, "1GiB"]  # room for the graphs of no step, of some, of all


class Threshold(nn.Module):
    """Computes its neuron's threshold from a parameter before each call."""

    def __init__(self):
        super().__init__()
        self.raw, self.neuron = nn.Parameter(torch.tensor(0.3)), neuron.IFNode()

    def forward(self, x):
        self.neuron.v_threshold = F.softplus(self.raw)
        return self.neuron(x)

    def rest(self):
        self.neuron.reset()

    def detach(self):
        oracle.detach_memories(self)


class Trace(nn.Module):
    """Keeps what it returned at the step before, as a plain attribute."""

    def __init__(self):
        super().__init__()
        self.strength, self.last = nn.Parameter(torch.tensor(0.4)), None

    def forward(self, x):
        self.last = torch.tanh(x if self.last is None else x + self.strength * self.last)
        return self.last

    def rest(self):
        self.last = None

    def detach(self):
        self.last = self.last.detach()


def net_with(module):
    torch.manual_seed(0)
    return nn.Sequential(module, *networks.conv_net())


def oracle_gradients(net, carry):
    """Of one more call: the state detached between steps."""
    if not carry:
        net[0].rest()
        for module in net[1:]:
            if hasattr(module, "reset"):
                module.reset()
    net.zero_grad()
    outputs = []
    for _ in range(T):
        outputs.append(net(X))
        net[0].detach()
        oracle.detach_memories(net)
    F.cross_entropy(torch.stack(outputs).mean(0), TARGET).backward()
    return oracle.gradients(net)


@pytest.mark.filterwarnings("ignore:tensors are kept from step to step")
@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("memory_budget", BUDGETS)
@pytest.mark.parametrize("make", [Threshold, Trace])
def test_what_modules_keep_as_attributes(make, memory_budget, carry):
    reference, net = net_with(make()), net_with(make())
    sltt_ext.over_time(net, T, memory_budget=memory_budget, carry=carry)
    for _ in range(4):
        net.zero_grad()
        F.cross_entropy(net(X), TARGET).backward()
        assert oracle.relative_error(oracle.gradients(net), oracle_gradients(reference, carry)) < 1e-6


@pytest.mark.filterwarnings("ignore:tensors are kept from step to step")
def test_a_step_starts_from_what_the_one_before_has_kept_though_that_does_not_run_again():
    reference, net = net_with(Trace()), net_with(Trace())
    outputs = []
    for t in range(T):
        with torch.set_grad_enabled(t != 2):
            outputs.append(reference(X))
        reference[0].detach()
        oracle.detach_memories(reference)
    (outputs[0] + outputs[1] + outputs[3]).square().sum().backward()
    steps = sltt_ext.over_time(net, T, schedule=lambda *_: [0, 1, 3], returns="sequence")(X)
    (0.75 * (steps[0] + steps[1] + steps[3]).square().sum()).backward()
    assert oracle.relative_error(oracle.gradients(net), oracle.gradients(reference)) < 1e-6


class AnotherEachStep(nn.Module):
    """Sets its layer's weight to another part of a parameter at each step."""

    def __init__(self):
        super().__init__()
        self.linear, self.t = nn.Linear(8, 8, bias=False), 0
        self.weights = nn.Parameter(torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)))
        del self.linear.weight

    def forward(self, x):
        self.t += 1
        self.linear.weight = self.weights[self.t % 3]
        return self.linear(x)


@pytest.mark.parametrize("memory_budget", BUDGETS)
def test_a_view_left_by_a_step_without_gradients(memory_budget):
    """Its base is updated before the next call."""
    nets = [net_with(AnotherEachStep()) for _ in range(2)]
    sltt_ext.over_time(nets[1], T, schedule=lambda *_: [0, 1, 2], memory_budget=memory_budget)
    optimizers = [torch.optim.SGD(net.parameters(), 0.01) for net in nets]
    for _ in range(3):
        outputs = []
        for t in range(T):
            with torch.set_grad_enabled(t < T - 1):
                outputs.append(nets[0](X))
            oracle.detach_memories(nets[0])
        functional.reset_net(nets[0])
        selected = [output.detach() + T / 3 * (output - output.detach()) for output in outputs]
        for optimizer in optimizers:
            optimizer.zero_grad()
        F.cross_entropy(torch.stack(selected).mean(0), TARGET).backward()
        F.cross_entropy(nets[1](X), TARGET).backward()
        assert oracle.relative_error(*map(oracle.gradients, nets)) < 1e-6
        for optimizer in optimizers:
            optimizer.step()


class Writes(nn.Linear):
    def __init__(self, write):
        super().__init__(8, 8)
        self.write = write

    def forward(self, x):
        self.write(self.weight)
        return super().forward(x)


def decays(weight):
    weight.data.mul_(0.9)


def assigns(weight):
    weight.data = 0.9 * weight.data


@torch.no_grad()
def adds(weight):
    weight.add_(0.01)


def clips(weight):
    weight.data.clamp_(-0.3, 0.3)


@pytest.mark.filterwarnings("ignore:the network computes something else")
@pytest.mark.parametrize("write", [decays, assigns, adds])
def test_a_network_that_writes_to_its_own_weights(write):
    net = sltt_ext.over_time(net_with(Writes(write)), T)
    with pytest.raises(LossError, match="writes to its own weights while it runs"):
        net(X).sum().backward()
    assert all(parameter.grad is None for parameter in net.parameters())


def test_weights_that_are_clipped_may_be():
    """What writes the same again changes nothing."""
    net = sltt_ext.over_time(net_with(Writes(clips)), T)
    net(X).sum().backward()
    assert net[0].weight.grad.any()
