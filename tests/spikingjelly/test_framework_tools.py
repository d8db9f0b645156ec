"""What SpikingJelly and PyTorch offer for a network goes on working on a converted one."""

import copy

import networks
import oracle
import pytest
import torch
from modules import FUNCTIONAL_FORM
from spikingjelly.activation_based import functional, layer, monitor, neuron, surrogate
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import sltt_ext

T = 4
only_2x = pytest.mark.skipif(not FUNCTIONAL_FORM, reason="SpikingJelly 2.x")
only_0 = pytest.mark.skipif(FUNCTIONAL_FORM, reason="SpikingJelly 0.0.0.0.14")
nodes = pytest.mark.parametrize("node", [neuron.LIFNode, neuron.ParametricLIFNode, neuron.QIFNode])


def converted_net(node=neuron.LIFNode, step_mode="s"):
    return sltt_ext.convert(networks.conv_net(node, step_mode))


def sequence():
    x, target = networks.images()
    return x.expand(T, *x.shape), target


@nodes
def test_reset_net_forgets(node):
    net = converted_net(node)
    x, _ = networks.images()
    first = net(x)
    assert isinstance(net[1].v, torch.Tensor)
    functional.reset_net(net)
    assert net[1].v == networks.conv_net(node)[1].v
    assert torch.equal(net(x), first)


@nodes
def test_set_step_mode(node):
    net = converted_net(node)
    x_seq, _ = sequence()
    expected = torch.stack([net(x) for x in x_seq])
    functional.reset_net(net)
    functional.set_step_mode(net, "m")
    assert net[1].multi_step
    torch.testing.assert_close(net(x_seq), expected)


@nodes
def test_detach_net_cuts_the_graph(node):
    net = converted_net(node)
    x, _ = networks.images()
    net(x).sum().backward()
    assert net[1].v.requires_grad
    functional.detach_net(net)
    assert not net[1].v.requires_grad


@only_0
def test_set_backend():
    net = converted_net(step_mode="m")
    functional.set_backend(net, "torch", neuron.LIFNode)
    assert net[1].backend == "torch"
    with pytest.raises(ImportError, match="CuPy is not installed"):
        functional.set_backend(net, "cupy", neuron.LIFNode)


@nodes
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_monitors(node, step_mode):
    original = networks.conv_net(node, step_mode)
    x_seq, _ = sequence()
    records = []
    for net in (original, sltt_ext.convert(copy.deepcopy(original))):
        for module in net.modules():
            if isinstance(module, node):
                module.store_v_seq = True
        spikes = monitor.OutputMonitor(net, node)
        potentials = monitor.AttributeMonitor("v_seq" if step_mode == "m" else "v", False, net, instance=node)
        net(x_seq if step_mode == "m" else x_seq[0])
        records.append(spikes.records + potentials.records)
    assert len(records[1]) == 4
    assert all(torch.equal(*pair) for pair in zip(*records, strict=True))


@nodes
def test_named_memories(node):
    original = networks.conv_net(node)
    net = sltt_ext.convert(copy.deepcopy(original))
    x, _ = networks.images()
    original(x)
    net(x)
    for before, after in zip(original, net, strict=True):
        if isinstance(before, node):
            for (name, value), (_, expected) in zip(
                after.named_memories(), before.named_memories(), strict=True
            ):
                assert torch.equal(value, expected), name


@only_2x
@nodes
def test_functional_forward_of_a_network(node):
    from spikingjelly.activation_based import base

    net = converted_net(node, "m")
    x_seq, _ = sequence()
    expected = net(x_seq)
    states = base.extract_memories(net)
    functional.reset_net(net)
    (output,), updated = base.to_functional_forward(net)((x_seq,), tuple(base.extract_memories(net)))
    assert torch.equal(output, expected)
    assert all(torch.equal(*pair) for pair in zip(updated, states, strict=True))


def conv_bn_net():
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(1, 4, 3, bias=False),
        layer.BatchNorm2d(4),
        neuron.LIFNode(v_threshold=0.3),
        layer.Flatten(),
    )
    x, _ = networks.images()
    for _ in range(3):
        net(x)
        functional.reset_net(net)
    return net.eval(), x


def test_conv_bn_fusion():
    net, x = conv_bn_net()
    net = sltt_ext.convert(net)
    with torch.no_grad():
        expected = net(x)
        functional.reset_net(net)
        if FUNCTIONAL_FORM:
            from spikingjelly.activation_based.functional.conv_bn_fusion import fuse_conv_bn_eval_modules

            fused = fuse_conv_bn_eval_modules(net)
        else:
            fused = copy.deepcopy(net)
            fused[0] = functional.fuse_convbn2d(net[0], net[1])
            fused[1] = nn.Identity()
        assert expected.sum() > 0
        assert sltt_ext.is_converted(fused)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
        torch.testing.assert_close(fused(x), expected)


