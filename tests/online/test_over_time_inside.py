"""`over_time(time_inside=)`: what the comparison with the network as it is must be able to tell."""

import copy
import functools
import types

import oracle
import pytest
import snntorch
import torch
from fuzz import networks_snntorch
from inside_networks import TARGET, Inside, Loop, T, X, oracle_gradients, snntorch_net, spikingjelly_net
from snntorch import utils
from spikingjelly.activation_based import functional
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.errors import ConfigurationError

STEPS = 4


def decorated(function):
    @functools.wraps(function)
    def call(*args):
        return function(*args)

    return call


class Global(nn.Module):
    """Reads the number of its steps from a global variable."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.averaged([self.body(x) for _ in range(STEPS)])

    @decorated
    def averaged(self, outputs):
        return sum([output / STEPS for output in outputs])


@pytest.mark.parametrize("averages", [True, False])
def test_one_step_does_not_tell_where_time_is(averages):
    net = sltt_ext.over_time(Inside(spikingjelly_net(), averages, 1), time_inside="T", returns="mean")
    assert net(X[:1]).shape == (1, 5)  # of one sample, too
    assert net(X).shape == (3, 5)
    sltt_ext.over_time(net, time_inside="T", returns="sequence")
    assert net(X).shape == (1, 3, 5)
    sltt_ext.over_time(net, time_inside="T")
    assert net(X).shape == ((3, 5) if averages else (1, 3, 5))


@pytest.mark.parametrize(
    ("options", "named"), [({"schedule": lambda *_: {0: 1.0, 1: 2.0}}, {}), ({}, {"lengths": [1, 4, 2]})]
)
def test_steps_that_count_differently_in_a_call_that_averages(options, named):
    net = sltt_ext.over_time(Inside(spikingjelly_net()), time_inside="T", chunk=2, **options)
    with pytest.raises(ConfigurationError, match=r"asks for each step.*use chunk=1"):
        net(X, **named)


def test_each_step_of_what_is_averaged_in_a_call():
    net = sltt_ext.over_time(Inside(spikingjelly_net()), time_inside="T", returns="sequence", chunk=2)
    with pytest.raises(ConfigurationError, match=r"asks for each step.*use chunk=1"):
        net(X)
    sltt_ext.over_time(net, time_inside="T", returns="sequence")
    by_steps = spikingjelly_net(step_mode="s")
    assert torch.allclose(net(X), torch.stack([by_steps(X) for _ in range(T)]), atol=1e-6)


@pytest.mark.parametrize("make", [lambda: spikingjelly_net(step_mode="s"), snntorch_net], ids=["sj", "snn"])
def test_a_global_variable(make):
    net = Global(make())
    wanted = oracle_gradients(copy.deepcopy(net.body))
    net = copy.deepcopy(sltt_ext.over_time(net, time_inside="STEPS"))
    with torch.no_grad():
        original = Loop(make())(X)
        torch.testing.assert_close(net(X), original)
    F.cross_entropy(net(X), TARGET).backward()
    assert oracle.relative_error(oracle.gradients(net), wanted) < 1e-6
    assert STEPS == T


def test_global_variables_that_differ():
    elsewhere = {"__name__": "elsewhere", "STEPS": 5}
    method = types.FunctionType(Global.forward.__code__, elsewhere)
    other = type("Other", (Global,), {"forward": method})
    net = nn.Sequential(Global(spikingjelly_net(step_mode="s")), other(spikingjelly_net(step_mode="s")))
    with pytest.raises(ConfigurationError, match="differ"):
        sltt_ext.over_time(net, time_inside="STEPS")


def test_a_global_variable_is_what_it_was_after_an_error():
    net = Global(spikingjelly_net(step_mode="s"))
    sltt_ext.over_time(net, time_inside="STEPS")
    net(X)
    net.body.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        net(X)
    assert STEPS == T


@pytest.mark.parametrize("how", ["an attribute", "a global variable"])
def test_another_number_of_steps_after_over_time(how, monkeypatch):
    net = (
        Global(spikingjelly_net(step_mode="s")) if "global" in how else Loop(spikingjelly_net(step_mode="s"))
    )
    name = "STEPS" if "global" in how else "T"
    sltt_ext.over_time(net, time_inside=name)
    net(X)
    monkeypatch.setitem(globals() if "global" in how else vars(net), name, 2)
    with pytest.raises(ConfigurationError, match="was 4 when over_time was called, and is 2 now"):
        net(X)
    sltt_ext.over_time(net, time_inside=name)
    net(X)


@pytest.mark.parametrize("given", [4, (), [4], {"T": 4}])
def test_a_name_is_wanted(given):
    with pytest.raises(ConfigurationError, match="must be the name of what holds the number of steps"):
        sltt_ext.over_time(Loop(spikingjelly_net(step_mode="s")), time_inside=given)


def test_what_to_do_if_nothing_holds_the_number_of_steps():
    with pytest.raises(
        ConfigurationError, match=r"no global variable .*numbers: T\): hold the number in an attribute"
    ):
        sltt_ext.over_time(Loop(spikingjelly_net(step_mode="s")), time_inside="num_steps")


class Tutorial(nn.Module):
    """A network of snnTorch's tutorials: it makes its states at the beginning, and passes them from step to step."""

    def __init__(self, neuron, init, detaches=False):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.lif1, self.init = nn.Linear(6, 6), neuron(), init
        self.fc2, self.lif2 = nn.Linear(6, 5), snntorch.Leaky(beta=0.8, threshold=0.3)
        self.detaches = detaches

    def forward(self, x):
        at_rest = getattr(self.lif1, self.init)()
        states = at_rest if isinstance(at_rest, tuple) else (at_rest,)
        mem2 = self.lif2.init_leaky()
        spikes, potentials = [], []
        for _ in range(STEPS):
            if self.detaches:
                states, mem2 = [state.detach() for state in states], mem2.detach()
            spk1, *states = self.lif1(self.fc1(x), *states)
            if self.init == "init_rleaky":
                states = [spk1, *states]
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spikes.append(spk2)
            potentials.append(mem2)
        return torch.stack(spikes), torch.stack(potentials)


