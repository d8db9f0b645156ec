"""Speed-ups change nothing: networks and loops that caching and packing used to get wrong, against plain steps."""

import copy
import gc
from contextlib import suppress

import oracle
import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import sltt_ext
from sltt_ext.analysis import ActivationMeter
from sltt_ext.errors import LossError

T, ITERATIONS = 4, 3
TARGET = torch.tensor([0, 1, 2, 0])


class Net(nn.Module):
    """A stem, a neuron, and a head; the stem's two layers see the same input at every step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = layer.Linear(6, 8), layer.Linear(8, 8)
        self.neuron, self.head = neuron.LIFNode(v_threshold=0.3), layer.Linear(8, 3)
        self.per_step = nn.Parameter(torch.randn(T, 8, 6))
        self.t = 0

    def stem(self, x):
        return self.second(torch.tanh(self.first(x)))

    def forward(self, x):
        self.t = self.t % T + 1
        return self.head(self.neuron(self.stem(x)))


class FastWeights(Net):
    def stem(self, x):
        weights = {"weight": self.first.weight * self.t, "bias": self.first.bias}
        return self.second(torch.tanh(torch.func.functional_call(self.first, weights, (x,))))


class WeightsOfEachStep(Net):
    def stem(self, x):
        self.first._parameters.pop("weight", None)
        self.first.weight = self.per_step[self.t - 1]
        return super().stem(x)


class NoiseThroughData(Net):
    def stem(self, x):
        self.first.weight.data.add_(0.05 * self.t)
        output = super().stem(x)
        self.first.weight.data.sub_(0.05 * self.t)
        return output


class OtherData(Net):
    def stem(self, x):
        kept = self.second.weight.data
        self.second.weight.data = kept + 0.1 * self.t
        output = super().stem(x)
        self.second.weight.data = kept
        return output


class ChangedInPlace(Net):
    def stem(self, x):
        return self.second(self.first(x).mul_(self.t))


class ChangedThroughData(Net):
    def stem(self, x):
        output = self.first(x)
        output.data.mul_(self.t)
        return self.second(output)


class Reversed(Net):
    """Turns the gradient of its stem round, and keeps what it was."""

    def stem(self, x):
        output = self.first(x)
        if output.requires_grad:
            output.register_hook(lambda gradient: -gradient.clamp(-1e-4, 1e-4))
            output.retain_grad()
        return self.second(output)


def hooked():
    net = Net()
    net.first.weight.register_hook(lambda gradient: gradient.clamp(-1e-4, 1e-4))
    net.second.bias.register_post_accumulate_grad_hook(halve)
    return net


def halve(parameter):
    parameter.grad *= 0.5


class TimesStep(nn.Module):
    """Says that it does not depend on time, and does."""

    sltt_time_invariant = True
    step = 0

    def forward(self, weight):
        self.step = self.step % T + 1
        return weight * self.step


def parametrised():
    net = Net()
    parametrize.register_parametrization(net.head, "weight", TimesStep())
    return net


def patched():
    """Someone else has replaced a layer's forward, which counts."""
    net = Net()
    inner = net.first.forward
    net.first.forward = lambda x: inner(x) * net.t
    return net


class HookedLater(Net):
    """Waits for the gradient of what the next layer has read already."""

    def stem(self, x):
        h = self.first(x)
        output = self.second(h)
        if h.requires_grad:
            h.register_hook(torch.sign)
        return output


class ReadsItsWeight(Net):
    def forward(self, x):
        output = super().forward(x)
        return output + F.linear(x, self.first.weight)[:, :3] * self.t


NETWORKS = {
    "plain": Net,
    "functional_call": FastWeights,
    "weights of each step": WeightsOfEachStep,
    "noise through .data": NoiseThroughData,
    "other .data": OtherData,
    "changed in place": ChangedInPlace,
    "changed through .data": ChangedThroughData,
    "gradient hooks on the output": Reversed,
    "gradient hooks on an output, later": HookedLater,
    "gradient hooks on the weights": hooked,
    "a parametrisation that counts": parametrised,
    "another's forward": patched,
    "a weight that is read twice": ReadsItsWeight,
}


def asks_for_gradients(net):
    def loss_fn(output, target):
        loss = F.cross_entropy(output, target)
        (gradient,) = torch.autograd.grad(loss, net.first.weight, retain_graph=True)
        return loss * (1 + gradient.norm().detach())

    return loss_fn


LOOPS = {
    "as it comes": lambda net: {},
    "scaled backward": lambda net: {"backward": lambda loss: (2 * loss).backward()},
    "backward that names its inputs": lambda net: {
        "backward": lambda loss: loss.backward(inputs=list(net.parameters()))
    },
    "backward that names some inputs": lambda net: {
        "backward": lambda loss: loss.backward(inputs=list(net.head.parameters()))
    },
    "gradients in the loss": lambda net: {"loss_fn": asks_for_gradients(net)},
    "SLTT-2": lambda net: {"schedule": lambda T, generator: [1, 2]},
    "loss of the mean": lambda net: {"loss_on": "mean"},
}


