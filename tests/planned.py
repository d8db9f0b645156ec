"""A network, and its training until its plan is decided."""

import networks
import oracle
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.nn import functional as F

import sltt_ext

T = 4
PLAIN = {"chunk": 1, "pack_spikes": False, "cache_invariant": False}


def normed(step_mode="s"):
    """With batch norm, whose statistics are those of a step whatever the plan."""
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(1, 6, 3, padding=1), layer.BatchNorm2d(6), neuron.LIFNode(v_threshold=0.3),
        layer.Conv2d(6, 6, 3, padding=1), layer.BatchNorm2d(6), neuron.LIFNode(v_threshold=0.3),
        layer.AdaptiveAvgPool2d(1), layer.Flatten(), layer.Linear(6, 5),
    )  # fmt: skip
    functional.set_step_mode(net, step_mode)
    return net


def trained(net, iterations=None, **options):
    """Gradients, outputs and buffers of each iteration, until the plan is decided or as many; and the trainer."""
    online = sltt_ext.OnlineTrainer(sltt_ext.convert(net), F.cross_entropy, T, **options)
    x, target = networks.images(4)
    found = []
    for _ in range(iterations or 40):
        net.zero_grad()
        output = online.forward_backward(x, target).output
        buffers = [buffer.double().clone() for buffer in net.buffers()]
        found.append([*(gradient.clone() for gradient in oracle.gradients(net)), output, *buffers])
        if iterations is None and online.plan.is_decided:
            break
    return found, online
