"""The neurons of spikingjelly.clock_driven, from a copy and from the package itself where it is installed."""

import copy
import itertools
import pickle
import subprocess
import sys

import pytest
import torch
from published_style import oracle
from torch import nn

import sltt_ext
from sltt_ext.clock_driven import base
from sltt_ext.clock_driven import neuron as clock_driven
from sltt_ext.errors import ConfigurationError, ConversionError
from sltt_ext.legacy_spikingjelly import FusedNode
from sltt_ext.legacy_spikingjelly import fused as fused_file
from sltt_ext.neuron import SLTTNeuron

packages = pytest.mark.parametrize(
    "package", oracle.packages(), ids=lambda package: package.__name__.split(".")[-1]
)
KINDS = ["IFNode", "LIFNode", "ParametricLIFNode"]
prefixes = pytest.mark.parametrize("prefix", ["", "MultiStep"])

SETTINGS = [
    {"v_reset": v_reset, "detach_reset": detach_reset}
    for v_reset, detach_reset in itertools.product([0.0, None, -0.3], [False, True])
]
FUSED = [(kind, settings) for kind in KINDS for settings in SETTINGS]
FUSED += [(kind, {**settings, "decay_input": False}) for kind in KINDS[1:] for settings in SETTINGS]


def currents(time_steps=6):
    return 2 * torch.randn(time_steps, 4, 7) + 0.6


def compare(original, tolerance):
    x_seq, weight, v_weight = currents(), torch.rand(6, 4, 7), torch.rand(4, 7)
    converted = sltt_ext.convert(copy.deepcopy(original))
    outputs, v, expected = oracle.module_by_steps(original, x_seq, weight, v_weight)
    actual_outputs, actual_v, actual = oracle.module_in_one_backward(converted, x_seq, weight, v_weight)
    assert torch.equal(actual_outputs, outputs)
    assert v is None or torch.equal(actual_v, v)
    assert oracle.relative_error(actual, expected) <= tolerance
    return converted


@packages
@prefixes
@pytest.mark.parametrize(("kind", "settings"), FUSED)
def test_fused(package, prefix, kind, settings):
    original = getattr(package, prefix + kind)(surrogate_function=package.ATan(), **settings)
    assert isinstance(compare(original, 1e-6), FusedNode)


@packages
@prefixes
@pytest.mark.parametrize("kind", [*KINDS, "EIFNode"])
def test_generic(package, prefix, kind):
    """Outside of spiking mode no operator knows the surrogate, and none knows EIF."""
    settings = {} if kind == "EIFNode" else {"surrogate_function": package.Sigmoid(spiking=False)}
    original = getattr(package, prefix + kind)(**settings)
    assert not isinstance(
        compare(original, 0 if kind == "EIFNode" else 1e-7), FusedNode
    )  # autograd's order of sums


@packages
def test_what_runs_is_the_operator(package, monkeypatch):
    converted = sltt_ext.convert(package.MultiStepLIFNode(tau=3.0))
    calls, run = [], fused_file.run_lif
    monkeypatch.setattr(
        fused_file, "run_lif", lambda *args, **kwargs: calls.append(1) or run(*args, **kwargs)
    )
    converted(currents())
    assert len(calls) == 1


@packages
@pytest.mark.parametrize("kind", ["IFNode", "LIFNode", "ParametricLIFNode", "EIFNode"])
def test_the_kernels_of_cupy_are_replaced(package, kind):
    """They are for a GPU, and have a gradient through time: neither is what a converted neuron runs."""
    original = getattr(package, f"MultiStep{kind}")()
    node = copy.deepcopy(original)
    node.backend = "cupy"
    converted = sltt_ext.convert(node)
    x_seq = currents()
    assert torch.equal(converted(x_seq), original(x_seq))
    assert converted.backend == "cupy"


@packages
def test_potentials_of_all_steps(package):
    original = package.MultiStepLIFNode(surrogate_function=package.ATan())
    converted = sltt_ext.convert(copy.deepcopy(original))
    x_seq = currents()
    expected = original(x_seq) * 0 + original.v_seq.detach()
    converted(x_seq)
    with pytest.raises(ConfigurationError, match="MultiStepLIFNode did not keep v_seq"):
        _ = converted.v_seq
    converted.reset()
    converted.store_v_seq = True
    converted(x_seq)
    assert torch.equal(converted.v_seq, expected)
    converted.reset_state()
    converted.store_v_seq = False
    converted(x_seq[:1])
    assert torch.equal(converted.v_seq, expected[:1])