TUTORIALS = {
    "init_leaky": lambda: snntorch.Leaky(beta=0.9, threshold=0.3, learn_beta=True),
    "init_synaptic": lambda: snntorch.Synaptic(alpha=0.8, beta=0.9, threshold=0.3),
    "init_rleaky": lambda: snntorch.RLeaky(beta=0.8, linear_features=6, threshold=0.3),
    "init_alpha": lambda: snntorch.Alpha(alpha=0.9, beta=0.8, threshold=0.1),
    "init_lapicque": lambda: snntorch.Lapicque(beta=0.9, threshold=0.3),
    "init_slstm": lambda: snntorch.SLSTM(6, 6, threshold=0.01),
}


@pytest.mark.parametrize("options", [{}, {"chunk": 2}, {"memory_budget": "1GiB"}], ids=str)
@pytest.mark.parametrize("init", TUTORIALS)
def test_networks_of_tutorials_as_they_are(init, options):
    net, expected = (Tutorial(TUTORIALS[init], init, detaches) for detaches in (False, True))
    sltt_ext.over_time(net, time_inside="STEPS", **options)
    for _ in range(3):
        results = []
        for one in (net, expected):
            one.zero_grad()
            spikes, potentials = one(X)
            assert spikes.shape == potentials.shape == (T, 3, 5)
            weights = torch.linspace(0.5, 1, T)[:, None, None]
            F.cross_entropy((weights * potentials).sum(0) + spikes.mean(0), TARGET).backward()
            results.append((spikes, potentials, oracle.gradients(one)))
        (spikes, potentials, mine), (their_spikes, their_potentials, theirs) = results
        assert torch.equal(spikes, their_spikes)
        torch.testing.assert_close(potentials, their_potentials)
        assert spikes.sum() > 0
        assert oracle.relative_error(mine, theirs) < 1e-5
    assert "reset_mem" not in vars(net.lif1)


