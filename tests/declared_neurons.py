"""Neurons of no framework, their declarations, and what their gradient has to be."""

import pytest
import torch
from torch import nn

import sltt_ext
from sltt_ext.conversion import _RULES
from sltt_ext.declared.adapters import Declared
from sltt_ext.surrogate import Surrogate


class Triangle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u >= 0).to(u)

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 - ctx.saved_tensors[0].abs()).clamp_min(0)


fire = Triangle.apply


class Loop(nn.Module):
    """Its own loop over time; ``detached`` makes it the oracle."""

    time_dim = 0
    detached = False

    def __init__(self):
        super().__init__()
        self.decay = nn.Parameter(torch.tensor(0.6))

    def forward(self, x):
        state, outputs = None, []
        for step in x.unbind(self.time_dim):
            if self.detached and state is not None:
                state = tuple(tensor.detach() for tensor in state)
            output, *state = self.one(step, *(state or [None] * self.states))
            outputs.append(output)
        if isinstance(outputs[0], tuple):
            return tuple(torch.stack(each, self.time_dim) for each in zip(*outputs))
        return torch.stack(outputs, self.time_dim)


class HardReset(Loop):
    states = 1

    def one(self, x, mem):
        mem = x if mem is None else self.decay * mem + x
        spike = fire(mem - 1.0)
        return spike, mem * (1 - spike)


class BatchFirst(HardReset):
    time_dim = 1


class LastSpikeResets(Loop):
    """As the networks with membrane shortcuts have it: the spike is a state, too."""

    states = 2

    def one(self, x, mem, spike):
        mem = x if mem is None else mem * self.decay * (1 - spike.detach()) + x
        spike = fire(mem - 0.5)
        return spike, mem, spike


class WithPotential(Loop):
    states = 1

    def one(self, x, mem):
        mem = x if mem is None else self.decay * mem + x
        spike = fire(mem - 1.0)
        return (spike, mem), mem - spike


class Attributes(nn.Module):
    """One step a call, the state in attributes."""

    def __init__(self):
        super().__init__()
        self.decay = nn.Parameter(torch.tensor(0.6))
        self.mem, self.spike = 0.0, 0.0

    def forward(self, x):
        self.mem = self.mem * self.decay * (1 - self.spike) + x
        self.spike = fire(self.mem - 0.5)
        return self.spike


class AttributesByStep(Attributes):
    pass


class FixedDecay(Attributes):
    """One step a call, a leak of 0.75, and a potential that is reset at once."""

    def __init__(self):
        super().__init__()
        del self.decay
        self.decay, self.mem = 0.75, None

    def forward(self, x):
        mem = x if self.mem is None else self.decay * self.mem + x
        spike = fire(mem - 1.0)
        self.mem = mem - spike
        return spike


class FixedLoop(HardReset):
    def __init__(self):
        super().__init__()
        del self.decay
        self.decay = 0.75


@pytest.fixture(autouse=True)
def declared():
    """The declarations below, and none that another test has made."""
    rules, declarations = dict(_RULES), dict(Declared.declarations)

    for cls in (HardReset, BatchFirst):

        @sltt_ext.declare_neuron(cls, time_dim=cls.time_dim, spikes=0)
        def one_state(module, x, mem):
            mem = x if mem is None else module.decay * mem + x
            spike = fire(mem - 1.0)
            return spike, mem * (1 - spike)

    @sltt_ext.declare_neuron(LastSpikeResets, time_dim=0, spikes=0)
    def two_states(module, x, mem, spike):
        mem = x if mem is None else mem * module.decay * (1 - spike.detach()) + x
        spike = fire(mem - 0.5)
        return spike, mem, spike

    @sltt_ext.declare_neuron(WithPotential, time_dim=0, spikes=0)
    def two_outputs(module, x, mem):
        mem = x if mem is None else module.decay * mem + x
        spike = fire(mem - 1.0)
        return (spike, mem), mem - spike

    sltt_ext.declare_neuron(Attributes, state=("mem", "spike"), spikes=0)

    @sltt_ext.declare_neuron(AttributesByStep, spikes=0)
    def by_step(module, x, mem, spike):
        mem = mem * module.decay * (1 - spike) + x
        spike = fire(mem - 0.5)
        return spike, mem, spike

    triangle = Surrogate("piecewise_quadratic", (1.0,))
    sltt_ext.declare_neuron(
        FixedDecay,
        state="mem",
        spikes=0,
        as_lif=lambda m: {
            "tau": 1 / (1 - m.decay),
            "factored_leak": True,
            "v_reset": None,
            "surrogate": triangle,
        },
    )
    sltt_ext.declare_neuron(
        FixedLoop,
        time_dim=0,
        spikes=0,
        as_lif=lambda m: {"tau": 1 / (1 - m.decay), "factored_leak": True, "surrogate": triangle},
    )
    yield
    _RULES.clear()
    _RULES.update(rules)
    Declared.declarations.clear()
    Declared.declarations.update(declarations)


SEQUENCES = [HardReset, BatchFirst, LastSpikeResets, WithPotential, FixedLoop]
STEPS = [Attributes, AttributesByStep, FixedDecay]
T, N = 5, 4


def outputs_of(net, x_seq):
    """What a neuron returns over ``x_seq`` ``[T, N, ...]``, first output, time in front."""
    if isinstance(net, Attributes):
        return torch.stack([net(x) for x in x_seq])
    output = net(x_seq.movedim(0, net.time_dim))
    return (output[0] if isinstance(output, tuple) else output).movedim(net.time_dim, 0)


def oracle_of(net):
    """The same, which detaches what it carries."""
    if isinstance(net, Attributes):

        def detach(module, _):
            for name in ("mem", "spike"):
                if isinstance(getattr(module, name), torch.Tensor):
                    setattr(module, name, getattr(module, name).detach())

        net.register_forward_pre_hook(detach)
    else:
        net.detached = True
    return net


def gradients(net, x_seq, weight):
    net.zero_grad()
    x_seq = x_seq.clone().requires_grad_()
    outputs = outputs_of(net, x_seq)
    (outputs * weight).sum().backward()
    return outputs.detach(), [x_seq.grad, *(parameter.grad for parameter in net.parameters())]
