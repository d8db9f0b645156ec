"""State that the trainer does not know: neurons that are not converted, and tensors kept as plain attributes."""

import warnings
from collections import deque

import oracle
import pytest
import snntorch
import torch
from spikingjelly.activation_based import functional, neuron
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.errors import ConfigurationError, SLTTWarning

T, N = 5, 4
X = 2 * torch.randn(T, N, 8, generator=torch.Generator().manual_seed(1))
TARGET = torch.tensor([0, 1, 2, 3])
NEURONS = {"SpikingJelly": neuron.IFNode, "snnTorch": lambda: snntorch.Leaky(beta=0.9, init_hidden=True)}


class Front(nn.Module):
    def __init__(self, make, where):
        super().__init__()
        self.a, self.lif, self.c, self.where = nn.Linear(8, 16), make(), nn.Linear(16, 4), where
        if where == "list":
            self.hidden = [make()]
        elif where == "dict of modules":
            self.hidden = {"front": nn.Sequential(make())}
        else:
            self.front = make()

    def forward(self, x):
        front = {"list": lambda: self.hidden[0], "dict of modules": lambda: self.hidden["front"]}
        return self.c(self.lif(self.a(front.get(self.where, lambda: self.front)()(x))))


CASES = [
    ("list", r"hidden: \w+ is not a submodule.*ModuleList"),
    ("dict of modules", r"hidden: \w+ is not a submodule.*ModuleList"),
    ("added later", r"front: \w+ is not converted"),
    ("partly converted", r"front: \w+ is not converted"),
]


@pytest.mark.parametrize(("where", "said"), CASES, ids=[where for where, _ in CASES])
@pytest.mark.parametrize("framework", NEURONS)
def test_neurons_that_are_not_known(framework, where, said):
    make = NEURONS[framework]
    net = Front(make, where)
    sltt_ext.convert(net.lif if where == "partly converted" else net)
    if where == "added later":
        net.front = make()
    online = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, time_dim=0)
    with pytest.warns(SLTTWarning, match=said):
        online.forward_backward(X, TARGET)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        online.forward_backward(X, TARGET)


class Keeps(nn.Module):
    """A trace of its input, as a plain attribute."""

    def __init__(self, start=None):
        super().__init__()
        self.trace = start
        self.decay = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        self.trace = x if self.trace is None else self.decay * self.trace + x
        return self.trace


class KeepsATuple(Keeps):
    def forward(self, x):
        trace, count = self.trace or (torch.zeros_like(x), 0)
        self.trace = (self.decay * trace + x, count + 1)
        return self.trace[0]


class KeepsSpikes(Keeps):
    """A loop back by an attribute that is not there at first."""

    def __init__(self):
        super().__init__()
        del self.trace
        self.neuron = neuron.LIFNode()

    def forward(self, x):
        self.trace = self.neuron(x + self.decay * getattr(self, "trace", 0.0))
        return self.trace


class KeepsAList(Keeps):
    """All of what it had, and it reads the last two."""

    def __init__(self):
        super().__init__([])

    def forward(self, x):
        for before in self.trace[-2:]:
            x = x + self.decay * before
        self.trace.append(x)
        return x


class KeepsADict(Keeps):
    def __init__(self):
        super().__init__({"of the layer": {}})

    def forward(self, x):
        entries = self.trace["of the layer"]
        entries["trace"] = x + self.decay * entries.get("trace", 0.0)
        return entries["trace"]


class KeepsASet(Keeps):
    def __init__(self):
        super().__init__(set())

    def forward(self, x):
        x = x + self.decay * sum(self.trace)
        self.trace.clear()
        self.trace.add(x)
        return x


class KeepsADeque(Keeps):
    """A delay line."""

    def __init__(self):
        super().__init__(deque(maxlen=2))

    def forward(self, x):
        x = x + self.decay * sum(self.trace)
        self.trace.append(x)
        return x


EMPTIED = {
    KeepsAList: list,
    KeepsADict: lambda: {"of the layer": {}},
    KeepsASet: set,
    KeepsADeque: lambda: deque(maxlen=2),
}


def network(make):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), neuron.LIFNode(), make(), nn.Linear(16, 4))


def at_rest(net):
    functional.reset_net(net)
    if isinstance(net[2], KeepsSpikes):
        vars(net[2]).pop("trace", None)
    else:
        net[2].trace = EMPTIED.get(type(net[2]), lambda: None)()


def detached(trace):
    """Written out for each kind of container."""
    if isinstance(trace, tuple):
        return trace[0].detach(), trace[1]
    if isinstance(trace, dict):
        return {"of the layer": {"trace": trace["of the layer"]["trace"].detach()}}
    if isinstance(trace, deque):
        return deque((t.detach() for t in trace), maxlen=2)
    return type(trace)(t.detach() for t in trace) if isinstance(trace, (list, set)) else trace.detach()


def expected(net, selected):
    net.zero_grad()
    at_rest(net)
    for t, x in enumerate(X):
        with torch.set_grad_enabled(t in selected):
            output = net(x)
        if t in selected:
            (F.cross_entropy(output, TARGET) / len(selected)).backward()
        functional.detach_net(net)
        net[2].trace = detached(net[2].trace)
    return gradients(net)