@packages
def test_generic_potentials_of_all_steps_have_their_local_gradient(package):
    original = package.MultiStepEIFNode()
    converted = sltt_ext.convert(copy.deepcopy(original))
    x_seq = currents(4)
    leaf = x_seq.clone().requires_grad_()
    converted(leaf)
    converted.v_seq.square().sum().backward()
    own = x_seq.clone().requires_grad_()
    for x in own:
        original(x.unsqueeze(0))
        original.v.square().sum().backward()
        oracle.detach(original)
    assert torch.equal(leaf.grad, own.grad)


def changed(**methods):
    return type("LIFNode", (clock_driven.LIFNode,), methods)


def clamped(self, x):
    clock_driven.LIFNode.neuronal_charge(self, x)
    self.v = self.v.clamp(-1.0, 50.0)


def counting(self, x):
    self.seen = getattr(self, "seen", 0) + 1
    return clock_driven.LIFNode.forward(self, x)


class SteeperATan(clock_driven.surrogate.ATan):
    def forward(self, u):
        s = super().forward(u)
        return 1.01 * s - 0.01 * s.detach()


SteeperATan.__name__ = "ATan"


@pytest.mark.parametrize(
    "original",
    [
        changed(neuronal_charge=clamped)(),
        changed(forward=counting)(),
        clock_driven.LIFNode(surrogate_function=SteeperATan()),
        clock_driven.LIFNode(v_threshold=torch.rand(7)),
    ],
    ids=["dynamics", "side effect", "surrogate", "a threshold for each"],
)
def test_a_changed_copy_runs_by_the_generic_rule(original):
    converted = compare(original, 0)
    assert converted._sltt_left != ()
    assert fused_file.fused_settings(original) is None or not isinstance(converted, FusedNode)
    assert getattr(converted, "seen", 6) == 6


class Louder(clock_driven.LIFNode):
    """A copy whose spikes are no ones."""

    def neuronal_fire(self):
        return 1.5 * super().neuronal_fire()


Louder.__name__ = "LIFNode"


@pytest.mark.parametrize("node", [clock_driven.LIFNode, Louder])
def test_only_ones_are_packed(node):
    def gradients_of(**options):
        torch.manual_seed(1)
        net = sltt_ext.convert(nn.Sequential(nn.Linear(7, 9), node(), nn.Linear(9, 3)))
        sltt_ext.OnlineTrainer(net, nn.functional.cross_entropy, 5, **options).forward_backward(x, target)
        return oracle.gradients(net), net[1].spikes(x)

    x, target = currents(1)[0], torch.randint(3, (4,))
    (plain, _), (packed, told) = gradients_of(), gradients_of(pack_spikes=True)
    assert (told is None) == (node is Louder)
    assert oracle.relative_error(packed, plain) < 1e-6


def test_a_setting_that_changes_after_conversion():
    converted = sltt_ext.convert(clock_driven.LIFNode())
    original = clock_driven.LIFNode(v_threshold=0.5)
    converted.v_threshold = 0.5
    x = currents(1)[0]
    assert torch.equal(converted(x), original(x))


class Configured(clock_driven.MultiStepLIFNode):
    def __init__(self, **settings):
        super().__init__(tau=1.5, detach_reset=True, **settings)


class Adapting(clock_driven.LIFNode):
    """A second state, and an order of its own: as in complementary LIF neurons."""

    def __init__(self):
        super().__init__(v_reset=None)
        self.register_memory("m", 0.0)

    def forward(self, x):
        self.neuronal_charge(x)
        self.m = self.m * torch.sigmoid(self.v / self.tau)
        spike = self.neuronal_fire()
        self.m = self.m + spike
        self.neuronal_reset(spike)
        self.v = self.v - spike * torch.sigmoid(self.m)
        return spike


class MultiStepAdapting(Adapting):
    def forward(self, x_seq):
        self.v_seq, spikes = [], []
        for x in x_seq:
            spikes.append(super().forward(x))
            self.v_seq.append(self.v)
        self.v_seq = torch.stack(self.v_seq)
        return torch.stack(spikes)


def test_a_subclass_that_sets_defaults_runs_on_the_operator():
    assert isinstance(compare(Configured(), 1e-6), FusedNode)


@pytest.mark.parametrize("cls", [Adapting, MultiStepAdapting])
def test_a_forward_that_charges_is_held_there(cls):
    assert not isinstance(compare(cls(), 0), FusedNode)


class PlainState(clock_driven.LIFNode):
    """Keeps a trace as a plain attribute, read in the next step."""

    trace = 0.0

    def neuronal_charge(self, x):
        super().neuronal_charge(x + self.trace)

    def forward(self, x):
        spike = super().forward(x)
        self.trace = 0.5 * self.trace + spike
        return spike


