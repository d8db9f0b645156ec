"""`over_time`: SLTT-K, both frameworks and both step modes under a loss of the mean, and losses that read two networks."""

import networks
import oracle
import pytest
import snntorch
import torch
from fuzz import networks_snntorch
from spikingjelly.activation_based import functional, layer
from torch import nn
from torch.nn import functional as F

import sltt_ext
from sltt_ext.snntorch import MultiStep

T = 4
X, TARGET = networks.images()


def spikingjelly_net(seed=0):
    """With a batch norm, in training."""
    net = networks.conv_net(seed=seed)
    return nn.Sequential(net[0], layer.BatchNorm2d(6), *net[1:])


def snntorch_net(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        snntorch.Leaky(beta=0.9, init_hidden=True, threshold=0.5),
        nn.Conv2d(6, 4, 3, padding=1),
        snntorch.Leaky(beta=0.8, init_hidden=True, threshold=0.5),
        nn.Flatten(),
        nn.Linear(256, 5),
    )
    with torch.no_grad():
        net[3].weight.mul_(3)
    return net


MAKES = {"SpikingJelly": spikingjelly_net, "snnTorch": snntorch_net}


def original(net, x, selected):
    """The mean over time, with T / K of the gradient of K steps."""
    outputs = []
    for t in range(T):
        output = net(x)
        constant = output.detach()
        share = T / len(selected) if t in selected else 0
        outputs.append(constant + share * (output - constant))
        oracle.detach_memories(net)
        networks_snntorch.detach(net)
    return torch.stack(outputs).mean(0)


def multi_step(net, framework):
    if framework == "snnTorch":
        return MultiStep(sltt_ext.convert(net))
    functional.set_step_mode(net, "m")
    return net


@pytest.mark.filterwarnings("ignore:batch norms take their statistics")
@pytest.mark.parametrize("k", [None, 1, 2, T])
@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("framework", MAKES)
def test_mean_in_both_step_modes(framework, step_mode, k):
    reference, net = MAKES[framework](), MAKES[framework]()
    selected = torch.randperm(T, generator=torch.Generator().manual_seed(3))[: k or T].tolist()
    F.cross_entropy(original(reference, X, selected), TARGET).backward()
    whole = multi_step(net, framework) if step_mode == "m" else net
    sltt_ext.over_time(whole, T, k=k, generator=torch.Generator().manual_seed(3))
    F.cross_entropy(whole(X), TARGET).backward()
    assert oracle.relative_error(oracle.gradients(net), oracle.gradients(reference)) < 1e-6
    assert torch.allclose(net[1].running_var, reference[1].running_var)


@pytest.mark.parametrize("framework", MAKES)
def test_distillation(framework):
    """From another network over time, whose outputs are constants, with a loss of the logits and of the target."""

    def loss(logits, teacher):
        soft = F.kl_div(F.log_softmax(logits / 2, 1), F.softmax(teacher / 2, 1), reduction="batchmean")
        return F.cross_entropy(logits, TARGET) + 4 * soft

    reference, net, teacher = MAKES[framework](), MAKES[framework](), MAKES[framework](seed=1)
    every = range(T)
    with torch.no_grad():
        expected_teacher = original(MAKES[framework](seed=1), X, every)
    loss(original(reference, X, every), expected_teacher).backward()
    sltt_ext.over_time(teacher, T)
    sltt_ext.over_time(net, T)
    with torch.no_grad():
        constant = teacher(X)
    loss(net(X), constant).backward()
    assert oracle.relative_error(oracle.gradients(net), oracle.gradients(reference)) < 1e-6
    assert all(parameter.grad is None for parameter in teacher.parameters())
