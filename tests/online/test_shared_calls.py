"""Several steps in one call are those steps one by one: gradients, outputs, running statistics, random numbers."""

import itertools
import random

import oracle
import products
import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.errors import ConfigurationError, SLTTWarning
from sltt_ext.online.grouping import Need
from sltt_ext.online.plan import Way
from sltt_ext.online.planner import Asked, Given, Planner

pytestmark = pytest.mark.usefixtures("bytes_alone")
T, N = 6, 4
TARGET = torch.tensor([0, 1, 2, 0])


class Net(nn.Module):
    """Time is folded into the batch by hand, and the network says so."""

    sltt_folds_time = True

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.norm, self.neuron = nn.Linear(8, 16), nn.BatchNorm1d(16), neuron.LIFNode(step_mode="m")
        self.head = nn.Linear(16, 3)

    def currents(self, x):
        return self.norm(self.fc(x))

    def forward(self, x_seq):
        y = self.currents(x_seq.flatten(0, 1))
        return self.head(self.neuron(2 * y.view(*x_seq.shape[:2], -1)))


class ReadsStatistics(Net):
    def currents(self, x):
        return super().currents(x) - self.norm.running_mean


class KeepsABuffer(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("rate", torch.zeros(16))

    def currents(self, x):
        y = super().currents(x)
        self.rate = 0.9 * self.rate + 0.1 * y.detach().mean(0)
        return y - self.rate


class KeepsAnAttribute(Net):
    rate = 0.0

    def currents(self, x):
        y = super().currents(x)
        self.rate = 0.9 * self.rate + 0.1 * y.detach().mean()
        return y - self.rate


class KeepsAList(Net):
    def __init__(self):
        super().__init__()
        self.rates = []

    def currents(self, x):
        y = super().currents(x)
        self.rates.append(float(y.detach().mean()))
        return y - sum(self.rates) / len(self.rates)


class Counts(Net):
    calls = 0

    def currents(self, x):
        self.calls += 1
        return super().currents(x) * (1 + self.calls % T)


class NormsByHand(Net):
    def currents(self, x):
        return F.batch_norm(self.fc(x), None, None, training=True)


class DropsByHand(Net):
    def currents(self, x):
        return F.dropout(super().currents(x), 0.3)


class RollsDice(Net):
    def currents(self, x):
        return super().currents(x) * random.choice([1.0, 2.0])


class NormOfEachStep(Net):
    """A loop of the network's own around its norm."""

    sltt_folds_time = False

    def currents(self, x):
        return torch.cat([self.norm(part) for part in self.fc(x).split(N)])


class Untold(Net):
    """Time is not even in front."""

    sltt_folds_time = False

    def currents(self, x):
        y = self.fc(x)
        return self.norm(torch.cat([y, 2 * y + 1]))[: len(y)]


class HooksAGradient(Net):
    """Limits the gradient of its currents, all at once."""

    def currents(self, x):
        y = super().currents(x)
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient / gradient.norm())
        return y


def hooked():
    net = Net()
    net.fc.weight.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    return net


class ChangesItsInput(Net):
    def forward(self, x_seq):
        return super().forward(x_seq.mul_(0.9))


class NormOfPrototypes(Net):
    """A norm of rows that have no time."""

    def __init__(self):
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(7, 16))
        self.other = nn.BatchNorm1d(16)

    def currents(self, x):
        return super().currents(x) + self.other(self.prototypes).mean(0)


class NormTwice(Net):
    """Its running statistics count the steps in another order where all of them come at once."""

    def currents(self, x):
        return self.norm(super().currents(x))


class NeuronTwice(Net):
    def forward(self, x_seq):
        return self.head(self.neuron(3 * self.neuron(self.fc(x_seq))))


class NeuronStepByStep(Net):
    def forward(self, x_seq):
        y = self.currents(x_seq.flatten(0, 1)).view(*x_seq.shape[:2], -1)
        return self.head(torch.cat([self.neuron(part) for part in y.split(1)]))


def layers(*norm):
    torch.manual_seed(0)
    net = nn.Sequential(layer.Linear(8, 16), *norm, neuron.LIFNode(v_threshold=0.3), layer.Linear(16, 3))
    functional.set_step_mode(net, "m")
    return net