def train(net, x, loop, **speed_ups):
    """Gradients after some iterations with an update in between, and outputs."""
    net = sltt_ext.convert(net)
    options = {"loss_fn": F.cross_entropy, **loop(net), **speed_ups}
    online = sltt_ext.OnlineTrainer(net, time_steps=T, **options)
    optimizer, outputs = torch.optim.SGD(net.parameters(), 0.1), []
    for _ in range(ITERATIONS):
        optimizer.step()
        optimizer.zero_grad()
        outputs.append(online.forward_backward(x, TARGET).output)
    return [parameter.grad for parameter in net.parameters()], outputs


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_nothing_changes(make, loop):
    x = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) * 3
    plain = train(make(), x, loop, cache_invariant=False)
    fast = train(make(), x, loop, cache_invariant=True, pack_spikes=True)
    for pair in zip(fast, plain, strict=True):
        got, want = ([value for value in values if value is not None] for values in pair)
        assert len(got) == len(want)
        assert oracle.relative_error(got, want) < 1e-6


@pytest.mark.parametrize("chunk", [1, 2, T, "auto"])
def test_a_module_that_folds_time_into_the_batch(chunk):
    def net():
        torch.manual_seed(0)
        folded = nn.Sequential(nn.Flatten(0, 1), nn.Linear(6, 8), nn.Unflatten(0, (-1, 4)))
        return nn.Sequential(*folded, neuron.LIFNode(step_mode="m"), nn.Linear(8, 3))

    x = torch.rand(4, 6) * 3
    plain, _ = train(net(), x, LOOPS["as it comes"], cache_invariant=False)
    assert oracle.relative_error(train(net(), x, LOOPS["as it comes"], chunk=chunk)[0], plain) < 1e-6


def test_a_backward_that_begins_to_name_its_inputs():
    net, inputs = sltt_ext.convert(Net()), []

    def backward(loss):
        loss.backward(inputs=inputs or None)

    online = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, backward=backward)
    online.forward_backward(torch.rand(4, 6), TARGET)
    inputs.extend(net.parameters())
    with pytest.raises(LossError, match="cache_invariant=False"):
        online.forward_backward(torch.rand(4, 6), TARGET)


def test_a_loss_that_begins_to_ask_for_gradients():
    net = sltt_ext.convert(Net())
    online = sltt_ext.OnlineTrainer(net, F.cross_entropy, T)
    online.forward_backward(torch.rand(4, 6), TARGET)
    online.loss_fn = asks_for_gradients(net)
    with pytest.raises(LossError, match="cache_invariant=False"):
        online.forward_backward(torch.rand(4, 6), TARGET)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.neuron = layer.Linear(6, 8), neuron.LIFNode()
        self.head, self.unread = layer.Linear(8, 3), layer.Linear(8, 8)

    def forward(self, x):
        s = self.neuron(self.fc(x))
        return torch.tanh(self.head(s)), torch.tanh(self.unread(s))


@pytest.mark.parametrize("pack_spikes", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_what_is_not_back_propagated_is_freed(pack_spikes, fails):
    """A head that the loss does not read, and a step that raises: their graphs go without the garbage collector."""
    calls, living = [], []

    def loss_fn(output, target):
        calls.append(None)
        if fails and len(calls) % 2 == 0:
            raise torch.OutOfMemoryError
        return F.cross_entropy(output, target)

    net = sltt_ext.convert(TwoHeads())
    online = sltt_ext.OnlineTrainer(net, loss_fn, T, pack_spikes=pack_spikes)
    gc.collect()
    gc.disable()
    try:
        with ActivationMeter() as meter:
            for _ in range(5):
                with suppress(torch.OutOfMemoryError):
                    online.forward_backward(torch.rand(4, 6), TARGET)
                net.zero_grad()
                living.append(meter.live_bytes)
    finally:
        gc.enable()
    assert living[1:] == [living[1]] * 4


class Late(nn.Module):
    """Changes what its backward reads."""

    def __init__(self):
        super().__init__()
        self.before, self.fc = layer.Linear(6, 6), layer.Linear(6, 8)
        self.neuron, self.head = neuron.LIFNode(), layer.Linear(8, 3)

    def forward(self, x):
        h = torch.tanh(self.before(x))
        a = self.fc(h)
        h.mul_(2.0)
        return self.head(self.neuron(a)) + h[:, :3]


@pytest.mark.parametrize("pack_spikes", [False, True])
def test_autograd_still_finds_out_what_was_changed_in_place(pack_spikes):
    online = sltt_ext.OnlineTrainer(sltt_ext.convert(Late()), F.cross_entropy, T, pack_spikes=pack_spikes)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        online.forward_backward(torch.rand(4, 6), TARGET)


@pytest.mark.parametrize("step_mode", "sm")
@pytest.mark.parametrize(
    "hook",
    [
        lambda module, inputs, output: output * 0.5,
        lambda module, inputs, output: output.mul_(0.5),
        lambda module, inputs, output: output + 0.1,
        lambda module, inputs, output: torch.sigmoid(output),
    ],
    ids=["halved", "halved in place", "raised", "another"],
)
def test_hooks_that_change_what_a_neuron_returns(hook, step_mode):
    torch.manual_seed(0)
    net = nn.Sequential(layer.Linear(6, 8), neuron.LIFNode(), layer.Linear(8, 3))
    functional.set_step_mode(net, step_mode)
    x, packed = torch.rand(4, 6) * 4, []
    for pack_spikes in (False, True):
        copied = copy.deepcopy(net)
        copied[1].register_forward_hook(hook)
        packed.append(train(copied, x, LOOPS["as it comes"], pack_spikes=pack_spikes)[0])
    assert all(map(torch.equal, *packed))
