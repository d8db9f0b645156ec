"""Which networks of single steps are known to take sequences as well."""

import networks
import pytest
from spikingjelly.activation_based import layer, neuron
from torch import nn
from torch.nn.utils import parametrize

import sltt_ext
from sltt_ext.step_modes import sequence_form


class Block(nn.Module):
    def __init__(self, *modules):
        super().__init__()
        self.body = nn.ModuleList(modules)

    def forward(self, x):
        for module in self.body:
            x = module(x)
        return x


class Leaf(nn.Module):
    def forward(self, x):
        return x


class OfTheirOwn(layer.Conv2d):
    pass


class Node(neuron.LIFNode):
    pass


def with_hook(name):
    net = networks.conv_net()
    getattr(net[0], name)(lambda *_: None)
    return net


def patched():
    net = networks.conv_net()
    net[0].forward = net[0].forward
    return net


def parametrised():
    net = networks.conv_net()
    parametrize.register_parametrization(net[0], "weight", Leaf())
    return net


KNOWN = {
    "layers": (networks.conv_net, 7),
    "a block": (lambda: Block(*networks.conv_net()), 7),
    "a parametrisation": (parametrised, 7),
    "activations": (lambda: nn.Sequential(*networks.conv_net(), nn.ReLU(), nn.Linear(5, 5)), 7),
}
UNKNOWN = {
    "a convolution of torch's": lambda: nn.Sequential(nn.Conv2d(1, 1, 3), *networks.conv_net()),
    "a flattening of torch's": lambda: nn.Sequential(nn.Flatten(), neuron.LIFNode()),
    "a leaf of the user's own": lambda: nn.Sequential(Leaf(), *networks.conv_net()),
    "a subclass of a layer": lambda: nn.Sequential(OfTheirOwn(1, 1, 3), *networks.conv_net()),
    "a subclass of a neuron": lambda: nn.Sequential(*networks.conv_net(), Node()),
    "a record": lambda: networks.conv_net(store_v_seq=True),
    "sequences": lambda: networks.conv_net(step_mode="m"),
    "dropout": lambda: nn.Sequential(*networks.conv_net(), layer.Dropout(0.5)),
    "a forward in the place of its own": patched,
    "a hook": lambda: with_hook("register_forward_hook"),
    "a hook before": lambda: with_hook("register_forward_pre_hook"),
    "a hook on gradients": lambda: with_hook("register_full_backward_hook"),
}


@pytest.mark.parametrize(("make", "number"), KNOWN.values(), ids=KNOWN)
def test_what_is_known(make, number):
    settings = sequence_form(sltt_ext.convert(make()))
    assert len(settings) == number
    assert {(setting.name, setting.value) for setting in settings} == {("_step_mode", "m")}


@pytest.mark.parametrize("make", UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_not(make):
    assert sequence_form(sltt_ext.convert(make())) is None


def test_a_hook_on_all_modules():
    net = sltt_ext.convert(networks.conv_net())
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert sequence_form(net) is None
    finally:
        handle.remove()