class Pixels(nn.Module):
    """A norm of images of one pixel: SpikingJelly 0.0.0.0.14 has none of features."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x_seq):
        return self.norm(x_seq[..., None, None])[..., 0, 0]


class InALoop(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x_seq):
        return torch.stack([self.norm(x) for x in x_seq])


SHARED = {
    "folded by hand": Net,
    "neuron step by step": NeuronStepByStep,
    "layers": lambda: layers(Pixels(layer.BatchNorm2d(16))),
    "container": lambda: layers(layer.MultiStepContainer(nn.BatchNorm1d(16))),
    "container of a sequence": lambda: layers(layer.SeqToANNContainer(nn.BatchNorm1d(16), nn.Tanh())),
    "norm without statistics, evaluated": lambda: layers(
        Pixels(layer.BatchNorm2d(16, track_running_stats=False))
    ).eval(),
    "cumulative norm": lambda: layers(Pixels(layer.BatchNorm2d(16, momentum=None))),
}
if hasattr(layer, "BatchNormThroughTime2d"):  # SpikingJelly 0.0.0.0.14 has none
    SHARED["norm through time"] = lambda: layers(Pixels(layer.BatchNormThroughTime2d(T, 16)))
KEPT_APART = {
    "reads running statistics": ReadsStatistics,
    "keeps a buffer": KeepsABuffer,
    "keeps an attribute": KeepsAnAttribute,
    "keeps a list": KeepsAList,
    "counts": Counts,
    "normalises by hand": NormsByHand,
    "drops by hand": DropsByHand,
    "rolls dice": RollsDice,
    "neuron twice": NeuronTwice,
    "norm of each step": NormOfEachStep,
    "nobody tells where time is": Untold,
    "norm twice": NormTwice,
    "hooks a gradient": HooksAGradient,
    "hooks a parameter": hooked,
    "changes its input": ChangesItsInput,
    "a loop around a norm": lambda: layers(InALoop()),
}


def iterations(make, sizes=(N,) * 4, kept_apart=None, **options):
    """Gradients, outputs, buffers and random numbers of some iterations, and the calls of the last one."""
    options = {"pack_spikes": False, "cache_invariant": True} | options
    net, calls, found = sltt_ext.convert(make()), [], []
    net.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    online = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, time_dim=0, **options)
    online._grouping.kept_apart = kept_apart
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    torch.manual_seed(1)
    random.seed(1)
    generator = torch.Generator().manual_seed(2)
    for size in sizes:
        calls.clear()
        optimizer.step()
        optimizer.zero_grad()
        x_seq = torch.rand(T, N, 8, generator=generator)[:, :size] * 3
        found.append(online.forward_backward(x_seq, TARGET[:size]).output)
    gradients = [gradient for gradient in oracle.gradients(net) if gradient is not None]
    return [*found, *gradients, *(buffer.double() for buffer in net.buffers()), torch.rand(3)], calls


CALLS = {
    "auto": ({"chunk": "auto", "memory_budget": 2**30}, {}),
    "SLTT-1": ({"schedule": lambda T, generator: [4]}, {"schedule": lambda T, generator: [4]}),
    "auto, SLTT-2": (
        {"chunk": "auto", "memory_budget": 2**30, "schedule": lambda T, generator: [2, 3]},
        {"schedule": lambda T, generator: [2, 3]},
    ),
}
SIZES = {"batches": (N,) * 4, "and smaller ones": (4, 4, 2, 3)}


@pytest.mark.parametrize(
    ("name", "call"), products.spread([*SHARED, *KEPT_APART], itertools.product(CALLS, SIZES), each=2)
)
@pytest.mark.filterwarnings(
    "ignore:chunk='auto' keeps to one step a call",
    "ignore:tensors are kept from step to step",
    "ignore:the trainer calls the network for each time step",
    "ignore:the network mixes time steps",
)
def test_nothing_changes(name, call):
    (options, step_by_step), sizes = CALLS[call[0]], SIZES[call[1]]
    if sizes[-1] != N and name == "norm of each step":
        pytest.skip("it knows its batch size")
    make = (SHARED | KEPT_APART)[name]
    single, separate = iterations(make, sizes, "to compare with", **step_by_step)
    shared, calls = iterations(make, sizes, **options)
    assert separate == [1] * T
    assert (len(calls) < T) is (name in SHARED) or "chunk" not in options
    assert oracle.relative_error(shared, single) < 1e-6


@pytest.mark.parametrize(
    ("make", "reason"),
    [(Untold, r"net\.norm\.sltt_folds_time = True"), (NeuronTwice, "runs 2 steps in a call of 1"),
     (ReadsStatistics, "reads the running statistics"), (lambda: layers(nn.Dropout(0.5)), "'1' draws random numbers")],
    ids=["norm", "neuron", "statistics", "dropout"],
)  # fmt: skip
def test_who_asked_for_more_is_told_why(make, reason):
    with pytest.warns(SLTTWarning, match=f"chunk='auto' keeps to one step a call.*{reason}") as told:
        iterations(make, chunk="auto")
    assert sum("keeps to one step" in str(one.message) for one in told) == 1


def test_what_cannot_be_told_is_refused():
    with pytest.warns(SLTTWarning, match="a BatchNorm1d reads something that does not have time in front"):
        _, calls = iterations(NormOfPrototypes, chunk="auto", memory_budget=2**30)
    assert calls == [1] * T


class NeuronTwiceLater(Net):
    iteration = 0

    def forward(self, x_seq):
        y = self.neuron(self.fc(x_seq))
        return self.head(self.neuron(y) if self.iteration else y)


def test_a_neuron_that_begins_to_run_twice():
    net = sltt_ext.convert(NeuronTwiceLater())
    online = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, memory_budget="6GiB")
    for _ in range(5):
        online.forward_backward(torch.rand(N, 8), TARGET)
    net.iteration = 1
    with pytest.raises(ConfigurationError, match="SLTTLIFNode runs 12 steps in a call of 6"):
        online.forward_backward(torch.rand(N, 8), TARGET)


def test_running_statistics_count_the_chunks():
    """Five steps without gradients are two chunks of two steps and one of one, also in one call."""
    last = {"schedule": lambda T, generator: [5]}

    def net():
        hidden = [(Pixels(layer.BatchNorm2d(16)), neuron.LIFNode(v_threshold=0.02)) for _ in range(8)]
        return layers(*[module for pair in hidden for module in pair])

    single, separate = iterations(net, kept_apart="to compare with", chunk=2, **last)
    shared, calls = iterations(net, chunk=2, **last)
    assert (separate, calls) == ([2, 2, 1, 1], [5, 1])
    assert oracle.relative_error(shared, single) < 1e-6


@pytest.mark.parametrize(("fits", "group"), [(200, 2), (299, 2), (300, 4), (499, 6), (10**9, 12)])
def test_shared_calls_are_whole_calls_of_the_users_own(fits, group):
    planner = Planner(Asked(2, False, True, None, False, False), 12, lambda *_: False, lambda net: 0)
    planner._measured.needs = {(False, True): Need(2, fits, 100)}
    planner._measured.unselected = Need(4, 300, 200, (2, 200))
    planner._shares = planner._is_decided = True
    planner.hold(Way(2, True, False, True))
    given = Given(0, {True: 2, False: 12}, True, True, None, None, True)
    assert planner.iteration(layers(), given, measures=False).sizes.group == group


def test_updates_at_every_step_do_not_depend_on_memory():
    steps = []
    iterations(Net, chunk="auto", on_step=steps.append)
    assert steps == [*range(T)] * 4


@pytest.mark.filterwarnings("ignore:chunk='auto' keeps to one step a call")
def test_a_resumed_run_keeps_them_apart_as_well():
    net = sltt_ext.convert(ReadsStatistics())
    online, calls = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, chunk="auto"), []
    online.forward_backward(torch.rand(N, 8), TARGET)
    resumed = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, chunk="auto")
    resumed.load_state_dict(online.state_dict())
    net.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    resumed.forward_backward(torch.rand(N, 8), TARGET)
    assert calls == [1] * T
