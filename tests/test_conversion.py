import copy
import pickle

import networks
import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

import sltt_ext
from sltt_ext.conversion import register_adapter
from sltt_ext.errors import BackendError, ConversionError, SLTTWarning, UnsupportedModuleError
from sltt_ext.neuron import SLTTNeuron


def test_convert_then_revert_leaves_everything_as_before():
    net = networks.resnet18().eval()
    x = torch.randn(1, 3, 32, 32)
    calls = []
    handle = net.layer1[0].sn1.register_forward_hook(lambda *_: calls.append(1))
    types = [type(module) for module in net.modules()]
    dictionaries = [set(vars(module)) for module in net.modules()]
    identities = [id(module) for module in net.modules()]
    expected = net(x)
    functional.reset_net(net)

    assert sltt_ext.convert(net) is net
    assert sltt_ext.is_converted(net)
    assert torch.equal(net(x), expected)
    functional.reset_net(net)
    assert sltt_ext.revert(net) is net

    assert not sltt_ext.is_converted(net)
    assert [type(module) for module in net.modules()] == types
    assert [set(vars(module)) for module in net.modules()] == dictionaries
    assert [id(module) for module in net.modules()] == identities
    assert torch.equal(net(x), expected)
    assert len(calls) == 3
    handle.remove()


def test_converting_twice_is_harmless():
    net = sltt_ext.convert(networks.conv_net(neuron.QIFNode))
    types = [type(module) for module in net.modules()]
    sltt_ext.convert(net)
    assert [type(module) for module in net.modules()] == types
    sltt_ext.revert(net)
    assert type(net[1]) is neuron.QIFNode


def test_one_neuron_and_a_shared_neuron():
    node = neuron.IFNode()
    assert sltt_ext.convert(node) is node
    shared = nn.Sequential(node, nn.Linear(3, 3), node)
    sltt_ext.convert(shared)
    assert isinstance(shared[2], SLTTNeuron)


@pytest.mark.parametrize("node", [neuron.LIFNode, neuron.ParametricLIFNode, neuron.QIFNode])
def test_checkpoints_load_both_ways(node, tmp_path):
    original, converted = networks.conv_net(node, seed=0), sltt_ext.convert(networks.conv_net(node, seed=1))
    assert list(original.state_dict()) == list(converted.state_dict())
    torch.save(converted.state_dict(), tmp_path / "converted.pt")
    original.load_state_dict(torch.load(tmp_path / "converted.pt"))
    converted.load_state_dict(networks.conv_net(node, seed=2).state_dict())
    x, _ = networks.images()
    assert torch.equal(networks.conv_net(node, seed=1)(x), original(x))
    assert torch.equal(networks.conv_net(node, seed=2)(x), converted(x))


@pytest.mark.parametrize("node", [neuron.LIFNode, neuron.ParametricLIFNode, neuron.QIFNode])
def test_copies_and_whole_network_pickles(node, tmp_path):
    net = sltt_ext.convert(networks.conv_net(node))
    torch.save(net, tmp_path / "net.pt")
    x, _ = networks.images()
    expected = net(x)
    functional.reset_net(net)
    twins = [
        copy.deepcopy(net),
        pickle.loads(pickle.dumps(net)),
        torch.load(tmp_path / "net.pt", weights_only=False),
    ]
    for twin in twins:
        assert torch.equal(twin(x), expected)
        assert [type(module) for module in twin.modules()] == [type(module) for module in net.modules()]


def test_half_and_to():
    net = sltt_ext.convert(networks.conv_net()).to(torch.bfloat16)
    x, _ = networks.images()
    assert net(x.to(torch.bfloat16)).dtype == torch.bfloat16
    functional.reset_net(net)
    assert net.to(torch.float64)(x.double()).dtype == torch.float64
    functional.reset_net(net)
    half = sltt_ext.convert(nn.Sequential(nn.Linear(4, 3), neuron.ParametricLIFNode())).half()
    assert half(torch.ones(2, 4).half()).dtype == torch.float16


