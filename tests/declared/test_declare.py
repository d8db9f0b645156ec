"""Neurons of no framework, against their own loops with the carried state detached."""

import copy
import pickle

import pytest
import torch
from declared_neurons import (
    SEQUENCES,
    STEPS,
    Attributes,
    BatchFirst,
    HardReset,
    N,
    T,
    WithPotential,
    fire,
    gradients,
    oracle_of,
)
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.errors import ConfigurationError, DeclarationError


@pytest.mark.parametrize("cls", [*SEQUENCES, *STEPS])
def test_convert_alone(cls):
    x_seq, weight = 2 * torch.randn(T, N, 3), torch.rand(T, N, 3)
    expected, wanted = gradients(oracle_of(cls()), x_seq, weight)
    converted = sltt_ext.convert(cls())
    for _ in range(2):
        outputs, got = gradients(converted, x_seq, weight)
        assert torch.equal(outputs, expected)
        for a, b in zip(got, wanted):
            assert torch.allclose(a, b, rtol=0 if "Fixed" not in cls.__name__ else 1e-6, atol=0)
        sltt_ext.convert(converted).reset_state()
    assert issubclass(type(converted), cls)
    assert type(sltt_ext.revert(converted)) is cls


def test_bptt_is_something_else():
    """What is compared above differs from the gradient through time."""
    x_seq, weight = 2 * torch.randn(T, N, 3), torch.rand(T, N, 3)
    for cls in (*SEQUENCES, *STEPS):
        assert not torch.equal(
            gradients(cls(), x_seq, weight)[1][0], gradients(oracle_of(cls()), x_seq, weight)[1][0]
        )


class First(nn.Module):
    """A neuron that returns more than spikes, in a network that reads spikes."""

    def __init__(self, neuron):
        super().__init__()
        self.neuron = neuron

    def forward(self, x):
        output = self.neuron(x)
        return output[0] if isinstance(output, tuple) else output


def network(cls):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), First(cls()), nn.Linear(8, 7), First(cls()), nn.Linear(7, 3))


def trainers(cls):
    chunks = [1] if issubclass(cls, Attributes) else [1, 2, T]
    return [(chunk, packs) for chunk in chunks for packs in (False, True)]


@pytest.mark.parametrize("cls", [cls for cls in (*SEQUENCES, *STEPS) if cls is not BatchFirst])
def test_trainer(cls):
    x_seq, target = torch.randn(T, N, 6), torch.randint(3, (N,))
    original = network(cls)
    for module in original:
        if isinstance(module, First):
            oracle_of(module.neuron)
    steps = [original(x) for x in x_seq] if issubclass(cls, Attributes) else original(x_seq)
    (sum(F.cross_entropy(step, target) for step in steps) / T).backward()
    converted = sltt_ext.convert(network(cls))
    for chunk, packs in trainers(cls):
        converted.zero_grad()
        online = sltt_ext.OnlineTrainer(
            converted, F.cross_entropy, T, time_dim=0, chunk=chunk, pack_spikes=packs
        )
        output = online.forward_backward(x_seq, target).output
        for a, b in zip(converted.parameters(), original.parameters()):
            assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-7)
        assert torch.allclose(output, sum(steps) / T, atol=1e-6)
        assert torch.allclose(online.predict(x_seq), output, atol=1e-6)


def test_k_steps_of_a_declared_neuron():
    x_seq, target = torch.randn(T, N, 6), torch.randint(3, (N,))
    original = network(HardReset)
    for module in original:
        if isinstance(module, First):
            oracle_of(module.neuron)
    outputs = original(x_seq)
    (F.cross_entropy(outputs[1], target) / 2 + F.cross_entropy(outputs[4], target) / 2).backward()
    converted = sltt_ext.convert(network(HardReset))
    sltt_ext.OnlineTrainer(
        converted, F.cross_entropy, T, time_dim=0, schedule=lambda *_: (1, 4)
    ).forward_backward(x_seq, target)
    for a, b in zip(converted.parameters(), original.parameters()):
        assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-7)


def test_spikes_are_packed():
    converted = sltt_ext.convert(network(HardReset))
    online = sltt_ext.OnlineTrainer(converted, F.cross_entropy, T, time_dim=0, pack_spikes=True)
    online.forward_backward(torch.randn(T, N, 6), torch.randint(3, (N,)))
    spikes = torch.ones(2, 2)
    assert converted[1].neuron.spikes(spikes)[0] is spikes
    assert sltt_ext.convert(WithPotential()).spikes((spikes, None))[0] is spikes