class MultiStepPlainState(PlainState):
    def forward(self, x_seq):
        return torch.stack([super(MultiStepPlainState, self).forward(x) for x in x_seq])


@pytest.mark.parametrize("cls", [PlainState, MultiStepPlainState])
def test_what_a_step_leaves_in_plain_attributes_is_state(cls):
    x_seq, weight = currents(), torch.rand(6, 4, 7)
    original = cls()
    own = x_seq.clone().requires_grad_()
    for x, step_weight in zip(own, weight):
        (oracle.step(original, x) * step_weight).sum().backward()
        oracle.detach(original)
        original.trace = original.trace.detach()
    _, _, actual = oracle.module_in_one_backward(sltt_ext.convert(cls()), x_seq, weight, torch.zeros(4, 7))
    assert torch.equal(actual[0], own.grad)


class MultiStepReadsEarly(clock_driven.LIFNode):
    """Adds its last spikes to the input ahead of ``neuronal_charge``, in a loop of its own."""

    def forward(self, x_seq):
        spikes = []
        for x in x_seq:
            self.neuronal_charge(x + 0.1 * spikes[-1] if spikes else x)
            spikes.append(self.neuronal_fire())
            self.neuronal_reset(spikes[-1])
        return torch.stack(spikes)


def test_a_state_that_is_read_too_early():
    converted = sltt_ext.convert(MultiStepReadsEarly())
    converted(currents(1).requires_grad_())
    with pytest.raises(ConfigurationError, match="MultiStepReadsEarly reads a value of the previous step"):
        converted(currents().requires_grad_())
    converted.reset()
    with torch.no_grad():
        assert torch.equal(converted(x_seq := currents()), MultiStepReadsEarly()(x_seq))


class NeverCharges(clock_driven.LIFNode):
    def forward(self, x):
        self.v = 0.5 * self.v + x
        return self.surrogate_function(self.v - 1.0)


class ChargesSometimes(clock_driven.LIFNode):
    def forward(self, x, charges=True):
        if charges:
            return super().forward(x)
        self.v = 0.5 * self.v + x
        return self.surrogate_function(self.v - 1.0)


class Unknown(base.MemoryModule):
    def __init__(self):
        super().__init__()
        self.register_memory("sum", 0.0)

    def forward(self, x):
        self.sum = self.sum + x
        return self.sum


def test_what_cannot_be_held_is_refused_with_the_way_out():
    net = nn.ModuleDict({"good": clock_driven.LIFNode(), "own": NeverCharges(), "unknown": Unknown()})
    with pytest.raises(ConversionError, match="Published code") as caught:
        sltt_ext.convert(net)
    assert set(caught.value.reasons) == {"own", "unknown"}
    assert "declare_neuron(NeverCharges, ...)" in str(caught.value)
    assert "declare_neuron(Unknown, state=" in str(caught.value)
    assert not sltt_ext.is_converted(net)
    converted = sltt_ext.convert(ChargesSometimes())
    x = currents(1)[0].requires_grad_()
    converted(x)
    with pytest.raises(ConfigurationError, match="forward of ChargesSometimes ran without neuronal_charge"):
        converted(x, charges=False)


