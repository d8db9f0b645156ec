"""Networks in the style of published code, as they are but for one line, against their own steps with the state detached."""

import copy
import types

import pytest
import torch
from published_style import declarations, networks, oracle  # noqa: F401  they declare the neurons of no framework
from published_style.networks import functional
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.errors import ConfigurationError
from sltt_ext.legacy_spikingjelly import FusedNode
from sltt_ext.neuron import SLTTNeuron

OWN = (networks.MemUpdate, networks.LIFSpike, networks.IntegerSpikes)


def held(net):
    """The oracle inside a call: what each neuron carries is detached between its steps, by the neuron's own means."""
    for module in net.modules():
        if isinstance(module, OWN):
            module.hold = lambda state: state.detach() if isinstance(state, torch.Tensor) else state
        elif oracle.takes_sequences(module) and "_memories" in vars(module):
            module.forward = types.MethodType(_step_by_step, module)
        elif "_memories" in vars(module):
            module.register_forward_pre_hook(lambda module, _: oracle.detach(module))
    return net


def _step_by_step(module, x_seq):
    if isinstance(module, networks.layer.Dropout):
        return type(module).forward(module, x_seq)
    spikes = []
    for x in x_seq:
        oracle.detach(module)
        spikes.append(type(module).forward(module, x.unsqueeze(0)))
    return torch.cat(spikes)


INSIDE = [
    (networks.Spikformer, networks.images, networks.cross_entropy),
    (networks.SEWResNet, networks.images, networks.cross_entropy),
    (networks.PLIFNet, networks.images, networks.cross_entropy),
    (networks.MSResNet, networks.images, networks.cross_entropy),
    (networks.TETNet, networks.images, networks.tet_loss),
    (networks.SpikingQNetwork, networks.images, networks.cross_entropy),
    (networks.SpikeGPT, networks.tokens, networks.next_token),
    (networks.IntegerNet, networks.images, networks.cross_entropy),
]
GENERIC = (networks.MSResNet, networks.TETNet, networks.IntegerNet)


def made(cls):
    torch.manual_seed(2)
    return cls()


def backward(net, x, loss):
    torch.manual_seed(3)  # dropout
    net.zero_grad()
    value = loss(net(x))
    value.backward()
    functional.reset_net(net)
    return value.detach(), [parameter.grad for parameter in net.parameters()]


@pytest.mark.parametrize(("cls", "x", "loss"), INSIDE)
def test_time_inside(cls, x, loss):
    original, converted = held(made(cls)), sltt_ext.convert(made(cls))
    for _ in range(2):
        expected, wanted = backward(original, x(), loss)
        value, got = backward(converted, x(), loss)
        assert torch.equal(value, expected)
        assert oracle.relative_error(got, wanted) <= (0 if cls in GENERIC else 1e-6)
        for net, gradients in ((original, wanted), (converted, wanted)):
            with torch.no_grad():
                torch._foreach_add_(list(net.parameters()), gradients, alpha=-0.01)
    kinds = {
        isinstance(module, FusedNode)
        for module in converted.modules()
        if isinstance(module, SLTTNeuron) and module.fires
    }
    assert kinds == {cls not in GENERIC}


@pytest.mark.parametrize(("cls", "x", "loss"), INSIDE)
def test_it_is_not_the_gradient_through_time(cls, x, loss):
    assert (
        oracle.relative_error(backward(made(cls), x(), loss)[1], backward(held(made(cls)), x(), loss)[1])
        > 1e-3
    )


OVER_TIME = [
    (networks.Spikformer, networks.images, networks.cross_entropy),
    (networks.SEWResNet, networks.images, networks.cross_entropy),
    (networks.PLIFNet, networks.images, networks.cross_entropy),
    (networks.PublishedQNetwork, networks.images, networks.cross_entropy),
]


@pytest.mark.parametrize(("cls", "x", "loss"), OVER_TIME)
@pytest.mark.parametrize("chunk", [1, 4])
def test_time_inside_step_by_step(cls, x, loss, chunk):
    """Norms read a step, so that one step or all of them at a time are the same only where they are fixed."""
    name = "_T" if cls is networks.PublishedQNetwork else "T"
    original, net = held(made(cls)), made(cls)
    for module in (*original.modules(), *net.modules()):
        if chunk == 1 and isinstance(module, (nn.modules.batchnorm._BatchNorm, networks.layer.Dropout)):
            module.eval()
    sltt_ext.over_time(net, time_inside=name, chunk=chunk)
    for _ in range(2):
        expected, wanted = backward(original, x(), loss)
        value, got = backward(net, x(), loss)
        assert torch.allclose(value, expected, rtol=1e-6)
        assert oracle.relative_error(got, wanted) <= 1e-6
        for each in (original, net):
            with torch.no_grad():
                torch._foreach_add_(list(each.parameters()), wanted, alpha=-0.01)


def test_a_sum_over_time_is_told():
    class Counts(networks.PLIFNet):
        def forward(self, x):
            return super().forward(x) * self.T

    net = made(Counts)
    net.fc[2].weight.data.fill_(1.0)  # it fires
    with pytest.raises(
        ConfigurationError, match=r"adds its outputs up over time, .* divide by the number of steps"
    ):
        sltt_ext.over_time(net, time_inside="T")(networks.images())


