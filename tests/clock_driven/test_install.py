"""The old package's names on a newer SpikingJelly, and the old package's numbers."""

import subprocess
import sys

import pytest
import torch
from published_style import oracle
from torch import nn

import sltt_ext
from sltt_ext.clock_driven import cext, functional, layer, neuron, surrogate
from sltt_ext.errors import ConfigurationError

BOTH = oracle.packages()
with_old = pytest.mark.skipif(len(BOTH) < 2, reason="the old package is not installed")


def test_code_as_it_is():
    """In a process of its own: what is imported, and how it is called, as code for 0.0.0.0.12 does."""
    code = """
import torch, sltt_ext.clock_driven
from spikingjelly.clock_driven import encoding, functional, layer, neuron, surrogate
from spikingjelly.clock_driven.neuron import MultiStepLIFNode, MultiStepParametricLIFNode
import spikingjelly.clock_driven.surrogate as surrogates
net = torch.nn.Sequential(
    layer.SeqToANNContainer(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6)),
    MultiStepLIFNode(tau=2.0, detach_reset=True, backend="torch"),
    layer.MultiStepDropout(0.2),
    layer.SeqToANNContainer(torch.nn.Linear(6, 6)),
    MultiStepParametricLIFNode(init_tau=2.0, surrogate_function=surrogates.ATan(spiking=True), detach_reset=True),
    layer.MultiStepContainer(torch.nn.Linear(6, 3), neuron.LIFNode(2.0, False, cupy_fp32_inference=False)),
)
sltt_ext.convert(net)(torch.randn(5, 4, 4)).mean(0).sum().backward()
functional.reset_net(net)
assert net[0][0].weight.grad.abs().sum() > 0 and net[1].v == 0.0
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def same_settings():
    reset = [{"v_reset": v_reset} for v_reset in (0.0, None, -0.3)]
    for name in ("IFNode", "LIFNode", "ParametricLIFNode", "QIFNode", "EIFNode"):
        for settings in reset:
            yield name, {"surrogate_function": neuron.surrogate.ATan(), "detach_reset": True, **settings}
            if "LIF" in name:
                yield name, {"decay_input": False, **settings}
    for name in ("MultiStepIFNode", "MultiStepLIFNode", "MultiStepParametricLIFNode", "MultiStepEIFNode"):
        yield name, {"backend": "torch", "v_reset": None}
        yield name, {}
    yield "SynapseFilter", {"tau": 3.0}
    yield "SynapseFilter", {"tau": 3.0, "learnable": True}


def through_time(module, x_seq):
    x_seq = x_seq.clone().requires_grad_()
    outputs = module(x_seq) if oracle.takes_sequences(module) else torch.stack([module(x) for x in x_seq])
    outputs.square().sum().backward()
    return [outputs.detach(), *oracle.gradients(module, x_seq)]


@with_old
@pytest.mark.parametrize(("name", "settings"), list(same_settings()))
def test_the_numbers_of_the_old_package(name, settings):
    x_seq = torch.randn(5, 4, 7)
    mine, old = (getattr(package, name)(**settings) for package in BOTH)
    for a, b in zip(through_time(mine, x_seq), through_time(old, x_seq), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)
    assert list(mine.state_dict()) == list(old.state_dict())
    assert {name for name, _ in mine.named_memories()} == {name for name, _ in old.named_memories()}


@with_old
@pytest.mark.parametrize(
    "name",
    [name for name in neuron.__all__ if "Node" in name and name not in ("BaseNode", "MultiStepBaseNode")],
)
def test_the_arguments_of_the_old_package(name):
    import inspect

    mine, old = (inspect.signature(getattr(package, name).__init__) for package in BOTH)
    assert list(mine.parameters) == list(old.parameters)
    for mine_one, old_one in zip(mine.parameters.values(), old.parameters.values()):
        if mine_one.name != "surrogate_function":
            assert mine_one.default == old_one.default


def test_layers_that_carry_no_state_fold_time():
    norm = layer.MultiStepThresholdDependentBatchNorm2d(1.0, 0.5, 3)
    assert torch.equal(norm.weight.detach(), torch.full((3,), 0.5))
    x_seq = torch.randn(4, 2, 3, 5, 5)
    own = nn.BatchNorm2d(3)
    nn.init.constant_(own.weight, 0.5)
    assert torch.equal(norm(x_seq), own(x_seq.flatten(0, 1)).view(x_seq.shape))
    with pytest.raises(ValueError, match="expected"):
        norm(x_seq[0])
    net = layer.SeqToANNContainer(nn.Conv2d(3, 2, 3), nn.Flatten())
    assert torch.equal(net(x_seq), torch.stack([net[1](net[0](x)) for x in x_seq]))
    assert torch.equal(
        functional.multi_step_forward(x_seq, net[0]), functional.seq_to_ann_forward(x_seq, net[0])
    )


def test_neu_norm_and_dropout():
    net = nn.Sequential(layer.NeuNorm(3, 4, 4), layer.Dropout2d(0.5), neuron.IFNode())
    converted = sltt_ext.convert(net)
    x = torch.rand(2, 3, 4, 4, requires_grad=True)
    first = converted(x)
    mask = converted[1].mask
    (gradient,) = torch.autograd.grad(converted(x).sum(), x)
    assert converted[1].mask is mask
    assert first.shape == gradient.shape
    functional.reset_net(converted)
    assert converted[1].mask is None
    assert converted[0].x == 0.0


def test_the_still_older_neurons_have_an_arc_tangent():
    x_seq = torch.randn(5, 4, 7)
    for old, new in (
        (
            cext.MultiStepIFNode(detach_reset=True),
            neuron.MultiStepIFNode(1.0, 0.0, neuron.surrogate.ATan(2.0), True),
        ),
        (
            cext.MultiStepLIFNode(2.0, alpha=3.0),
            neuron.MultiStepLIFNode(2.0, surrogate_function=neuron.surrogate.ATan(3.0)),
        ),
        (cext.IFNode(), neuron.IFNode(surrogate_function=neuron.surrogate.ATan())),
        (cext.LIFNode(2.0), neuron.LIFNode(surrogate_function=neuron.surrogate.ATan())),
    ):
        for a, b in zip(
            through_time(sltt_ext.convert(old), x_seq), through_time(sltt_ext.convert(new), x_seq)
        ):
            assert torch.equal(a, b)
    with pytest.raises(
        ConfigurationError,
        match=r"surrogate_function='Erf' of spikingjelly.cext is not available here: use one of ATan",
    ):
        cext.IFNode(surrogate_function="Erf")


def test_a_surrogate_of_ones_own():
    class Rectangle(surrogate.SurrogateFunctionBase):
        """As code for the old package writes one."""

        def __init__(self, alpha=1.0, spiking=True):
            super().__init__(alpha, spiking)

        @staticmethod
        def spiking_function(x, alpha):
            near = (x.abs() < alpha / 2).to(x) * x
            return surrogate.heaviside(x) + near - near.detach()

        @staticmethod
        def primitive_function(x, alpha):
            return x.clamp(-alpha / 2, alpha / 2)

    x = torch.tensor([-2.0, -0.1, 0.1, 2.0], requires_grad=True)
    node = sltt_ext.convert(neuron.IFNode(v_threshold=0.0, surrogate_function=Rectangle()))
    spikes = node(x)
    assert spikes.tolist() == [0, 0, 1, 1]
    spikes.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]
    node.surrogate_function.set_spiking_mode(False)
    assert node.surrogate_function(x).tolist() == pytest.approx([-0.5, -0.1, 0.1, 0.5])


def test_arguments_in_the_order_of_a_still_older_package():
    with pytest.raises(
        ConfigurationError, match=r"v_reset must be a number, got Sigmoid.*before SpikingJelly 0\.0\.0\.0\.9"
    ):
        neuron.MultiStepLIFNode(2.0, 1.0, 0.0, surrogate.Sigmoid())


def test_a_backend_that_is_not_there():
    assert neuron.MultiStepLIFNode(backend="cupy").backend == "cupy"
    with pytest.raises(ConfigurationError, match="backend='lava' of the old neurons is not available here"):
        neuron.MultiStepLIFNode(backend="lava")


def test_other_names_are_the_installed_ones():
    try:
        from spikingjelly.activation_based import layer as newer
    except ModuleNotFoundError:
        pytest.skip("no newer SpikingJelly")
    assert layer.DropConnectLinear is newer.DropConnectLinear
    with pytest.raises(AttributeError):
        _ = layer.Nothing