@packages
def test_revert_copies_and_pickles(package):
    original = nn.Sequential(nn.Linear(7, 7), package.LIFNode(), package.EIFNode())
    before = [set(vars(module)) for module in original.modules()]
    converted = sltt_ext.convert(copy.deepcopy(original))
    x = currents(1)[0]
    for twin in (converted, copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert torch.equal(twin(x), original(x))
        [module.reset() for module in original.modules() if hasattr(module, "reset")]
    sltt_ext.revert(converted)
    assert [set(vars(module)) for module in converted.modules()] == before
    assert [type(module) for module in converted.modules()] == [type(module) for module in original.modules()]


@packages
@pytest.mark.parametrize("learnable", [False, True])
def test_synapse_filter(package, learnable):
    class Readout(nn.Module):
        def __init__(self):
            super().__init__()
            self.filter = package.SynapseFilter(tau=3.0, learnable=learnable)

        def forward(self, x):
            return self.filter(x)

    x_seq, weight = currents().clamp(0, 1), torch.rand(6, 4, 7)
    original = Readout()
    converted = sltt_ext.convert(nn.Sequential(copy.deepcopy(original), package.IFNode()))[0]
    assert isinstance(converted.filter, SLTTNeuron)
    assert not converted.filter.fires
    outputs, _, expected = oracle.module_by_steps(original, x_seq, weight, None)
    actual_outputs, _, actual = oracle.module_in_one_backward(converted, x_seq, weight, None)
    assert torch.equal(actual_outputs, outputs)
    assert oracle.relative_error(actual, expected) <= 1e-6


@packages
def test_recurrent_containers(package):
    def make(kind):
        node = package.LIFNode(surrogate_function=package.ATan())
        if kind == "linear":
            return package.LinearRecurrentContainer(node, 7, 7)
        return package.ElementWiseRecurrentContainer(node, torch.add)

    for kind in ("linear", "element wise"):
        original = make(kind)
        x_seq, weight = currents(), torch.rand(6, 4, 7)
        converted = sltt_ext.convert(copy.deepcopy(original))
        outputs, _, expected = oracle.module_by_steps(original, x_seq, weight, None)
        actual_outputs, _, actual = oracle.module_in_one_backward(converted, x_seq, weight, None)
        assert torch.equal(actual_outputs, outputs)
        assert oracle.relative_error(actual, expected) <= 1e-6


@packages
def test_multi_step_container_and_dropout(package):
    original = nn.Sequential(
        package.SeqToANNContainer(nn.Linear(7, 7), nn.BatchNorm1d(7)),
        package.MultiStepContainer(nn.Linear(7, 7), package.LIFNode(surrogate_function=package.ATan())),
        package.MultiStepDropout(0.3),
    )
    original[2](torch.ones(1, 4, 7))  # its mask is drawn
    converted = sltt_ext.convert(copy.deepcopy(original))
    assert [isinstance(module, SLTTNeuron) for module in converted] == [False, True, True]
    x_seq, weight = currents(), torch.rand(6, 4, 7)
    folded = original[0](x_seq)  # the norm sees all steps, and carries nothing
    expected = []
    for x, step_weight in zip(folded, weight):
        expected.append(original[2](original[1](x.unsqueeze(0)))[0])
        (expected[-1] * step_weight).sum().backward(retain_graph=True)
        oracle.detach(original[1])
    outputs = converted(x_seq)
    (outputs * weight).sum().backward()
    assert torch.equal(outputs, torch.stack(expected))
    assert oracle.relative_error(oracle.gradients(converted), oracle.gradients(original)) <= 1e-6


@packages
@prefixes
def test_trainer(package, prefix):
    def make():
        torch.manual_seed(1)
        node = getattr(package, f"{prefix}LIFNode")
        return nn.Sequential(
            nn.Linear(7, 9), node(surrogate_function=package.ATan()), nn.Linear(9, 3), node(v_reset=None)
        )

    x, target = currents(1)[0], torch.randint(3, (4,))
    original = make()
    for _ in range(5):
        output = original(x.unsqueeze(0))[0] if prefix else original(x)
        (nn.functional.cross_entropy(output, target) / 5).backward()
        oracle.detach(original)
    converted = sltt_ext.convert(make())
    for chunk, packs in itertools.product((1, 5) if prefix else (1,), (False, True)):
        converted.zero_grad()
        online = sltt_ext.OnlineTrainer(
            converted, nn.functional.cross_entropy, time_steps=5, chunk=chunk, pack_spikes=packs
        )
        online.forward_backward(x, target)
        assert oracle.relative_error(oracle.gradients(converted), oracle.gradients(original)) < 1e-6


class MultiStepInner(clock_driven.LIFNode):
    """Shows one current to itself several times, which is no reading of its state."""

    def forward(self, x_seq):
        spikes = []
        for x in x_seq:
            current = 2 * x
            for _ in range(2):
                self.neuronal_charge(current if not spikes else current + 0.1)
                spikes.append(self.neuronal_fire())
                self.neuronal_reset(spikes[-1])
        return torch.stack(spikes[::2])


def test_a_current_that_is_shown_several_times():
    x_seq = currents().requires_grad_()
    spikes = sltt_ext.convert(MultiStepInner())(x_seq)
    assert torch.equal(spikes, MultiStepInner()(x_seq))
    (gradient,) = torch.autograd.grad(spikes[0].sum(), x_seq)
    assert gradient[0].any()
    assert not gradient[1:].any()


def test_the_room_is_imported_where_a_network_needs_it():
    code = """
import sys, torch, sltt_ext
try:
    sltt_ext.convert(torch.nn.Linear(2, 2))
except sltt_ext.ConversionError:
    pass
assert not [name for name in sys.modules if name.startswith(("sltt_ext.legacy", "spikingjelly"))]
class MemoryModule(torch.nn.Module):
    pass
class IFNode(MemoryModule):
    pass
try:
    sltt_ext.convert(IFNode())  # of the same name, and of something else
except sltt_ext.ConversionError as error:
    assert "no spiking neuron" in str(error)
assert "sltt_ext.legacy_spikingjelly" in sys.modules
assert "spikingjelly" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