@pytest.mark.parametrize("multi_step", [False, True])
def test_a_network_that_resets_itself_first(multi_step):
    kind = Inside if multi_step else Loop

    class ResetsItself(kind):
        def forward(self, x):
            functional.reset_net(self)
            return super().forward(x)

    net = ResetsItself(spikingjelly_net(step_mode="m" if multi_step else "s"))
    wanted = oracle_gradients(copy.deepcopy(net.body))
    sltt_ext.over_time(net, time_inside="T")
    for _ in range(2):
        net.zero_grad()
        F.cross_entropy(net(X), TARGET).backward()
        assert oracle.relative_error(oracle.gradients(net), wanted) < 1e-6
    assert all("reset" not in vars(module) for module in net.modules())


@pytest.mark.parametrize("init", TUTORIALS)
def test_networks_of_tutorials_with_the_gradient_through_time(init):
    net, expected = (Tutorial(TUTORIALS[init], init) for _ in range(2))
    sltt_ext.over_time(net, time_inside="STEPS", temporal="call", chunk=T)
    for one in (net, expected):
        F.cross_entropy(one(X)[1].mean(0), TARGET).backward()
    assert oracle.relative_error(oracle.gradients(net), oracle.gradients(expected)) < 1e-5


def test_what_the_state_of_a_tutorials_network_is_after_a_call():
    """A call of its own begins at rest, whatever the call before has left."""
    net = sltt_ext.over_time(Tutorial(TUTORIALS["init_leaky"], "init_leaky"), time_inside="STEPS")
    with torch.no_grad():
        first, _ = net(X), net(5 * X)
        assert all(map(torch.equal, net(X), first))
        assert all(map(torch.equal, sltt_ext.revert(net)(X), first))


class Sequence(nn.Module):
    """Goes through all steps that its input has."""

    def __init__(self, body, averages=False, time_dim=0):
        super().__init__()
        self.body, self.averages, self.time_dim = body, averages, time_dim

    def forward(self, x, scale=1.0):
        s = torch.stack([self.body(scale * x_t) for x_t in x.unbind(self.time_dim)], self.time_dim)
        return s.mean(self.time_dim) if self.averages else s


@pytest.mark.parametrize("make", [lambda: spikingjelly_net(step_mode="s"), snntorch_net], ids=["sj", "snn"])
@pytest.mark.parametrize("averages", [False, True])
@pytest.mark.parametrize("time_dim", [0, 1])
def test_steps_of_the_input(make, averages, time_dim):
    plain, net = make(), sltt_ext.over_time(
        Sequence(make(), averages, time_dim), time_inside="x", time_dim=time_dim
    )  # fmt: skip
    for time_steps in (T, 1, T + 2):
        x_seq = 2 * torch.rand(time_steps, 3, 6)
        outputs = []
        for x in x_seq:
            outputs.append(plain(x))
            oracle.detach_memories(plain)
            networks_snntorch.detach(plain)
        (utils.reset if make is snntorch_net else functional.reset_net)(plain)
        wanted = torch.stack(outputs)
        wanted = wanted.mean(0) if averages else wanted.movedim(0, time_dim)
        found = net(x_seq.movedim(0, time_dim).contiguous(), scale=1.0)
        torch.testing.assert_close(found, wanted)
        for one in (plain, net):
            one.zero_grad()
        wanted.pow(2).mean().backward()
        found.pow(2).mean().backward()
        assert oracle.relative_error(oracle.gradients(net), oracle.gradients(plain)) < 1e-6


def test_one_step_of_the_input_first():
    """It does not tell whether the network averages, and the next sequence may be longer."""
    net = sltt_ext.over_time(Sequence(snntorch_net()), time_inside="x", time_dim=0)
    assert net(X.unsqueeze(0)).shape == (1, 3, 5)
    assert net(torch.stack([X] * T)).shape == (T, 3, 5)


