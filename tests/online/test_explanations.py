"""Mistakes of the first hour: what is said tells what to do, and what it tells works."""

import copy
import io
import pickle

import networks
import oracle
import pytest
import snntorch
import torch
from snntorch import functional as SF
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.bptt import BPTTTrainer
from sltt_ext.errors import ConfigurationError, InputError, LossError, SLTTError
from sltt_ext.snntorch import Stateful, step_loss

T, N = 4, 3
X_SEQ = 2 * torch.rand(T, N, 1, 8, 8, generator=torch.Generator().manual_seed(1))
TARGET = torch.tensor([0, 2, 1])


def trainer(net, loss_fn=F.cross_entropy, **options):
    return sltt_ext.OnlineTrainer(sltt_ext.convert(net), loss_fn, T, **options)


@pytest.mark.parametrize("make", [sltt_ext.OnlineTrainer, BPTTTrainer])
def test_backward_of_the_loss_of_an_iteration(make):
    net = sltt_ext.convert(networks.conv_net())
    loss = make(net, F.cross_entropy, T).forward_backward(X_SEQ[0], TARGET).loss
    with pytest.raises(LossError, match=r"in \.grad already.*optimizer\.step\(\)"):
        loss.backward()


def test_the_loss_of_an_iteration_is_a_plain_tensor_otherwise():
    loss = trainer(networks.conv_net()).forward_backward(X_SEQ[0], TARGET).loss
    file = io.BytesIO()
    torch.save({"loss": loss}, file)
    file.seek(0)
    others = [
        torch.load(file, weights_only=True)["loss"], copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)),
        loss + 0, torch.stack([loss])[0], loss.clone(),
    ]  # fmt: skip
    assert all(type(other) is torch.Tensor and other.item() == loss.item() for other in others)
    assert repr(loss) == repr(others[0])
    assert not loss.requires_grad


