"""Every model of ``activation_based.model``, small: same spikes as the original, and the oracle's gradient."""

import copy
import importlib
import pkgutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import networks
import numpy as np
import oracle
import pytest
import torch
from spikingjelly.activation_based import functional, layer, model, neuron, surrogate
from torch import nn

import sltt_ext

T = 3
LIF = {"spiking_neuron": neuron.LIFNode, "surrogate_function": surrogate.ATan(), "detach_reset": True}
PLIF = {"spiking_neuron": neuron.ParametricLIFNode, "surrogate_function": surrogate.ATan(), "init_tau": 2.0}


def zoo(room: str, name: str, **kwargs: object) -> nn.Module:
    return getattr(importlib.import_module(f"{model.__name__}.{room}"), name)(**kwargs)


@dataclass(frozen=True)
class Model:
    """A model to try.

    ``slow``: whether it is large, or another one of its kind is among the fast tests. ``takes``: "steps" follows the step mode; "sequences" takes and returns [T, N, ...]; "average" takes [T, N, ...] and
    returns the mean over time; "image" runs its own time loop over a static [N, ...].
    """

    room: str
    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (2, 3, 32, 32)
    takes: str = "steps"
    slow: bool = False


def spiking_vgg(name: str, **kwargs: object) -> nn.Module:
    """With a small classifier: the model's own has 120 million weights."""
    with torch.device("meta"):
        net = zoo("spiking_vgg", name, **kwargs)
    net.avgpool = layer.AdaptiveAvgPool2d(1)
    for index, width in ((0, 512), (3, 64), (6, 64)):
        net.classifier[index] = layer.Linear(width, 10 if index == 6 else 64)
    net.features.to_empty(device="cpu")
    for module in net.features:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return net


def snas_net(celltype: str) -> nn.Module:
    args = Namespace(
        timestep=T, second_avgpooling=2, dataset="cifar100", celltype=celltype, threshold=1.0, tau=4 / 3
    )
    cells = np.array([[0, 2, 1, 3], [0, 0, 4, 2], [0, 0, 0, 3], [0, 0, 0, 0]])
    net = zoo("snas_net", "SNASNet", args=args, con_mat=cells)
    for module in net.modules():  # a class of its own, without a base to tell it is a surrogate
        if isinstance(module, neuron.LIFNode):
            module.surrogate_function = surrogate.ATan()
    return net


def spike_dhs() -> nn.Module:
    args = Namespace(fea_step=3, fea_num_layers=8, fea_block_multiplier=3, fea_filter_multiplier=48)
    net = zoo("spike_dhs", "SpikeDHS", args=args)
    functional.set_step_mode(net, "m")
    return net


