"""`over_time(time_inside=)`: the comparison of a network, step by step, with the network as it is."""

import copy
import threading
import warnings

import oracle
import pytest
import snntorch
import torch
from inside_networks import TARGET, Inside, Loop, T, X, oracle_gradients, snntorch_net, spikingjelly_net
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import spectral_norm

import sltt_ext
from sltt_ext.errors import ConfigurationError, SLTTError, SLTTWarning
from sltt_ext.snntorch import MultiStep


class Computing(nn.Module):
    """Computes its neuron's threshold from a parameter before each call."""

    def __init__(self):
        super().__init__()
        self.raw, self.neuron = nn.Parameter(torch.tensor(0.3)), neuron.IFNode()

    def forward(self, x):
        self.neuron.v_threshold = F.softplus(self.raw)
        return self.neuron(x)


def recurrent():
    return snntorch.RLeaky(beta=0.8, linear_features=6, init_hidden=True)


@pytest.mark.parametrize("between", [(), (recurrent,)], ids=["Leaky", "RLeaky"])
@pytest.mark.parametrize("multi_step", [False, True])
def test_snntorch_which_computes_in_float32_whatever_it_is_given(multi_step, between):
    net = snntorch_net(*(make() for make in between))
    wanted = oracle_gradients(copy.deepcopy(net))
    body = MultiStep(sltt_ext.convert(net)) if multi_step else net
    whole = sltt_ext.over_time((Inside if multi_step else Loop)(body), time_inside="T")
    F.cross_entropy(whole(X), TARGET).backward()
    assert oracle.relative_error(oracle.gradients(net), wanted) < 1e-6
    whole = sltt_ext.over_time(nn.Sequential(Loop(snntorch_net()), nn.Softmax(-1)), time_inside="*.T")
    with pytest.raises(ConfigurationError, match="not linear in the average"):
        whole(X)


@pytest.mark.parametrize(
    "between", [Computing, lambda: spectral_norm(nn.Linear(6, 6))], ids=["threshold", "weight"]
)
def test_what_was_computed_from_parameters_is_copied(between):
    layers = between()
    wanted = oracle_gradients(spikingjelly_net(copy.deepcopy(layers), step_mode="s"))
    net = sltt_ext.over_time(Loop(spikingjelly_net(layers, step_mode="s")), time_inside="T")
    for iteration in range(3):
        net.zero_grad()
        F.cross_entropy(net(X), TARGET).backward()
        if iteration == 0:  # whose power iteration goes on
            assert oracle.relative_error(oracle.gradients(net.body), wanted) < 1e-6


