"""`over_time(norms="sequence")`: batch norms by the statistics of all steps, against the network as it is and autograd."""

import functools

import oracle
import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.analysis import peak_activation_bytes
from sltt_ext.errors import ConfigurationError

T, TARGET = 4, torch.tensor([0, 2, 1])
X_SEQ = torch.randn(T, 3, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class OverTimeAndSamples(nn.Module):
    """A norm over time as a third dimension of places."""

    def __init__(self, features):
        super().__init__()
        self.bn = nn.BatchNorm3d(features)

    def forward(self, x):
        return self.bn(x.permute(1, 2, 0, 3, 4)).permute(2, 0, 1, 3, 4)


class Norms(nn.Module):
    """Two norms; ``norm`` makes one, and ``T`` is where time is inside."""

    def __init__(self, norm, inside=False):
        super().__init__()
        torch.manual_seed(0)
        self.T, self.inside = T, inside
        self.conv1, self.conv2 = layer.Conv2d(2, 4, 3, padding=1), layer.Conv2d(4, 4, 3, padding=1)
        self.norm1, self.norm2 = norm(4), norm(4)
        self.fc = layer.Linear(144, 5)
        self.lif1, self.lif2 = neuron.LIFNode(v_threshold=0.5), neuron.LIFNode(v_threshold=0.5)
        functional.set_step_mode(self, "m")
        self.double()

    def forward(self, x):
        x = x.unsqueeze(0).repeat(self.T, 1, 1, 1, 1) if self.inside else x
        x = self.lif1(self.norm1(self.conv1(x)))
        x = self.fc(self.lif2(self.norm2(self.conv2(x))).flatten(2))
        return x.mean(0) if self.inside else x


def folded(features):
    return layer.SeqToANNContainer(nn.BatchNorm2d(features))


def told(features, **options):
    """With weights that are not those of a new norm."""
    norm = layer.BatchNorm2d(features, **options)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.linspace(-0.2, 0.3, features))
    return norm


NORMS = {
    "takes sequences": told,
    "in a container": folded,
    "time as a place": OverTimeAndSamples,
    "no weights": functools.partial(told, affine=False),
    "cumulative": functools.partial(told, momentum=None),
    "no running statistics": functools.partial(told, track_running_stats=False),
}