STEPS = [
    Model(
        "spiking_resnet",
        name,
        lambda name=name: zoo("spiking_resnet", name, num_classes=10, **LIF),
        slow=name != "spiking_resnet18",
    )
    for name in ("spiking_resnet18", "spiking_resnet50")
]
STEPS += [
    Model(
        "sew_resnet",
        f"sew_resnet18-{cnf}",
        lambda cnf=cnf: zoo("sew_resnet", "sew_resnet18", cnf=cnf, num_classes=10, **PLIF),
    )
    for cnf in ("ADD", "AND", "IAND")
]
STEPS += [
    Model("spiking_vgg", name, lambda name=name: spiking_vgg(name, **LIF), slow=name != "spiking_vgg11_bn")
    for name in ("spiking_vgg11", "spiking_vgg11_bn")
]
STEPS += [
    Model(
        "parametric_lif_net",
        name,
        lambda name=name: zoo("parametric_lif_net", name, channels=8, **PLIF),
        shape,
    )
    for name, shape in {
        "MNISTNet": (2, 1, 28, 28),
        "FashionMNISTNet": (2, 1, 28, 28),
        "NMNISTNet": (2, 2, 34, 34),
        "CIFAR10Net": (2, 3, 32, 32),
        "CIFAR10DVSNet": (2, 2, 128, 128),
        "DVSGestureNet": (2, 2, 128, 128),
    }.items()
]
SEQUENCES = [
    Model(
        "ms_resnet",
        name,
        lambda name=name: zoo("ms_resnet", name, T=T, num_classes=10, layers=(1, 1, 1, 1), base_channels=8),
        takes="average",
    )
    for name in ("MSResNet", "MaxResNet")
]
SEQUENCES += [
    Model(
        "spikformer",
        "Spikformer",
        lambda: zoo(
            "spikformer",
            "Spikformer",
            T=T,
            img_size_h=32,
            img_size_w=32,
            patch_size=4,
            num_classes=10,
            embed_dims=32,
            num_heads=4,
            depths=1,
        ),
        takes="sequences",
    ),
    Model(
        "spike_driven_transformer",
        "SpikeDrivenTransformer",
        lambda: zoo(
            "spike_driven_transformer",
            "SpikeDrivenTransformer",
            T=T,
            num_classes=10,
            embed_dims=32,
            num_heads=4,
            depths=1,
        ),
        takes="average",
    ),
    Model(
        "qkformer",
        "QKFormer",
        lambda: zoo(
            "qkformer", "QKFormer", T=T, num_classes=10, embed_dims=32, num_heads=(1, 2, 4), depths=(1, 1, 1)
        ),
        takes="average",
    ),
    Model(
        "maxformer",
        "MaxFormer",
        lambda: zoo("maxformer", "MaxFormer", T=T, num_classes=10, embed_dims=48, depths=(1, 1, 1)),
        takes="average",
    ),
    Model("snas_net", "SNASNet", lambda: snas_net("forward"), (1, 3, 32, 32), takes="image"),
    Model("spike_dhs", "SpikeDHS", spike_dhs, (1, 3, 32, 32), takes="image", slow=True),
]
OTTT = [
    Model(
        "spiking_vggws_ottt",
        "OTTTSpikingVGG",
        lambda: zoo(
            "spiking_vggws_ottt",
            "OTTTSpikingVGG",
            cfg=[8, "M", 512, "A"],
            num_classes=10,
            spiking_neuron=neuron.OTTTLIFNode,
        ),
    ),
]
REFUSED = {
    "masnn": lambda: zoo("masnn", "masnn_dvs128_gesture", T=10),
    "snas_net": lambda: snas_net("backward"),
}
WITHOUT_MODELS = {
    "train_classify",
    "train_imagenet_example",
    "tv_ref_classify",
}  # training scripts of 0.0.0.0.14


def installed(models: list[Model]) -> list[Any]:
    rooms = {module.name for module in pkgutil.iter_modules(model.__path__)}
    return [
        pytest.param(each, marks=pytest.mark.slow if each.slow else [])
        for each in models
        if each.room in rooms
    ]


steps = pytest.mark.parametrize("each", installed(STEPS), ids=lambda each: each.name)
sequences = pytest.mark.parametrize("each", installed(SEQUENCES), ids=lambda each: each.name)


def test_no_model_is_unaccounted_for():
    known = {each.room for each in STEPS + SEQUENCES + OTTT} | set(REFUSED) | WITHOUT_MODELS
    assert {module.name for module in pkgutil.iter_modules(model.__path__)} <= known


def build(each: Model) -> tuple[nn.Module, torch.Tensor]:
    """The model in double precision, in which T images at once and one by one give the same spikes, and T inputs."""
    torch.manual_seed(0)
    net = each.make().double()
    for module in net.modules():  # lively: spikes reach the last layer
        if isinstance(module, neuron.BaseNode):
            module.v_threshold = 0.2
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.data *= 2
    x_seq = 2 * torch.rand(T, *each.shape, dtype=torch.float64)
    with torch.no_grad():  # batch norm's statistics of these inputs, so that every layer fires
        functional.reset_net(net)
        for x in x_seq:
            net(x.unsqueeze(0) if each.takes in ("sequences", "average") else x)
        functional.reset_net(net)
    return networks.freeze_batch_norm(net), x_seq


def weights(output: torch.Tensor) -> torch.Tensor:
    return torch.randn(output.shape[-2:], dtype=output.dtype, generator=torch.Generator().manual_seed(3))


def oracle_gradients(net: nn.Module, each: Model, x_seq: torch.Tensor) -> list[torch.Tensor]:
    """Original network, one step a call, the carried state detached after it, one backward a step."""
    torch.manual_seed(5)  # dropout masks
    for x in x_seq:
        output = oracle.first(net(x if each.takes == "steps" else x.unsqueeze(0)))
        (output * weights(output)).sum().div(T).backward()
        oracle.detach_memories(net)
    return oracle.gradients(net)