def test_where_time_is_in_the_input():
    with pytest.raises(
        ConfigurationError, match=r"which of its axes is time, time_dim=0 for \[T, N, \.\.\.\]"
    ):
        sltt_ext.over_time(Sequence(snntorch_net()), time_inside="x")
    with pytest.raises(ConfigurationError, match=r"time_dim=\{'scale': 0\} for"):
        sltt_ext.over_time(Sequence(snntorch_net()), time_inside="scale", time_dim=0)
    with pytest.raises(ConfigurationError, match=r"no argument of forward.*time_inside='x', time_dim=0"):
        sltt_ext.over_time(Sequence(snntorch_net()), time_inside="x.size(0)")


def test_windows_of_the_steps_of_the_input():
    x_seq, wanted = 2 * torch.rand(T, 3, 6), snntorch_net()
    outputs = []
    for t, x in enumerate(x_seq):
        outputs.append(wanted(x))
        if t % 2:
            networks_snntorch.detach(wanted)
    torch.stack(outputs).pow(2).mean().backward()
    net = sltt_ext.over_time(Sequence(snntorch_net()), time_inside="x", time_dim=0, temporal="call", chunk=2)
    net(x_seq).pow(2).mean().backward()
    assert oracle.relative_error(oracle.gradients(net), oracle.gradients(wanted)) < 1e-6


def test_a_state_that_is_carried_from_call_to_call_by_a_network_that_puts_itself_to_rest():
    x_seq = torch.rand(6, 3, 6)

    class Recorded(Tutorial):
        def forward(self, x):
            mem1, mem2, outputs = self.lif1.init_leaky(), self.lif2.init_leaky(), []
            for x_t in x:
                spk1, mem1 = self.lif1(self.fc1(x_t), mem1)
                _, mem2 = self.lif2(self.fc2(spk1), mem2)
                outputs.append(mem2)
            return torch.stack(outputs)

    def make():
        return Recorded(lambda: snntorch.Leaky(beta=0.9, threshold=0.2), "init_leaky")

    net = sltt_ext.over_time(make(), time_inside="x", time_dim=0, carry=True)
    torch.testing.assert_close(torch.cat([net(x_seq[:2]), net(x_seq[2:])]), make()(x_seq))


def test_numbers_of_steps_of_all_modules():
    class Inner(Inside):
        def forward(self, x):
            return self.body(x.unflatten(0, (self.T, -1)))

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.T, self.inner = T, Inner(spikingjelly_net())

        def forward(self, x):
            return self.inner(x.repeat(self.T, 1)).mean(0)

    wanted = Outer()(X)
    torch.testing.assert_close(sltt_ext.over_time(Outer(), time_inside="*.T")(X), wanted)
    with pytest.raises(ConfigurationError, match=r"inner.T may have to be named, too"):
        sltt_ext.over_time(Outer(), time_inside="T")(X)


def test_a_number_that_is_given_at_each_call():
    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = snntorch_net()

        def forward(self, x, num_steps=4):
            return torch.stack([self.body(x) for _ in range(num_steps)])

    with pytest.raises(ConfigurationError, match="hold the number in an attribute"):
        sltt_ext.over_time(Given(), time_inside="num_steps")


class ReadsInside(nn.Module):
    """Reads the number of its steps in a function inside of a decorated one, and nowhere else."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    @decorated
    def forward(self, x):
        def outputs():
            return [self.body(x) for _ in range(STEPS)]

        return torch.stack(outputs()).mean(0)


def test_a_global_variable_that_is_read_in_an_inner_function():
    wanted = ReadsInside(spikingjelly_net(step_mode="s"))(X)
    net = sltt_ext.over_time(ReadsInside(spikingjelly_net(step_mode="s")), time_inside="STEPS")
    torch.testing.assert_close(net(X), wanted)


class ResetsHidden(Loop):
    """Puts its neurons to rest first, and leaves the states to them."""

    def forward(self, x):
        for module in self.body:
            if isinstance(module, snntorch.Leaky):
                module.reset_mem()
        return super().forward(x)


def test_hidden_states_of_a_network_that_puts_itself_to_rest():
    wanted = ResetsHidden(snntorch_net())(X)
    net = sltt_ext.over_time(ResetsHidden(snntorch_net()), time_inside="T")
    torch.testing.assert_close(net(X), wanted)
