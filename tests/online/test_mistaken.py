"""What is mistaken for something else is said: states for inputs, time for the batch, a loop around a loop; and what is right is not."""

import warnings

import oracle
import pytest
import snntorch
import torch
from spikingjelly.activation_based import layer, neuron
from step_networks import TARGET, Multi, N, Single, T, X, leaky, said, trainer
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.errors import ConfigurationError, InputError, SLTTWarning
from sltt_ext.snntorch import Stateful


class GivenStates(nn.Module):
    """As one step of snnTorch's tutorials: it takes its states and returns them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
        self.lif1, self.lif2 = snntorch.Leaky(beta=0.9), snntorch.Synaptic(alpha=0.5, beta=0.9)

    def forward(self, x, mem1, syn2, mem2):
        spk, mem1 = self.lif1(self.a(x), mem1)
        _, syn2, mem2 = self.lif2(self.b(spk), syn2, mem2)
        return mem2, mem1, syn2, mem2


STATES = [torch.zeros(N, 16), torch.zeros(N, 4), torch.zeros(N, 4)]


@pytest.mark.parametrize("options", [{}, {"temporal": "call", "chunk": T}], ids=["SLTT", "BPTT"])
def test_states_that_are_given_for_all_steps_are_refused(options):
    net = sltt_ext.over_time(GivenStates(), T, **options)
    with pytest.raises(ConfigurationError, match=r"'lif1' is given a state .*Stateful\(net\)"):
        net(X[0], *STATES)
    with torch.no_grad():
        assert len(sltt_ext.over_time(GivenStates(), 1)(X[0], *STATES)) == 4  # one step begins with them


@pytest.mark.parametrize("options", [{}, {"temporal": "call", "chunk": T}], ids=["SLTT", "BPTT"])
def test_several_states_go_from_step_to_step(options):
    plain, states, output = GivenStates(), STATES, 0.0
    for x in X:
        if not options:
            states = [state.detach() for state in states]
        potential, *states = plain(x, *states)
        output = output + potential / T
    F.cross_entropy(output, TARGET).backward()
    net = GivenStates()
    over = sltt_ext.over_time(Stateful(net), time_dim=0, **options)
    for _ in range(2):
        net.zero_grad()
        found = over(X)
        F.cross_entropy(found, TARGET).backward()
        torch.testing.assert_close(found, output)
        assert oracle.relative_error(oracle.gradients(net), oracle.gradients(plain)) < 1e-6


def test_a_step_that_does_not_return_all_its_states():
    class Lacks(GivenStates):
        def forward(self, x, mem1, syn2, mem2):
            return super().forward(x, mem1, syn2, mem2)[:2]

    with pytest.raises(InputError, match=r"\(output, mem1, syn2, mem2\).*got a tuple of 2"):
        sltt_ext.over_time(Stateful(Lacks()), T)(X[0])


def test_arguments_with_another_default_are_no_states():
    class Flag(GivenStates):
        def forward(self, x, state, scale=2.0):
            potential, *state = super().forward(scale * x, *(state or [None] * 3))
            return potential, state

    assert sltt_ext.over_time(Stateful(Flag()), T)(X[0]).shape == (N, 4)


def mixed(contained):
    second = neuron.LIFNode()
    layers = [nn.Linear(8, 16), neuron.LIFNode(step_mode="m"), nn.Linear(16, 4)]
    return nn.Sequential(*layers, layer.MultiStepContainer(second) if contained else second)


def test_a_neuron_for_single_steps_that_is_given_a_sequence():
    (text,) = said(trainer(mixed(contained=False), chunk=1))
    assert "3: a LIFNode has step_mode 's' and is given [T, N, ...]" in text
    assert said(trainer(mixed(contained=True))) == []


def test_shapes_that_do_not_tell_time_from_the_batch():
    x = 3 * torch.rand(N, N, N)
    net = nn.Sequential(
        nn.Linear(N, N), neuron.LIFNode(step_mode="m"), layer.MultiStepContainer(neuron.LIFNode())
    )
    online = sltt_ext.OnlineTrainer(sltt_ext.convert(net), F.cross_entropy, N, chunk=N, time_dim=0)
    assert not [
        text for text, _ in warnings_of(lambda: online.forward_backward(x, TARGET)) if "step_mode" in text
    ]


def warnings_of(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [(str(one.message), one.filename) for one in caught if issubclass(one.category, SLTTWarning)]


@pytest.mark.parametrize("make", [Single, lambda: Single(leaky), Multi])
@pytest.mark.parametrize("returns", [None, "sequence"])
def test_a_sequence_that_is_taken_for_a_batch_is_said_once(make, returns):
    net = sltt_ext.over_time(make(), T, returns=returns)
    ((text, filename),) = warnings_of(lambda: [net(X), net(X)])
    assert f"[{T}, {N}, 8] is taken for a batch of {T} samples" in text
    assert "time_dim=0" in text
    assert filename == __file__


def test_what_is_no_sequence():
    class Pools(Single):
        def forward(self, x):
            return super().forward(x).mean(1)

    tokens = sltt_ext.over_time(Pools(), T)
    images = sltt_ext.over_time(nn.Sequential(nn.Flatten(), Single()), T)
    others = sltt_ext.over_time(Single(), T + 1)
    sequences = sltt_ext.over_time(Single(), time_dim=0)
    assert warnings_of(lambda: [tokens(X), images(X[:, :4, :2]), others(X), sequences(X)]) == []


def test_a_loop_over_time_around_a_network_over_time():
    net = sltt_ext.over_time(Single(), T)
    ((text, filename),) = warnings_of(lambda: [net(X[0]) for _ in range(2 * T)])
    assert f"called {T} times in a row with the same input" in text
    assert filename == __file__
    net = sltt_ext.over_time(Single(), T)
    ((text, _),) = warnings_of(lambda: [net(x) for x in X])
    assert "steps of a sequence" in text
    assert "time_dim=0" in text


def test_calls_that_are_no_loop_over_time():
    def trains(net, x, update):
        for _ in range(2 * T):
            F.cross_entropy(net(x), TARGET).backward()
            if update:
                torch.optim.SGD(net.parameters(), 0.1).step()

    def changes(net, x):
        for _ in range(2 * T):
            net(x)
            x += 1.0

    def made(**options):
        return sltt_ext.over_time(Single(), T, **options)

    def predicts(net):
        with torch.no_grad():
            return [net(X[0]) for _ in range(T)]

    several = torch.rand(T + 1, N, 8)
    runs = {
        "training on one batch": lambda: trains(made(), X[0], update=True),
        "K steps, of which the graph is kept": lambda: trains(made(k=1), X[0], update=True),
        "accumulated gradients": lambda: trains(made(), X[0], update=False),
        "an input that changes in place": lambda: changes(made(), X[0].clone()),
        "other inputs": lambda: [net(x.clone()) for net in [made()] for x in X],
        "more inputs than steps": lambda: [net(x) for net in [made()] for x in several],
        "fewer calls": lambda: [net(X[0]) for net in [made()] for _ in range(T - 1)],
        "some inputs twice": lambda: [net(X[max(t, 1)]) for net in [made()] for t in range(T)],
        "predictions": lambda: predicts(made()),
        "a stream": lambda: [net(x) for net in [made(carry=True)] for x in X],
        "two views": lambda: [net(x) for net in [sltt_ext.over_time(Single(), 2)] for x in X[:2]],
    }
    assert {name: said for name, run in runs.items() if (said := warnings_of(run))} == {}


class Packed(GivenStates):
    """Takes its states in one tensor, as `torch.nn.RNN` does."""

    def forward(self, x, states):
        return super().forward(x, states[0], states[1, :, :4], states[2, :, :4])


def test_parts_of_what_the_network_was_called_with_are_refused_as_states():
    with pytest.raises(ConfigurationError, match=r"'lif1' is given a state that the network was called with"):
        sltt_ext.over_time(Packed(), T)(X[0], torch.zeros(3, N, 16))


class Gate(snntorch.Leaky):
    def forward(self, x, gate):
        return super().forward(x * gate)


@pytest.mark.parametrize("over_time", [False, True])
def test_another_input_of_a_neuron_is_no_state(over_time):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.lif = nn.Linear(8, 4), Gate(beta=0.9, init_hidden=True)

        def forward(self, x, gate):
            return self.lif(self.fc(x), gate)

    net = sltt_ext.over_time(Net(), time_dim={"x": 0, "gate": 0} if over_time else 0)
    assert warnings_of(lambda: net(X, torch.rand(T, N, 4) if over_time else torch.rand(N, 4))) == []


def test_states_that_forward_makes_at_each_step():
    class Makes(GivenStates):
        def forward(self, x, mem1=None, syn2=None, mem2=None):
            states = (
                (torch.zeros(N, 16), torch.zeros(N, 4), torch.zeros(N, 4))
                if mem1 is None
                else (mem1, syn2, mem2)
            )
            return super().forward(x, *states)

    (text,) = [text for text, _ in warnings_of(lambda: sltt_ext.over_time(Makes(), T)(X[0]))]
    assert "lif1: a Leaky is given a state at rest in the middle of a sequence" in text
    assert "Stateful" in text
    stateful = sltt_ext.over_time(Stateful(Makes()), T)
    assert warnings_of(lambda: stateful(X[0])) == []


def test_the_first_parameter_of_forward_has_time_in_whatever_order():
    class Two(Single):
        def forward(self, x, context):
            return super().forward(x) + context

    net, context = sltt_ext.over_time(Two(), time_dim=0), torch.rand(N, 4)
    wanted = net(X, context)
    assert torch.equal(net(x=X, context=context), wanted)
    assert torch.equal(net(**{"context": context, "x": X}), wanted)


@pytest.mark.parametrize("options", [{"k": 1}, {"memory_budget": "1GiB"}, {"chunk": T}], ids=str)
def test_accumulated_gradients_of_parts_of_a_batch_are_no_loop_over_time(options):
    net = sltt_ext.over_time(Multi(), T, norms="step", **options)
    parts = torch.rand(T, N, 8)
    assert warnings_of(lambda: [F.cross_entropy(net(part), TARGET).backward() for part in parts]) == []


class GivenAtEachStep(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.lif = nn.Linear(8, 4), snntorch.Leaky(beta=0.9)

    def forward(self, x, mem):
        return self.lif(self.fc(x), mem)[1]


def test_states_of_each_step_are_no_state_of_all():
    net = sltt_ext.over_time(GivenAtEachStep(), time_dim={"x": 0, "mem": 0})
    assert warnings_of(lambda: net(X, torch.rand(T, N, 4))) == []


def test_a_state_at_rest_where_the_last_step_has_left_it_at_rest():
    class AtRest(GivenAtEachStep):
        def forward(self, x):
            return super().forward(0 * x, torch.zeros(N, 4))

    net = AtRest()
    nn.init.zeros_(net.fc.bias)
    assert warnings_of(lambda: sltt_ext.over_time(net, T)(X[0])) == []