@steps
def test_spikes_in_evaluation(each):
    net, x_seq = build(each)
    net.eval()
    for step_mode in ("s", "m"):
        functional.set_step_mode(net, step_mode)
        functional.reset_net(net)
        converted = sltt_ext.convert(copy.deepcopy(net))
        with torch.no_grad():
            expected, actual = (forward(module, x_seq, step_mode) for module in (net, converted))
        assert expected.abs().sum() > 0
        assert torch.equal(actual, expected)


def forward(net: nn.Module, x_seq: torch.Tensor, step_mode: str) -> torch.Tensor:
    return net(x_seq) if step_mode == "m" else torch.stack([net(x) for x in x_seq])


@steps
def test_gradients(each):
    net, x_seq = build(each)
    single, multi = (sltt_ext.convert(copy.deepcopy(net)) for _ in range(2))
    expected = oracle_gradients(net, each, x_seq)
    assert expected[0].abs().sum() > 0
    online = sltt_ext.OnlineTrainer(single, lambda output, _: (output * weights(output)).sum(), T, time_dim=0)
    torch.manual_seed(5)
    online.forward_backward(x_seq, None)
    assert oracle.relative_error(oracle.gradients(single), expected) < 1e-6
    functional.set_step_mode(multi, "m")
    torch.manual_seed(5)
    output = multi(x_seq)
    (output.mean(0) * weights(output)).sum().backward()
    assert oracle.relative_error(oracle.gradients(multi), expected) < 1e-6


@sequences
def test_whole_sequences(each):
    net, x_seq = build(each)
    converted = sltt_ext.convert(copy.deepcopy(net))
    net.eval()
    converted.eval()
    with torch.no_grad():
        given = x_seq[0] if each.takes == "image" else x_seq
        expected, actual = (oracle.first(module(given)) for module in (net, converted))
    assert expected.abs().sum() > 0
    assert torch.equal(actual, expected)


@sequences
def test_gradients_of_whole_sequences(each):
    net, x_seq = build(each)
    given = x_seq[0] if each.takes == "image" else x_seq
    converted = sltt_ext.convert(copy.deepcopy(net))
    oracle.detach_on_entry(net)
    for module in (net, converted):
        torch.manual_seed(5)
        output = oracle.first(module(given))
        (output * weights(output)).sum().div(T if each.takes == "sequences" else 1).backward()
    expected = oracle.gradients(net)
    assert sum(gradient.norm() for gradient in expected if gradient is not None) > 0
    assert oracle.relative_error(oracle.gradients(converted), expected) < 1e-6
    if each.takes == "image":
        return
    online = sltt_ext.OnlineTrainer(
        converted,
        lambda output, _: (output * weights(output)).sum(),
        T,
        time_dim=0,
        output=torch.Tensor.contiguous if each.takes == "sequences" else lambda average: average.unsqueeze(0),
    )
    converted.zero_grad()
    functional.reset_net(converted)
    online.forward_backward(x_seq, None)
    assert oracle.relative_error(oracle.gradients(converted), expected) < 1e-6


@pytest.mark.parametrize("each", installed(OTTT), ids=lambda each: each.name)
def test_ottt_networks_keep_their_own_gradient(each):
    net, x_seq = build(each)
    converted = sltt_ext.convert(copy.deepcopy(net))
    expected = oracle_gradients(net, each, x_seq)
    online = sltt_ext.OnlineTrainer(
        converted, lambda output, _: (output * weights(output)).sum(), T, time_dim=0
    )
    torch.manual_seed(5)
    online.forward_backward(x_seq, None)
    assert all(torch.equal(*pair) for pair in zip(oracle.gradients(converted), expected, strict=True))


@pytest.mark.parametrize(
    "room", [name for name in REFUSED if name in {m.name for m in pkgutil.iter_modules(model.__path__)}]
)
def test_refused_models(room):
    with pytest.raises(sltt_ext.ConversionError, match="nothing was converted"):
        sltt_ext.convert(REFUSED[room]())
