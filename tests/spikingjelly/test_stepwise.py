import copy
import inspect
import pickle
import warnings

import modules
import oracle
import pytest
import torch
from modules import FUNCTIONAL_FORM, T
from spikingjelly.activation_based import base, layer, neuron, rnn
from torch import nn

import sltt_ext
from sltt_ext.errors import InputError, SLTTWarning
from sltt_ext.neuron import SLTTNeuron
from sltt_ext.spikingjelly.stepwise import StepwiseNode


class AdaptiveByMemories(neuron.SimpleBaseNode if FUNCTIONAL_FORM else neuron.BaseNode):
    """A user's own neuron with two states, written step by step."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.register_memory("w", 0.0)

    def neuronal_charge(self, x):
        self.v = 0.8 * self.v + x - 0.2 * self.w
        self.w = 0.9 * self.w + self.v


class ScaledQIF(neuron.QIFNode):
    """A user's subclass with a parameter of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.gain = nn.Parameter(torch.tensor(1.1))

    def single_step_forward(self, x):
        return super().single_step_forward(self.gain * x)


OWN = [modules.Case(cls.__name__, {}, make_with=cls) for cls in (AdaptiveByMemories, ScaledQIF)]
if FUNCTIONAL_FORM:

    class LeakyBySubclass(neuron.BaseNode):
        """A user's own neuron, written against the functional interface of 2.x."""

        def single_step_functional_forward(self, inputs, states, **kwargs):
            h = 0.7 * states[0] + inputs[0].tanh()
            spike = self.surrogate_function(h - self.v_threshold)
            return (spike,), (self.apply_soft_reset(h, spike, self.v_threshold), *states[1:])

    class LouderLIF(neuron.LIFNode):
        """A user's subclass of a neuron that has a fused form."""

        def single_step_functional_forward(self, inputs, states, **kwargs):
            return super().single_step_functional_forward((1.1 * inputs[0],), states, **kwargs)

    OWN += [modules.Case(cls.__name__, {}, make_with=cls) for cls in (LeakyBySubclass, LouderLIF)]

CASES = modules.GENERIC + OWN
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
step_modes = pytest.mark.parametrize("step_mode", ["s", "m"])


def converted(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SLTTWarning)  # those have a test of their own
        return sltt_ext.convert(copy.deepcopy(module))


def inputs_and_weights(case):
    torch.manual_seed(1)
    x_seq = 1.5 * torch.randn(T, *case.shape) + 0.5
    with torch.no_grad():
        output = oracle.first(copy.deepcopy(case.make())(x_seq[0]))
    return x_seq, torch.randn(T, *output.shape)


def test_no_class_with_memories_is_unaccounted_for():
    tables = (modules.FUSED, modules.GENERIC, modules.SEQUENCES, modules.REFUSED)
    known = {case.name for table in tables for case in table} | modules.STATELESS | modules.FRAMES
    temporal = (base.MemoryModule, base.MultiStepModule, rnn.SpikingRNNBase, rnn.SpikingRNNCellBase)
    for room in modules.ROOMS:
        for name, cls in vars(room).items():
            if inspect.isclass(cls) and issubclass(cls, temporal) and issubclass(cls, nn.Module):
                assert name in known or name.startswith("_"), (
                    f"{room.__name__}.{name} is in none of the lists"
                )


