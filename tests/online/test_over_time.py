"""`over_time`: any loss of a network over time, with an ordinary backward; against the original network and one graph."""

import copy
from collections import namedtuple
from dataclasses import dataclass

import networks
import oracle
import pytest
import snntorch
import torch
from over_time_oracle import TARGET, T, TimeInside, X, detach, gradients, original, random_net
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.errors import ConfigurationError, SLTTWarning
from sltt_ext.snntorch import MultiStep


def conv_snn():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        snntorch.Leaky(beta=0.9, init_hidden=True),
        nn.Conv2d(6, 6, 3, padding=1),
        snntorch.Synaptic(alpha=0.8, beta=0.7, init_hidden=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(96, 5),
    )
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return net


LOSSES = {
    "mean": lambda s: F.cross_entropy(s.mean(0), TARGET),
    "max over time": lambda s: F.cross_entropy(s.max(0).values, TARGET),
    "TET": lambda s: F.cross_entropy(s.flatten(0, 1), TARGET.repeat(len(s))),
    "last step": lambda s: F.cross_entropy(s[-1], TARGET),
    "spread over time": lambda s: s.var(0).mean() + F.cross_entropy(s.mean(0), TARGET),
}
MAKES = {
    "fused": networks.conv_net,
    "generic": lambda: networks.conv_net(neuron.QIFNode, v_c=0.5, v_threshold=0.8),
    "parametric": lambda: networks.conv_net(neuron.ParametricLIFNode),
    "random": random_net,
    "snnTorch": conv_snn,
}


@pytest.mark.parametrize("k", [None, 1, 2, T])
@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("loss", LOSSES)
def test_any_loss_of_all_steps(loss, make, k):
    """Equal to the original's but for the order in which steps are added up; masks and statistics are its, too."""
    reference, net = MAKES[make](), MAKES[make]()
    generator = torch.Generator().manual_seed(3)
    selected = None if k is None else torch.randperm(T, generator=generator)[:k].tolist()
    torch.manual_seed(4)
    LOSSES[loss](original(reference, [X] * T, selected)).backward()
    buffers = [
        buffer.clone() for name, buffer in reference.named_buffers() if "running" in name or "num_" in name
    ]
    sltt_ext.over_time(net, T, k=k, returns="sequence", generator=torch.Generator().manual_seed(3))
    for _ in range(3):  # what is found out in the first iterations is used in later ones
        net.zero_grad()
        net.load_state_dict(copy.deepcopy(MAKES[make]().state_dict()), strict=False)
        net._sltt_time_loop.settings.generator.manual_seed(3)
        torch.manual_seed(4)
        LOSSES[loss](net(X)).backward()
        assert oracle.relative_error(gradients(net), gradients(reference)) < 1e-6
    after = [buffer for name, buffer in net.named_buffers() if "running" in name or "num_" in name]
    assert all(map(torch.allclose, after, buffers))


@pytest.mark.parametrize("memory_budget", [None, "1GiB", 100_000])
@pytest.mark.parametrize("pack_spikes", [False, True])
@pytest.mark.parametrize(("step_mode", "chunk"), [("s", 1), ("m", 1), ("m", 2), ("m", T)])
def test_how_steps_are_run_does_not_matter(step_mode, chunk, pack_spikes, memory_budget):
    reference = networks.conv_net()
    F.cross_entropy(original(reference, [X] * T).mean(0), TARGET).backward()
    net = sltt_ext.over_time(
        networks.conv_net(step_mode=step_mode),
        T,
        chunk=chunk,
        pack_spikes=pack_spikes,
        memory_budget=memory_budget,
    )
    for _ in range(3):
        net.zero_grad()
        output = net(X)
        F.cross_entropy(output, TARGET).backward()
        assert oracle.relative_error(gradients(net), gradients(reference)) < 1e-6
    assert output.shape == (3, 5)


def test_generic_neurons_are_exact():
    """In float64 nothing is left but the order of a sum."""
    reference, net = (networks.conv_net(neuron.QIFNode).double() for _ in range(2))
    LOSSES["spread over time"](original(reference, [X.double()] * T)).backward()
    LOSSES["spread over time"](sltt_ext.over_time(net, T, returns="sequence")(X.double())).backward()
    assert oracle.relative_error(gradients(net), gradients(reference)) < 1e-14


