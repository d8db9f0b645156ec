"""Networks that are run block by block against the oracles, which run them step by step."""

import copy

import networks
import oracle
import pytest
import torch
import tutorials
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from spikingjelly.activation_based.model import sew_resnet
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.analysis import peak_activation_bytes
from sltt_ext.errors import ConfigurationError, InputError, LossError
from sltt_ext.models.nf_resnet import BasicBlock, NFResNet

T = 4
STEPS = (1, 3)


def trainer(net, loss_fn=F.cross_entropy, time_steps=T, **options):
    return sltt_ext.OnlineTrainer(sltt_ext.convert(net), loss_fn, time_steps, **{"blocks": "auto", **options})


def trained(net, x, target, step_mode="s", iterations=2, **options):
    """The network after some iterations, and what the last one returned."""
    net = copy.deepcopy(net)
    functional.set_step_mode(net, step_mode)
    online = trainer(net, **options)
    for _ in range(iterations):
        net.zero_grad()
        result = online.forward_backward(x, target)
    return net, result


def gradients(*args, **options):
    return oracle.gradients(trained(*args, **options)[0])


def nf_net():
    torch.manual_seed(0)
    net = NFResNet(BasicBlock, [1, 2, 1, 1], 5, in_channels=1, width=4)
    for name, parameter in net.named_parameters():
        if "gain" in name:
            nn.init.ones_(parameter)
    nn.init.normal_(net.fc.weight)
    return net


def sew_net():
    torch.manual_seed(0)
    return sew_resnet.SEWResNet(
        sew_resnet.BasicBlock, [2, 1, 1, 1], num_classes=5, cnf="ADD", spiking_neuron=neuron.IFNode,
        surrogate_function=surrogate.ATan(),
    )  # fmt: skip


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("cls", [neuron.LIFNode, neuron.ParametricLIFNode, neuron.QIFNode])
def test_gradients_are_the_oracles(cls, step_mode):
    net = networks.conv_net(cls)
    x, target = networks.images()
    expected = oracle.sltt_gradients(net, [x] * T, target, F.cross_entropy)
    for options in ({}, {"pack_spikes": True}, {"cache_invariant": False}):
        assert oracle.relative_error(gradients(net, x, target, step_mode, **options), expected) < 1e-6


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("scale", ["mean", "paper"])
def test_sltt_k(step_mode, scale):
    net = networks.conv_net(neuron.LIFNode)
    x, target = networks.images()
    divisor = T if scale == "paper" else None
    expected = oracle.sltt_gradients(net, [x] * T, target, F.cross_entropy, STEPS, divisor)
    for full_output in (True, False):
        options = {"schedule": lambda *_: STEPS, "scale": scale, "full_output": full_output}
        assert oracle.relative_error(gradients(net, x, target, step_mode, **options), expected) < 1e-6