@only_2x
def test_nir_export(tmp_path):
    """nirtorch looks modules up by their exact class, so it is given the original ones."""
    nir = pytest.importorskip("nir")
    from spikingjelly.activation_based import nir_exchange

    torch.manual_seed(0)
    original = nn.Sequential(layer.Linear(6, 5), neuron.LIFNode(tau=2.0), layer.Linear(5, 3), neuron.IFNode())
    net = sltt_ext.convert(copy.deepcopy(original))
    x = torch.rand(2, 6)
    graphs = [nir_exchange.export_to_nir(each.eval(), x) for each in (original, sltt_ext.revert(net))]
    assert list(graphs[0].nodes) == list(graphs[1].nodes)
    assert {type(node) for node in graphs[1].nodes.values()} >= {nir.LIF, nir.IF, nir.Affine}
    assert graphs[0].edges == graphs[1].edges
    assert torch.equal(sltt_ext.convert(net)(x), original(x))  # and training goes on


@only_2x
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("node", [neuron.LIFNode, neuron.QIFNode])
def test_memopt_on_top(node, level, compress):
    from spikingjelly.activation_based import memopt

    net = converted_net(node, "m")
    x_seq, target = sequence()

    def train_step(network):
        functional.reset_net(network)
        network.zero_grad()
        F.cross_entropy(network(x_seq).mean(0), target).backward()
        return oracle.gradients(network)

    expected = train_step(net)
    functional.reset_net(net)
    optimized = memopt.optimize_memory(
        copy.deepcopy(net),
        (layer.Conv2d, neuron.BaseNode),
        train_step,
        level=level,
        checkpoint_budget="memory",
        compress=compress,
    )
    assert type(optimized[1]).__name__ == "CheckpointWrapper"
    assert oracle.relative_error(train_step(optimized), expected) < 1e-6


@pytest.mark.parametrize("node", [neuron.LIFNode, neuron.ParametricLIFNode])
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_compile(node, step_mode):
    net = converted_net(node, step_mode)
    x_seq, target = sequence()
    given = x_seq if step_mode == "m" else x_seq[0]
    output = net(given)
    F.cross_entropy(output.mean(0) if step_mode == "m" else output, target).backward()
    expected = oracle.gradients(net)
    functional.reset_net(net)
    net.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(
        net, backend="aot_eager", fullgraph=FUNCTIONAL_FORM
    )  # 0.0.0.0.14's own layers break
    again = compiled(given)
    F.cross_entropy(again.mean(0) if step_mode == "m" else again, target).backward()
    torch.testing.assert_close(again, output)
    assert oracle.relative_error([p.grad for p in net.parameters()], expected) < 1e-6


@nodes
def test_data_parallel_replicas_do_not_share_state(node):
    """What DataParallel does to every module on each device; it needs CUDA to do it by itself."""
    module = sltt_ext.convert(node())
    x = torch.randn(2, 4, 7)
    module(x[0])
    v = module.v
    replica = module._replicate_for_data_parallel()
    replica.__dict__.update(_parameters=module._parameters)  # DataParallel copies these onto the device
    assert type(replica) is type(module)
    replica(x[1])
    assert module.v is v
    assert replica.v is not v


def test_surrogates_keep_their_own_forward_when_not_spiking():
    net = nn.Sequential(
        layer.Linear(3, 3), neuron.LIFNode(surrogate_function=surrogate.Sigmoid(spiking=False))
    )
    x = torch.randn(2, 3)
    expected = net(x)
    functional.reset_net(net)
    assert torch.equal(sltt_ext.convert(net)(x), expected)


@only_2x
@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize(
    "name",
    ["ACCounter", "FlopCounter", "MACCounter", "MemoryAccessCounter", "NeuronStateCounter", "SynOpCounter"],
)
def test_operation_counters(name, step_mode):
    """They know the framework's own operators, and count those."""
    from spikingjelly.activation_based import op_counter

    def counted(net):
        x = sequence()[0] if step_mode == "m" else networks.images()[0]
        counter = getattr(op_counter, name)()
        with op_counter.DispatchCounterMode([counter]), torch.no_grad():
            net(x)
        return counter.get_total()

    expected = counted(networks.conv_net(step_mode=step_mode))
    assert counted(converted_net(step_mode=step_mode)) == expected


@nodes
def test_an_export_to_onnx_runs_the_framework_s_own_operators(node, monkeypatch):
    x, _ = networks.images()
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert ran(converted_net(node), x) == ran(networks.conv_net(node), x)


def ran(net, x):
    """The operators that a forward pass dispatches."""
    with Names() as names:
        output = net(x)
    return names.seen, output.tolist()


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) != "aten.detach.default":
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@only_2x
def test_vmap_over_a_converted_network():
    x, _ = networks.images()

    def one(net):
        def run(sample):
            functional.reset_net(net)
            return net(sample.unsqueeze(0)).squeeze(0)

        return torch.func.vmap(run)

    torch.testing.assert_close(one(converted_net())(x), one(networks.conv_net())(x))
