"""A network over time by plain autograd: the oracle for the tests of over_time, and the networks that they share."""

import networks
import oracle
import snntorch
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

T = 5
X, TARGET = networks.images()


def detach(net):
    """What each neuron carries, for both frameworks."""
    oracle.detach_memories(net)
    for module in net.modules():
        if isinstance(module, snntorch.SpikingNeuron):
            for store in (module._buffers, vars(module)):
                for name, value in list(store.items()):
                    if isinstance(value, torch.Tensor):
                        store[name] = value.detach()


def reset(net):
    for module in net.modules():
        for name in ("reset", "reset_mem"):
            if hasattr(module, name):
                getattr(module, name)()


def original(net, frames, selected=None):
    """All steps of the original network, single-step, each from a constant state; T / K times the gradient of K of them."""
    outputs = []
    reset(net)
    for t, frame in enumerate(frames):
        output = net(frame)
        if selected is not None:
            constant = output.detach()
            factor = len(frames) / len(selected)
            output = constant + factor * (output - constant) if t in selected else constant
        outputs.append(output)
        detach(net)
    return torch.stack(outputs)


def gradients(*modules):
    return [parameter.grad for module in modules for parameter in module.parameters()]


def random_net():
    """With batch norm and dropout, in training."""
    net = networks.conv_net()
    layers = [net[0], layer.BatchNorm2d(6), net[1], layer.Dropout(0.3), *net[2:]]
    return nn.Sequential(*layers[:3], nn.Dropout(0.3), *layers[4:])


class TimeInside(nn.Module):
    """As published: the image is repeated T times, the average over time is classified."""

    def __init__(self, time_steps=4, averages=True, after=None):
        super().__init__()
        torch.manual_seed(0)
        self.T, self.averages = time_steps, averages
        self.body = nn.Sequential(
            layer.Conv2d(1, 6, 3, padding=1),
            neuron.LIFNode(),
            layer.Conv2d(6, 4, 3, padding=1),
            neuron.LIFNode(),
            layer.Flatten(),
        )
        functional.set_step_mode(self, "m")
        self.head, self.after = nn.Linear(256, 5), after or nn.Identity()
        with torch.no_grad():
            for parameter in self.body.parameters():
                parameter.mul_(3)

    def forward(self, x):
        s = self.body(x.unsqueeze(0).repeat(self.T, 1, 1, 1, 1))
        return self.after(self.head(s.mean(0))) if self.averages else self.head(s)
