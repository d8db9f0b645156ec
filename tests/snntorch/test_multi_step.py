import copy
import warnings

import oracle
import pytest
import snntorch
import torch
import tutorials
from hypothesis import given, settings
from hypothesis import strategies as st
from snntorch import surrogate, utils
from spikingjelly.activation_based import neuron as spikingjelly_neuron
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.errors import ConfigurationError, InputError, SLTTError, SLTTWarning
from sltt_ext.snntorch import MultiStep

T, N = 5, 3


def sequence(shape, time_steps=T, seed=1):
    return 2 * torch.rand(time_steps, N, *shape, generator=torch.Generator().manual_seed(seed))


def tensors(output):
    return [output] if isinstance(output, torch.Tensor) else list(output)


def weighted(output, t):
    """A loss on everything the network returns, another one at each step."""
    generator = torch.Generator().manual_seed(100 + t)
    return sum((part * torch.randn(part.shape, generator=generator)).sum() for part in tensors(output))


def check(net, x_seq, step=None, tolerance=5e-6):  # how layers over T * N round depends on the threads, too
    """Outputs, states, buffers and gradients of one multi-step call are those of the stepping original."""
    stepped, outputs = tutorials.stepping(net, x_seq, weighted, step)
    converted = sltt_ext.convert(copy.deepcopy(net))
    actual = MultiStep(converted)(x_seq)
    steps = [
        actual[t] if isinstance(actual, torch.Tensor) else [part[t] for part in actual]
        for t in range(len(x_seq))
    ]
    sum(weighted(output, t) for t, output in enumerate(steps)).backward()
    assert tensors(actual)[0].detach().abs().mean() > 0.02  # not silent
    for got, want in zip(steps, outputs, strict=True):
        for pair in zip(tensors(got), tensors(want), strict=True):
            torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5)  # layers over T * N round differently
    assert oracle.relative_error(oracle.gradients(converted), oracle.gradients(stepped)) < tolerance
    for (name, got), want in zip(converted.named_buffers(), stepped.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=name)
    return actual