@cases
@pytest.mark.parametrize("training", [True, False])
@step_modes
def test_outputs_and_states_are_bit_identical(case, step_mode, training):
    original = case.make().train(training)
    node = converted(original)
    assert isinstance(node, StepwiseNode)
    x_seq, _ = inputs_and_weights(case)
    outputs = []
    for module, mode in ((original, "s"), (node, step_mode)):
        torch.manual_seed(2)
        halves = x_seq.split(T // 2)  # two calls, without a reset in between
        outputs.append(torch.cat([oracle.run(module, half, mode) for half in halves]))
    assert torch.equal(outputs[1], outputs[0])
    for (name, value), (_, expected) in zip(node.named_memories(), original.named_memories(), strict=True):
        assert_same(value, expected, name)


def assert_same(value, expected, name):
    if isinstance(expected, torch.Tensor):
        assert torch.equal(value, expected), name
    elif isinstance(expected, list):
        for pair in zip(value, expected, strict=True):
            assert_same(*pair, name)
    else:
        assert value == expected, name


@cases
def test_gradients_are_bit_identical(case):
    original = case.make()
    x_seq, weight = inputs_and_weights(case)
    torch.manual_seed(2)
    expected = oracle.module_gradients(copy.deepcopy(original), x_seq, weight, "s", detach=True)
    torch.manual_seed(2)
    actual = oracle.module_gradients(converted(original), x_seq, weight, "s")
    for gradient, want in zip(actual, expected, strict=True):
        assert torch.equal(gradient, want)
    torch.manual_seed(2)
    whole = oracle.module_gradients(converted(original), x_seq, weight, "m")
    assert torch.equal(whole[0], expected[0])
    assert oracle.relative_error(whole, expected) < 1e-6  # parameters: summed over T in another order


@pytest.mark.parametrize("case", modules.REFUSED, ids=lambda case: case.id)
def test_refused(case):
    with pytest.raises(sltt_ext.ConversionError) as caught:
        sltt_ext.convert(nn.Sequential(neuron.LIFNode(), case.make()))
    assert set(caught.value.reasons) == {"1"}
    assert caught.value.reasons["1"].startswith(f"{case.name}: ")


def test_modules_without_a_local_gradient_are_converted_with_a_warning():
    net = nn.Sequential(neuron.LIFNode(), layer.Delay(1), layer.Delay(0))
    if FUNCTIONAL_FORM:
        net.append(neuron.RAFNode())
    with pytest.warns(SLTTWarning, match="get no gradient") as caught:
        sltt_ext.convert(net)
    assert len(caught) == 1
    assert "1: Delay" in str(caught[0].message)
    assert "2: Delay" not in str(caught[0].message)
    assert ("3: RAFNode" in str(caught[0].message)) == FUNCTIONAL_FORM
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sltt_ext.convert(net)  # again: nothing new to say


@pytest.mark.skipif(not FUNCTIONAL_FORM, reason="SpikingJelly 2.x")
def test_few_spike_nodes_are_stateless_in_single_steps_and_mix_them_in_sequences():
    table = neuron.FewSpikeTable([0.5, 0.25], [0.5, 0.25], [0.5, 0.25])
    node = neuron.FewSpikeNode(table)
    net = sltt_ext.convert(nn.Sequential(neuron.LIFNode(), node))
    assert type(net[1]) is neuron.FewSpikeNode
    node.step_mode = "m"
    with pytest.raises(sltt_ext.ConversionError, match="sums its input over time"):
        sltt_ext.convert(nn.Sequential(neuron.LIFNode(), node))


def test_recorded_sequences_are_the_originals():
    cases = [
        case for case in modules.GENERIC if case.name in ("ComplementaryLIFNode", "CubaLIFNode", "FlexSN")
    ]
    for case in cases:
        original = case.make()
        flags = [
            flag for flag in ("store_v_seq", "store_i_seq", "store_state_seqs") if hasattr(original, flag)
        ]
        original.step_mode = "m"
        for flag in flags:
            setattr(original, flag, case.name != "ComplementaryLIFNode" or flag != "store_v_seq")
        node = converted(original)
        x_seq, _ = inputs_and_weights(case)
        original(x_seq)
        node(x_seq)
        for name in ("v_seq", "i_seq", "state_seqs"):
            if getattr(original, name, None) is not None:
                actual, expected = getattr(node, name), getattr(original, name)
                assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True)), (case.id, name)


def test_detach_state_lets_go_of_recorded_potentials():
    node = sltt_ext.convert(neuron.QIFNode(step_mode="m", store_v_seq=True))
    node(torch.rand(3, 4, 7, requires_grad=True))
    assert node.v_seq.requires_grad
    node.detach_state()
    assert not node.v_seq.requires_grad
    assert not node.v.requires_grad


def test_an_empty_sequence():
    for node in (neuron.QIFNode, neuron.LIFNode):
        with pytest.raises(InputError, match="T >= 1"):
            sltt_ext.convert(node(step_mode="m"))(torch.zeros(0, 4, 7))


@pytest.mark.parametrize(
    "cls", [AdaptiveByMemories, neuron.QIFNode, neuron.LIFNode, layer.Dropout, rnn.SpikingGRUCell]
)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda node: pickle.loads(pickle.dumps(node))])
def test_copies_and_pickles(cls, duplicate):
    node = sltt_ext.convert(cls(7, 7) if cls is rnn.SpikingGRUCell else cls()).eval()
    x = torch.randn(4, 7)
    node(x)
    twin = duplicate(node)
    assert type(twin) is type(node)
    assert torch.equal(twin(x), node(x))
    assert type(sltt_ext.revert(twin)) is cls


@pytest.mark.parametrize(("encoder", "x"), modules.ENCODERS, ids=lambda value: type(value).__name__)
def test_encoders(encoder, x):
    node = sltt_ext.convert(copy.deepcopy(encoder))
    assert isinstance(node, SLTTNeuron)
    for given in ((x,), (), ()):
        assert torch.equal(node(*given), encoder(*given))
