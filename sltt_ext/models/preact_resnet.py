"""Pre-activation spiking ResNets with batch norm for CIFAR (Meng et al. 2023, Sec. 5).

A block computes ``s = neuron(bn(x))`` and ``conv(neuron(bn(conv(s))))``, and adds the shortcut: ``conv(s)`` if the shape
changes, otherwise ``s`` itself, so that blocks pass spikes on.
"""

from __future__ import annotations

from spikingjelly.activation_based import layer
from torch import Tensor, nn

from sltt_ext.models.neurons import Neuron, new_neuron, paper_lif, with_converted_dropout

__all__ = ["PreActResNet", "preact_resnet18", "preact_resnet34"]


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, neuron: Neuron, dropout: float) -> None:
        super().__init__()
        self.bn1 = layer.BatchNorm2d(inputs)
        self.sn1 = new_neuron(neuron)
        self.conv1 = layer.Conv2d(inputs, outputs, 3, stride, padding=1)
        self.bn2 = layer.BatchNorm2d(outputs)
        self.sn2 = new_neuron(neuron)
        self.dropout = layer.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = layer.Conv2d(outputs, outputs, 3, padding=1)
        same_shape = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same_shape else layer.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        s = self.sn1(self.bn1(x))
        residual = self.conv2(self.dropout(self.sn2(self.bn2(self.conv1(s)))))
        return residual + self.shortcut(s)


class PreActResNet(nn.Module):
    """A pre-activation spiking ResNet for images of 32 x 32 pixels.

    Args:
        blocks: How many blocks each of the four stages has.
        num_classes: Number of outputs.
        in_channels: Channels of the input.
        neuron: A neuron class, or a function that makes a neuron; default `paper_lif`.
        width: Channels of the first stage. The next stages have 2, 4 and 8 times as many.
        dropout: Probability of dropping a spike before each block's last convolution, and before the classifier.

    Shape: ``[N, in_channels, 32, 32]`` to ``[N, num_classes]``, both with a leading ``[T]`` in step mode "m".
    """

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(
        self,
        blocks: list[int],
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        neuron: Neuron = paper_lif,
        width: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv1 = layer.Conv2d(in_channels, width, 3, padding=1, bias=False)
        inputs = width
        for stage, number in enumerate(blocks):
            outputs = width * 2**stage
            stack = []
            for i in range(number):
                stack.append(_Block(inputs, outputs, 2 if stage > 0 and i == 0 else 1, neuron, dropout))
                inputs = outputs
            self.add_module(f"layer{stage + 1}", nn.Sequential(*stack))
        self.bn1 = layer.BatchNorm2d(inputs)
        self.sn1 = new_neuron(neuron)
        self.pool = layer.AvgPool2d(4)
        self.flatten = layer.Flatten()
        self.dropout = layer.Dropout(dropout) if dropout else nn.Identity()
        self.linear = layer.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.linear.bias)
        with_converted_dropout(self)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of one step, or of each step."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        x = self.pool(self.sn1(self.bn1(x)))
        return self.linear(self.dropout(self.flatten(x)))


def preact_resnet18(
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    neuron: Neuron = paper_lif,
    width: int = 64,
    dropout: float = 0.0,
) -> PreActResNet:
    """Pre-activation ResNet-18; see `PreActResNet`."""
    return PreActResNet(
        [2, 2, 2, 2], num_classes, in_channels=in_channels, neuron=neuron, width=width, dropout=dropout
    )


def preact_resnet34(
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    neuron: Neuron = paper_lif,
    width: int = 64,
    dropout: float = 0.0,
) -> PreActResNet:
    """Pre-activation ResNet-34; see `PreActResNet`."""
    return PreActResNet(
        [3, 4, 6, 3], num_classes, in_channels=in_channels, neuron=neuron, width=width, dropout=dropout
    )