def test_multi_step_of_snntorch():
    reference = conv_snn()
    x_seq = 2 * torch.rand(T, *X.shape)
    F.cross_entropy(original(reference, x_seq).mean(0), TARGET).backward()
    net = conv_snn()
    whole = sltt_ext.over_time(MultiStep(sltt_ext.convert(net)), time_dim=0)
    F.cross_entropy(whole(x_seq), TARGET).backward()
    assert oracle.relative_error(gradients(net), gradients(reference)) < 1e-6


class TwoHeads(nn.Module):
    """A backbone whose heads come in whatever ``structure`` makes of them."""

    def __init__(self, structure=dict):
        super().__init__()
        self.backbone, self.box, self.structure = networks.conv_net()[:5], nn.Conv2d(6, 4, 1), structure
        self.head = nn.Linear(96, 5)

    def forward(self, x, scale=1.0):
        features = self.backbone(x)
        return self.structure(logits=self.head(features.flatten(1)) * scale, boxes=self.box(features))


@dataclass
class Detections:
    logits: torch.Tensor
    boxes: torch.Tensor


Pair = namedtuple("Pair", ["logits", "boxes"])
STRUCTURES = {
    "dict": dict,
    "tuple": lambda logits, boxes: (logits, boxes),
    "list in a dict": lambda logits, boxes: {"all": [logits, {"boxes": boxes}]},
    "dataclass": Detections,
    "named tuple": Pair,
}


def heads(output):
    if isinstance(output, (Detections, Pair)):
        return output.logits, output.boxes
    if isinstance(output, dict):
        return (output["all"][0], output["all"][1]["boxes"]) if "all" in output else tuple(output.values())
    return output


@pytest.mark.parametrize("structure", STRUCTURES)
def test_several_heads(structure):
    torch.manual_seed(1)
    reference = TwoHeads(lambda logits, boxes: torch.cat([logits, boxes.flatten(1)], 1))
    net = TwoHeads(STRUCTURES[structure])
    net.load_state_dict(reference.state_dict())
    both = original(reference, [X] * T).mean(0)
    (F.cross_entropy(both[:, :5], TARGET) + F.smooth_l1_loss(both[:, 5:], torch.ones(3, 64))).backward()
    logits, boxes = heads(sltt_ext.over_time(net, T)(X))
    (F.cross_entropy(logits, TARGET) + F.smooth_l1_loss(boxes.flatten(1), torch.ones(3, 64))).backward()
    assert oracle.relative_error(gradients(net), gradients(reference)) < 1e-6


class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.lif = nn.Linear(8, 16), nn.Linear(4, 16), neuron.LIFNode()
        self.head = nn.Linear(16, 5)

    def forward(self, x, context, *, gain=None):
        h = 3 * self.a(x) + self.b(context["text"])
        return self.head(self.lif(h if gain is None else gain * h))


@pytest.mark.parametrize("time_dim", [0, {"x": 0}, {"x": 0, "gain": 1}])
def test_several_inputs(time_dim):
    """Positional and named, with an axis of time and without; those that want a gradient get it."""
    torch.manual_seed(2)
    gains = isinstance(time_dim, dict) and "gain" in time_dim
    reference, net = Conditioned(), sltt_ext.over_time(Conditioned(), time_dim=time_dim)
    x_seq, text = torch.rand(T, 3, 8, requires_grad=True), torch.rand(3, 4, requires_grad=True)
    gain = torch.rand(3, T, 1) if gains else torch.tensor(1.5)
    steps = []
    for t in range(T):
        steps.append(reference(x_seq[t], {"text": text}, gain=gain[:, t] if gains else gain))
        detach(reference)
    F.cross_entropy(torch.stack(steps).mean(0), TARGET).backward()
    expected = [*gradients(reference), x_seq.grad, text.grad]
    x_seq.grad = text.grad = None
    F.cross_entropy(net(x_seq, context={"text": text}, gain=gain), TARGET).backward()
    assert oracle.relative_error([*gradients(net), x_seq.grad, text.grad], expected) < 1e-6


def test_a_part_of_a_network():
    """An encoder in front, a head behind: ordinary autograd on both sides."""

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(5)
            self.encoder, self.backbone, self.head = (
                nn.Conv2d(1, 1, 3, padding=1),
                networks.conv_net(),
                nn.Linear(5, 5),
            )

        def forward(self, x, backbone):
            return self.head(backbone(3 * self.encoder(x).relu()).tanh())

    reference, net = Detector(), Detector()
    F.cross_entropy(reference(X, lambda x: original(reference.backbone, [x] * T).mean(0)), TARGET).backward()
    sltt_ext.over_time(net.backbone, T)
    F.cross_entropy(net(X, net.backbone), TARGET).backward()
    assert oracle.relative_error(gradients(net), gradients(reference)) < 1e-6


