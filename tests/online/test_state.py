"""State is what an earlier step left: all else that enters a step keeps its gradient, against a loop written out."""

import copy

import oracle
import pytest
import snntorch
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.errors import LossError
from sltt_ext.snntorch import MultiStep, Stateful

pytestmark = pytest.mark.filterwarnings("ignore:the trainer calls the network for each time step")

T, N = 5, 4
X = 2 * torch.randn(T, N, 8, generator=torch.Generator().manual_seed(1))
TARGET = torch.tensor([0, 1, 2, 3])
STATES = ("mem", "syn", "spk", "syn_exc", "syn_inh")


class Shared(nn.Module):
    """One neuron, twice in each step."""

    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.neuron = make()

    def forward(self, x):
        return self.c(self.neuron(self.b(self.neuron(self.a(x)))))


class Computed(nn.Module):
    """A parameter of the neuron, computed in each step."""

    def __init__(self, make, name):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.neuron, self.c = nn.Linear(8, 16), make(), nn.Linear(16, 4)
        self.raw, self.name = nn.Parameter(torch.tensor(1.0)), name

    def forward(self, x):
        setattr(self.neuron, self.name, torch.sigmoid(self.raw))
        return self.c(self.neuron(self.a(x)))


class StartsFrom(neuron.LIFNode):
    """A learned initial state."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.v0 = nn.Parameter(torch.linspace(-0.5, 0.5, 16).expand(N, 16).clone())

    def reset(self):
        super().reset()
        self.v = 1.0 * self.v0


class StartsFromToo(StartsFrom):
    """By the generic rule."""

    def neuronal_charge(self, x):
        super().neuronal_charge(x)


def network(make):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), make(), nn.Linear(16, 4))


def reset(net):
    functional.reset_net(net)
    for module in net.modules():
        if isinstance(module, snntorch.SpikingNeuron):
            module.reset_mem()


def detach(net):
    oracle.detach_memories(net)
    for module in net.modules():
        if isinstance(module, snntorch.SpikingNeuron):
            for name in STATES:
                if isinstance(getattr(module, name, None), torch.Tensor):
                    setattr(module, name, getattr(module, name).detach())


def expected(net, selected=range(T), chunk=None):
    """The original network, its state detached after each call: of one step, or of ``chunk`` in multi-step mode."""
    net = copy.deepcopy(net)
    reset(net)
    for start in range(0, T, chunk or 1):
        stop = min(start + (chunk or 1), T)
        with torch.set_grad_enabled(start in selected):
            outputs = net(X[start:stop]) if chunk else net(X[start]).unsqueeze(0)
        if start in selected:
            sum(F.cross_entropy(output, TARGET) / len(selected) for output in outputs).backward()
        detach(net)
    return oracle.gradients(net)


def trained(net, selected=None, **options):
    net = sltt_ext.convert(copy.deepcopy(net))
    schedule = None if selected is None else lambda T, generator: list(selected)
    online = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, time_dim=0, schedule=schedule, **options)
    online.forward_backward(X, TARGET)
    return oracle.gradients(net)


NEURONS = {
    "LIF": neuron.LIFNode,
    "LIF, soft reset": lambda: neuron.LIFNode(v_reset=None, decay_input=False),
    "PLIF": neuron.ParametricLIFNode,
    "IF": lambda: neuron.IFNode(detach_reset=True),
    "generic": neuron.IzhikevichNode,
    "recurrent": lambda: layer.LinearRecurrentContainer(neuron.LIFNode(), 16, 16),
    "Leaky": lambda: snntorch.Leaky(beta=0.9, init_hidden=True, learn_beta=True, learn_threshold=True),
    "Leaky, reset to zero": lambda: snntorch.Leaky(beta=0.9, init_hidden=True, reset_mechanism="zero"),
    "Synaptic": lambda: snntorch.Synaptic(alpha=0.8, beta=0.9, init_hidden=True),
    "RLeaky": lambda: snntorch.RLeaky(beta=0.9, linear_features=16, init_hidden=True),
    "Alpha": lambda: snntorch.Alpha(alpha=0.9, beta=0.8, init_hidden=True),
}
SPIKINGJELLY = ["LIF", "LIF, soft reset", "PLIF", "IF", "generic", "recurrent"]
OPTIONS = [{}, {"pack_spikes": True}, {"selected": (1, 3)}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", NEURONS)
def test_the_gradient_flows_between_two_calls_in_one_step(name, options):
    net = Shared(NEURONS[name])
    want = expected(net, options.get("selected", range(T)))
    assert oracle.relative_error(trained(net, **options), want) < 1e-6


@pytest.mark.parametrize("name", SPIKINGJELLY)
def test_the_gradient_flows_between_two_calls_in_one_step_of_a_multi_step_network(name):
    net = Shared(NEURONS[name])
    want = expected(net)
    functional.set_step_mode(net.neuron, "m")
    if name == "recurrent":
        net.neuron.sub_module.step_mode = "s"
    assert oracle.relative_error(trained(net), want) < 1e-6


def test_in_a_call_of_several_steps_the_second_call_goes_on_from_the_last_step_of_the_first():
    net = Shared(lambda: neuron.LIFNode(step_mode="m", surrogate_function=surrogate.ATan()))

    class StepByStep(neuron.LIFNode):
        def multi_step_forward(self, x_seq):
            steps = []
            for x in x_seq:
                if steps:
                    self.v = self.v.detach()
                steps.append(self.single_step_forward(x))
            return torch.stack(steps)

    want = Shared(lambda: StepByStep(step_mode="m", surrogate_function=surrogate.ATan()))
    want = expected(want, chunk=T)
    assert oracle.relative_error(trained(net, chunk=T), want) < 1e-6


@pytest.mark.parametrize("name", ["Leaky", "Synaptic", "RLeaky", "Alpha"])
def test_with_multi_step(name):
    net = Shared(NEURONS[name])
    want = expected(net)
    net = sltt_ext.convert(copy.deepcopy(net))
    online = sltt_ext.OnlineTrainer(MultiStep(net), F.cross_entropy, T, time_dim=0)
    online.forward_backward(X, TARGET)
    assert oracle.relative_error(oracle.gradients(net), want) < 1e-6


@pytest.mark.parametrize("parameter", ["beta", "threshold"])
@pytest.mark.parametrize("name", ["Leaky, reset to zero", "Synaptic", "RLeaky", "Alpha"])
@pytest.mark.parametrize("own_loop", [False, True])
def test_a_parameter_that_is_computed_is_no_state(name, parameter, own_loop):
    net = Computed(NEURONS[name], parameter)
    want = expected(net)
    if not own_loop:
        assert oracle.relative_error(trained(net), want) < 1e-6
        return
    net = sltt_ext.convert(copy.deepcopy(net))
    reset(net)
    sum(F.cross_entropy(net(x), TARGET) / T for x in X).backward()
    assert oracle.relative_error(oracle.gradients(net), want) < 1e-6


def test_a_parameter_that_is_computed_once_is_not_cut():
    """As without SLTT: a graph is gone after one backward pass."""
    net = sltt_ext.convert(network(NEURONS["Synaptic"]))
    raw = torch.ones((), requires_grad=True)
    net[1].beta = raw.sigmoid()
    online = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, time_dim=0)
    with pytest.raises(LossError, match="reaches back to an earlier time step"):
        online.forward_backward(X, TARGET)


class KeepsNothing(snntorch.SpikingNeuron):
    """All of its state comes and goes with the call."""

    def reset_mem(self):
        pass

    def forward(self, x, mem):
        mem = 0.9 * mem + x
        return self.fire(mem), mem


@pytest.mark.parametrize("own_loop", [False, True])
@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("make", [StartsFrom, StartsFromToo])
def test_a_learned_initial_state(make, step_mode, own_loop):
    net = network(make)
    want = expected(net)
    assert net[1].v0.grad is None
    functional.set_step_mode(net[1], step_mode)
    if not own_loop:
        gradients = trained(net)
    else:
        net = sltt_ext.convert(net)
        reset(net)
        output_seq = net(X) if step_mode == "m" else [net(x) for x in X]
        sum(F.cross_entropy(output, TARGET) / T for output in output_seq).backward()
        gradients = oracle.gradients(net)
    assert oracle.relative_error(gradients, want) < 1e-6


class PassesItsState(nn.Module):
    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.neuron, self.c = nn.Linear(8, 16), make(), nn.Linear(16, 4)
        self.start = nn.Parameter(torch.randn(16))

    def forward(self, x, state):
        start = (self.start.expand(N, -1),) * (2 if isinstance(self.neuron, snntorch.Synaptic) else 1)
        spk, *state = self.neuron(self.a(x), *(start if state is None else state))
        return self.c(spk), state


@pytest.mark.parametrize(
    "changes", [lambda mem: mem, lambda mem: mem.clamp(-1, 1)], ids=["as it is", "changed"]
)
@pytest.mark.parametrize("own_loop", [False, True])
@pytest.mark.parametrize(
    "make",
    [lambda: snntorch.Leaky(beta=0.9), lambda: snntorch.Synaptic(alpha=0.8, beta=0.9), KeepsNothing],
    ids=["Leaky", "Synaptic", "keeps nothing"],
)
def test_a_learned_initial_state_that_is_passed(make, own_loop, changes):
    net = PassesItsState(make)
    original, state = copy.deepcopy(net), None
    for x in X:
        output, state = original(x, state)
        (F.cross_entropy(output, TARGET) / T).backward()
        state = [changes(tensor.detach()) for tensor in state]
    want = oracle.gradients(original)
    if own_loop:
        state, loss = None, 0.0
        for x in X:
            output, state = sltt_ext.convert(net)(x, state)
            loss = loss + F.cross_entropy(output, TARGET) / T
            state = [changes(tensor) for tensor in state]
        loss.backward()
    else:

        def step(net, x, state):
            output, state = net(x, state)
            return output, [changes(tensor) for tensor in state]

        online = sltt_ext.OnlineTrainer(Stateful(sltt_ext.convert(net), step), F.cross_entropy, T, time_dim=0)
        online.forward_backward(X, TARGET)
    assert oracle.relative_error(oracle.gradients(net), want) < 1e-6


@pytest.mark.parametrize("name", NEURONS)
def test_with_convert_alone_each_call_is_a_step(name):
    net = Shared(NEURONS[name])
    original = copy.deepcopy(net)
    reset(original)
    loss = 0.0
    for x in X:
        y = original.neuron(original.a(x))
        detach(original)
        loss = loss + F.cross_entropy(original.c(original.neuron(original.b(y))), TARGET) / T
        detach(original)
    loss.backward()
    sltt_ext.convert(net)
    reset(net)
    sum(F.cross_entropy(net(x), TARGET) / T for x in X).backward()
    assert oracle.relative_error(oracle.gradients(net), oracle.gradients(original)) < 1e-6