@pytest.mark.parametrize("form", ["sequence", "transposed", "frames"])
def test_inputs_over_time(form):
    net = networks.conv_net(neuron.LIFNode)
    x_seq = 2 * torch.rand(T, 3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    target = torch.tensor([0, 3, 4])
    expected = oracle.sltt_gradients(net, list(x_seq), target, F.cross_entropy)
    x, time_dim = {
        "sequence": (x_seq, 0),
        "transposed": (x_seq.transpose(0, 1), 1),
        "frames": (list(x_seq), None),
    }[form]
    assert oracle.relative_error(gradients(net, x, target, "m", time_dim=time_dim), expected) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("blocks", ["auto", "stages", "residual blocks"])
def test_spiking_resnet18_in_training(blocks, step_mode):
    """Its running statistics, too, to the last bit."""
    net = networks.resnet18()
    functional.set_step_mode(net, step_mode)
    x, target = torch.randn(3, 3, 32, 32), torch.tensor([3, 7, 1])
    by_steps = copy.deepcopy(net)
    online = trainer(by_steps, blocks=None)
    mine = copy.deepcopy(net)
    modules = [mine.layer1, mine.layer2, mine.layer3, mine.layer4]
    if blocks == "residual blocks":
        modules = [block for stage in modules for block in stage]
    in_blocks = trainer(mine, blocks="auto" if blocks == "auto" else modules, pack_spikes=True)
    for _ in range(2):
        by_steps.zero_grad()
        mine.zero_grad()
        expected, result = online.forward_backward(x, target), in_blocks.forward_backward(x, target)
        assert oracle.relative_error(oracle.gradients(mine), oracle.gradients(by_steps)) < 1e-6
        assert torch.equal(result.output, expected.output)
        torch.testing.assert_close(result.loss, expected.loss)
        for name, buffer in by_steps.named_buffers():
            assert torch.equal(dict(mine.named_buffers())[name], buffer), name
    net.zero_grad()
    wanted = oracle.sltt_gradients(net, [x] * T, target, F.cross_entropy)
    assert oracle.relative_error(oracle.gradients(mine), wanted) < 1e-6


@pytest.mark.parametrize("make", [nf_net, sew_net])
def test_networks_of_residual_blocks(make):
    net, channels = make(), 1 if make is nf_net else 3
    x = 3 * torch.randn(5, channels, 16, 16, generator=torch.Generator().manual_seed(0))
    target = torch.arange(5)
    expected = oracle.sltt_gradients(net, [x] * 3, target, F.cross_entropy)
    actual = gradients(net, x, target, time_steps=3, pack_spikes=True)
    assert oracle.relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize(
    "make", [tutorials.convolutional, lambda: tutorials.convolutional(learn_beta=True, learn_threshold=True)]
)
@pytest.mark.parametrize("steps", [range(T), STEPS])
def test_snntorch(make, steps):
    net = tutorials.strong(make())
    x_seq = 2 * torch.rand(T, 3, 1, 12, 12, generator=torch.Generator().manual_seed(3))
    target = torch.tensor([0, 2, 4])
    loss = lambda out, t: F.cross_entropy(oracle.first(out), target) / len(steps) * (t in steps)  # noqa: E731
    stepped, _ = tutorials.stepping(net, x_seq, loss)
    online = trainer(net, time_dim=0, schedule=lambda *_: steps)
    for _ in range(2):
        net.zero_grad()
        online.forward_backward(x_seq, target)
        assert oracle.relative_error(oracle.gradients(net), oracle.gradients(stepped)) < 1e-6


def test_gradient_through_the_steps_of_a_call():
    net = networks.conv_net(neuron.LIFNode, step_mode="m")
    x, target = networks.images()
    found = []
    for blocks in (None, "auto"):
        mine = sltt_ext.convert(copy.deepcopy(net), temporal="call")
        trainer(mine, chunk=2, blocks=blocks).forward_backward(x, target)
        found.append(oracle.gradients(mine))
    assert oracle.relative_error(*found) < 1e-6


def test_dropout_draws_the_same_again():
    """The first run of each block, and its second with a graph: the same masks, and random numbers go on from the first."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 8), layer.Dropout(0.5), neuron.LIFNode(tau=1.1), nn.Linear(8, 8), nn.Dropout(0.3),
        neuron.LIFNode(tau=1.1), nn.Linear(8, 5),
    )  # fmt: skip
    x, target = 3 * torch.rand(4, 6), torch.tensor([0, 1, 2, 3])
    seen = {1: [], 4: []}
    for place, outputs in seen.items():
        net[place].register_forward_hook(
            lambda module, args, out, outputs=outputs: outputs.append((args[0], out.detach()))
        )
    online = trainer(net, blocks=[net[0], net[1], net[2], net[3], net[4], net[5]])
    online.forward_backward(x, target)
    for outputs in seen.values():
        del outputs[:]
    net.zero_grad()
    online.forward_backward(x, target)
    factors = {}
    for place, outputs in seen.items():
        first, second = outputs[:T], outputs[T:]
        assert len(second) == T
        assert all(torch.equal(a[1], b[1]) for a, b in zip(first, second))
        factors[place] = [out for _, out in first]

    class Given(nn.Module):
        def __init__(self, outputs, scale):
            super().__init__()
            self.outputs, self.scale = iter(outputs), scale

        def forward(self, x):
            return x * (next(self.outputs) != 0) * self.scale

    plain = copy.deepcopy(sltt_ext.revert(net))
    plain.zero_grad()
    plain[1], plain[4] = Given(factors[1], 1 / 0.5), Given(factors[4], 1 / 0.7)
    expected = oracle.sltt_gradients(plain, [x] * T, target, F.cross_entropy)
    assert oracle.relative_error(oracle.gradients(net), expected) < 1e-6


def test_input_and_frozen_layers():
    net = networks.conv_net(neuron.LIFNode)
    x, target = networks.images()
    found = []
    for blocks in (None, "auto"):
        mine, leaf = copy.deepcopy(net), x.clone().requires_grad_()
        trainer(mine, blocks=blocks).forward_backward(leaf, target)
        found.append([leaf.grad, *oracle.gradients(mine)])
    assert oracle.relative_error(*found) < 1e-6
    net[0].requires_grad_(False)
    net[2].requires_grad_(False)
    mine = copy.deepcopy(net)
    online = trainer(mine, blocks=[mine[0], mine[1], mine[2], mine[3]])
    online.forward_backward(x, target)
    expected = oracle.sltt_gradients(net, [x] * T, target, F.cross_entropy)
    assert mine[0].weight.grad is None
    assert oracle.relative_error([p.grad for p in mine[6].parameters()], expected[-2:]) < 1e-6


def test_backward_scales_the_loss():
    net = networks.conv_net(neuron.LIFNode)
    x, target = networks.images()
    expected = oracle.sltt_gradients(net, [x] * T, target, F.cross_entropy)
    actual = gradients(net, x, target, backward=lambda loss: (8 * loss).backward())
    assert oracle.relative_error([gradient / 8 for gradient in actual], expected) < 1e-6
    weights = list(net.parameters())
    with pytest.raises(LossError, match="inputs="):
        trainer(net, backward=lambda loss: loss.backward(inputs=weights)).forward_backward(x, target)


def test_autocast():
    net = networks.conv_net(neuron.LIFNode)
    x, target = networks.images()
    found = []
    for blocks in (None, "auto"):
        mine = copy.deepcopy(net)
        online = trainer(mine, blocks=blocks)
        with torch.autocast("cpu", torch.bfloat16):
            online.forward_backward(x, target)
        found.append(oracle.gradients(mine))
    assert oracle.relative_error(found[1], found[0]) < 1e-2


def test_gradients_accumulate_and_states_are_at_rest():
    net = networks.conv_net(neuron.LIFNode)
    x, target = networks.images()
    online = trainer(net)
    online.forward_backward(x, target)
    once = [gradient.clone() for gradient in oracle.gradients(net)]
    online.forward_backward(x, target)
    assert oracle.relative_error(oracle.gradients(net), [2 * gradient for gradient in once]) < 1e-6
    assert net[1].v == 0.0
    assert net[3].v == 0.0


@pytest.mark.parametrize(("pack_spikes", "part"), [(False, 0.6), (True, 0.8)])
def test_memory_is_that_of_a_block(pack_spikes, part):
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(layer.Conv2d(8, 8, 3, padding=1), layer.BatchNorm2d(8), neuron.LIFNode())
        for _ in range(8)
    ]
    net = nn.Sequential(*blocks, layer.AdaptiveAvgPool2d(1), layer.Flatten(), nn.Linear(8, 5))
    x, target = torch.randn(8, 8, 16, 16), torch.arange(8) % 5
    peaks = []
    for option in (None, "auto"):
        mine = copy.deepcopy(net)
        online = trainer(mine, chunk=1, blocks=option, pack_spikes=pack_spikes, cache_invariant=True)
        online.forward_backward(x, target)
        peaks.append(peak_activation_bytes(lambda: online.forward_backward(x, target), mine))  # noqa: B023
    assert peaks[1] < part * peaks[0]


@pytest.mark.parametrize("where", ["loss", "second run"])
def test_an_exception_leaves_nothing_behind(where):
    net = networks.resnet18()
    x, target = torch.randn(2, 3, 32, 32), torch.tensor([3, 7])
    calls = []

    def fails(*args):
        calls.append(1)
        if len(calls) == (2 if where == "loss" else T + 2):
            raise KeyboardInterrupt
        return F.cross_entropy(*args) if where == "loss" else None

    online = trainer(
        net, fails if where == "loss" else F.cross_entropy, blocks=[net.layer1, net.layer2, net.layer3]
    )
    online._blocks._compared = True
    if where != "loss":
        net.layer2[0].conv1.register_forward_hook(fails)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    buffers = {name: buffer.clone() for name, buffer in net.layer2.named_buffers()}
    with pytest.raises(KeyboardInterrupt):
        online.forward_backward(x, target)
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in net.parameters())
    assert all(module.v == 0.0 for module in net.modules() if isinstance(module, neuron.LIFNode))
    if where == "second run":  # the running statistics have moved once, by the first run
        assert not torch.equal(net.layer2[0].bn1.running_mean, buffers["0.bn1.running_mean"])
        assert int(net.layer2[0].bn1.num_batches_tracked) == T
    assert all("forward" not in vars(module) for module in net.modules())


class Forks(nn.Module):
    """Two branches from the first layer to the last."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), neuron.LIFNode(), nn.Linear(5, 5)

    def forward(self, x):
        return self.c(self.b(self.a(x))) + self.a(x)


class Decides(Forks):
    def forward(self, x):
        return self.c(self.b(self.a(x))) if x.sum() > 0 else self.c(x)


class Shares(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), neuron.LIFNode(), nn.Linear(5, 5)

    def forward(self, x):
        return self.b(self.c(self.b(self.a(x))))


REFUSED = {
    "no chain": (Forks, "auto", {}, "finds no place"),
    "control flow": (Decides, "auto", {}, "TraceError"),
    "shared neuron": (Shares, lambda net: [net.c], {}, "flows past"),
    "runs twice": (Shares, lambda net: [net.b], {}, "runs 2 times"),
    "not in the network": (Shares, lambda net: [nn.Linear(4, 5)], {}, "not a module of the network"),
    "past its border": (networks.resnet18, lambda net: [net.layer1[0].conv2], {}, "flows past"),
    "no list": (Shares, "all", {}, "blocks must be"),
    "on_step": (Shares, "auto", {"on_step": lambda t: None}, "on_step"),
    "one loss": (Shares, "auto", {"loss_on": "mean"}, "loss_on"),
    "chunk": (Shares, "auto", {"chunk": "auto"}, "chunk='auto'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    make, blocks, options, message = REFUSED[name]
    net = make()
    x = torch.randn(2, 3, 32, 32) if make is networks.resnet18 else torch.rand(2, 4)
    with pytest.raises(ConfigurationError, match=message):
        trainer(net, blocks=blocks(net) if callable(blocks) else blocks, **options).forward_backward(
            x, torch.tensor([0, 1])
        )
    assert all(parameter.grad is None for parameter in net.parameters())


def test_hooks_on_the_network_itself_are_refused_and_those_in_it_run():
    net = networks.conv_net(neuron.LIFNode)
    x, target = networks.images()
    seen = []
    net[4].register_forward_hook(lambda *_: seen.append(1))
    online = trainer(net, blocks=[net[0], net[1], net[2], net[3]])
    online.forward_backward(x, target)
    assert len(seen) == T  # it is in the last block, which runs once
    hook = net.register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigurationError, match="hooks of its own"):
        online.forward_backward(x, target)
    hook.remove()
    online.forward_backward(x, target)
    with pytest.raises(InputError, match="iterator"):
        online.forward_backward(iter([x] * T), target)


def test_a_module_that_cannot_be_traced_is_run_as_it_is():
    """A surrogate of its own: traced through, it would lose its backward."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x):
            return Twice.apply(self.linear(x)) if x.sum() > -1e9 else x

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 6), neuron.LIFNode(tau=1.1), Own(), neuron.LIFNode(tau=1.1), nn.Linear(6, 5)
    )
    x, target = 3 * torch.rand(3, 4), torch.tensor([0, 1, 2])
    expected = oracle.sltt_gradients(net, [x] * T, target, F.cross_entropy)
    assert oracle.relative_error(gradients(net, x, target), expected) < 1e-6


@pytest.mark.parametrize(("parts", "steps"), [(2, range(T)), (T, range(T)), (2, STEPS)])
def test_gradients_of_a_part_of_the_steps_at_a_time(parts, steps):
    net = networks.conv_net(neuron.LIFNode)
    x, target = networks.images()
    expected = oracle.sltt_gradients(net, [x] * T, target, F.cross_entropy, tuple(steps))
    online = trainer(net, schedule=lambda *_: steps)
    online._blocks.parts = parts
    for _ in range(2):
        net.zero_grad()
        online.forward_backward(x, target)
        assert oracle.relative_error(oracle.gradients(net), expected) < 1e-6