def test_several_calls_before_one_backward():
    """As in contrastive learning, distillation and GANs: each call is a sequence of its own."""
    views = [X, 1.3 * X.flip(-1), X[:2]]
    reference, net = (
        random_net(),
        sltt_ext.over_time(random_net(), T, k=3, generator=torch.Generator().manual_seed(0)),
    )
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(6)
    outputs = [
        original(reference, [view] * T, torch.randperm(T, generator=generator)[:3].tolist()).mean(0)
        for view in views
    ]
    (F.mse_loss(outputs[0], outputs[1]) + outputs[2].square().sum()).backward()
    torch.manual_seed(6)
    for _ in range(3):
        net._sltt_time_loop.settings.generator.manual_seed(0)
        net.zero_grad()
        torch.manual_seed(6)
        outputs = [net(view) for view in views]
        (F.mse_loss(outputs[0], outputs[1]) + outputs[2].square().sum()).backward()
        assert oracle.relative_error(gradients(net), gradients(reference)) < 1e-6


@pytest.mark.parametrize("k", [None, 1, 2])
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_the_graph_of_the_last_step_is_kept(step_mode, k):
    """What was evaluated once for all steps is back-propagated once, by steps that were kept and steps that run again."""

    def make(mode="s"):
        net = networks.conv_net(step_mode=mode)
        net = nn.Sequential(
            nn.Conv2d(1, 1, 3, padding=1) if mode == "s" else layer.Conv2d(1, 1, 3, padding=1, step_mode="m"),
            *net,
        )
        for module in net:
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.utils.parametrizations.weight_norm(module)
        return net

    net = sltt_ext.over_time(make(step_mode), T, k=k, generator=torch.Generator())
    for iteration in range(4):
        net._sltt_time_loop.settings.generator.manual_seed(iteration)
        generator = torch.Generator().manual_seed(iteration)
        selected = None if k is None else torch.randperm(T, generator=generator)[:k].tolist()
        reference = make()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(1.01)  # as an optimizer does
        reference.load_state_dict(net.state_dict())
        net.zero_grad()
        F.cross_entropy(original(reference, [X] * T, selected).mean(0), TARGET).backward()
        F.cross_entropy(net(X), TARGET).backward()
        assert oracle.relative_error(gradients(net), gradients(reference)) < 1e-6
    net.zero_grad()
    net._sltt_time_loop.settings.generator.manual_seed(iteration)
    loss = F.cross_entropy(net(X), TARGET)
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    thrice = [3 * gradient for gradient in gradients(reference)]
    assert oracle.relative_error(gradients(net), thrice) < 1e-6


def test_no_step_runs_twice_with_one_selected():
    net = sltt_ext.over_time(networks.conv_net(), T, k=1)
    calls = []
    net[0].register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        calls.clear()
        net(X + torch.rand(())).sum().backward()  # another input for each
    assert len(calls) <= T


def test_variational():
    """A latent that is drawn between a spiking encoder and an ordinary decoder."""

    def elbo(statistics, decoder):
        mu, log_variance = statistics.split([2, 3], 1)
        latent = mu + (log_variance[:, :2] / 2).exp() * torch.randn(3, 2)
        return F.mse_loss(decoder(latent), X.flatten(1)) + (mu**2 + log_variance[:, :2].exp()).mean()

    pairs = []
    for over_time in (False, True):
        torch.manual_seed(0)
        net, decoder = networks.conv_net(), nn.Linear(2, 64)
        torch.manual_seed(9)
        mean = sltt_ext.over_time(net, T)(X) if over_time else original(net, [X] * T).mean(0)
        elbo(mean, decoder).backward()
        pairs.append(gradients(net, decoder))
    assert oracle.relative_error(pairs[1], pairs[0]) < 1e-6


@pytest.mark.parametrize("lengths", [[5, 1, 3], torch.tensor([2, 2, 5])])
def test_padded_sequences(lengths):
    x_seq = 2 * torch.rand(T, *X.shape)
    weights = (torch.arange(T)[:, None] < torch.as_tensor(lengths)) / torch.as_tensor(lengths)
    reference, net = networks.conv_net(), sltt_ext.over_time(networks.conv_net(), time_dim=0)
    F.cross_entropy((original(reference, x_seq) * weights[..., None]).sum(0), TARGET).backward()
    F.cross_entropy(net(x_seq, lengths=lengths), TARGET).backward()
    assert oracle.relative_error(gradients(net), gradients(reference)) < 1e-6


