"""The networks that are compared, all with the paper's neuron: settings of `sltt_ext.models.paper_lif`.

The reset is detached: SLTT has no path through it, and rate-based backpropagation is spared a tensor for each neuron.
Gains and classifiers are moved away from the zeros that some start at, so that the gradient flows everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import Tensor, nn
from torch.nn import functional as F

from sltt_ext.models import nf_resnet34, nf_resnet50, nf_resnet101, preact_resnet18, vgg11_bn
from sltt_ext.models.standardisation import SkipGain

CLASSES = 10
PAPER_LIF: dict[str, Any] = {
    "tau": 1.1,
    "decay_input": False,
    "v_threshold": 1.0,
    "v_reset": None,
    "detach_reset": True,
}

Node = Callable[..., nn.Module]


def paper_neuron(node: Node = neuron.LIFNode) -> Callable[..., nn.Module]:
    """A maker of neurons of the class ``node`` with the paper's settings."""
    return partial(node, **PAPER_LIF, surrogate_function=surrogate.PiecewiseQuadratic(alpha=1.0))


@dataclass(frozen=True)
class Network:
    """A network and the shape of its input.

    Attributes:
        name: What it is called in the results.
        make: ``(neuron maker) -> network``.
        frame: Shape of one sample at one time step, ``[C, H, W]``.
        batch: How many samples.
        sequence: The input differs from step to step, ``[T, N, C, H, W]``; otherwise it is an image, ``[N, C, H, W]``.
        spread: Standard deviation of the random images; more where pooling in the stem averages them away, so that
            neurons fire in all layers.
        single_step: The network has a single-step mode. One that has none takes a step as a sequence of one.
        blocks: What a user of memopt would checkpoint: the smallest modules with several layers in them.
    """

    name: str
    make: Callable[[Callable[..., nn.Module]], nn.Module]
    frame: tuple[int, int, int]
    batch: int
    sequence: bool = False
    spread: float = 1.0
    single_step: bool = True
    blocks: Callable[[nn.Module], tuple[type[nn.Module], ...]] = lambda net: (type(net.layer1[0]),)

    @property
    def size(self) -> str:
        """The network and its batch in words."""
        return f"{self.name}, {self.batch} images of {self.frame[-1]} px"

    def build(self, node: Node = neuron.LIFNode, step_mode: str = "s") -> nn.Module:
        """The network in a step mode, in training mode; the same weights at every call."""
        torch.manual_seed(0)
        net = alive(self.make(paper_neuron(node)))
        if self.single_step:
            functional.set_step_mode(net, step_mode)
        return net

    def task(self, time_steps: int = 6) -> Task:
        """The network and a batch of random data; the same at every call."""
        torch.manual_seed(1)
        shape = (self.batch, *self.frame)
        x = torch.rand(time_steps, *shape) if self.sequence else self.spread * torch.randn(shape)
        return Task(self, x, torch.arange(self.batch) % CLASSES, time_steps)


@dataclass(frozen=True)
class Task:
    """One batch for one network, and how a network and a loss are applied to it.

    Attributes:
        network: The network.
        x: The input, ``[N, C, H, W]``, or ``[T, N, C, H, W]`` of a network that takes sequences.
        target: Class indices ``[N]``.
        time_steps: T.
    """

    network: Network
    x: Tensor
    target: Tensor
    time_steps: int

    def to(self, device: str) -> Task:
        """The same batch on another device."""
        return replace(self, x=self.x.to(device), target=self.target.to(device))

    @property
    def time_dim(self) -> int | None:
        """The axis of time, as `sltt_ext.OnlineTrainer` takes it."""
        return 0 if self.network.sequence else None

    @property
    def x_seq(self) -> Tensor:
        """The input of all steps ``[T, N, C, H, W]``; an image is not copied."""
        return self.x if self.network.sequence else self.x.expand(self.time_steps, *self.x.shape)

    def step(self, net: nn.Module, t: int) -> Tensor:
        """Output ``[N, classes]`` of time step ``t``."""
        x = self.x[t] if self.network.sequence else self.x
        return net(x) if self.network.single_step else net(x.unsqueeze(0)).squeeze(0)

    def loss(self, output: Tensor) -> Tensor:
        """The cross-entropy of an output ``[N, classes]``."""
        return F.cross_entropy(output, self.target)

    def mean_loss(self, output_seq: Tensor) -> Tensor:
        """The mean over time of the steps' cross-entropies, of outputs ``[T, N, classes]``."""
        return F.cross_entropy(output_seq.flatten(0, 1), self.target.repeat(len(output_seq)))