def gradients(net):
    return [gradient.clone() for gradient in oracle.gradients(net) if gradient is not None]


@pytest.mark.parametrize("selected", [(0,), (4,), (1, 3), tuple(range(T))], ids=str)
@pytest.mark.parametrize("make", [Keeps, KeepsATuple, KeepsSpikes, *EMPTIED])
@pytest.mark.filterwarnings("ignore:tensors are kept")
def test_a_tensor_that_is_kept_is_state(make, selected):
    want = expected(network(make), selected)
    net = sltt_ext.convert(network(make))
    online = sltt_ext.OnlineTrainer(
        net, F.cross_entropy, T, time_dim=0, schedule=lambda T, generator: list(selected)
    )
    for _ in range(3):
        net.zero_grad()
        online.forward_backward(X, TARGET)
        assert oracle.relative_error(gradients(net), want) < 1e-6


def test_a_single_step_starts_from_rest_as_well():
    """There is no later step that would tell what the kept tensor is."""
    net = sltt_ext.convert(network(KeepsATuple))
    online = sltt_ext.OnlineTrainer(net, F.cross_entropy, 1, time_dim=0)
    found = []
    for _ in range(2):
        net.zero_grad()
        online.forward_backward(X[:1], TARGET)
        found.append(gradients(net))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("k", [None, 1, 2])
def test_who_keeps_a_tensor_is_told_once(k):
    online = sltt_ext.OnlineTrainer(sltt_ext.convert(network(Keeps)), F.cross_entropy, T, k, time_dim=0)
    with pytest.warns(SLTTWarning, match=r"2\.trace: of a Keeps"):
        online.forward_backward(X, TARGET)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        online.forward_backward(X, TARGET)


def test_the_rest_that_a_user_sets_is_kept():
    net = sltt_ext.convert(network(Keeps))
    online = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, time_dim=0)
    with pytest.warns(SLTTWarning, match="tensors are kept"):
        online.forward_backward(X, TARGET)
    first = online.predict(X)
    net[2].trace = torch.ones(N, 16)
    other = online.predict(X)
    assert not torch.equal(first, other)
    assert torch.equal(online.predict(X), other)


class Looked(nn.Module):
    """Keeps what only others look at."""

    def forward(self, x):
        self.seen = 2 * x
        if self.seen.requires_grad:
            self.seen.retain_grad()
        return self.seen


def test_what_is_only_looked_at_stays():
    net = sltt_ext.convert(network(Looked))
    online = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, time_dim=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            online.forward_backward(X, TARGET)
            assert net[2].seen.grad is not None


class Records(nn.Module):
    """Others read what it has kept; it does not."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        x = 2 * x
        if x.requires_grad:
            x.retain_grad()
        self.seen.append(x)
        return x


def test_a_record_is_left_alone():
    net = sltt_ext.convert(network(Records))
    online = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, time_dim=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for iteration in (1, 2):
            online.forward_backward(X, TARGET)
            assert len(net[2].seen) == iteration * T
            assert all(seen.grad is not None for seen in net[2].seen)


@pytest.mark.parametrize("kind", [list, dict])
def test_a_list_stays_the_same_object(kind):
    make = KeepsAList if kind is list else KeepsADict
    net = sltt_ext.convert(network(make))
    online, kept = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, time_dim=0), net[2].trace
    with pytest.warns(
        SLTTWarning, match=r"2\.trace" + (r"\['of the layer'\]\['trace'\]" if kind is dict else ": of a")
    ):
        online.forward_backward(X, TARGET)
    online.forward_backward(X, TARGET)
    assert net[2].trace is kept
    assert kind is dict or len(kept) == T


class ListComputedOnce(Keeps):
    def forward(self, x):
        self.trace = self.trace or [self.decay.sigmoid()]
        return self.trace[0] * x


class DictComputedOnce(KeepsADict):
    """And a state beside it."""

    def forward(self, x):
        entries = self.trace
        if "decay" not in entries:
            entries["decay"] = self.decay.sigmoid()
        entries["trace"] = x + entries["decay"] * entries.get("trace", 0.0)
        return entries["trace"]


class ComputedOnce(Keeps):
    def forward(self, x):
        if self.trace is None:
            self.trace = self.decay.sigmoid()
        return self.trace * x


@pytest.mark.parametrize("make", [ComputedOnce, ListComputedOnce, DictComputedOnce])
@pytest.mark.filterwarnings("ignore:tensors are kept")
def test_what_is_computed_once_is_refused(make):
    net = sltt_ext.convert(network(make))
    online = sltt_ext.OnlineTrainer(net, F.cross_entropy, T, time_dim=0)
    with pytest.raises(
        ConfigurationError, match=r"2\.trace(\['decay'\])? is computed with a gradient at one time step"
    ):
        online.forward_backward(X, TARGET)
    assert all(parameter.grad is None for parameter in net.parameters())
