"""Normaliser-free spiking ResNets for ImageNet (Meng et al. 2023, Sec. 5; after Brock et al. 2021).

A block has the input x, whose expected variance is beta squared::

    s = neuron(x / beta)
    y = x + skip alpha conv(2.74 neuron(... conv(2.74 s)))      in the first block of a stage conv(2.74 s) + ...

Convolutions are weight-standardised and read pure spikes; see `sltt_ext.models.standardisation`.
"""

from __future__ import annotations

from itertools import pairwise
from math import sqrt
from typing import ClassVar

from spikingjelly.activation_based import layer
from torch import Tensor, nn

from sltt_ext.models.neurons import Neuron, new_neuron, paper_lif
from sltt_ext.models.standardisation import SkipGain, standardised_conv

__all__ = ["NFResNet", "nf_resnet34", "nf_resnet50", "nf_resnet101"]

GAMMA = 2.74
"""The published factor that brings a spike train back to unit variance."""


class _Block(nn.Module):
    """A residual block. ``kernels`` holds the sizes of its convolutions, ``channels`` the channels before and after each."""

    expansion: ClassVar[int]
    sn1: nn.Module

    def __init__(
        self,
        channels: list[int],
        kernels: list[int],
        strides: list[int],
        beta: float,
        alpha: float,
        neuron: Neuron,
    ) -> None:
        super().__init__()
        self.beta = beta
        last = len(kernels)
        for i, ((inputs, outputs), kernel, stride) in enumerate(
            zip(pairwise(channels), kernels, strides, strict=True), 1
        ):
            skip = SkipGain(alpha) if i == last else None
            conv = standardised_conv(inputs, outputs, kernel, stride, scale=GAMMA, skip=skip)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"sn{i}", new_neuron(neuron))
        stride = max(strides)
        self.downsample = (
            standardised_conv(channels[0], channels[-1], 1, stride, scale=GAMMA)
            if stride != 1 or channels[0] != channels[-1]
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        s = self.sn1(x if self.beta == 1 else x / self.beta)
        skip = x if self.downsample is None else self.downsample(s)
        return self.residual(s) + skip

    def residual(self, s: Tensor) -> Tensor:
        raise NotImplementedError


class BasicBlock(_Block):
    """Two 3 x 3 convolutions."""

    expansion = 1
    conv1: nn.Module
    sn2: nn.Module
    conv2: nn.Module

    def __init__(
        self, inputs: int, planes: int, stride: int, beta: float, alpha: float, neuron: Neuron
    ) -> None:
        super().__init__([inputs, planes, planes], [3, 3], [stride, 1], beta, alpha, neuron)

    def residual(self, s: Tensor) -> Tensor:
        """The part that is added to the skip connection, computed from the spikes of the first neuron."""
        return self.conv2(self.sn2(self.conv1(s)))


class Bottleneck(_Block):
    """A 3 x 3 convolution between two 1 x 1."""

    expansion = 4
    conv1: nn.Module
    sn2: nn.Module
    conv2: nn.Module
    sn3: nn.Module
    conv3: nn.Module

    def __init__(
        self, inputs: int, planes: int, stride: int, beta: float, alpha: float, neuron: Neuron
    ) -> None:
        super().__init__([inputs, planes, planes, 4 * planes], [1, 3, 1], [1, stride, 1], beta, alpha, neuron)

    def residual(self, s: Tensor) -> Tensor:
        """The part that is added to the skip connection, computed from the spikes of the first neuron."""
        return self.conv3(self.sn3(self.conv2(self.sn2(self.conv1(s)))))


class NFResNet(nn.Module):
    """A normaliser-free spiking ResNet.

    Args:
        block: Class of the blocks.
        blocks: How many blocks each of the four stages has.
        num_classes: Number of outputs.
        in_channels: Channels of the input.
        neuron: A neuron class, or a function that makes a neuron; default `paper_lif`.
        width: Channels of the first stage. The next stages have 2, 4 and 8 times as many.
        alpha: Constant weight of every residual branch.

    Shape: ``[N, in_channels, H, W]`` to ``[N, num_classes]``, both with a leading ``[T]`` in step mode "m".
    """

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        blocks: list[int],
        num_classes: int = 1000,
        *,
        in_channels: int = 3,
        neuron: Neuron = paper_lif,
        width: int = 64,
        alpha: float = 0.2,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            standardised_conv(in_channels, width, 7, 2), layer.AvgPool2d(3, 2, padding=1)
        )
        inputs, variance = width, 1.0
        for stage, number in enumerate(blocks):
            planes = width * 2**stage
            stack: list[nn.Module] = []
            for i in range(number):
                stride = 2 if stage > 0 and i == 0 else 1
                stack.append(block(inputs, planes, stride, sqrt(variance), alpha, neuron))
                variance = (1.0 if stack[-1].downsample is not None else variance) + alpha**2
                inputs = planes * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*stack))
        self.avgpool = layer.AdaptiveAvgPool2d((1, 1))
        self.flatten = layer.Flatten()
        self.fc = layer.Linear(inputs, num_classes)
        nn.init.zeros_(self.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of one step, or of each step."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x)))))
        return self.fc(self.flatten(self.avgpool(x)))


def nf_resnet34(
    num_classes: int = 1000, *, in_channels: int = 3, neuron: Neuron = paper_lif, width: int = 64
) -> NFResNet:
    """NF-ResNet-34, 21.8 million parameters; see `NFResNet`.

    Examples:
        >>> sum(p.numel() for p in nf_resnet34().parameters())
        21797688
    """
    return NFResNet(
        BasicBlock, [3, 4, 6, 3], num_classes, in_channels=in_channels, neuron=neuron, width=width
    )


def nf_resnet50(
    num_classes: int = 1000, *, in_channels: int = 3, neuron: Neuron = paper_lif, width: int = 64
) -> NFResNet:
    """NF-ResNet-50, 25.6 million parameters; see `NFResNet`."""
    return NFResNet(
        Bottleneck, [3, 4, 6, 3], num_classes, in_channels=in_channels, neuron=neuron, width=width
    )


def nf_resnet101(
    num_classes: int = 1000, *, in_channels: int = 3, neuron: Neuron = paper_lif, width: int = 64
) -> NFResNet:
    """NF-ResNet-101, 44.6 million parameters; see `NFResNet`."""
    return NFResNet(
        Bottleneck, [3, 4, 23, 3], num_classes, in_channels=in_channels, neuron=neuron, width=width
    )