def test_a_silent_network_does_not_tell_whether_it_averages():
    net = Inside(spikingjelly_net())
    net.body[1].v_threshold = 1e6
    sltt_ext.over_time(net, time_inside="T")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(9):
            net(X)
    with pytest.warns(SLTTWarning, match="do its neurons fire"):
        net(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(X)


def test_one_sample_in_evaluation():
    net = sltt_ext.over_time(Loop(spikingjelly_net(nn.BatchNorm1d(6), step_mode="s")).eval(), time_inside="T")
    by_steps = spikingjelly_net(nn.BatchNorm1d(6), step_mode="s").eval()
    wanted = torch.stack([by_steps(X[:1]) for _ in range(T)]).mean(0)
    assert torch.allclose(net(X[:1]), wanted, atol=1e-6)


@pytest.mark.filterwarnings("ignore:batch norms take their statistics")
def test_batch_norms_without_running_statistics():
    """They see other statistics in each call, as all batch norms in training do; that is no other network."""
    norm = layer.SeqToANNContainer(nn.BatchNorm1d(6, track_running_stats=False))
    net = sltt_ext.over_time(Inside(spikingjelly_net(norm)), time_inside="T")
    F.cross_entropy(net(X), TARGET).backward()
    wanted = oracle_gradients(spikingjelly_net(nn.BatchNorm1d(6, track_running_stats=False), step_mode="s"))
    assert oracle.relative_error(oracle.gradients(net.body), wanted) < 1e-6
    assert norm[0].running_mean is None


def test_the_comparison_leaves_the_input_alone():
    class Changing(Inside):
        def forward(self, x):
            return super().forward(x.add_(1.0))

    net = sltt_ext.over_time(Changing(spikingjelly_net()).double(), time_inside="T")
    x = X.double()
    with torch.no_grad():
        net(x)
    assert torch.equal(x, X.double() + T)  # once in each step, and no more


class InTraining(Inside):
    """Returns all steps in training, for a loss of each, and their mean in evaluation; or the other way round."""

    def forward(self, x):
        s = self.body(x.unsqueeze(0).repeat(self.T, 1, 1))
        return s if self.training == self.averages else s.mean(0)


@pytest.mark.parametrize("steps_in_training", [True, False])
@pytest.mark.parametrize("first", ["training", "evaluation"])
def test_outputs_that_differ_in_training(steps_in_training, first):
    body = spikingjelly_net()
    plain = [copy.deepcopy(body) for _ in range(2)]
    net = sltt_ext.over_time(InTraining(body, steps_in_training), time_inside="T")
    if first == "evaluation":
        net.eval()
        net(X)
        net.train()
    wanted = oracle_gradients(plain[0]) if not steps_in_training else None
    output = net(X)
    assert output.shape == ((T, 3, 5) if steps_in_training else (3, 5))
    if steps_in_training:
        functional.set_step_mode(plain[1], "s")
        outputs = []
        for _ in range(T):
            outputs.append(plain[1](X))
            oracle.detach_memories(plain[1])
        torch.stack(outputs).pow(2).mean().backward()
        output.pow(2).mean().backward()
        wanted = oracle.gradients(plain[1])
    else:
        F.cross_entropy(output, TARGET).backward()
    assert oracle.relative_error(oracle.gradients(net), wanted) < 1e-6
    assert net.eval()(X).shape == ((3, 5) if steps_in_training else (T, 3, 5))


class MoreInTraining(Inside):
    """With an auxiliary head in training."""

    def forward(self, x):
        s = self.body(x.unsqueeze(0).repeat(self.T, 1, 1))
        return (s.mean(0), s) if self.training else s.mean(0)


def test_more_outputs_in_training():
    net = sltt_ext.over_time(MoreInTraining(spikingjelly_net()), time_inside="T")
    assert [output.shape for output in net(X)] == [(3, 5), (T, 3, 5)]
    assert net.eval()(X).shape == (3, 5)


class MakesStates(nn.Module):
    """As some code does instead of ``init_leaky``."""

    def __init__(self, threshold):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.lif = nn.Linear(6, 5), snntorch.Leaky(beta=0.9, threshold=threshold)

    def forward(self, x):
        mem, spikes = torch.zeros(x.shape[1], 5), []
        for x_t in x:
            spk, mem = self.lif(self.fc(x_t), mem)
            spikes.append(spk)
        return torch.stack(spikes)


def test_a_network_that_makes_its_states_and_is_silent_at_first():
    x_seq = torch.rand(T, 3, 6)
    net = sltt_ext.over_time(MakesStates(2.0), time_inside="x", time_dim=0)
    with pytest.warns(SLTTWarning, match="lif: a Leaky is given a state at rest in the middle of a sequence"):
        assert not net(0.5 * x_seq).any()
    with pytest.raises(ConfigurationError, match="makes states itself"):
        net(20 * x_seq)


class PerStep(Inside):
    """Has weights for each step, which are the same at the beginning."""

    def __init__(self, body):
        super().__init__(body)
        self.w = nn.Parameter(torch.ones(T))

    def forward(self, x):
        s = self.body(x.unsqueeze(0).repeat(self.T, 1, 1))
        return (s * self.w[: self.T, None, None]).mean(0)


def test_weights_of_single_steps_that_are_the_same_at_first():
    net = sltt_ext.over_time(PerStep(spikingjelly_net()), time_inside="T")
    before = [parameter.clone() for parameter in net.parameters()]
    with pytest.raises(ConfigurationError, match="treats single steps in another way"):
        net(X)
    assert all(map(torch.equal, before, net.parameters()))


class Flat(Inside):
    """Returns ``[T * N, C]``."""

    def forward(self, x):
        return self.body(x.unsqueeze(0).repeat(self.T, 1, 1)).flatten(0, 1)


def test_a_first_call_with_one_sample_does_not_tell_where_time_is():
    net = sltt_ext.over_time(Flat(spikingjelly_net()), time_inside="T")
    net(X[:1])
    with pytest.raises(
        ConfigurationError, match=r"an output of 1 step is \[3, 5\].*for every number of samples"
    ):
        net(X)


class Draws(Loop):
    """Draws its input anew at each step, in evaluation as well."""

    def __init__(self, body, generator):
        super().__init__(body)
        self.generator = generator

    def forward(self, x):
        def drawn():
            return (torch.rand(x.shape, generator=self.generator) < x / 2).to(x)

        return torch.stack([self.body(drawn()) for _ in range(self.T)]).mean(0)


@pytest.mark.parametrize("own", [False, True])
def test_random_numbers_at_each_step(own):
    def made():
        torch.manual_seed(3)
        return Draws(spikingjelly_net(step_mode="s"), torch.Generator().manual_seed(3) if own else None)

    plain, net = made(), sltt_ext.over_time(made(), time_inside="T")
    for _ in range(2):
        torch.manual_seed(3)
        wanted = plain(X)
        functional.reset_net(plain)
        torch.manual_seed(3)
        torch.testing.assert_close(net(X), wanted)


def test_hooks_do_not_see_the_comparison():
    net = sltt_ext.over_time(Loop(spikingjelly_net(step_mode="s")), time_inside="T")
    seen = []
    net.body[0].register_forward_hook(lambda module, inputs, output: seen.append(module.training))
    with torch.no_grad():
        net(X)
    assert seen == [True] * T


def test_an_output_that_does_not_depend_on_time():
    class WithEmbedding(Loop):
        def forward(self, x):
            return super().forward(x), x.square()

    net = sltt_ext.over_time(WithEmbedding(spikingjelly_net(step_mode="s")), time_inside="T")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            _, embedding = net(X)
    torch.testing.assert_close(embedding, X.square())


def refused(make_output):
    class Returns(Inside):
        def forward(self, x):
            return make_output(self.body(x.unsqueeze(0).repeat(self.T, 1, 1)))

    return sltt_ext.over_time(Returns(spikingjelly_net()), time_inside="T")


REFUSED = {
    "a class": (lambda s: (s.mean(0), s.mean(0).argmax(1)), "an output has no mean over time"),
    "a list of steps": (list, r"returns 4 tensors for 4 steps, and 1 for one.*torch.stack"),
    "no tensor": (lambda s: None, "returned no tensor"),
    "nothing of the first step": (lambda s: torch.stack(list(s)[1:]), "not one alone.*non-empty"),
    "the last step": (lambda s: s[-1], "returns the last step or the maximum alone"),
}


@pytest.mark.parametrize(("make_output", "message"), REFUSED.values(), ids=REFUSED)
def test_outputs_that_are_refused(make_output, message):
    with pytest.raises(SLTTError, match=message):
        refused(make_output)(X)


def test_flags_of_each_step():
    output, flags = refused(lambda s: (s, s > 0))(X)
    assert torch.equal(flags, output > 0)


def test_what_cannot_be_copied():
    net = Loop(spikingjelly_net(step_mode="s"))
    net.lock = threading.Lock()
    with pytest.raises(ConfigurationError, match=r"cannot be copied .*keep what cannot be copied out"):
        sltt_ext.over_time(net, time_inside="T")(X)


def test_a_network_without_parameters():
    net = sltt_ext.over_time(Inside(neuron.IFNode(step_mode="m")), time_inside="T")
    assert net(X).shape == (3, 6)


BATCHES = []  # not kept by the network


class Noting(Loop):
    """Notes its batches, and may take one size of them alone."""

    def __init__(self, body, only=None):
        super().__init__(body)
        self.only = only

    def forward(self, x, context=None):
        BATCHES.append(len(x))
        if self.only is not None:
            x = x.view(self.only, 6)
        return super().forward(x if context is None else x + context[: len(x)])


@pytest.mark.parametrize("only", [None, 12])
@pytest.mark.parametrize(
    "context", [None, torch.rand(12, 6), torch.rand(15, 6)], ids=["alone", "batch", "other"]
)
def test_a_few_samples_are_compared_if_the_network_takes_them(only, context):
    x = torch.cat([X] * 4)
    body = spikingjelly_net(step_mode="s")
    wanted = Noting(copy.deepcopy(body))(x, context)
    net = sltt_ext.over_time(Noting(body, only), time_inside="T")
    BATCHES.clear()
    torch.testing.assert_close(net(x, context), wanted)
    compared = BATCHES[:-T]
    assert set(compared) == ({4} if only is None else {4, 12})
    assert BATCHES[-T:] == [12] * T
