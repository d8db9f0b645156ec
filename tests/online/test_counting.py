"""One call of the network is so many steps: what runs other steps, resets or takes the batch for time is said."""

import warnings

import oracle
import pytest
import snntorch
import torch
from snntorch import utils
from spikingjelly.activation_based import functional, layer, neuron
from step_networks import SOFT, TARGET, Multi, N, Single, T, X, leaky, said, trainer
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.errors import ConfigurationError, InputError, SLTTWarning
from sltt_ext.snntorch import MultiStep, Stateful

# neurons that run other steps than those of the call


class Loops(Single):
    def forward(self, x):
        return sum(super(Loops, self).forward(x) for _ in range(T)) / T


class LoopsWithStates(Single):
    """As snnTorch's tutorials do."""

    def __init__(self):
        super().__init__(lambda: snntorch.Leaky(beta=0.9))

    def forward(self, x):
        mem, outputs = self.lif.reset_mem(), []
        for _ in range(T):
            spk, mem = self.lif(self.a(x), mem)
            outputs.append(self.c(spk))
        return torch.stack(outputs)


class Repeats(Multi):
    """As the spike-driven transformers do with images."""

    def forward(self, x):
        if x.dim() < 5:
            x = x.unsqueeze(0).repeat(T, *[1] * x.dim())
        return super().forward(x).mean(0)


class BatchFirst(Multi):
    """Takes the samples of ``[1, N, ...]`` for steps."""

    def forward(self, x):
        return super().forward(x.transpose(0, 1)).mean(0, keepdim=True)


class Twice(Single):
    """A legitimate use: one neuron at two places of a step."""

    def __init__(self, make=neuron.LIFNode):
        super().__init__(make)
        self.b = nn.Linear(16, 16)

    def forward(self, x):
        return self.c(self.lif(self.b(self.lif(self.a(x)))))


OTHER_STEPS = {
    "a loop": (Loops, f"lif: a LIFNode runs {T} time steps in a call of 1"),
    "a loop, snnTorch": (lambda: Loops(leaky), f"lif: a Leaky runs {T} time steps in a call of 1"),
    "a loop with states": (LoopsWithStates, f"lif: a Leaky runs {T} time steps in a call of 1"),
    "an input that is repeated": (Repeats, f"lif: a LIFNode runs {T} time steps in a call of 1"),
    "samples taken for steps": (BatchFirst, f"lif: a LIFNode runs {N} time steps in a call of 1"),
    "a neuron at two places": (Twice, "lif: a LIFNode runs 2 time steps in a call of 1"),
    "a neuron at two places, snnTorch": (lambda: Twice(leaky), "lif: a Leaky runs 2 time steps in a call of 1"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), OTHER_STEPS.values(), ids=OTHER_STEPS)
def test_other_steps_than_those_of_the_call_are_said_once(make, message):
    target = SOFT if make is BatchFirst else TARGET
    loss_fn = F.mse_loss if make is BatchFirst else lambda output, _: output.pow(2).mean()
    found = [text for text in said(trainer(make(), loss_fn), target) if "runs" in text]
    assert len(found) == 1
    assert message in found[0]
    assert "make it run one step" in found[0]
    assert "at several places" in found[0]


@pytest.mark.parametrize("make", [neuron.LIFNode, leaky])
@pytest.mark.filterwarnings("ignore:the trainer calls the network")
def test_a_neuron_at_two_places_is_right(make):
    net = Twice(make)
    trainer(net).forward_backward(X, TARGET)
    plain = Twice(make)
    for x in X:
        (F.cross_entropy(plain(x), TARGET) / T).backward()
        functional.detach_net(plain)
        if make is leaky:
            plain.lif.detach_hidden()
    assert oracle.relative_error(oracle.gradients(net), oracle.gradients(plain)) < 1e-6


def test_a_prediction_is_watched_as_well():
    online = trainer(Loops())
    with pytest.warns(SLTTWarning, match=f"runs {T} time steps"):
        online.predict(X)


QUIET = {
    "a single-step network": (Single, {}),
    "snnTorch": (lambda: Single(leaky), {}),
    "a multi-step network": (Multi, {}),
    "chunks that leave a rest": (Multi, {"chunk": 4}),
    "all steps in one call": (Multi, {"chunk": T}),
    "SLTT-K": (Multi, {"k": 2}),
    "a neuron alone": (lambda: neuron.ParametricLIFNode(step_mode="m"), {}),
    "MultiStep": (lambda: MultiStep(sltt_ext.convert(Single(leaky))), {"chunk": 3}),
}