def test_without_neurons():
    with pytest.raises(
        ConversionError, match=r"no spiking neuron.*declare_neuron: the page 'Published code'"
    ):
        sltt_ext.convert(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


def test_what_is_no_module():
    layers = [nn.Linear(2, 2), neuron.LIFNode()]
    for what, said in (
        (lambda x: x, "got a function"),
        (layers, r"got a list: give it as nn.Sequential\(\*layers\)"),
        (neuron.LIFNode, "got the class LIFNode: make one first"),
    ):
        with pytest.raises(ConversionError, match=said):
            sltt_ext.convert(what)
    assert sltt_ext.is_converted(sltt_ext.convert(nn.Sequential(*layers)))


class OverridesForward(neuron.LIFNode):
    def forward(self, x):
        return super().forward(2 * x)


def network_with_modules_to_refuse():
    net = nn.ModuleDict(
        {
            "good": neuron.LIFNode(),
            "own": OverridesForward(),
            "block": nn.Sequential(layer.Conv2d(1, 1, 1), layer.DropConnectLinear(3, 3, invariant=True)),
        }
    )
    refused = {"own", "block.1"}
    if hasattr(neuron, "PSN"):
        net["psn"] = neuron.PSN(T=4)
        refused.add("psn")
    return net, refused


def test_refusal_lists_every_module_and_changes_nothing():
    net, refused = network_with_modules_to_refuse()
    with pytest.raises(ConversionError, match="nothing was converted") as caught:
        sltt_ext.convert(net)
    assert set(caught.value.reasons) == refused
    assert "block.1: DropConnectLinear: with invariant=True it carries its weights" in str(caught.value)
    assert not sltt_ext.is_converted(net)


def test_not_strict_converts_the_rest_with_one_warning():
    net, refused = network_with_modules_to_refuse()
    with pytest.warns(SLTTWarning, match="left as they are") as caught:
        assert sltt_ext.convert(net, strict=False) is net
    assert len(caught) == 1
    assert all(f"  {path}: " in str(caught[0].message) for path in refused)
    assert isinstance(net["good"], SLTTNeuron)
    assert type(net["own"]) is OverridesForward
    with pytest.raises(ConversionError, match="the module itself"):
        sltt_ext.convert(OverridesForward(), strict=False)  # nothing else to convert


def test_a_rule_may_leave_a_module_as_it_is_or_name_a_class_by_its_path():
    class Plain(nn.Module):
        pass

    register_adapter(f"{Plain.__module__}.{Plain.__qualname__}")(lambda module: None)
    net = sltt_ext.convert(nn.Sequential(neuron.LIFNode(), Plain()))
    assert type(net[1]) is Plain


def test_unknown_backend_changes_nothing():
    net = networks.conv_net()
    with pytest.raises(BackendError, match="unknown backend 'cuda'"):
        sltt_ext.convert(net, backend="cuda")
    assert not sltt_ext.is_converted(net)


def test_backend_reaches_the_neurons_and_leaves_with_revert():
    net = sltt_ext.convert(networks.conv_net(), backend="torch")
    assert net[1].sltt_backend == "torch"
    assert "sltt_backend" not in vars(sltt_ext.revert(net)[1])


def test_rules_of_the_closest_base_class_win():
    class Base(nn.Module):
        pass

    class Derived(Base):
        pass

    @register_adapter(Base)
    def base_rule(module):
        raise UnsupportedModuleError("the rule of the base")

    @register_adapter(Derived)
    def derived_rule(module):
        raise UnsupportedModuleError("the rule of the subclass")

    with pytest.raises(ConversionError) as caught:
        sltt_ext.convert(nn.ModuleList([Base(), Derived()]))
    assert caught.value.reasons == {
        "0": "Base: the rule of the base",
        "1": "Derived: the rule of the subclass",
    }


@pytest.mark.parametrize(
    "stateful",
    [
        lambda: layer.Dropout(0.4),
        lambda: layer.SynapseFilter(tau=3.0, learnable=True),
        lambda: layer.LinearRecurrentContainer(neuron.LIFNode(), 7, 7),
        lambda: layer.ElementWiseRecurrentContainer(neuron.LIFNode(), lambda x, y: x + 0.5 * y),
    ],
    ids=["Dropout", "SynapseFilter", "LinearRecurrentContainer", "ElementWiseRecurrentContainer"],
)
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_other_stateful_modules(stateful, step_mode):
    import oracle

    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Linear(7, 7),
        neuron.LIFNode(surrogate_function=surrogate.ATan()),
        stateful(),
        layer.Linear(7, 3),
    )
    with torch.no_grad():
        net[0].weight.mul_(4)
    converted = sltt_ext.convert(copy.deepcopy(net))
    x_seq, weight = 2 * torch.rand(5, 4, 7), torch.randn(5, 4, 3)

    torch.manual_seed(1)
    for x, step_weight in zip(x_seq, weight):
        (net(x) * step_weight).sum().backward()
        oracle.detach_memories(net)
    torch.manual_seed(1)
    functional.set_step_mode(converted, step_mode)
    output = converted(x_seq) if step_mode == "m" else torch.stack([converted(x) for x in x_seq])
    (output * weight).sum().backward()
    assert oracle.relative_error(oracle.gradients(converted), oracle.gradients(net)) < 1e-6


def test_a_trainer_is_no_network():
    net = sltt_ext.convert(nn.Sequential(nn.Linear(2, 2), neuron.LIFNode()))
    online = sltt_ext.OnlineTrainer(net, nn.functional.cross_entropy, 2)
    with pytest.raises(ConversionError, match=r"revert takes a torch.nn.Module, .*: give its network, .net"):
        sltt_ext.revert(online)
    assert not sltt_ext.is_converted(sltt_ext.revert(online.net))