@pytest.mark.filterwarnings("ignore:the trainer calls the network for each time step")
def test_own_time_inside_one_step_of_the_trainer():
    """A network that shows each frame several times to itself starts each call from rest, as it does by itself."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.neuron = nn.Linear(6, 3), HardReset()

        def forward(self, x):
            return self.neuron(self.fc(x).repeat(4, 1, 1)).mean(0, keepdim=True)

    torch.manual_seed(1)
    original, converted = Inner(), None
    converted = sltt_ext.convert(copy.deepcopy(original))
    oracle_of(original.neuron)
    x_seq, target = torch.randn(T, N, 6), torch.randint(3, (N,))
    sltt_ext.OnlineTrainer(converted, F.cross_entropy, T, time_dim=0).forward_backward(x_seq, target)
    (sum(F.cross_entropy(original(x)[0], target) for x in x_seq) / T).backward()
    for a, b in zip(converted.parameters(), original.parameters()):
        assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-7)


def test_twice_in_a_step_is_an_error_of_the_trainer():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.neuron = nn.Linear(6, 6), HardReset()

        def forward(self, x):
            return self.neuron(self.fc(self.neuron(self.fc(x))))

    torch.manual_seed(1)
    net, x_seq = Twice(), torch.randn(T, N, 6)
    own = oracle_of(copy.deepcopy(net).neuron)
    twin = copy.deepcopy(net)
    twin.neuron = own
    sltt_ext.convert(net)
    net(x_seq).sum().backward()
    twin(x_seq).sum().backward()
    assert torch.equal(net.fc.weight.grad, twin.fc.weight.grad)
    with pytest.raises(ConfigurationError, match="HardReset runs more than once in a step"):
        sltt_ext.OnlineTrainer(net, F.cross_entropy, T, time_dim=0).forward_backward(
            x_seq, torch.zeros(N).long()
        )


class OneStepAtATime(nn.Module):
    """Neurons with their time behind the batch, in a network that runs step by step."""

    def __init__(self, axis=True):
        super().__init__()
        self.fc, self.neuron, self.axis = nn.Linear(6, 3), BatchFirst(), axis

    def forward(self, x):
        return self.neuron(self.fc(x).unsqueeze(1)).squeeze(1) if self.axis else self.neuron(self.fc(x))


@pytest.mark.parametrize("batch", [4, T])
def test_time_behind_the_batch_in_the_trainer(batch):
    x_seq, target = torch.randn(T, batch, 6), torch.zeros(batch).long()
    torch.manual_seed(1)
    net = OneStepAtATime()
    own = oracle_of(copy.deepcopy(net.neuron))
    outputs = own(net.fc(x_seq).movedim(0, 1)).movedim(1, 0)
    wanted = torch.autograd.grad(
        sum(F.cross_entropy(output, target) for output in outputs) / T, [*net.fc.parameters(), own.decay]
    )
    sltt_ext.convert(net)
    sltt_ext.OnlineTrainer(net, F.cross_entropy, T, time_dim=0).forward_backward(x_seq, target)
    for parameter, gradient in zip((*net.fc.parameters(), net.neuron.decay), wanted):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-5, atol=1e-7)
    wrong = sltt_ext.OnlineTrainer(
        sltt_ext.convert(OneStepAtATime(axis=False)), F.cross_entropy, T, time_dim=0
    )
    with pytest.raises(ConfigurationError, match=r"BatchFirst takes \[N, T, ...\], and got shape"):
        wrong.forward_backward(x_seq, target)


def test_copies_and_pickles():
    converted = sltt_ext.convert(HardReset())
    x_seq = torch.randn(T, N, 3)
    for twin in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert type(twin) is type(converted)
        assert torch.equal(twin(x_seq), HardReset()(x_seq))


def test_a_subclass_is_declared_with_its_base_and_compared():
    class Softer(HardReset):
        def one(self, x, mem):
            mem = x if mem is None else self.decay * mem + x
            spike = fire(mem - 1.0)
            return spike, mem - spike

    class Renamed(HardReset):
        pass

    x_seq = torch.randn(T, N, 3)
    assert torch.equal(sltt_ext.convert(Renamed())(x_seq), HardReset()(x_seq))
    with pytest.raises(
        DeclarationError, match="declared step of Softer differs from its forward at time step 1"
    ):
        sltt_ext.convert(Softer())(x_seq)