class Tutorial(nn.Module):
    """As in snnTorch's tutorials: ``forward`` loops over time."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(64, 5)
        self.lif = snntorch.Leaky(beta=0.9)

    def forward(self, x):
        state, spikes = self.lif.reset_mem(), []
        for _ in range(T):
            spike, state = self.step(x, state)
            spikes.append(spike)
        return torch.stack(spikes)

    def step(self, x, state):
        spike, state = self.lif(3 * self.fc(x.flatten(1)), state)
        return spike, state


class PassesState(Tutorial):
    def forward(self, x, state):
        return self.step(x, state)


def works(online, x=X_SEQ[0]):
    online.forward_backward(x, TARGET)
    return all(gradient is not None for gradient in oracle.gradients(online.net))


@pytest.mark.parametrize("loss_on", ["step", "mean"])
@pytest.mark.filterwarnings("ignore:the trainer calls the network for each time step")
def test_a_forward_that_loops_over_time(loss_on):
    with pytest.raises(
        LossError, match=r"output of one step, \[4, 3, 5\], has the batch on axis 1.*Stateful"
    ):
        trainer(Tutorial(), loss_on=loss_on).forward_backward(X_SEQ[0], TARGET)
    assert works(trainer(Stateful(PassesState()), loss_on=loss_on))


def test_a_forward_that_takes_the_state():
    net = PassesState()
    with pytest.raises(
        ConfigurationError, match=r"forward\(x, state\) of PassesState needs state,.*Stateful\(net\)"
    ):
        trainer(net)
    assert works(trainer(Stateful(net)))


def test_a_sequence_without_time_dim():
    net = networks.conv_net()
    with pytest.raises(InputError, match=r"if axis 0 of x \[4, 3, 1, 8, 8\] is time, say time_dim=0"):
        trainer(net).forward_backward(X_SEQ, TARGET)
    assert works(trainer(net, time_dim=0), X_SEQ)
    with pytest.raises(InputError, match=r"if axis 1 of x .* is time, say time_dim=1"):
        trainer(net).predict(X_SEQ.transpose(0, 1))


def test_a_sequence_without_time_dim_where_the_network_runs():
    net = nn.Sequential(nn.Linear(8, 5), neuron.LIFNode())
    x_seq = 3 * X_SEQ[:, :, 0, 0]
    with pytest.raises(LossError, match="if x has its time in front, say time_dim=0"):
        trainer(net).forward_backward(x_seq, TARGET)
    assert works(trainer(net, time_dim=0), x_seq)


class Repeats(nn.Module):
    def __init__(self, net, how):
        super().__init__()
        self.net = net
        self.how = how

    def forward(self, x):
        return self.net(self.how(x))


@pytest.mark.parametrize(
    "how", [lambda x: x.unsqueeze(0).repeat(T, 1, 1, 1, 1), lambda x: x.expand(T, *x.shape)], ids=["repeat", "expand"]
)  # fmt: skip
def test_a_forward_that_repeats_its_input_over_time(how):
    net = networks.conv_net(step_mode="m")
    with pytest.raises(InputError, match="a forward that repeats x over time itself has to leave that out"):
        trainer(Repeats(net, how)).forward_backward(X_SEQ[0], TARGET)
    assert works(trainer(Repeats(net, lambda x: x)))


@pytest.mark.parametrize("conv", [nn.Conv2d, layer.Conv2d])
def test_layers_for_single_steps_behind_neurons_for_sequences(conv):
    net = nn.Sequential(conv(1, 5, 8), neuron.LIFNode(step_mode="m"), layer.Flatten(step_mode="m"))
    with pytest.raises(InputError, match=r"'0', a Conv2d, takes single steps.*set_step_mode\(net, 'm'\)"):
        trainer(net).forward_backward(X_SEQ[0], TARGET)
    net[0] = layer.Conv2d(1, 5, 8)
    functional.set_step_mode(net, "m")
    assert works(trainer(net))


@pytest.mark.parametrize("make", [sltt_ext.OnlineTrainer, BPTTTrainer])
def test_a_loss_of_snntorch_as_it_is(make):
    net = sltt_ext.convert(networks.conv_net())
    with pytest.raises(
        ConfigurationError, match=r"ce_rate_loss is a loss of whole recordings.*step_loss\(ce_rate_loss\(\)\)"
    ):
        make(net, SF.ce_rate_loss(), T)
    assert works(make(net, step_loss(SF.ce_rate_loss()), T))


@pytest.mark.parametrize(("loss_fn", "got"), [(nn.CrossEntropyLoss, "CrossEntropyLoss"), ("mse", "str")])
def test_what_is_no_loss(loss_fn, got):
    with pytest.raises(ConfigurationError, match=f"loss_fn must be a function or a module object, got {got}"):
        trainer(networks.conv_net(), loss_fn)


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize(
    "error", [RuntimeError("the disk is full"), ValueError("no such label"), KeyError("size")]
)
def test_errors_that_nothing_explains_stay_what_they_are(error, step_mode):
    def fails(*_):
        raise error

    net = networks.conv_net(step_mode=step_mode)
    for online in (trainer(net, fails), trainer(Repeats(net, fails))):
        with pytest.raises(type(error)) as raised:
            online.forward_backward(X_SEQ[0], TARGET)
        assert raised.value is error


def test_an_input_without_time_where_time_dim_is_given():
    images = torch.rand(T, 1, 8, 8)
    with pytest.raises(InputError, match=rf"time_dim=0 takes axis 0 of x \[{T}, 1, 8, 8\] for time"):
        trainer(networks.conv_net(), time_dim=0).forward_backward(images, torch.zeros(T, dtype=torch.long))
    with pytest.raises(InputError, match="leave time_dim out, and give time_steps"):
        sltt_ext.over_time(networks.conv_net(), time_dim=0)(images)


def test_a_target_over_time():
    target = torch.stack([TARGET] * T)
    with pytest.raises(LossError, match=rf"target \[{T}, 3\] has the batch on axis 1.*target_time_dim=0"):
        trainer(networks.conv_net()).forward_backward(X_SEQ[0], target)
    trainer(networks.conv_net(), target_time_dim=0).forward_backward(X_SEQ[0], target)


def test_a_numpy_array():
    with pytest.raises(InputError, match=r"x is a NumPy array: give a tensor, torch.from_numpy"):
        trainer(networks.conv_net()).forward_backward(X_SEQ[0].numpy(), TARGET)


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, nn.CrossEntropyLoss()])
def test_swapped_arguments(loss_fn):
    net = sltt_ext.convert(networks.conv_net())
    with pytest.raises(ConfigurationError, match=r"in the place of the network: give the network first"):
        sltt_ext.OnlineTrainer(loss_fn, net, time_steps=T)
    with pytest.raises(SLTTError, match="is not converted"):
        sltt_ext.OnlineTrainer(networks.conv_net(), nn.CrossEntropyLoss(), time_steps=T)


@pytest.mark.parametrize("around", [lambda net: net, nn.Sequential])
def test_a_network_that_runs_over_time_already(around):
    net = sltt_ext.over_time(networks.conv_net(), time_steps=T)
    with pytest.raises(ConfigurationError, match=r"in each call already.*sltt_ext.revert"):
        sltt_ext.OnlineTrainer(around(net), F.cross_entropy, T)
    assert works(trainer(sltt_ext.revert(net)))


def test_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = networks.conv_net()

        def forward(self, a, b):
            return self.net(a + b)

    with pytest.raises(ConfigurationError, match=r"forward\(a, b\) of Two needs b.*one dict of all inputs"):
        trainer(Two())
    F.cross_entropy(sltt_ext.over_time(Two(), T)(X_SEQ[0], X_SEQ[1]), TARGET).backward()  # as it says