def norms_of(net):
    return [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def folded_in_front(x):
    return x.flatten(0, 1) if x.shape[1:3] == (3, 4) else x


def by_constants(norm, statistics, x):
    """The norm by constant statistics, with the gradient through those of ``x``, in plain autograd."""
    shape, y = x.shape, folded_in_front(x)
    over, channels = [d for d in range(y.dim()) if d != 1], [1, -1] + [1] * (y.dim() - 2)
    mean, variance = (one.view(channels) for one in statistics)
    own_mean, own_variance = y.mean(over, keepdim=True), ((y - mean) ** 2).mean(over, keepdim=True)
    mean = mean + (own_mean - own_mean.detach())
    variance = variance + (own_variance - own_variance.detach())
    z = (y - mean) / (variance + norm.eps).sqrt()
    if norm.weight is not None:
        z = z * norm.weight.view(channels) + norm.bias.view(channels)
    return z.view(shape)


def as_it_is(net, x_seq):
    """All steps in one call: outputs, and what each norm has seen."""
    seen, hooks = {}, []

    def see(norm, args):
        y = folded_in_front(args[0]).movedim(1, 0).flatten(1)
        seen[norm] = y.mean(1), y.var(1, correction=0)

    hooks = [norm.register_forward_pre_hook(see) for norm in norms_of(net)]
    with torch.no_grad():
        outputs = net(x_seq)
    functional.reset_net(net)
    for hook in hooks:
        hook.remove()
    return outputs, seen


def expected(net, loss_fn, selected=range(T), chunk=1, x_seq=X_SEQ):
    """Outputs of the network as it is, and the gradient: chunk by chunk, each from a constant state."""
    outputs, seen = as_it_is(net, x_seq)
    for norm, statistics in seen.items():
        norm.forward = functools.partial(by_constants, norm, statistics)
    oracle.detach_on_entry(net)
    steps = torch.cat([net(part) for part in x_seq.split(chunk)])
    factors = torch.tensor([T / len(selected) * (t in selected) for t in range(T)]).view(T, 1, 1)
    loss_fn(steps.detach() + factors * (steps - steps.detach())).backward()
    return outputs, oracle.gradients(net)


def cross_entropy(output_seq):
    return F.cross_entropy(output_seq.mean(0), TARGET)


def buffers(net):
    return [buffer.clone() for name, buffer in net.named_buffers() if "running" in name or "num_" in name]


def over_time(net, **options):
    return sltt_ext.over_time(net, time_dim=0, returns="sequence", norms="sequence", **options)


@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("norm", NORMS)
def test_outputs_are_those_of_the_network_as_it_is_and_gradients_those_of_its_statistics(norm, chunk):
    reference, net = Norms(NORMS[norm]), over_time(Norms(NORMS[norm]), chunk=chunk)
    outputs, gradients = expected(reference, cross_entropy, chunk=chunk)
    for _ in range(2):  # what is found out in the first iteration is used in the second
        net.zero_grad()
        output_seq = net(X_SEQ)
        cross_entropy(output_seq).backward()
        assert torch.allclose(output_seq, outputs, atol=1e-12)
        assert oracle.relative_error(oracle.gradients(net), gradients) < 1e-9


@pytest.mark.parametrize("norm", NORMS)
def test_running_statistics_move_as_in_one_call_of_the_network(norm):
    reference, net = Norms(NORMS[norm]), over_time(Norms(NORMS[norm]))
    as_it_is(reference, X_SEQ)
    cross_entropy(net(X_SEQ)).backward()
    assert all(map(torch.allclose, buffers(net), buffers(reference)))
    assert all(norm.training for norm in norms_of(net))


@pytest.mark.parametrize("memory_budget", [None, "1GiB", 60_000])
@pytest.mark.parametrize("options", [{}, {"pack_spikes": True}, {"cache_invariant": False}])
@pytest.mark.parametrize("k", [1, 2, T])
def test_how_steps_are_run_does_not_matter(k, options, memory_budget):
    generator = torch.Generator().manual_seed(3)
    selected = torch.randperm(T, generator=torch.Generator().manual_seed(3))[:k].tolist()
    outputs, gradients = expected(Norms(told), cross_entropy, selected)
    net = over_time(Norms(told), k=k, memory_budget=memory_budget, generator=generator, **options)
    for _ in range(2):
        net.zero_grad()
        generator.manual_seed(3)
        output_seq = net(X_SEQ)
        cross_entropy(output_seq).backward()
        assert torch.allclose(output_seq, outputs, atol=1e-12)
        assert oracle.relative_error(oracle.gradients(net), gradients) < 1e-9


def test_a_network_with_time_inside_gives_what_it_gave():
    reference, net = Norms(told), Norms(told, inside=True)
    x_seq = X_SEQ[:1].repeat(T, 1, 1, 1, 1)
    as_it_was = Norms(told)
    outputs, _ = as_it_is(as_it_was, x_seq)
    sltt_ext.over_time(net, time_inside="T", norms="sequence")
    _, gradients = expected(reference, cross_entropy, x_seq=x_seq)
    output = net(x_seq[0])
    F.cross_entropy(output, TARGET).backward()
    assert torch.allclose(output, outputs.mean(0), atol=1e-12)
    assert all(map(torch.allclose, buffers(net), buffers(as_it_was)))
    assert oracle.relative_error(oracle.gradients(net), gradients) < 1e-9


def test_an_input_that_stays_the_same():
    """What follows from it is evaluated once, a norm by the statistics of all steps as well."""
    reference, net = Norms(told), Norms(told)
    x_seq = X_SEQ[:1].repeat(T, 1, 1, 1, 1)
    as_it_is(reference, x_seq)
    before = buffers(reference)
    _, gradients = expected(Norms(told), cross_entropy, x_seq=x_seq)
    sltt_ext.over_time(net, T, norms="sequence")
    for iteration in range(2):
        net.zero_grad()
        F.cross_entropy(net(X_SEQ[0]), TARGET).backward()
        assert oracle.relative_error(oracle.gradients(net), gradients) < 1e-9
        assert iteration or all(map(torch.allclose, buffers(net), before))
    assert all(norm.num_batches_tracked == 2 for norm in norms_of(net))


def test_a_sequence_that_goes_on_starts_from_where_the_last_one_ended():
    reference, net = Norms(told), over_time(Norms(told), carry=True)
    with torch.no_grad():
        expected_seq = [reference(X_SEQ), reference(X_SEQ)]
    assert all(torch.allclose(net(X_SEQ), outputs, atol=1e-12) for outputs in expected_seq)


def test_the_input_gets_its_gradient():
    reference, x_seq = Norms(told), X_SEQ.clone().requires_grad_()
    expected(reference, cross_entropy, x_seq=x_seq)
    own = X_SEQ.clone().requires_grad_()
    cross_entropy(over_time(Norms(told))(own)).backward()
    assert oracle.relative_error([own.grad], [x_seq.grad]) < 1e-9


def test_the_pass_that_looks_first_leaves_no_trace():
    """Random numbers and what modules keep are those of the steps alone."""

    class Counting(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x + 0.1 * torch.randn_like(x)

    nets = [Norms(told), Norms(told)]
    for net in nets:
        net.norm1 = nn.Sequential(net.norm1, Counting())
    with torch.no_grad():
        torch.manual_seed(0)
        nets[0](X_SEQ[0:1])
        first = torch.rand(1)
        torch.manual_seed(0)
        over_time(nets[1])(X_SEQ)
        torch.manual_seed(0)
        torch.randn(3, 4, 6, 6, dtype=torch.float64)
    assert torch.equal(torch.rand(1), first)
    assert nets[1].norm1[1].calls == T


def test_in_evaluation_nothing_is_looked_at_first():
    net, calls = Norms(told).eval(), []
    with torch.no_grad():
        outputs = Norms(told).eval()(X_SEQ)
        net.conv1.register_forward_hook(lambda module, args, output: calls.append(len(output)))
        assert torch.allclose(over_time(net)(X_SEQ), outputs, atol=1e-12)
    assert calls == [1] * T


def deep():
    blocks = [
        part
        for _ in range(8)
        for part in (layer.Conv2d(4, 4, 3, padding=1), layer.BatchNorm2d(4), neuron.LIFNode(v_threshold=0.5))
    ]
    net = nn.Sequential(*blocks, layer.Flatten(), layer.Linear(4 * 16 * 16, 5))
    functional.set_step_mode(net, "m")
    return net


def peak(chunk):
    net, x = sltt_ext.over_time(deep(), T, norms="sequence", chunk=chunk), torch.rand(2, 4, 16, 16)
    return peak_activation_bytes(lambda: net(x).sum().backward())


def test_memory_is_not_that_of_all_steps():
    assert peak(1) < 0.5 * peak(T)


class Twice(Norms):
    def forward(self, x):
        return super().forward(self.norm1(x.repeat(1, 1, 2, 1, 1))[:, :, :2])


class OfItsOwn(nn.BatchNorm2d):
    """Of a kind that nobody knows."""


BAD = {
    "a word": (lambda: sltt_ext.over_time(Norms(told), T, norms="all"), "'step' or 'sequence'"),
    "single steps": (lambda: over_time(functional.set_step_mode(net := Norms(told), "s") or net)(X_SEQ), "takes single steps"),
    "twice": (lambda: over_time(Twice(told))(X_SEQ), "'norm1' more than once"),
    "of its own": (
        lambda: over_time(Norms(lambda features: layer.SeqToANNContainer(OfItsOwn(features))))(X_SEQ), "'norm2.0', a OfItsOwn|'norm1.0', a OfItsOwn",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_have_the_statistics_of_all_steps(case):
    run, message = BAD[case]
    with pytest.raises(ConfigurationError, match=message):
        run()


def test_an_error_leaves_running_statistics_as_they_were():
    net = over_time(Norms(told))
    net.fc.register_forward_hook(lambda *_: 1 / 0)
    before = buffers(net)
    with pytest.raises(ZeroDivisionError):
        net(X_SEQ)
    assert all(map(torch.equal, buffers(net), before))
    assert all(norm.training for norm in norms_of(net))
