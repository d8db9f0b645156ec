"""Small real networks, written with plain SpikingJelly."""

import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from spikingjelly.activation_based.model import spiking_resnet
from torch import nn


def conv_net(node: type = neuron.LIFNode, step_mode: str = "s", seed: int = 0, **kwargs: object) -> nn.Module:
    """A BatchNorm-free network: [N, 1, 8, 8] -> [N, 5]."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        layer.Conv2d(1, 6, 3, padding=1),
        node(**kwargs),
        layer.Conv2d(6, 6, 3, padding=1),
        node(**kwargs),
        layer.MaxPool2d(2),
        layer.Flatten(),
        layer.Linear(96, 5),
    )
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    functional.set_step_mode(net, step_mode)
    return net


def resnet18(node: type = neuron.LIFNode, step_mode: str = "s", **kwargs: object) -> nn.Module:
    """SpikingJelly's spiking ResNet-18: [N, 3, 32, 32] -> [N, 10]."""
    torch.manual_seed(0)
    net = spiking_resnet.spiking_resnet18(
        spiking_neuron=node, surrogate_function=surrogate.ATan(), num_classes=10, **kwargs
    )
    functional.set_step_mode(net, step_mode)
    return net


def freeze_batch_norm(net: nn.Module) -> nn.Module:
    """Running statistics, as a chunk of several steps needs them to equal single steps; all else stays in training."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return net


def images(n: int = 3, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(n, 1, 8, 8, generator=generator)
    return x, torch.randint(0, 5, (n,), generator=generator)