@pytest.mark.parametrize(("make", "options"), QUIET.values(), ids=QUIET)
def test_nothing_is_said_of_other_networks(make, options):
    assert said(trainer(make(), **options)) == []


def test_a_state_that_is_passed_is_no_reset():
    class Step(Single):
        def forward(self, x, state):
            spk, mem = self.lif(self.a(x), self.lif.reset_mem() if state is None else state)
            return self.c(spk), mem

    net = Stateful(sltt_ext.convert(Step(lambda: snntorch.Leaky(beta=0.9))))
    assert said(sltt_ext.OnlineTrainer(net, F.cross_entropy, T, time_dim=0)) == []


def test_later_iterations_stand_around_no_neuron():
    net, standing = Multi(), []
    online = trainer(net, chunk=1, pack_spikes=False, cache_invariant=True)
    net.a.register_forward_hook(lambda *_: standing.append("forward" in vars(net.lif)))
    online.forward_backward(X, TARGET)
    online.forward_backward(X, TARGET)
    assert standing == [True] * T + [False] * T


# resets


class ResetsItself(Multi):
    def forward(self, x_seq):
        functional.reset_net(self)
        return super().forward(x_seq)


class ResetsItsMultiStep(Single):
    def __init__(self):
        super().__init__(leaky)

    def forward(self, x):
        utils.reset(self)
        return super().forward(x)


RESETS = {"SpikingJelly": ResetsItself, "snnTorch": lambda: MultiStep(sltt_ext.convert(ResetsItsMultiStep()))}


@pytest.mark.parametrize(
    "options", [{}, {"chunk": 3}, {"schedule": lambda T, _: [2, 3]}], ids=["steps", "chunks", "schedule"]
)
@pytest.mark.parametrize("make", RESETS.values(), ids=RESETS)
def test_a_network_that_resets_itself_is_refused_in_parts(make, options):
    net = make()
    online = trainer(net, **options)
    with pytest.raises(ConfigurationError, match=r"resets its neurons in forward.*chunk=time_steps"):
        online.forward_backward(X, TARGET)
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("make", RESETS.values(), ids=RESETS)
def test_a_network_that_resets_itself_is_right_in_one_call(make):
    online = trainer(make(), chunk=T)
    plain = trainer(Multi() if make is ResetsItself else MultiStep(sltt_ext.convert(Single(leaky))), chunk=T)
    assert said(online) == said(plain) == []
    assert oracle.relative_error(oracle.gradients(online.net), oracle.gradients(plain.net)) < 1e-6


@pytest.mark.parametrize("reset", [functional.reset_net, utils.reset, lambda net: setattr(net.lif, "v", 0.0)])
def test_a_reset_at_every_single_step_is_said(reset):
    class Forgets(Single):
        def forward(self, x):
            reset(self)
            return super().forward(x)

    found = said(trainer(Forgets(leaky if reset is utils.reset else neuron.LIFNode)))
    assert len(found) == 1
    assert "is reset in the middle of a sequence: leave the reset out" in found[0]


class Inhibits(Single):
    """Changes the state from step to step, and resets nothing."""

    def forward(self, x):
        if isinstance(self.lif.v, torch.Tensor):
            self.lif.v = 0.9 * self.lif.v
        return super().forward(x)


def test_a_state_that_is_changed_is_not_reset():
    assert said(trainer(Inhibits())) == []


# batches


class BatchOfOne(Single):
    def forward(self, x):
        return super().forward(x).mean(0, keepdim=True)


class TimeInFront(Single):
    def forward(self, x):
        return torch.stack([super().forward(x)] * 3)


class Patches(Single):
    """As detection heads do: more than one row for a sample."""

    def forward(self, x):
        return super().forward(torch.cat([x, 2 * x]))


@pytest.mark.filterwarnings("ignore:Using a target size")  # torch's own
@pytest.mark.parametrize(
    ("make", "shape"), [(BatchOfOne, r"\[1, 4\], with 1"), (TimeInFront, r"\[3, 5, 4\], with 3")]
)
def test_an_output_of_another_batch_is_said(make, shape):
    with pytest.warns(SLTTWarning, match=rf"for a batch of {N}, the output of one step has shape {shape}"):
        trainer(make(), F.mse_loss).forward_backward(X, SOFT)


def test_an_output_of_more_rows_is_not():
    assert said(trainer(Patches(), lambda output, _: output.pow(2).mean())) == []


def test_the_counts_are_of_the_call_alone():
    """A loss that runs a part of the network again adds no step."""
    net = Multi()

    def loss_fn(output, target):
        net.lif(net.a(X[:1]))
        return F.cross_entropy(output, target)

    assert said(trainer(net, loss_fn)) == []


# states and axes that are mistaken for something else


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
