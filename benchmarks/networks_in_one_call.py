"""Small multi-step networks in the style of published ones, whose batch norms read time folded into the batch.

Each takes ``[T, N, channels, 16, 16]`` and returns ``[T, N, classes]``.
"""

from __future__ import annotations

from collections.abc import Callable

from spikingjelly.activation_based import layer, neuron, surrogate
from torch import Tensor, nn

__all__ = ["NETWORKS", "SEWResNet", "SpikeDrivenTransformer", "Spikformer"]

CLASSES = 10


def lif(v_threshold: float = 1.0) -> nn.Module:
    return neuron.LIFNode(tau=2.0, v_threshold=v_threshold, detach_reset=True, step_mode="m")


def integrate_and_fire() -> nn.Module:
    return neuron.IFNode(detach_reset=True, surrogate_function=surrogate.ATan(), step_mode="m")


def conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Module:
    """A convolution and its norm."""
    return layer.SeqToANNContainer(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs)
    )


def halved() -> nn.Module:
    return layer.SeqToANNContainer(nn.MaxPool2d(2))


class SEWBlock(nn.Module):
    """A spike-element-wise residual block, which adds spikes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            conv(channels, channels), integrate_and_fire(), conv(channels, channels), integrate_and_fire()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class SEWResNet(nn.Module):
    """A small form of Fang et al., "Deep residual learning in spiking neural networks", NeurIPS 2021."""

    def __init__(self, in_channels: int, width: int = 16) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            conv(in_channels, width), integrate_and_fire(), halved(), SEWBlock(width), SEWBlock(width),
            conv(width, 2 * width), integrate_and_fire(), halved(), SEWBlock(2 * width), SEWBlock(2 * width),
        )  # fmt: skip
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, x_seq: Tensor) -> Tensor:
        """``[T, N, channels, 16, 16] -> [T, N, classes]``."""
        return self.head(self.blocks(x_seq).mean((-2, -1)))


class SpikingAttention(nn.Module):
    """Attention among spikes, without softmax: ``(q k') v``."""

    def __init__(self, dim: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.project = (nn.Sequential(conv(dim, dim, 1), lif()) for _ in range(4))
        self.attended = lif(v_threshold=0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            branch(x).flatten(-2).unflatten(2, (self.heads, -1)).transpose(-2, -1)
            for branch in (self.q, self.k, self.v)
        )
        y = ((q @ k.transpose(-2, -1)) @ v * 0.125).transpose(-2, -1).reshape(x.shape)
        return self.project(self.attended(y))


class Spikformer(nn.Module):
    """A small form of Zhou et al., "Spikformer: when spiking neural network meets transformer", ICLR 2023."""

    def __init__(self, in_channels: int, dim: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Sequential(
            conv(in_channels, dim // 2), lif(), halved(), conv(dim // 2, dim), lif(), halved()
        )
        self.positions = nn.Sequential(conv(dim, dim), lif())
        self.attention = nn.ModuleList(SpikingAttention(dim) for _ in range(depth))
        self.mlp = nn.ModuleList(
            nn.Sequential(conv(dim, 2 * dim, 1), lif(), conv(2 * dim, dim, 1), lif()) for _ in range(depth)
        )
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x_seq: Tensor) -> Tensor:
        """``[T, N, channels, 16, 16] -> [T, N, classes]``."""
        x = self.patches(x_seq)
        x = x + self.positions(x)
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            x = x + attention(x)
            x = x + mlp(x)
        return self.head(x.mean((-2, -1)))


class MaskingAttention(nn.Module):
    """Spike-driven attention: what keys and values of all places have in common masks the queries."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fire, self.common = lif(), lif(v_threshold=0.5)
        self.q, self.k, self.v = (nn.Sequential(conv(dim, dim, 1), lif()) for _ in range(3))
        self.project = conv(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        s = self.fire(x)
        mask = self.common((self.k(s) * self.v(s)).sum((-2, -1), keepdim=True))
        return self.project(self.q(s) * mask)


class SpikeDrivenTransformer(nn.Module):
    """A small form of Yao et al., "Spike-driven transformer", NeurIPS 2023: shortcuts add potentials, not spikes."""

    def __init__(self, in_channels: int, dim: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Sequential(
            conv(in_channels, dim // 2), lif(), halved(), conv(dim // 2, dim), halved()
        )
        self.positions = nn.Sequential(lif(), conv(dim, dim))
        self.attention = nn.ModuleList(MaskingAttention(dim) for _ in range(depth))
        self.mlp = nn.ModuleList(
            nn.Sequential(lif(), conv(dim, 2 * dim, 1), lif(), conv(2 * dim, dim, 1)) for _ in range(depth)
        )
        self.fire = lif()
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x_seq: Tensor) -> Tensor:
        """``[T, N, channels, 16, 16] -> [T, N, classes]``."""
        x = self.patches(x_seq)
        x = x + self.positions(x)
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            x = x + attention(x)
            x = x + mlp(x)
        return self.head(self.fire(x).mean((-2, -1)))


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "SEW-ResNet": SEWResNet,
    "Spikformer": Spikformer,
    "Spike-driven transformer": SpikeDrivenTransformer,
}
"""Number of input channels -> network."""
