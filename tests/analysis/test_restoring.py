"""Every measurement leaves the network, its gradients, state, statistics and torch's random numbers as they were."""

import networks
import pytest
import snntorch
import torch
import tutorials
from spikingjelly.activation_based import base, layer
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.analysis import (
    dead_neurons,
    firing_rates,
    gradient_similarity,
    memory_profile,
    operation_counts,
    temporal_credit,
)
from sltt_ext.analysis.restoring import restoring

T = 3
TOOLS = {
    "gradient_similarity": lambda net, x, y: gradient_similarity(
        net, x, y, F.cross_entropy, T, per_step=True
    ),
    "temporal_credit": lambda net, x, y: temporal_credit(net, x, y, F.cross_entropy, T),
    "operation_counts": lambda net, x, y: operation_counts(net, x, "bptt", T),
    "memory_profile": lambda net, x, y: memory_profile(net, x, ("bptt", "sltt-1"), (T,)),
    "memory_profile, fake": lambda net, x, y: memory_profile(net, x, ("bptt", "sltt-1"), (T,), fake=True),
    "firing_rates": lambda net, x, y: firing_rates(net, x, T),
    "dead_neurons": lambda net, x, y: dead_neurons(net, x, T),
}


class Failing(nn.Module):
    """Fails after some calls, like memory that runs out."""

    def __init__(self):
        super().__init__()
        self.calls_left = [10**9]

    def forward(self, x):
        self.calls_left[0] -= 1
        if self.calls_left[0] < 0:
            raise MemoryError("out of memory")
        return x


def spikingjelly_net():
    net = networks.conv_net()
    net.insert(1, layer.BatchNorm2d(6))
    net.insert(5, nn.Dropout(0.5))
    net.append(Failing())
    return net


def snntorch_net():
    net = tutorials.strong(tutorials.convolutional(norm=True, learn_beta=True))
    net.insert(3, Failing())
    net.pop(len(net) - 1)
    return net


def midway(make, converted):
    """A network with gradients, a carried state with its graph, and running statistics."""
    net = make()
    x, target = (torch.rand(3, 1, 8, 8) * 2, torch.randint(5, (3,))) if make is spikingjelly_net else (
        torch.rand(3, 1, 12, 12), torch.randint(5, (3,)))  # fmt: skip
    if converted:
        sltt_ext.convert(net)
    F.cross_entropy(net(x), target).backward()
    for module in net.modules():
        if isinstance(module, (base.MemoryModule, snntorch.SpikingNeuron)):
            (module.reset if isinstance(module, base.MemoryModule) else module.reset_mem)()
    return net, x, target, net(x)


def state_of(net):
    return {
        "classes": [type(module) for module in net.modules()],
        "modes": [module.training for module in net.modules()],
        "attributes": [{key: id(value) for key, value in vars(module).items()} for module in net.modules()],
        "memories": [
            {key: id(value) for key, value in vars(module).get("_memories", {}).items()}
            for module in net.modules()
        ],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules()],
        "buffers": {name: (id(buffer), buffer.tolist()) for name, buffer in net.named_buffers()},
        "gradients": [(id(p.grad), p.grad.tolist()) for p in net.parameters() if p.grad is not None],
        "parameters": [(id(p), p.tolist()) for p in net.parameters()],
        "random": torch.get_rng_state().tolist(),
    }


@pytest.mark.parametrize("make", [spikingjelly_net, snntorch_net])
@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("tool", TOOLS)
def test_leaves_no_trace(tool, make, converted, fails):
    net, x, target, output = midway(make, converted)
    failing = next(module for module in net.modules() if isinstance(module, Failing))
    before = state_of(net)
    if fails:
        failing.calls_left = [1]
        before = state_of(net)
        with pytest.raises(MemoryError):
            TOOLS[tool](net, x, target)
        assert failing.calls_left == [1]
    else:
        TOOLS[tool](net, x, target)
    assert state_of(net) == before
    F.cross_entropy(net(x) + output, target).backward()  # the graph of the step before is intact


@pytest.mark.parametrize("tool", ["gradient_similarity", "temporal_credit", "memory_profile"])
def test_hooks_on_accumulated_gradients_do_not_fire(tool):
    net, fired = networks.conv_net(), []
    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(fired.append)
    TOOLS[tool](net, *networks.images())
    assert fired == []
    F.cross_entropy(net(networks.images()[0]), networks.images()[1]).backward()
    assert len(fired) == len(list(net.parameters()))


def spoil(net):
    net.log["losses"].append(2.0)
    net.new = 3
    net.eval()
    sltt_ext.convert(net)
    net[0].register_forward_hook(print)
    raise KeyboardInterrupt


def test_attributes_of_every_kind_are_put_back():
    net = networks.conv_net()
    net.log = {"losses": [1.0]}
    with restoring(net), pytest.raises(KeyboardInterrupt):
        spoil(net)
    assert net.log == {"losses": [1.0]}
    assert not hasattr(net, "new")
    assert net.training
    assert not sltt_ext.is_converted(net)
    assert not net[0]._forward_hooks


def test_works_inside_no_grad():
    with torch.no_grad():
        assert (
            gradient_similarity(networks.conv_net(), *networks.images(), F.cross_entropy, T).overall.cosine
            > 0
        )
        assert not torch.is_grad_enabled()