@pytest.mark.parametrize(("cls", "x", "loss"), INSIDE)
def test_through_time_it_is_the_gradient_of_the_network_as_it_is(cls, x, loss):
    expected, wanted = backward(made(cls), x(), loss)
    if (
        cls is networks.PLIFNet
    ):  # its loop calls neurons for single steps: what a call of the network is has to be told
        net = sltt_ext.over_time(made(cls), time_inside="T", temporal="call", chunk=4)
    else:
        net = sltt_ext.convert(made(cls), temporal="call")
    value, got = backward(net, x(), loss)
    assert torch.equal(value, expected)
    assert oracle.relative_error(got, wanted) <= (0 if cls in GENERIC else 1e-6)


def test_time_outside():
    def run(net, detach):
        torch.manual_seed(3)
        outputs = []
        for _ in range(4):
            outputs.append(net(networks.images()))
            if detach:
                oracle.detach(net)
        networks.cross_entropy(sum(outputs) / 4).backward()
        functional.reset_net(net)
        return [parameter.grad for parameter in net.parameters()]

    wanted = run(made(networks.CLIFNet), detach=True)
    assert oracle.relative_error(run(sltt_ext.convert(made(networks.CLIFNet)), detach=False), wanted) == 0
    converted = sltt_ext.convert(made(networks.CLIFNet))
    online = sltt_ext.OnlineTrainer(converted, F.cross_entropy, 4, loss_on="mean")
    online.forward_backward(networks.images(), networks.TARGET)
    assert oracle.relative_error([parameter.grad for parameter in converted.parameters()], wanted) < 1e-6


def depth_loss(depths, _=None):
    return sum((depth - 0.5).abs().mean() for depth in depths)


@pytest.mark.filterwarnings("ignore:the trainer calls the network for each time step")
@pytest.mark.parametrize("steps", [1, 3])
def test_a_read_out_that_runs_several_times_a_step(steps):
    """Its gradient goes on from one scale to the next within a step, which the trainer knows the end of."""
    x_seq = torch.randn(steps, 2, 3, 8, 8)
    original, converted = made(networks.StereoNet), sltt_ext.convert(made(networks.StereoNet))
    for x in x_seq:
        (depth_loss(original(x)[0]) / steps).backward()
        oracle.detach(original)
    online = sltt_ext.OnlineTrainer(
        converted, depth_loss, steps, time_dim=0, output=lambda returned: tuple(returned[0])
    )
    online.forward_backward(x_seq, None)
    assert oracle.relative_error(oracle.gradients(converted), oracle.gradients(original)) < 1e-6


def test_several_calls_for_one_loss():
    """Deep Q-learning: the values of two states, of which one is a constant, in one loss."""

    def run(net, target):
        states = torch.randn(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(4))
        with torch.no_grad():
            wanted = 1 + 0.9 * target(states[1]).max(1).values
        F.smooth_l1_loss(net(states[0]).gather(1, networks.TARGET[:, None])[:, 0], wanted).backward()
        return oracle.gradients(net)

    original, converted = (
        held(made(networks.SpikingQNetwork)),
        sltt_ext.convert(made(networks.SpikingQNetwork)),
    )
    got, wanted = (
        run(converted, copy.deepcopy(converted)),
        run(original, held(made(networks.SpikingQNetwork))),
    )
    assert oracle.relative_error(got, wanted) < 1e-6


def test_sequences_through_the_trainer():
    """The part of a network behind its own time: one step a call, and all at once."""

    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.lif1, self.fc2 = nn.Linear(8, 12), networks.MemUpdate(), nn.Linear(12, 3)

        def forward(self, x):
            return self.fc2(self.lif1(self.fc1(x)))

    x_seq, target = torch.randn(5, 4, 8), torch.randint(3, (4,))
    original = held(made(Steps))
    (sum(F.cross_entropy(output, target) for output in original(x_seq)) / 5).backward()
    for chunk in (1, 5):
        converted = sltt_ext.convert(made(Steps))
        sltt_ext.OnlineTrainer(converted, F.cross_entropy, 5, time_dim=0, chunk=chunk).forward_backward(
            x_seq, target
        )
        assert oracle.relative_error(oracle.gradients(converted), oracle.gradients(original)) < 1e-6


class ResetsItself(nn.Module):
    """Takes ``[T, N, ...]``, each call a sequence of its own: as code for time series has it."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 3)
        self.lif = networks.neuron.MultiStepLIFNode(surrogate_function=networks.surrogate.ATan())

    def forward(self, x):
        functional.reset_net(self)
        return self.fc2(self.lif(self.fc1(x)))


def test_a_network_that_resets_itself():
    """`convert` alone is right for it, and all steps in one call; the trainer says so of fewer."""
    x_seq, target = torch.randn(5, 4, 8), torch.randint(3, (4,))
    original = held(made(ResetsItself))
    (sum(F.cross_entropy(output, target) for output in original(x_seq)) / 5).backward()
    converted = sltt_ext.convert(made(ResetsItself))
    for chunk in (1, 2):
        online = sltt_ext.OnlineTrainer(converted, F.cross_entropy, 5, time_dim=0, chunk=chunk)
        with pytest.raises(ConfigurationError, match="resets its neurons in forward"):
            online.forward_backward(x_seq, target)
        assert converted.fc1.weight.grad is None
    (sum(F.cross_entropy(output, target) for output in converted(x_seq)) / 5).backward()
    assert oracle.relative_error(oracle.gradients(converted), oracle.gradients(original)) < 1e-6
    converted.zero_grad()
    sltt_ext.OnlineTrainer(converted, F.cross_entropy, 5, time_dim=0, chunk=5).forward_backward(x_seq, target)
    assert oracle.relative_error(oracle.gradients(converted), oracle.gradients(original)) < 1e-6
