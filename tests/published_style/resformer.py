"""A hierarchical spiking transformer in the style of published code: attention whose keys and values are one, convolutional MLPs.

Plain PyTorch and SpikingJelly, as in `published_style.networks`.
"""

import torch
from published_style.networks import neuron, over_time, surrogate
from torch import nn


def lif():
    return neuron.MultiStepLIFNode(
        tau=2.0, v_threshold=0.3, detach_reset=True, surrogate_function=surrogate.ATan(), backend="torch"
    )


class ConvNorm(nn.Sequential):
    """Over ``[T, N, C, H, W]``."""

    def __init__(self, channels, features, size=1, stride=1, groups=1):
        super().__init__(
            nn.Conv2d(channels, features, size, stride, (size - 1) // 2, groups=groups, bias=False),
            nn.BatchNorm2d(features),
        )

    def forward(self, x):
        return over_time(super().forward, x)


class DualSpikeAttention(nn.Module):
    """Two products of spikes with spikes: no softmax, no product of floats."""

    def __init__(self, dim, heads, patch):
        super().__init__()
        self.heads = heads
        self.activation_in, self.activation_attn, self.activation_out = lif(), lif(), lif()
        self.W = ConvNorm(dim, 2 * dim, patch, patch)
        self.Wproj = ConvNorm(dim, dim)
        self.scale1 = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("scale2", torch.tensor(0.7))

    def forward(self, x):
        T, N, C, H, W = x.shape
        spikes = self.activation_in(x)
        y = self.W(spikes).flatten(3).reshape(T, N, self.heads, 2 * C // self.heads, -1)
        y1, y2 = y.chunk(2, dim=3)
        spikes = spikes.flatten(3).reshape(T, N, self.heads, C // self.heads, H * W)
        attention = self.activation_attn(y1.transpose(-1, -2) @ spikes * self.scale1)
        out = (y2 @ attention * self.scale2).reshape(T, N, C, H, W)
        return self.Wproj(self.activation_out(out)) + x


class GroupedMLP(nn.Module):
    def __init__(self, dim, ratio=2):
        super().__init__()
        self.inner, self.conv, self.up, self.down = lif(), lif(), lif(), lif()
        self.fc1, self.fc2 = ConvNorm(dim, ratio * dim), ConvNorm(ratio * dim, dim)
        self.grouped = ConvNorm(ratio * dim, ratio * dim, 3, groups=2)

    def forward(self, x):
        y = self.fc1(self.up(x))
        y = y + self.grouped(self.conv(y))
        return x + self.fc2(self.down(y))


class SpikingResformer(nn.Module):
    """Returns the outputs of all steps, ``[T, N, classes]``, or their mean."""

    def __init__(self, T=4, dim=8, classes=5, averages=True):
        super().__init__()
        self.T, self.averages = T, averages
        self.prologue = nn.Sequential(ConvNorm(3, dim, 3), lif())
        self.stages = nn.Sequential(
            DualSpikeAttention(dim, 2, 2),
            GroupedMLP(dim),
            ConvNorm(dim, 2 * dim, 3, 2),
            DualSpikeAttention(2 * dim, 2, 2),
            GroupedMLP(2 * dim),
        )
        self.classifier = nn.Linear(2 * dim, classes)

    def forward(self, x):
        if x.dim() != 5:
            x = x.unsqueeze(0).repeat(self.T, 1, 1, 1, 1)
        x = self.stages(self.prologue(x)).mean((-2, -1))
        return self.classifier(x.mean(0) if self.averages else x)
