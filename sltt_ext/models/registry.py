"""The networks by name, for configuration files and to recognise a checkpoint."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from sltt_ext.models import nf_resnet, preact_resnet, vgg

__all__ = ["MODELS"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    factory.__name__: factory
    for factory in (
        nf_resnet.nf_resnet34,
        nf_resnet.nf_resnet50,
        nf_resnet.nf_resnet101,
        preact_resnet.preact_resnet18,
        preact_resnet.preact_resnet34,
        vgg.vgg11_bn,
        vgg.vgg13_bn,
        vgg.vgg16_bn,
        vgg.vgg19_bn,
    )
}
"""Name -> factory ``(num_classes, *, in_channels, neuron, width, ...)``."""
