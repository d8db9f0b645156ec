"""Spiking VGGs with batch norm for event data (Meng et al. 2023, Sec. 5).

They have five stages of ``dropout(neuron(bn(conv(x))))`` layers, each with average pooling at its end, and one linear layer.
"""

from __future__ import annotations

from spikingjelly.activation_based import layer
from torch import Tensor, nn

from sltt_ext.models.neurons import Neuron, new_neuron, paper_lif, with_converted_dropout

__all__ = ["VGG", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn"]

CLASSIFIER_PIXELS = 7


class VGG(nn.Module):
    """A spiking VGG.

    Args:
        depths: How many layers each of the five stages has.
        num_classes: Number of outputs.
        in_channels: Channels of the input; 2 for the two polarities of events.
        neuron: A neuron class, or a function that makes a neuron; default `paper_lif`.
        width: Channels of the first stage. The next stages have 2, 4, 8 and 8 times as many.
        dropout: Probability of dropping a spike. The mask is the same at all time steps.

    Shape: ``[N, in_channels, H, W]`` to ``[N, num_classes]``, with H and W at least 32; both with a leading ``[T]``
    in step mode "m".
    """

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module
    layer5: nn.Module

    def __init__(
        self,
        depths: list[int],
        num_classes: int = 10,
        *,
        in_channels: int = 2,
        neuron: Neuron = paper_lif,
        width: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        inputs = in_channels
        for stage, depth in enumerate(depths):
            layers: list[nn.Module] = []
            outputs = width * min(2**stage, 8)
            for _ in range(depth):
                layers += [
                    layer.Conv2d(inputs, outputs, 3, padding=1),
                    layer.BatchNorm2d(outputs),
                    new_neuron(neuron),
                    layer.Dropout(dropout) if dropout else nn.Identity(),
                ]
                inputs = outputs
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers, layer.AvgPool2d(2)))
        self.avgpool = layer.AdaptiveAvgPool2d((CLASSIFIER_PIXELS, CLASSIFIER_PIXELS))
        linear = layer.Linear(inputs * CLASSIFIER_PIXELS**2, num_classes)
        self.classifier = nn.Sequential(layer.Flatten(), linear)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        nn.init.normal_(linear.weight, 0, 0.01)
        nn.init.zeros_(linear.bias)
        with_converted_dropout(self)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of one step, or of each step."""
        x = self.layer5(self.layer4(self.layer3(self.layer2(self.layer1(x)))))
        return self.classifier(self.avgpool(x))


def vgg11_bn(
    num_classes: int = 10,
    *,
    in_channels: int = 2,
    neuron: Neuron = paper_lif,
    width: int = 64,
    dropout: float = 0.0,
) -> VGG:
    """VGG-11 with batch norm; see `VGG`."""
    return VGG(
        [1, 1, 2, 2, 2], num_classes, in_channels=in_channels, neuron=neuron, width=width, dropout=dropout
    )


def vgg13_bn(
    num_classes: int = 10,
    *,
    in_channels: int = 2,
    neuron: Neuron = paper_lif,
    width: int = 64,
    dropout: float = 0.0,
) -> VGG:
    """VGG-13 with batch norm; see `VGG`."""
    return VGG(
        [2, 2, 2, 2, 2], num_classes, in_channels=in_channels, neuron=neuron, width=width, dropout=dropout
    )


def vgg16_bn(
    num_classes: int = 10,
    *,
    in_channels: int = 2,
    neuron: Neuron = paper_lif,
    width: int = 64,
    dropout: float = 0.0,
) -> VGG:
    """VGG-16 with batch norm; see `VGG`."""
    return VGG(
        [2, 2, 3, 3, 3], num_classes, in_channels=in_channels, neuron=neuron, width=width, dropout=dropout
    )


def vgg19_bn(
    num_classes: int = 10,
    *,
    in_channels: int = 2,
    neuron: Neuron = paper_lif,
    width: int = 64,
    dropout: float = 0.0,
) -> VGG:
    """VGG-19 with batch norm; see `VGG`."""
    return VGG(
        [2, 2, 4, 4, 4], num_classes, in_channels=in_channels, neuron=neuron, width=width, dropout=dropout
    )