def test_state_from_call_to_call():
    x_seq = 2 * torch.rand(6, *X.shape)
    reference = networks.conv_net()
    LOSSES["spread over time"](original(reference, x_seq)).backward()
    net = sltt_ext.over_time(networks.conv_net(), time_dim=0, returns="sequence", carry=True)
    parts = [net(part) for part in (x_seq[:1], x_seq[1:4], x_seq[4:])]
    LOSSES["spread over time"](torch.cat(parts)).backward()
    assert oracle.relative_error(gradients(net), gradients(reference)) < 1e-6
    functional.reset_net(net)
    assert torch.equal(net(x_seq[:1]), parts[0])


def test_state_is_that_after_forward():
    reference, net = networks.conv_net(), sltt_ext.over_time(networks.conv_net(), T)
    original(reference, [X] * T)
    output = net(X)
    assert torch.equal(net[1].v, reference[1].v)
    output.sum().backward()
    assert torch.equal(net[1].v, reference[1].v)


class Loop(nn.Module):
    """A loop over time of its own, in a part of the network."""

    def __init__(self, time_steps=4):
        super().__init__()
        self.inner = TimeInside(time_steps)
        functional.set_step_mode(self.inner, "s")

    def forward(self, x):
        return sum(self.inner.head(self.inner.body(x)) for _ in range(self.inner.T)) / self.inner.T


@pytest.mark.parametrize("k", [None, 1])
@pytest.mark.parametrize(
    ("make", "name"),
    [(TimeInside, "T"), (Loop, "*.T"), (Loop, "inner.T"), (lambda: TimeInside(averages=False), "T")],
)
def test_time_inside(make, name, k):
    whole = make()(X)
    reference, net = (
        make(),
        sltt_ext.over_time(make(), time_inside=name, k=k, generator=torch.Generator().manual_seed(2)),
    )
    selected = (
        None if k is None else torch.randperm(4, generator=torch.Generator().manual_seed(2))[:k].tolist()
    )
    inner = getattr(reference, "inner", reference)
    inner.T = 1
    steps = original(reference, [X] * 4, selected)
    output = net(X)
    assert torch.allclose(output, whole, atol=1e-6)
    if output.dim() == 3:  # the network itself does not average
        LOSSES["TET"](steps[:, 0]).backward()
        LOSSES["TET"](output).backward()
    else:
        F.cross_entropy(steps.mean(0), TARGET).backward()
        F.cross_entropy(output, TARGET).backward()
    assert oracle.relative_error(gradients(net), gradients(reference)) < 1e-6
    assert getattr(net, "inner", net).T == 4


def test_an_output_that_is_averaged_and_one_that_is_not():
    class Both(TimeInside):
        def forward(self, x):
            s = self.body(x.unsqueeze(0).repeat(self.T, 1, 1, 1, 1))
            return self.head(s.mean(0)), s

    reference, net = TimeInside(averages=False), sltt_ext.over_time(Both(), time_inside="T")
    whole, spikes = Both()(X)
    reference.T = 1
    steps = original(reference, [X] * 4)[:, 0]
    F.cross_entropy(steps.mean(0), TARGET).backward()
    output, output_spikes = net(X)
    assert torch.allclose(output, whole, atol=1e-6)
    assert torch.equal(output_spikes, spikes)
    F.cross_entropy(output, TARGET).backward()
    assert oracle.relative_error(gradients(net), gradients(reference)) < 1e-6


@pytest.mark.parametrize("after", [nn.Softmax(-1), nn.Tanh(), nn.LayerNorm(5)])
def test_something_that_is_not_linear_after_the_average(after):
    with pytest.raises(ConfigurationError, match="not linear in the average over time"):
        sltt_ext.over_time(TimeInside(after=after), time_inside="T")(X)


def test_a_network_that_resets_itself_between_two_steps():
    class ResetsItself(TimeInside):
        def forward(self, x):
            first = super().forward(x)
            functional.reset_net(self)
            return first + super().forward(x)

    with pytest.raises(ConfigurationError, match="resets its neurons at its end"):
        sltt_ext.over_time(ResetsItself(), time_inside="T")(X)


def test_norms_that_see_other_statistics_are_said():
    net = nn.Sequential(
        layer.Conv2d(1, 4, 3), layer.BatchNorm2d(4), neuron.LIFNode(), layer.Flatten(), layer.Linear(144, 5)
    )
    functional.set_step_mode(net, "m")
    with pytest.warns(SLTTWarning, match=r"batch norms take their statistics over 1 step.*\n.*1"):
        sltt_ext.over_time(net, T)(X)