def alive(net: nn.Module) -> nn.Module:
    """Skip gains to one, and classifiers to random weights; biases stay zero."""
    for module in net.modules():
        if isinstance(module, SkipGain):
            nn.init.ones_(module.gain)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return net


def spikformer(
    maker: Callable[..., nn.Module], embed_dims: int = 384, num_heads: int = 12, depths: int = 4
) -> nn.Module:
    """SpikingJelly's Spikformer for 32 x 32 pixels; by default of the size of its ``spikformer_cifar10``."""
    from spikingjelly.activation_based.model.spikformer import Spikformer

    return Spikformer(
        img_size_h=32, img_size_w=32, patch_size=4, num_classes=CLASSES, embed_dims=embed_dims,
        num_heads=num_heads, depths=depths, spiking_neuron=maker,
    )  # fmt: skip


def spikformer_blocks(net: nn.Module) -> tuple[type[nn.Module], ...]:
    return type(net.patch_embed.stages[0]), type(net.blocks[0])


def of_sltt_ext(factory: Callable[..., nn.Module]) -> Callable[[Callable[..., nn.Module]], nn.Module]:
    return lambda maker: factory(CLASSES, neuron=maker)


def of_spikingjelly(
    module: str, name: str, **options: Any
) -> Callable[[Callable[..., nn.Module]], nn.Module]:
    """A network of SpikingJelly's; where a class is named and not a function, it is made of basic blocks."""

    def make(maker: Callable[..., nn.Module]) -> nn.Module:
        models = import_module(f"spikingjelly.activation_based.model.{module}")
        block = (models.BasicBlock,) if isinstance(getattr(models, name), type) else ()
        return getattr(models, name)(*block, num_classes=CLASSES, spiking_neuron=maker, **options)  # type: ignore[no-any-return]

    return make


NF_RESNET34 = Network("NF-ResNet-34", of_sltt_ext(nf_resnet34), (3, 96, 96), 8, spread=3.0)
HALF_AS_WIDE = Network(
    "NF-ResNet-34, half as wide",
    lambda maker: nf_resnet34(CLASSES, neuron=maker, width=32),
    (3, 64, 64),
    4,
    spread=3.0,
)
PREACT_RESNET18 = Network("pre-activation ResNet-18", of_sltt_ext(preact_resnet18), (3, 32, 32), 16)
VGG11 = Network(
    "VGG-11", of_sltt_ext(vgg11_bn), (2, 48, 48), 8, sequence=True, blocks=lambda net: (nn.Sequential,)
)
SPIKFORMER = Network(
    "Spikformer", spikformer, (3, 32, 32), 8, single_step=False, blocks=spikformer_blocks
)  # fmt: skip
SPIKING_RESNET18 = Network(
    "spiking ResNet-18", of_spikingjelly("spiking_resnet", "spiking_resnet18"), (3, 64, 64), 16
)
SEW_RESNET18 = Network(
    "SEW ResNet-18", of_spikingjelly("sew_resnet", "sew_resnet18", cnf="ADD"), (3, 64, 64), 16
)
LARGE = tuple(
    Network(name, of_sltt_ext(factory), (3, 224, 224), 256, spread=3.0)
    for name, factory in (
        ("NF-ResNet-34", nf_resnet34), ("NF-ResNet-50", nf_resnet50), ("NF-ResNet-101", nf_resnet101)
    )
)  # fmt: skip


def networks() -> tuple[Network, ...]:
    """All networks of the time benchmark; the Spikformer where SpikingJelly has one (2.0)."""
    always = (NF_RESNET34, PREACT_RESNET18, VGG11)
    has_spikformer = find_spec("spikingjelly.activation_based.model.spikformer") is not None
    return (*always, SPIKFORMER) if has_spikformer else always


def of_size(network: Network, batch: int, pixels: int) -> Network:
    """The network on another number of samples and pixels."""
    return replace(network, batch=batch, frame=(network.frame[0], pixels, pixels))
