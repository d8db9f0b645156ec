"""Windows of C steps by plain autograd: the oracle for the tests of the gradient through time, and the networks that they share."""

import copy

import oracle
import pytest
import snntorch
import torch
from modules import T
from networks import conv_net, images
from spikingjelly.activation_based import base, neuron, surrogate
from torch import nn
from torch.utils._pytree import tree_map

import sltt_ext
import sltt_ext.snntorch.neurons
import sltt_ext.spikingjelly.fused


def first(returned):
    return returned if isinstance(returned, torch.Tensor) else returned[0]


def detach(net):
    """What the modules of either framework carry, as a constant."""
    oracle.detach_memories(net)
    for module in net.modules():
        if isinstance(module, snntorch.SpikingNeuron):
            own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
            for store, values in ((vars(module), own), (module._buffers, module._buffers)):
                store.update({name: tree_map(_constant, value) for name, value in values.items()})


def _constant(value):
    return value.detach() if isinstance(value, torch.Tensor) and value.grad_fn is not None else value


def reset(net):
    for module in net.modules():
        if isinstance(module, base.MemoryModule):
            module.reset()
        elif hasattr(module, "reset_mem"):
            module.reset_mem()


def windows_by_hand(net, x_seq, targets, window, loss_fn, stepwise=(), selected=None, divisor=None):
    """The gradients of a network and its input by windows; the layers named in ``stepwise`` are detached at every step."""
    net, x_seq = copy.deepcopy(net), x_seq.clone().requires_grad_()
    net.zero_grad()
    reset(net)
    selected = range(T) if selected is None else selected
    for start in range(0, T, window):
        steps = range(start, min(start + window, T))
        outputs = []
        for t in steps:
            outputs.append(first(net(x_seq[t])))
            for name in stepwise:
                detach(net.get_submodule(name))
        losses = [loss_fn(output, targets[t]) for t, output in zip(steps, outputs, strict=True)]
        total = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        if start in selected and total.requires_grad:
            (total / (divisor or len(selected))).backward()
        detach(net)
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in (x_seq, *net.parameters())]


def by_trainer(net, x_seq, targets, loss_fn, **options):
    """The same by an `OnlineTrainer`."""
    x_seq = x_seq.clone().requires_grad_()
    net.zero_grad()
    online = sltt_ext.OnlineTrainer(
        net, loss_fn, T, time_dim=0, target_time_dim=0, **{"output": first, **options}
    )
    online.forward_backward(x_seq, targets)
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in (x_seq, *net.parameters())]


def assert_equal(actual, expected):
    for got, want in zip(actual, expected, strict=True):
        assert torch.equal(got, want)


LAST_IS_SHORTER = "does not divide time_steps"
shorter = pytest.mark.filterwarnings(f"ignore:chunk=4 {LAST_IS_SHORTER}")


def mixed(net, *through_time):
    """The network with these layers alone through time."""
    net = copy.deepcopy(net)
    for name in through_time:
        sltt_ext.convert(net.get_submodule(name), temporal="call")
    return sltt_ext.convert(net)


def spiking(step_mode="s", node=neuron.QIFNode):
    """Two spiking layers without norms; the neurons run by the generic rule."""
    return conv_net(node, step_mode, surrogate_function=surrogate.ATan())


FRAMES = torch.stack([images(seed=t)[0] for t in range(T)])
TARGETS = torch.stack([images(seed=t)[1] for t in range(T)])


def leaky_net(init_hidden=True):
    torch.manual_seed(0)
    neurons = [snntorch.Leaky(beta=0.9, init_hidden=init_hidden) for _ in range(2)]
    return nn.Sequential(nn.Linear(6, 8), neurons[0], nn.Linear(8, 5), neurons[1])


SEQUENCE = 2 * torch.rand(T, 4, 6, generator=torch.Generator().manual_seed(3))
CLASSES = torch.randint(5, (T, 4), generator=torch.Generator().manual_seed(4))