NETWORKS = {
    "fully connected": (tutorials.fully_connected, (12,)),
    "convolutional": (tutorials.convolutional, (1, 12, 12)),
    "residual": (tutorials.Residual, (1, 12, 12)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("reset_mechanism", ["subtract", "zero", "none"])
@pytest.mark.parametrize("reset_delay", [True, False])
@pytest.mark.parametrize("learn", [True, False])
def test_networks(name, reset_mechanism, reset_delay, learn):
    make, shape = NETWORKS[name]
    options = {"reset_mechanism": reset_mechanism, "reset_delay": reset_delay}
    net = tutorials.strong(make(**options, learn_beta=learn, learn_threshold=learn))
    check(net, sequence(shape))


RECURRENT = {"linear_features": 16, "learn_beta": True}
OTHERS = {
    "Synaptic": (snntorch.Synaptic, {"alpha": 0.7, "learn_alpha": True}),
    "Alpha": (snntorch.Alpha, {"alpha": 0.95, "threshold": 0.1}),
    "Lapicque": (snntorch.Lapicque, {}),
    "RLeaky": (snntorch.RLeaky, RECURRENT),
    "RLeaky, one to one": (snntorch.RLeaky, {"all_to_all": False, "V": 0.4}),
    "RSynaptic": (snntorch.RSynaptic, {"alpha": 0.7, **RECURRENT}),
    "Leaky, custom surrogate": (
        snntorch.Leaky,
        {"spike_grad": surrogate.custom_surrogate(lambda u, g, s: g * s)},
    ),
    "Leaky, graded": (snntorch.Leaky, {"graded_spikes_factor": 0.6, "learn_graded_spikes_factor": True}),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("output", [True, False])
def test_other_neurons_step_inside(name, output):
    cls, kwargs = OTHERS[name]
    hidden = cls(beta=0.8, init_hidden=True, output=output, **kwargs)
    net = nn.Sequential(nn.Linear(12, 16), hidden)
    check(tutorials.strong(net), sequence((12,)))


@pytest.mark.parametrize("cls", [snntorch.SLSTM, snntorch.SConv2dLSTM])
def test_spiking_lstms_step_inside(cls):
    torch.manual_seed(0)
    if cls is snntorch.SLSTM:
        net, shape = cls(12, 12, threshold=0.05, init_hidden=True, output=True), (12,)
    else:
        net, shape = cls(2, 3, 3, max_pool=2, threshold=0.05, init_hidden=True, output=True), (2, 6, 6)
    check(net, sequence(shape))


@pytest.mark.skipif(not hasattr(snntorch, "DeltaLeaky"), reason="since snnTorch 1.0")
def test_delta_leaky_returns_a_pair_as_state():
    net = nn.Sequential(
        nn.Linear(12, 16), snntorch.DeltaLeaky(beta=0.8, init_hidden=True, delta_threshold=0.5)
    )
    tutorials.strong(net)
    x_seq = sequence((12,))
    spk, (mem, mem_prev) = MultiStep(sltt_ext.convert(copy.deepcopy(net)))(x_seq)
    for t, x in enumerate(x_seq):
        want_spk, (want_mem, want_prev) = net(x)
        torch.testing.assert_close((spk[t], mem[t], mem_prev[t]), (want_spk, want_mem, want_prev))


@settings(max_examples=40)
@given(
    time_steps=st.integers(1, 7),
    split=st.integers(1, 6),
    beta=st.floats(0, 1.2),
    threshold=st.floats(0.1, 1.5),
    surrogate_name=st.sampled_from(
        ["atan", "fast_sigmoid", "triangular", "straight_through_estimator", "SFS"]
    ),
    seed=st.integers(0, 1000),
)
def test_any_split_of_the_sequence_continues_where_the_last_call_ended(
    time_steps, split, beta, threshold, surrogate_name, seed
):
    spike_grad = getattr(surrogate, surrogate_name)()
    options = {"beta": beta, "threshold": threshold, "spike_grad": spike_grad, "learn_beta": True}
    net = tutorials.strong(tutorials.fully_connected(**options), seed)
    x_seq = sequence((12,), time_steps, seed)
    stepped, outputs = tutorials.stepping(net, x_seq, weighted)
    converted = sltt_ext.convert(copy.deepcopy(net))
    multi_step, done = MultiStep(converted), 0
    for part in x_seq.split(split):
        spk, mem = multi_step(part)
        for t in range(len(part)):
            torch.testing.assert_close(spk[t], outputs[done + t][0])
            torch.testing.assert_close(mem[t], outputs[done + t][1], rtol=1e-5, atol=1e-5)
        sum(weighted((spk[t], mem[t]), done + t) for t in range(len(part))).backward()
        done += len(part)
    got, want = oracle.gradients(converted), oracle.gradients(stepped)
    # in float32, as snnTorch's spikes are; a steep surrogate makes up to fifty times as much of a rounding
    assert oracle.relative_error(got, want) < 1e-4 or max(map(torch.Tensor.norm, want)) < 1e-3


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_reads_the_statistics_of_each_step(training):
    net = tutorials.strong(tutorials.convolutional(norm=True))
    net(sequence((1, 12, 12), 1)[0])  # running statistics that are not the initial ones
    utils.reset(net)
    check(net.train(training), sequence((1, 12, 12)))


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_norms_of_one_sample(samples, norm):
    torch.manual_seed(0)
    norms = [norm(4, affine=True, track_running_stats=True) for _ in range(2)]
    leaky = [snntorch.Leaky(beta=0.8, init_hidden=True, threshold=0.2) for _ in range(2)]
    convs = [nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)]
    net = nn.Sequential(convs[0], norms[0], leaky[0], convs[1], norms[1], leaky[1], nn.Flatten())
    check(net, sequence((1, 6, 6))[:, :samples])


class NormTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(12, 16), nn.BatchNorm1d(16)
        self.first, self.second = (snntorch.Leaky(beta=0.8, init_hidden=True) for _ in range(2))

    def forward(self, x):
        return self.second(self.norm(self.first(self.norm(self.fc(x)))))


def test_a_norm_that_runs_twice_says_what_it_counts():
    net = MultiStep(sltt_ext.convert(NormTwice()))
    with pytest.warns(SLTTWarning, match="count them in another order"):
        net(sequence((12,)))
    net.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(sequence((12,)))


class NeuronTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.lif = nn.Linear(12, 12), snntorch.Leaky(beta=0.8, init_hidden=True)

    def forward(self, x):
        return self.lif(3 * self.lif(self.fc(x)))


def test_a_neuron_that_runs_twice_is_refused():
    net = sltt_ext.convert(tutorials.strong(NeuronTwice()))
    with pytest.raises(ConfigurationError, match="Leaky runs more than once in a step"):
        MultiStep(net)(sequence((12,)))
    utils.reset(net)
    check(net, sequence((12,), 1))


class NormsInAList(nn.Module):
    """A list of norms that has nothing to do with time."""

    def __init__(self):
        super().__init__()
        self.fc, self.norms = nn.Linear(12, 16), nn.ModuleList([nn.BatchNorm1d(16), nn.BatchNorm1d(16)])
        self.lif = snntorch.Leaky(beta=0.8, init_hidden=True)

    def forward(self, x):
        y = self.fc(x)
        for norm in self.norms:
            y = norm(y)
        return self.lif(y)


def test_a_list_of_norms_is_no_norm_through_time():
    net = tutorials.strong(NormsInAList())
    check(net, sequence((12,)))
    multi_step = MultiStep(sltt_ext.convert(net))
    assert not multi_step.whole_sequence
    sltt_ext.OnlineTrainer(multi_step, F.cross_entropy, T, k=1).forward_backward(
        sequence((12,))[0], torch.arange(N)
    )


class ThroughTime(nn.Module):
    """Batch norm through time, as its documentation has it: the norm of step t is in a list."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 16)
        self.norm = snntorch.BatchNormTT1d(16, T)
        self.lif = snntorch.Leaky(beta=0.8, init_hidden=True)

    def forward(self, x, t=None):
        norm = self.norm if t is None else self.norm[t]
        return self.lif(norm(self.fc(x)))


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_through_time_keeps_its_meaning(training):
    net = tutorials.strong(ThroughTime()).train(training)
    check(net, sequence((12,)), step=lambda net, x, t: net(x, t))


def test_batch_norm_through_time_in_a_sequential():
    net = nn.Sequential(
        nn.Linear(12, 16), snntorch.BatchNormTT1d(16, T), snntorch.Leaky(beta=0.8, init_hidden=True)
    )
    check(tutorials.strong(net), sequence((12,)), step=lambda net, x, t: net[2](net[1][t](net[0](x))))


def test_batch_norm_through_time_needs_all_its_steps_in_one_call():
    multi_step = MultiStep(sltt_ext.convert(ThroughTime()))
    with pytest.raises(InputError, match="made for 5 time steps got a sequence of 3"):
        multi_step(sequence((12,), 3))
    with pytest.raises(ConfigurationError, match="whole sequence in one call"):
        sltt_ext.OnlineTrainer(multi_step, F.cross_entropy, T, chunk=2)
    online = sltt_ext.OnlineTrainer(multi_step, F.cross_entropy, T, chunk=T)
    assert online.forward_backward(sequence((12,))[0], torch.arange(N)).output.shape == (N, 16)


def test_neurons_that_keep_their_state_without_init_hidden():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.lif = nn.Linear(12, 16), snntorch.Leaky(beta=0.9)

        def forward(self, x):
            return self.lif(self.fc(x))

    check(tutorials.strong(Net()), sequence((12,)))


def test_states_that_are_passed_are_refused():
    net = sltt_ext.convert(tutorials.StatesPassed())
    multi_step = MultiStep(net)
    net.forward = lambda x: tutorials.StatesPassed.forward(net, x, None)
    with pytest.raises(ConfigurationError, match="init_hidden=True"):
        multi_step(sequence((12,)))
    assert net.lif1.sltt_time_steps is None  # and nothing of the sequence is left behind


def test_a_forward_that_does_not_keep_the_batch_in_front():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lif = snntorch.Leaky(beta=0.9, init_hidden=True)

        def forward(self, x):
            return self.lif(x).mean(0)

    with pytest.raises(InputError, match="keep the batch in front"):
        MultiStep(sltt_ext.convert(Net()))(sequence((12,)))


class OfTwo(nn.Module):
    """Takes two inputs in a dict or tuple."""

    def __init__(self):
        super().__init__()
        self.net = tutorials.fully_connected()

    def forward(self, x):
        first, second = x.values() if isinstance(x, dict) else x
        return self.net(first + torch.tanh(second))


@pytest.mark.parametrize("held", [lambda *parts: dict(zip("ab", parts)), lambda *parts: parts])
def test_several_inputs(held):
    net = sltt_ext.convert(OfTwo())
    parts = sequence((12,)), sequence((12,), seed=2)
    expected = MultiStep(copy.deepcopy(net.net))(parts[0] + torch.tanh(parts[1]))
    actual = MultiStep(net)(held(*parts))
    assert all(map(torch.equal, tensors(actual), tensors(expected)))


@pytest.mark.parametrize("x_seq", [torch.zeros(3), torch.zeros(0, 3, 12), {}, (torch.zeros(5, 3, 12), 1)])
def test_what_is_no_sequence(x_seq):
    with pytest.raises(InputError, match="T >= 1"):
        MultiStep(sltt_ext.convert(tutorials.fully_connected()))(x_seq)


def test_sequences_that_do_not_agree():
    with pytest.raises(InputError, match=r"first two axes, time and batch, got \[\(4, 3\), \(5, 3\)\]"):
        MultiStep(sltt_ext.convert(OfTwo()))((sequence((12,)), sequence((12,), time_steps=4)))


def test_what_cannot_be_run():
    with pytest.raises(SLTTError, match="not converted"):
        MultiStep(tutorials.fully_connected())
    mixed = nn.Sequential(tutorials.fully_connected(), spikingjelly_neuron.LIFNode())
    with pytest.raises(ConfigurationError, match="SLTTLIFNode"):
        MultiStep(sltt_ext.convert(mixed))


def test_reverting_leaves_a_network_that_is_not_converted():
    multi_step = MultiStep(sltt_ext.convert(tutorials.fully_connected()))
    sltt_ext.revert(multi_step)
    assert not sltt_ext.is_converted(multi_step)
    assert type(multi_step) is MultiStep


def test_a_reverted_network_is_refused():
    multi_step = MultiStep(sltt_ext.convert(tutorials.fully_connected()))
    sltt_ext.revert(multi_step)
    with pytest.raises(SLTTError, match="was reverted"):
        multi_step(torch.rand(T, 3, 12))
